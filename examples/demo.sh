#!/usr/bin/env bash
# The main job from end to end, on the English of the running Python. `make demo` runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf runs/demo
step smolseek inspect tiny
step smolseek train tiny --data builtin --run runs/demo --steps 240 --batch-size 8 --eval-every 60 --optim.lr 3e-3
step smolseek generate runs/demo "The function returns" --max-tokens 60 --temperature 0.7
step python examples/open_with_transformers.py runs/demo
