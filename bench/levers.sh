#!/usr/bin/env bash
# What carries further than SVAMP's 600 training problems, and what T-SPMO lacks there: SmolLM2-135M, one seed each, judged
# by the held-back problems; accuracy on 300 training problems beside it. bench/results/svamp-levers.json. Needs the
# warm start of `bench/tuned.sh svamp-smollm2 sft`. What is done is not run again. Several share the card (AT_ONCE, 4 where nothing is said).
#   bench/levers.sh [NAME ...]          default: all
set -euo pipefail

# NAME RECIPE, then settings
lever() {
  { [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]; } || return 0
  while (($(jobs -rp | wc -l) >= ${AT_ONCE:-4})); do sleep 1; done
  carried_out "$@" &
  begun+=($!)
}
carried_out() {
  local out=runs/levers/$1 plain=(sampling.dynamic_sampling=1)
  case $2 in *-t-spmo) plain+=(algorithm.u_count=all) ;; esac
  python3 -m shoestring sweep "recipes/$2.toml" model=runs/svamp-smollm2-sft/model "${plain[@]}" "${@:3}" --seeds 0 \
    --split validation --out "$out" > "$out.txt" 2>&1
  [ -e "$out/train.json" ] || python3 -m shoestring eval "$out/seed-0" --split train --num 300 --json > "$out/train.draft"
  [ -e "$out/train.json" ] || mv "$out/train.draft" "$out/train.json"
  echo "$1 is done"
}

wanted=("$@") begun=() failed=0
mkdir -p runs/levers
svamp='{name="svamp",validation=100}'
lever none svamp-smollm2
lever words svamp-smollm2 "task={name=\"mixture\",of=[$svamp,\"word-problems\"],num=[600,3000]}"
lever gsm8k svamp-smollm2 "task={name=\"mixture\",of=[$svamp,\"gsm8k\"],num=[600,3000]}"
lever kl svamp-smollm2 objective.beta=0.04
lever fewer-weights svamp-smollm2 adapter.rank=4 adapter.alpha=8 adapter.layers=last-third
lever words-longer svamp-smollm2 "task={name=\"mixture\",of=[$svamp,\"word-problems\"],num=[600,6000]}" steps=300
lever t-spmo-none svamp-smollm2-t-spmo sampling.temperature=1 optim.lr=1e-4
lever t-spmo-replay svamp-smollm2-t-spmo algorithm.replay_from=both sampling.temperature=1 optim.lr=1e-4
lever t-spmo-replay-success svamp-smollm2-t-spmo algorithm.replay_from=success sampling.temperature=1 optim.lr=1e-4
lever t-spmo-large-groups svamp-smollm2-t-spmo sampling.num_prompts=4 sampling.num_completions=64 sampling.temperature=1 optim.lr=1e-4
lever t-spmo-colder svamp-smollm2-t-spmo sampling.temperature=0.5 optim.lr=1e-4
lever t-spmo-colder-large svamp-smollm2-t-spmo sampling.temperature=0.5 sampling.num_prompts=4 sampling.num_completions=64 optim.lr=1e-4
lever t-spmo-coldest svamp-smollm2-t-spmo sampling.temperature=0.3 optim.lr=1e-4
lever t-spmo-colder-faster svamp-smollm2-t-spmo sampling.temperature=0.5 optim.lr=3e-4
lever t-spmo-colder-longer svamp-smollm2-t-spmo sampling.temperature=0.5 steps=300 optim.lr=1e-4
lever t-spmo-colder-replay svamp-smollm2-t-spmo sampling.temperature=0.5 algorithm.replay_from=both optim.lr=1e-4
lever t-spmo-refilled svamp-smollm2-t-spmo sampling.dynamic_sampling=4
lever t-spmo-branching svamp-smollm2-t-spmo algorithm.u_count=branching
lever t-spmo-refilled-branching svamp-smollm2-t-spmo sampling.dynamic_sampling=4 algorithm.u_count=branching
lever t-spmo-refilled-warmer svamp-smollm2-t-spmo sampling.dynamic_sampling=4 sampling.temperature=0.7
lever more-prompts svamp-smollm2 sampling.num_prompts=64
lever t-spmo-more-prompts svamp-smollm2-t-spmo sampling.num_prompts=64
lever t-spmo-more-prompts-warmer svamp-smollm2-t-spmo sampling.num_prompts=64 sampling.temperature=0.7
for process in "${begun[@]}"; do wait "$process" || failed=1; done
python3 bench/levers.py svamp-levers levers
exit $failed
