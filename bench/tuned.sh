#!/usr/bin/env bash
# A model on a task, each of three methods at three rates, then at the best of them with three seeds:
# bench/results/NAME-lr.json, then NAME.json. Rows that are in these files, and runs that are done, are not made again.
#   bench/tuned.sh NAME [STAGE ...]
# NAME: svamp-smollm2, multiply-2x2-smollm2, multiply-3x3-smollm2 (a GPU), multiply-embedded-hard and
# multiply-embedded-harder (a CPU).
# Stages in order: sft rates seeds passes elsewhere; default: all. Methods (METHODS, all three where nothing is said) run
# beside each other, each with AT_ONCE runs or evaluations at a time, so a run's seconds are not those it takes alone.
# Stages on request, at the same rate: longer, 300 steps with 32 completions of a prompt or more kinds of problems; plain,
# for svamp-smollm2, whose recipes replace groups without signal: as they were when their rates were chosen, without that.
set -euo pipefail
shoestring=(python3 -m shoestring)
name=$1
start=runs/$name-sft trained=() plain=()

# The recipes' name, what the warm start and all else take, what training takes besides, how pass@k is judged, what else
# greedily (a name and how), and what changes in longer runs, of which methods and seeds.
longer=(steps=300 eval_every=50 sampling.num_completions=32) longer_methods=(grpo) longer_seeds=0
case $name in
  svamp-smollm2)
    recipe=$name sft=(recipes/smollm2-sft.toml) settings=()
    judged=(--task svamp --max-new-tokens 96 --k 1,4,16,64) elsewhere=('gsm8k --task gsm8k --max-new-tokens 256')
    longer=(steps=300 eval_every=25 save_every=25)
    longer+=('task={name="mixture",of=[{name="svamp",validation=100},"word-problems"],num=[600,6000]}')
    longer_methods=(grpo s-grpo t-spmo) longer_seeds=0,1,2 plain=(sampling.dynamic_sampling=1) ;;
  multiply-2x2-smollm2) sft=(recipes/multiply-smollm2-sft.toml) settings=('task.digits=[2,2]') others=(1,3 2,3 3,3) ;;&
  multiply-3x3-smollm2)
    sft=(recipes/multiply-smollm2-sft.toml num=6400) settings=('task.digits=[3,3]') others=(2,2 2,3 3,2) ;;&
  multiply-*-smollm2) recipe=multiply-smollm2 tokens=128 ;;&
  multiply-embedded-hard) digits=[3,2] tokens=80 taught=6400 longer_methods=(grpo s-grpo t-spmo) others=(2,2 2,3 3,3) ;;&
  multiply-embedded-harder) digits=[3,3] tokens=128 taught=12800 others=(2,2 2,3 3,2) ;;&
  multiply-embedded-*)
    export OMP_NUM_THREADS=1
    recipe=multiply-embedded-hard sft=(recipes/multiply-embedded-hard-sft.toml num=$taught) settings=("task.digits=$digits")
    trained=(sampling.max_new_tokens=$tokens) ;;&
  multiply-*)
    judged=(--task multiplication --max-new-tokens "$tokens" --k 1,4,16,64) elsewhere=()
    for other in "${others[@]}"; do
      elsewhere+=("${other/,/x} --task multiplication --max-new-tokens 128 task.digits=[$other]")
    done ;;
  *) echo "no such name: $name" >&2 && exit 1 ;;
esac

# A sweep of a method's own recipe, or of the one for all.
swept() {
  local own=recipes/$recipe-$1.toml
  [ -e "$own" ] || own=recipes/$recipe.toml
  "${shoestring[@]}" sweep "$own" "algorithm.name=$1" "${settings[@]}" "${trained[@]}" "model=$start/model" \
    --out "runs/$name-$1" --at-once "${AT_ONCE:-1}" "${@:2}"
}

sft() {
  [ ! -e "$start/model" ] || return 0
  if [ -e "$start/config.toml" ]; then "${shoestring[@]}" sft --resume "$start"
  else "${shoestring[@]}" sft "${sft[@]}" "${settings[@]}" "out=$start"; fi
}

# A method's settings without what its recipe does about groups without signal, in the array `plainly`.
as_plain() {
  plainly=("${plain[@]}")
  [ "$1-${#plain[@]}" != t-spmo-1 ] || plainly+=(algorithm.u_count=all)
}

# A rate, by held-back problems.
rates() {
  local missing plainly out=runs/$name-$1
  missing=$(python3 bench/tuned.py "$name" rates "$1")
  [ -z "$missing" ] && return
  as_plain "$1"
  [ ${#plain[@]} = 0 ] || out=runs/$name-plain-$1
  swept "$1" "${plainly[@]}" --over "optim.lr=$missing" --seeds 0 --split validation --out "$out"
  mkdir -p "runs/$name-$1"
  cp "$out/sweep.json" "runs/$name-$1/rates.json"
  results
}

# Three seeds at that rate, by the test problems. Runs with the same settings lie in one folder, so seed 0 is trained once.
seeds() {
  local missing rate
  missing=$(python3 bench/tuned.py "$name" seeds "$1" 0,1,2)
  rate=$(python3 bench/tuned.py "$name" best "$1")
  [ -z "$missing" ] || swept "$1" --over "optim.lr=$rate" --seeds "$missing" --split test
}

# More of the same.
longer() {
  [[ " ${longer_methods[*]} " == *" $1 "* ]] || return 0
  local plainly
  as_plain "$1"
  more longer "$1" "$longer_seeds" "${plainly[@]}" "${longer[@]}"
}
plain() {
  local plainly
  as_plain "$1"
  [ ${#plain[@]} = 0 ] || more plain "$1" 0,1,2 "${plainly[@]}"
}

# STAGE METHOD SEEDS, then settings.
more() {
  local rate missing
  rate=$(python3 bench/tuned.py "$name" best "$2")
  missing=$(python3 bench/tuned.py "$name-$1" seeds "$2" "$3")
  [ -z "$missing" ] || swept "$2" "optim.lr=$rate" "${@:4}" --seeds "$missing" --split test --out "runs/$name-$1-$2"
  for what in pass judge_elsewhere; do of_models $what "$2" "$name-$1"; done
}

# pass@k at temperature 1 of a method's final runs, or of the warm start.
passes() { of_models pass "$1"; }
pass() { evaluated "$1" "$2passes.json" "${settings[@]}" "${judged[@]}" --temperature 1; }

# Greedy accuracy of the same on other problems.
elsewhere() { of_models judge_elsewhere "$1"; }
judge_elsewhere() {
  local label how
  for line in "${elsewhere[@]}"; do
    read -r label how <<< "$line"
    evaluated "$1" "$2elsewhere-$label.json" $how
  done
}

# A job, given each model of a method (or of its longer runs) and how its files begin.
of_models() {
  [ "$2" = base ] && { "$1" "$start/model" "runs/$name-base-"; return; }
  local runs begun=()
  runs=$(python3 bench/tuned.py "${3:-$name}" runs "$2")
  for run in $runs; do
    while (($(jobs -rp | wc -l) >= ${AT_ONCE:-1})); do sleep 0.2; done
    "$1" "$run" "$run/" & begun+=($!)
  done
  all_of "${begun[@]}"
}
all_of() {
  local status=0
  for process in "$@"; do wait "$process" || status=1; done
  return $status
}
evaluated() {
  [ -e "$2" ] && return
  "${shoestring[@]}" eval "$1" "${@:3}" --json > "$2.draft"
  mv "$2.draft" "$2"
}

results() { flock "runs/$name.lock" python3 bench/tuned.py "$name"; }

shift
mkdir -p runs
[ $# -gt 0 ] || set -- sft rates seeds passes elsewhere
later=() begun=() failed=0
for stage in "$@"; do
  case $stage in sft) sft ;; *) later+=("$stage") ;; esac
done
stages_of() {
  for stage in "${later[@]}"; do
    case $1-$stage in base-rates | base-seeds | base-longer | base-plain) ;; *) "$stage" "$1" ;; esac
  done
}
for method in base ${METHODS:-grpo s-grpo t-spmo}; do stages_of "$method" & begun+=($!); done
all_of "${begun[@]}" || failed=1
results
exit $failed
