#!/usr/bin/env bash
# Multiplication with the embedded model: some 50 minutes on one core. What is done is not run again.
#   bench/multiply.sh             everything under runs/, then the result files
set -euo pipefail
export OMP_NUM_THREADS=1
shoestring=(python3 -m shoestring)

# Two digits by two. A rate for each method, by the problems of the split "validation"; then three seeds at that rate,
# by the test problems. Both lie in one folder, so seed 0 is trained once.
for method in grpo s-grpo t-spmo; do
  recipe=recipes/multiply-embedded-$method.toml out=runs/multiply-$method
  "${shoestring[@]}" sweep "$recipe" --over optim.lr=1e-4,3e-4,1e-3 --seeds 0 --split validation --out "$out"
  cp "$out/sweep.json" "$out/rates.json"
  rate=$(python3 bench/multiply.py "$out/rates.json")
  "${shoestring[@]}" sweep "$recipe" --over "optim.lr=$rate" --seeds 0,1,2 --split test --out "$out"
done

# More completions, one seed; the rates are not tuned.
for method in s-grpo t-spmo; do
  "${shoestring[@]}" sweep "recipes/multiply-embedded-long-$method.toml" --split test --out "runs/multiply-long-$method"
done

# Behind a warm start that works everything out, in larger groups, one seed.
[ -e runs/multiply-embedded-worked-sft/model ] || "${shoestring[@]}" sft recipes/multiply-embedded-worked-sft.toml
for method in grpo s-grpo t-spmo; do
  "${shoestring[@]}" sweep recipes/multiply-embedded-worked.toml "algorithm=$method" --seeds 0 --split test \
    --out "runs/multiply-embedded-worked-$method"
done
# MODEL NAME: greedily on the training split
trained() {
  local target=runs/worked/$2-trained.json
  [ -e "$target" ] && return
  "${shoestring[@]}" eval "$1" --task multiplication 'task.digits=[2,2]' --max-new-tokens 64 --split train --num 1000 --json \
    > "$target.draft"
  mv "$target.draft" "$target"
}
mkdir -p runs/worked
trained runs/multiply-embedded-worked-sft/model base
for method in grpo s-grpo t-spmo; do trained "runs/multiply-embedded-worked-$method/seed-0" "$method"; done

# Three digits by three, before any training.
"${shoestring[@]}" eval tiny --task multiplication "task.digits=[3, 3]" --k 1,16 --max-new-tokens 128 --json \
  > runs/multiply-3x3.json

python3 bench/multiply.py
