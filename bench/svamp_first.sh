#!/usr/bin/env bash
# The first run on a real task: SmolLM2-135M, sft on GSM8K, then RL on SVAMP. One stage a call, so that it can be spread
# over several sittings; a training stage that is cut off by TERM goes on where it was.
#   bench/svamp_first.sh FOLDER sft
#   bench/svamp_first.sh FOLDER s-grpo|t-spmo|grpo [KEY=VALUE ...]
# bench/svamp_first.py then makes bench/results/svamp-first.json of what lies in FOLDER.
set -euo pipefail
root=$1 stage=$2
shift 2
shoestring=(python3 -m shoestring)
if [ "$stage" = sft ]; then
  "${shoestring[@]}" sft recipes/smollm2-sft.toml out="$root/sft"
  "${shoestring[@]}" eval "$root/sft/model" --task svamp --max-new-tokens 96 --batch-rows 300 --details "$root/sft.json"
  exit
fi
run="$root/$stage"
if [ -e "$run/config.toml" ]; then
  "${shoestring[@]}" train --resume "$run"
else
  "${shoestring[@]}" train recipes/svamp-smollm2.toml model="$root/sft/model" algorithm.name="$stage" out="$run" "$@"
fi
"${shoestring[@]}" eval "$run" --batch-rows 300 --details "$root/$stage.json"
