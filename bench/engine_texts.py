"""The texts of another engine beside those of stock transformers, for bench/engines.py."""

import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from smolseek.tokenizer import tokenizer_of
from smolseek.train.samples import PROMPTS

TOKENS, TOP = 64, 5
TOLERANCE = 1e-3


class Engine(Protocol):
    """What is asked of an engine: see `engine_worker.Worker`."""

    functions: list[str]

    def ask(self, function: str, **arguments: Any) -> dict: ...

    def logits(self, ids: list[int]) -> np.ndarray: ...


class Reference:
    """Stock transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = tokenizer_of(folder)
        eos = self.model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos]) - {None}
        self.texts: dict[str, list[int]] = {}

    @torch.no_grad()
    def round_to_bfloat16(self) -> None:
        """Round the matrices, as a GGUF file in BF16 has them: norms and routers stay."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("mlp.gate.weight"):
                parameter.copy_(parameter.bfloat16())
        self.texts.clear()

    @torch.no_grad()
    def text(self, prompt: str) -> list[int]:
        """Return the tokens of the greedy continuation, without the end token."""
        if prompt not in self.texts:
            ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
            out = self.model.generate(ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
            self.texts[prompt] = [token for token in out[0, ids.shape[1] :].tolist() if token not in self.eos]
        return self.texts[prompt]

    @torch.no_grad()
    def logits(self, ids: list[int], model: Any = None) -> torch.Tensor:
        """Return the logits [T, V] after each of the tokens `ids`, in float64."""
        return (model or self.model)(torch.tensor([ids])).logits[0].double()

    def bfloat16_deviation(self) -> float:
        """Return the largest deviation of the likeliest tokens' log-probabilities in bfloat16."""
        rounded, largest = copy.deepcopy(self.model).bfloat16(), 0.0
        for prompt in PROMPTS:
            ids = self.tokenizer(prompt)["input_ids"] + self.text(prompt)
            exact, other = (self.logits(ids, model).log_softmax(-1) for model in (self.model, rounded))
            top = exact.topk(TOP)
            largest = max(largest, float((other.gather(-1, top.indices) - top.values).abs().max()))
        return largest


def compare_text(reference: Reference, worker: Engine, prompt: str) -> dict:
    """Return how the engine's continuation of `prompt` differs from that of transformers."""
    ids = reference.tokenizer(prompt)["input_ids"]
    answer = worker.ask("generate", prompt=prompt, tokens=TOKENS, top=TOP)
    written: list[int] = answer["tokens"]
    logits = reference.logits(ids + written)[len(ids) - 1 :]
    flips = []
    for position, (row, token) in enumerate(zip(logits, written, strict=False)):
        best = int(row.argmax())
        if best != token:
            texts = [reference.tokenizer.decode([i]) for i in (best, token)]
            flips.append({"position": position, "tokens": texts, "difference": float(row[best] - row[token])})
    if len(written) < TOKENS:  # the engine ended the text
        end = max(float(logits[-1][i]) for i in reference.eos)
        if (difference := float(logits[-1].max()) - end) > 0:
            flips.append({"position": len(written), "tokens": ["", "end"], "difference": difference})
    logprobs = logits.log_softmax(-1)
    deviations = [
        abs(value - float(logprobs[position, token]))
        for position, step in enumerate(answer["top"])
        for token, value in step
        if np.isfinite(value)
    ]
    expected = reference.tokenizer.decode(written, skip_special_tokens=True)
    out = {
        "equal": written == reference.text(prompt),
        "same_prompt": answer["prompt_tokens"] == len(ids),
        "same_characters": "\ufffd" in expected or answer["text"].strip() == expected.strip(),
        "tokens": len(written),
        "flips": flips,
        "logprobs": max(deviations, default=np.inf),
    }
    if "logits" in worker.functions:
        theirs = worker.logits(ids + written)[len(ids) - 1 :]
        out["logits"] = float((torch.from_numpy(theirs).double() - logits).abs().max())
    return out


def judge_texts(reference: Reference, worker: Engine, tolerance: float) -> dict:
    """Return the differences over all prompts, and whether they are within the tolerance."""
    texts = [compare_text(reference, worker, prompt) for prompt in PROMPTS]
    flips = [{"prompt": number} | flip for number, text in enumerate(texts) for flip in text["flips"]]
    deviations = [text[name] for text in texts for name in ("logprobs", "logits") if name in text]
    judged = [flip["difference"] for flip in flips] + (deviations if tolerance == TOLERANCE else [])
    row = {
        "prompts": len(texts),
        "equal": sum(text["equal"] for text in texts),
        "tokens": sum(text["tokens"] for text in texts),
        "flips": flips,
        "same_tokenizer": all(text["same_prompt"] and text["same_characters"] for text in texts),
        "logprobs": max(text["logprobs"] for text in texts),
        "tolerance": tolerance,
    }
    if any("logits" in text for text in texts):
        row["logits"] = max(text["logits"] for text in texts)
    within = all(value < tolerance for value in judged)
    return row | {"agrees": within and row["same_tokenizer"] and row["tokens"] > 0}
