"""A folder of small models, runs and texts, and a server that runs command lines in copies of it.

Each command is forked from a process that has loaded all modules. So a command takes a fraction of a second, has its
own environment, limits and streams, and may crash without ending the tests.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

from fork_server import ForkServer

SMALL = "--seq-len 16 --batch-size 1 --eval-tokens 32 --sample-tokens 3 --data.val-fraction 0.3 --log-every 1"
SHAPE = (
    "--model.vocab-size 320 --model.hidden-size 16 --model.num-hidden-layers 2 --model.max-position-embeddings 64 "
    "--model.intermediate-size 32 --model.moe-intermediate-size 8 --model.num-attention-heads 2 "
    "--model.num-key-value-heads 2 --model.n-routed-experts 4 --model.num-experts-per-tok 2"
)

RUN = r"""
import io, json, os, resource, signal, sys
loaded = set(sys.modules)
import torch
from smolseek.cli import main

folder, stdin, modules, encoding, memory, *arguments = sys.argv[1:]
torch.set_num_threads(1)
os.chdir(folder)
os.dup2(os.open(stdin, os.O_RDONLY), 0)
sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding=encoding)
sys.stderr = io.TextIOWrapper(
    io.BufferedWriter(io.FileIO(2, "w")), encoding=encoding, errors="backslashreplace", line_buffering=True
)
signal.signal(signal.SIGINT, signal.default_int_handler)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
# A model too large for memory must end in an error, and must not take the machine down.
resource.setrlimit(resource.RLIMIT_AS, (size + int(memory), resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    code = main(arguments)
    sys.stdout.flush()
except BaseException:
    import traceback

    traceback.print_exc()
    code = 1
sys.stderr.flush()
with open(modules, "w") as file:
    json.dump([name for name in sys.modules if name not in loaded], file)
os._exit(code)
"""


class Outcome(NamedTuple):
    """The result of a command."""

    code: int
    """Exit code, or the negative number of the signal that ended the process."""
    out: str
    err: str
    interrupted: bool
    """Whether the command was interrupted because it took too long."""


class Nursery:
    """Runs one command at a time, each in a process forked from a process that has loaded all modules."""

    def __init__(self, folder: Path) -> None:
        """Use `folder` for input and temporary files."""
        self.folder, self._server = folder, ForkServer()

    def run(
        self,
        words: list[str],
        folder: Path,
        *,
        stdin: bytes = b"",
        environment: dict[str, str | None] | None = None,
        encoding: str = "utf-8",
        seconds: float = 4.0,
    ) -> Outcome:
        """Run `smolseek *words` in `folder`; an environment value of None removes the variable."""
        variables = {**home(self.folder), **(environment or {})}
        modules = self.folder / "modules"
        imported = json.loads(modules.read_text()) if modules.exists() else []
        modules.unlink(missing_ok=True)
        (self.folder / "stdin").write_bytes(stdin)
        process = self._server.start(
            *("-c", RUN, folder, self.folder / "stdin", modules, encoding, 3 << 30, *words),
            env={name: value for name, value in variables.items() if value is not None},
            modules=imported,  # modules that this command imported are loaded for the next one
        )
        interrupted = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is None:  # a valid command may take days, so interrupt it
            interrupted = True
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.send_signal(signal.SIGKILL)
        done = process.finish(60)
        return Outcome(done.returncode, done.stdout, done.stderr, interrupted)

    def close(self) -> None:
        """End the server."""
        self._server.close()


def home(folder: Path) -> dict[str, str]:
    """Return an environment whose folders are in `folder`, except the cache of compiled C files."""
    made = {name: folder / name for name in ("home", "tmp", "hf")}
    for path in made.values():
        path.mkdir(exist_ok=True)
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
    return kept | {
        "HOME": str(made["home"]),
        "TMPDIR": str(made["tmp"]),
        "HF_HOME": str(made["hf"]),
        "XDG_CACHE_HOME": cache,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LANG": "C.UTF-8",
    }


def build(folder: Path, nursery: Nursery) -> None:
    """Fill `folder` with everything that the valid commands name: all kinds of models, texts, runs and tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    said = [f"The old river number {i} runs under a small red house near the light." for i in range(400)]
    texts = [" ".join(said[i * 6 : i * 6 + 6]) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts, "number": list(range(60))}), folder / "table.parquet")
    (folder / "texts").mkdir()
    for number, text in enumerate(texts[:8]):
        (folder / "texts" / f"{number}.txt").write_text(text)

    tokenizer = tokenizer_of(said)
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaConfig(hidden_size=32, intermediate_size=32, max_position_embeddings=128, **sizes, **ends)
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, vocab_size=320, **ends)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "foreign")
    tokenizer.save_pretrained(folder / "foreign")
    write_gguf(folder / "model.gguf", folder / "llama", tokenizer)

    for command in (
        "convert llama deep --no-verify",
        "convert llama half --mode compress --cache 0.5 --profile hf-exact --calibration text.jsonl "
        "--calibration-tokens 64 --no-verify",
        f"train tiny --data text.jsonl --run run --tokenizer llama {SMALL} {SHAPE} --steps 4 --save-every 2",
        "prepare tokens --data text.jsonl --tokenizer llama",
    ):
        done = nursery.run(command.split(), folder, seconds=60)
        assert done.code == 0, (command, done)
    # Make the run look as if it had been killed after its third step.
    shutil.rmtree(folder / "run/checkpoints/step-000004")


def tokenizer_of(texts: list[str]):  # type: ignore[no-untyped-def]
    """Return a byte-level tokenizer with a chat template, which splits text like SmolLM2's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=special[0])
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = turns + "<|im_start|>assistant\n"
    return tokenizer


def write_gguf(path: Path, llama: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Write the model in the folder `llama` as GGUF like llama.cpp, except for the row order of queries and keys."""
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32("llama.rope.freq_base", 10_000.0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = {"embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    parts = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    parts |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in load_file(llama / "model.safetensors").items():
        pieces = name.split(".")
        if pieces[1] == "layers":
            place = f"blk.{pieces[2]}.{next(new for old, new in parts.items() if old in pieces)}"
        else:
            place = next(new for old, new in names.items() if old in name)
        writer.add_tensor(f"{place}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
