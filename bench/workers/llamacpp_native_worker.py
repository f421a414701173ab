"""llama.cpp as llama-cpp-python builds it for this processor, with all logits and with times.

llamacpp_native_worker.py MODEL.gguf {"context": 512, "cache": "F32", "threads": 1}
"""

import json
import sys
import time
from importlib.metadata import version

import protocol

answers = protocol.open_answers()

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402


def start(model: str, context: int, cache: str, threads: int, all_logits: bool = True) -> llama_cpp.Llama:
    number_format = getattr(llama_cpp, f"GGML_TYPE_{cache}")
    return llama_cpp.Llama(
        model,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        type_k=number_format,
        type_v=number_format,
        logits_all=all_logits,
    )


llama = start(sys.argv[1], **json.loads(sys.argv[2]))


def generate(prompt: str, tokens: int, top: int) -> dict:
    ids = llama.tokenize(prompt.encode(), special=True)
    llama.reset()
    llama.eval(ids)
    written, likely = [], []
    while len(written) < tokens:
        row = llama.scores[llama.n_tokens - 1].astype(np.float64)
        token = int(row.argmax())
        if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llama.model), token):
            break
        row -= row.max() + np.log(np.exp(row - row.max()).sum())
        written.append(token)
        likely.append([[int(i), float(row[i])] for i in np.argsort(-row)[:top]])
        llama.eval([token])
    text = llama.detokenize(written, prev_tokens=ids).decode("utf-8", errors="replace")
    return {"prompt_tokens": len(ids), "tokens": written, "text": text, "top": likely}


def logits(ids: list[int], file: str, one_by_one: bool = False) -> dict:
    llama.reset()
    for chunk in [[token] for token in ids] if one_by_one else [ids]:
        llama.eval(chunk)
    np.save(file, llama.scores[: len(ids)])
    return {}


def decode(ids: list[int]) -> float:
    """Evaluate tokens, and return the seconds until the next one is chosen."""
    begun = time.perf_counter()
    tokens = (llama_cpp.llama_token * len(ids))(*ids)  # the batch only points to them
    if llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids))):
        raise RuntimeError("llama_decode failed")
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    np.ctypeslib.as_array(pointer, shape=(llama.n_vocab(),)).argmax()
    return time.perf_counter() - begun


def times(ids: list[int], steps: int) -> dict:
    """Return the seconds of reading the prompt `ids`, and of each of the `steps` tokens after it."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
    prompt = 0.0
    for start in range(0, len(ids), llama.n_batch):
        prompt += decode(ids[start : start + llama.n_batch])
    return {"prompt": prompt, "steps": [decode([ids[0]]) for _ in range(steps)]}


about = {
    "version": f"llama-cpp-python {version('llama-cpp-python')}",
    "features": llama_cpp.llama_print_system_info().decode(),
}
protocol.serve(answers, about, generate=generate, logits=logits, times=times)
