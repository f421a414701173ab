"""Compare generated tokens with stock transformers' `generate` on the same folder, in float32.

    smolseek convert smollm2 FOLDER
    python bench/parity.py FOLDER
    python bench/parity.py FOLDER --tokens 20 --only beams

The cases are greedy decoding, each logits processor, beam search with 2 to 8 beams and length penalties, and n-gram
blocking, each over several prompts. A case counts as equal if every token of every returned text is the same. A line is
printed for each case. docs/results/parity.json is written after each case, so that an interrupted run keeps its
results.
"""

import argparse
import json
from pathlib import Path

import torch
from machine import describe
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from smolseek.generate.beam import beam_search
from smolseek.generate.engine import Generator
from smolseek.generate.sampling import SamplingParams
from smolseek.storage.hf_folder import load_model
from smolseek.train.samples import PROMPTS

BANNED = (" the", " of", " and")
GREEDY = {
    "greedy": ({}, {}),
    "repetition penalty 1.2": ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    "no repeated 2-gram": ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
    "no repeated 3-gram": ({"no_repeat_ngram": 3}, {"no_repeat_ngram_size": 3}),
    "bad words": None,  # needs the tokenizer: see `cases`
    "at least 15 tokens": ({"min_tokens": 15}, {"min_new_tokens": 15}),
    "penalty 1.1, no repeated 3-gram, at least 10": (
        {"repetition_penalty": 1.1, "no_repeat_ngram": 3, "min_tokens": 10},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 10},
    ),
}
BEAMS = [
    {"beams": 2},
    {"beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"beams": 4, "length_penalty": 2.0, "early_stopping": True, "returned": 4},
    {"beams": 5, "length_penalty": -1.0, "returned": 2},
    {"beams": 6, "length_penalty": 0.5, "returned": 3},
    {"beams": 8, "length_penalty": 1.5, "early_stopping": "never", "returned": 3},
    {"beams": 4, "ngram": 2, "returned": 4},
]


def theirs(oracle, ids, tokens, stop_ids, **options):
    """Return the continuations of transformers, without the stop token and padding."""
    out = oracle.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
        **options,
    )
    sequences = [sequence[len(ids) :].tolist() for sequence in out]
    return [
        sequence[: next((i for i, t in enumerate(sequence) if t in stop_ids), len(sequence))] for sequence in sequences
    ]


def cases(tokenizer, tokens, stop_ids):
    """Yield the name of each case, and for both engines a function from a prompt's tokens to continuations."""
    banned = [tokenizer.encode(text) for text in BANNED]
    for name, options in GREEDY.items():
        mine, other = options or ({"bad_words": tuple(map(tuple, banned))}, {"bad_words_ids": banned})
        sampling = SamplingParams(temperature=0, **mine)
        yield (
            name,
            lambda m, ids, s=sampling: [Generator(m, [ids], s, tokens, stop_ids=stop_ids).finish()[0].tokens],
            lambda m, ids, o=other: theirs(m, ids, tokens, stop_ids, **o),
        )
    for case in BEAMS:
        full = {"length_penalty": 1.0, "early_stopping": False, "returned": 1, "ngram": 0, **case}
        ngram = full.pop("ngram")
        yield (
            ", ".join(f"{key} {value}" for key, value in case.items()),
            lambda m, ids, o=full, n=ngram: [
                beam.tokens
                for beam in beam_search(
                    m, ids, max_tokens=tokens, sampling=SamplingParams(no_repeat_ngram=n), stop_ids=stop_ids, **o
                )
            ],
            lambda m, ids, o=full, n=ngram: theirs(
                m,
                ids,
                tokens,
                stop_ids,
                num_beams=o["beams"],
                length_penalty=o["length_penalty"],
                early_stopping=o["early_stopping"],
                num_return_sequences=o["returned"],
                no_repeat_ngram_size=n,
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a model folder that both read, such as the exact conversion of SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=3, help="how many of the five prompts")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--out", type=Path, default=Path("docs/results/parity.json"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(args.folder, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    oracle = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    stop_ids = set(model.config.eos_ids)
    about = {**describe(), "command": f"python bench/parity.py FOLDER --tokens {args.tokens} --prompts {args.prompts}"}
    results = []
    for name, ours, their in cases(tokenizer, args.tokens, stop_ids):
        if not name.startswith(args.only):
            continue
        equal, total, texts = 0, 0, 0
        for prompt in PROMPTS[: args.prompts]:
            ids = tokenizer.encode(prompt)
            mine, other = ours(model, ids), their(oracle, ids)
            equal += mine == other
            total += 1
            texts += len(other)
            if mine != other:
                print(f"  {name}, {prompt!r}:\n    ours   {mine}\n    theirs {other}")
        results.append({**about, "case": name, "prompts": total, "texts": texts, "equal_prompts": equal})
        print(f"{name:70} {equal} of {total} prompts equal, {texts} texts", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"tokens": args.tokens, "dtype": "float32", "rows": results}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
