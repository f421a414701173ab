"""Open a run's newest checkpoint with stock transformers and compare its logits with smolseek's.

python examples/open_with_transformers.py RUN
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from smolseek.storage.hf_folder import load_model

disable_progress_bar()
ours = load_model(sys.argv[1])
theirs = AutoModelForCausalLM.from_pretrained(ours.path)
tokenizer = AutoTokenizer.from_pretrained(ours.path)
ids = tokenizer("A function is an object that can be called.", return_tensors="pt")["input_ids"]
with torch.no_grad():
    a, b = ours.model(ids), theirs(ids).logits
print(f"{ours.path} opens in transformers as {type(theirs).__name__}")
print(f"largest difference of the logits: {(a - b).abs().max():.1e} (their standard deviation is {b.std():.2f})")
if (a - b).abs().max() > 1e-4:
    sys.exit("the logits differ")
