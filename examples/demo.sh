#!/usr/bin/env bash
# The main job from end to end, offline. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1

part() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf runs/demo runs/smollm2-deepseek

part "SmolLM2-135M-Instruct's weights become a DeepSeek-V3 model, with nothing lost"
step smolseek convert smollm2 runs/smollm2-deepseek
step python examples/open_with_transformers.py runs/smollm2-deepseek
step python examples/five_prompts.py runs/smollm2-deepseek

part "A small DeepSeek model trained from scratch on the English of the running Python"
step smolseek train tiny --data builtin --data.val-fraction 0.05 --run runs/demo \
  --steps 400 --balance.calibration-steps 100 --eval-every 100 --log-every 25 --balance.gamma 3e-3
step smolseek generate runs/demo "The function returns" --max-tokens 40 --temperature 0.7
step python examples/open_with_transformers.py runs/demo
