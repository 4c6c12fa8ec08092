#!/usr/bin/env bash
# What the settings do: multiplication of two digits by two with the embedded model, 40 steps of 128 completions, one
# setting changed at a time, three seeds each. Some 50 minutes on one core. What is done is not run again.
#   bench/ablations.sh [NAME ...]       in order; default: all
# bench/ablations.py then makes bench/results/ablations.json of what lies under runs/ablations/.
set -euo pipefail
export OMP_NUM_THREADS=1

# NAME METHOD, then what the sweep takes
swept() {
  python3 -m shoestring sweep "recipes/multiply-embedded-$2.toml" steps=40 optim.schedule=constant eval_every=10 \
    evaluation.split=validation evaluation.num=150 --seeds 0,1,2 --split test --out "runs/ablations/$1" "${@:3}"
}

alpha() { swept alpha s-grpo algorithm.k=32 algorithm.p=0.25 --over algorithm.alpha=0,8,16,32; }
k() { swept k s-grpo algorithm.alpha=0 algorithm.p=0.5 --over algorithm.k=2,4,8,16,32; }
p() { swept p s-grpo algorithm.alpha=0 algorithm.k=64 --over algorithm.p=0.05,0.1,0.25,0.5,1.0; }
# Six tokens of a completion: the first, any (that many on average), those of highest entropy.
choice() {
  swept choice-first s-grpo algorithm.alpha=6 --over algorithm.k=6
  swept choice-random s-grpo algorithm.alpha=0 algorithm.k=64 --over algorithm.p=0.2
  swept choice-entropy s-grpo algorithm.name=entropy-filter --over algorithm.k=6
}
group() {
  for size in 4 8 16 32; do
    swept "group-$size" s-grpo sampling.num_prompts=$((128 / size)) --over "sampling.num_completions=$size"
  done
}
# The scale alpha / rank stays 2; small ranks also at a higher rate.
rank() {
  for rank in 1 4 16; do
    swept "rank-$rank" s-grpo adapter.alpha=$((2 * rank)) --over "adapter.rank=$rank"
    swept "rank-$rank-fast" s-grpo adapter.alpha=$((2 * rank)) optim.lr=1e-3 --over "adapter.rank=$rank"
  done
}
layers() { swept layers s-grpo --over adapter.layers=last-third,all; }
replay() { swept replay t-spmo --over algorithm.replay_from=none,success,failure,both; }

for name in ${@:-alpha k p choice group rank layers replay}; do "$name"; done
