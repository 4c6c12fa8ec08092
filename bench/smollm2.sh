#!/usr/bin/env bash
# SmolLM2-135M on a task, three methods tuned alike, three seeds each: bench/results/TASK-smollm2-lr.json, then
# TASK-smollm2.json. Rows that are in these files, and runs that are done, are not made again.
#   bench/smollm2.sh svamp|multiply-2x2|multiply-3x3 [STAGE ...]
# Stages in order: sft rates results seeds passes results; default: all. The three methods run beside each other on one
# card, so a run's seconds are not those it takes alone.
set -euo pipefail
shoestring=(python3 -m shoestring)
task=$1
start=runs/$task-smollm2-sft

# What the task's recipes are called, what the warm start and all else take, and the tokens of a completion.
case $task in
  svamp) recipe=svamp-smollm2 sft=(recipes/smollm2-sft.toml) settings=() judged=(--task svamp --max-new-tokens 96) ;;
  multiply-2x2) sft=(recipes/multiply-smollm2-sft.toml) settings=('task.digits=[2,2]') ;;&
  multiply-3x3) sft=(recipes/multiply-smollm2-sft.toml num=6400) settings=('task.digits=[3,3]') ;;&
  multiply-*) recipe=multiply-smollm2 judged=(--task multiplication --max-new-tokens 128) ;;
esac

# In the background, once for each method; fails if one of them does.
each() {
  local waiting=() status=0
  for method in grpo s-grpo t-spmo; do "$1" "$method" & waiting+=($!); done
  for process in "${waiting[@]}"; do wait "$process" || status=1; done
  return $status
}

# A sweep of a method's recipe: the one without a method in its name is that of S-GRPO.
swept() {
  local own=recipes/$recipe-$1.toml
  "${shoestring[@]}" sweep "${own/-s-grpo/}" "${settings[@]}" "model=$start/model" --out "runs/$task-$1" "${@:2}"
}

sft() { [ -e "$start/model" ] || "${shoestring[@]}" sft "${sft[@]}" "${settings[@]}" "out=$start"; }

# A rate for each method, by held-back problems.
rates() { each rates_of; }
rates_of() {
  local missing
  missing=$(python3 bench/smollm2.py "$task" rates "$1")
  [ -z "$missing" ] && return
  swept "$1" --over "optim.lr=$missing" --seeds 0 --split validation
  cp "runs/$task-$1/sweep.json" "runs/$task-$1/rates.json"
}

# Three seeds at that rate, by the test problems. Both lie in one folder, so seed 0 is trained once.
seeds() { each seeds_of; }
seeds_of() {
  local missing rate
  missing=$(python3 bench/smollm2.py "$task" seeds "$1")
  rate=$(python3 bench/smollm2.py "$task" best "$1")
  [ -z "$missing" ] || swept "$1" --over "optim.lr=$rate" --seeds "$missing" --split test
}

# pass@k at temperature 1 of the warm start and of every final run.
passes() { pass "$start/model" "runs/$task-base.json"; each passes_of; }
passes_of() {
  for run in $(python3 bench/smollm2.py "$task" runs "$1"); do pass "$run" "$run/passes.json"; done
}
pass() {
  [ -e "$2" ] && return
  "${shoestring[@]}" eval "$1" "${settings[@]}" "${judged[@]}" --k 1,4,16 --temperature 1 --json > "$2.draft"
  mv "$2.draft" "$2"
}

results() { python3 bench/smollm2.py "$task"; }

shift
for stage in ${@:-sft rates results seeds passes results}; do "$stage"; done
