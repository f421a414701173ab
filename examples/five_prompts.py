"""Continue the original experiment's five prompts with a model.

python examples/five_prompts.py MODEL
"""

import sys

from smolseek import load
from smolseek.train.samples import PROMPTS

model = load(sys.argv[1], dtype="float32")  # the same text on every processor
for prompt in PROMPTS:
    print(f"> {prompt}", end="")
    for piece in model.stream(prompt, max_tokens=40, temperature=0):
        print(piece.replace("\n", " "), end="", flush=True)
    print(" ...")
