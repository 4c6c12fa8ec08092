#!/usr/bin/env bash
# SVAMP with SmolLM2-135M: bench/results/svamp-smollm2-lr.json and svamp-smollm2.json. Rows that are in these files, and
# runs that are done, are not made again.
#   bench/svamp.sh [STAGE ...]          in order: sft rates results seeds passes results; default: all
# The three methods run beside each other on one card, so a run's seconds are not those it takes alone.
set -euo pipefail
shoestring=(python3 -m shoestring)

# In the background, once for each method; fails if one of them does.
each() {
  local waiting=() status=0
  for method in grpo s-grpo t-spmo; do "$1" "$method" & waiting+=($!); done
  for process in "${waiting[@]}"; do wait "$process" || status=1; done
  return $status
}

# A sweep of a method's recipe: svamp-smollm2.toml is that of S-GRPO.
swept() {
  local recipe=recipes/svamp-smollm2-$1.toml
  "${shoestring[@]}" sweep "${recipe/-s-grpo/}" --out "runs/svamp-$1" "${@:2}"
}

sft() { [ -e runs/smollm2-sft/model ] || "${shoestring[@]}" sft recipes/smollm2-sft.toml; }

# A rate for each method, by the held-back training problems.
rates() { each rates_of; }
rates_of() {
  local missing
  missing=$(python3 bench/svamp.py rates "$1")
  [ -z "$missing" ] && return
  swept "$1" --over "optim.lr=$missing" --seeds 0 --split validation
  cp "runs/svamp-$1/sweep.json" "runs/svamp-$1/rates.json"
}

# Three seeds at that rate, by the test problems. Both lie in one folder, so seed 0 is trained once.
seeds() { each seeds_of; }
seeds_of() {
  local missing
  missing=$(python3 bench/svamp.py seeds "$1")
  [ -z "$missing" ] || swept "$1" --over "optim.lr=$(python3 bench/svamp.py best "$1")" --seeds "$missing" --split test
}

# pass@k at temperature 1 of the warm start and of every final run.
passes() { pass runs/smollm2-sft/model runs/svamp-base.json; each passes_of; }
passes_of() {
  for run in $(python3 bench/svamp.py runs "$1"); do pass "$run" "$run/passes.json"; done
}
pass() {
  [ -e "$2" ] && return
  "${shoestring[@]}" eval "$1" --task svamp --max-new-tokens 96 --k 1,4,16 --temperature 1 --json > "$2.draft"
  mv "$2.draft" "$2"
}

results() { python3 bench/svamp.py; }

for stage in ${@:-sft rates results seeds passes results}; do "$stage"; done
