"""llama.cpp, by the server of the package xllamacpp: llamacpp_worker.py MODEL.gguf {"context": 512, "cache": "F32"}.

The package gives no logits, but the log-probabilities of the most likely tokens.
"""

import json
import sys
from importlib.metadata import version

import protocol

answers = protocol.open_answers()

import xllamacpp  # noqa: E402


def start(model: str, context: int, cache: str, threads: int, slots: int = 1, verbosity: int = 4) -> xllamacpp.Server:
    attention = xllamacpp.llama_flash_attn_type
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context * slots, slots, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")
    if cache == "F32":  # flash attention rounds to 16 bits in between
        params.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.cache_ram_mib = False, 0
    params.verbosity = verbosity  # from 4 on, the log on stderr has the size of the cache
    return xllamacpp.Server(params)


server = start(sys.argv[1], **json.loads(sys.argv[2]))


def generate(prompt: str, tokens: int, top: int) -> dict:
    out = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "n_probs": top,
            "return_tokens": True,
            "cache_prompt": False,
            "verbose": True,
        }
    )["__verbose"]
    steps = out["completion_probabilities"]
    written = out["tokens"]
    return {
        "prompt_tokens": out["tokens_evaluated"],
        "tokens": written,
        "text": out["content"],
        "top": [[[one["id"], one["logprob"]] for one in step["top_logprobs"]] for step in steps[: len(written)]],
    }


about = {"version": f"xllamacpp {version('xllamacpp')}", "address": server.listening_address}
about["features"] = xllamacpp.get_system_info()
protocol.serve(answers, about, generate=generate)
