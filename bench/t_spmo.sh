#!/usr/bin/env bash
# What T-SPMO's settings do where skill itself has to grow: the embedded model on three digits by two, one setting changed
# at a time, three seeds each, judged by the test problems. bench/results/multiply-embedded-hard-settings.json. On one core.
# What is done is not run again.
#   bench/t_spmo.sh [NAME ...]          default: all
set -euo pipefail
export OMP_NUM_THREADS=1
start=runs/multiply-embedded-hard-sft
wanted=("$@")

# NAME, then settings
lever() {
  [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]] || return 0
  python3 -m shoestring sweep recipes/multiply-embedded-hard.toml algorithm.name=t-spmo "model=$start/model" "${@:2}" \
    --seeds 0,1,2 --split test --out "runs/t-spmo/$1"
}

[ -e "$start/model" ] || python3 -m shoestring sft recipes/multiply-embedded-hard-sft.toml "out=$start"
lever none
lever refilled sampling.dynamic_sampling=3
lever more-prompts sampling.num_prompts=32
lever colder sampling.temperature=0.7
lever coldest sampling.temperature=0.5
lever colder-more-prompts sampling.temperature=0.7 sampling.num_prompts=32
lever branching algorithm.u_count=branching
lever replay algorithm.replay_from=both
lever large-groups sampling.num_prompts=8 sampling.num_completions=16
lever large-groups-refilled sampling.num_prompts=8 sampling.num_completions=16 sampling.dynamic_sampling=3
lever grpo-more-prompts algorithm.name=grpo sampling.num_prompts=32  # beside it
python3 bench/levers.py multiply-embedded-hard-settings t-spmo
