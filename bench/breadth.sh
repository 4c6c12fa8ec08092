#!/usr/bin/env bash
# What RL on products of two digits by two does elsewhere, with the embedded model: problems it was trained on, other digits,
# and pass@k up to 64 before and after. Three methods, three seeds; some 20 minutes on one core. What is done is not run again.
#   bench/breadth.sh; then bench/breadth.py makes bench/results/multiply-embedded-breadth.json
set -euo pipefail
export OMP_NUM_THREADS=1
mkdir -p runs/breadth

# MODEL NAME
judged() {
  for digits in 2,2 1,3 2,3 3,2; do
    evaluated "$1" "$2-${digits/,/x}" "task.digits=[$digits]"
  done
  evaluated "$1" "$2-trained" 'task.digits=[2,2]' --split train --num 1000
  evaluated "$1" "$2-passes" 'task.digits=[2,2]' --k 1,4,16,64 --temperature 1
}
evaluated() {
  local target=runs/breadth/$2.json
  [ -e "$target" ] && return
  python3 -m shoestring eval "$1" --task multiplication "$3" --max-new-tokens 80 --json "${@:4}" > "$target.draft"
  mv "$target.draft" "$target"
}

judged tiny base
for method in grpo s-grpo t-spmo; do
  out=runs/breadth-$method
  python3 -m shoestring sweep "recipes/multiply-embedded-$method.toml" --seeds 0,1,2 --split test --out "$out"
  for seed in 0 1 2; do judged "$out/seed-$seed" "$method-$seed"; done
done
