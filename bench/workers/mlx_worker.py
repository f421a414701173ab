"""mlx-lm on a CPU: mlx_worker.py FOLDER."""

import sys
from importlib.metadata import version

import protocol

answers = protocol.open_answers()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm import load, stream_generate  # noqa: E402

mx.set_default_device(mx.cpu)
model, tokenizer = load(sys.argv[1])


def generate(prompt: str, tokens: int, top: int) -> dict:
    ids, written, likely, text = tokenizer.encode(prompt), [], [], ""
    for step in stream_generate(model, tokenizer, ids, max_tokens=tokens):  # greedy without a sampler
        text += step.text
        if step.finish_reason == "stop":
            break
        logprobs = np.array(step.logprobs.astype(mx.float32))
        written.append(int(step.token))
        likely.append([[int(i), float(logprobs[i])] for i in np.argsort(-logprobs)[:top]])
    return {"prompt_tokens": len(ids), "tokens": written, "text": text, "top": likely}


def logits(ids: list[int], file: str) -> dict:
    np.save(file, np.array(model(mx.array([ids]))[0].astype(mx.float32)))
    return {}


versions = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}"
protocol.serve(answers, {"version": versions}, generate=generate, logits=logits)
