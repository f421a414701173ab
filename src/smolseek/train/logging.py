"""What a run logs: records in metrics.jsonl, and lines for a terminal."""

import contextlib
import mmap
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

from smolseek.config import ModelConfig, TrainConfig
from smolseek.memory import free_bytes, peak_resident_bytes
from smolseek.model import summary
from smolseek.run_folder import RunFolder
from smolseek.train.schedule import Schedule
from smolseek.train.state import Progress


def describe() -> dict:
    """Return the date, the machine and the package versions, in JSON types."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "smolseek"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "versions": versions}


def memory(device: torch.device) -> dict[str, int]:
    """Return current and peak memory in bytes: PyTorch's reserved memory on a GPU, or the process's resident memory."""
    if device.type == "cuda":  # reserved, not allocated: the memory of CUDA graphs does not count as allocated
        return {"memory": torch.cuda.memory_reserved(device), "peak_memory": torch.cuda.max_memory_reserved(device)}
    now = peak = peak_resident_bytes()
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as statm:
        now = int(statm.read().split()[1]) * mmap.PAGESIZE
    return {"memory": now, "peak_memory": peak}


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on the GPU, or in this machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes()


def recipe_lines(config: TrainConfig) -> list[str]:
    """Return the optimizers with their peak learning rates, the schedule and the weight decay as two lines of text."""
    model, optim, schedule = config.model, config.optim.resolved(), config.schedule
    assert optim.lr is not None
    factors = {
        "embedding and tied head" if model.tie_word_embeddings else "embedding": optim.embedding_factor,
        **({} if model.tie_word_embeddings else {"head": optim.head_factor}),
        "norms, biases and routers" if model.n_moe_layers else "norms and biases": optim.vector_factor,
    }
    shown = {name: factor for name, factor in factors.items() if optim.kind == "muon" or factor != 1}
    rates = ", ".join(f"{name} {optim.lr * (factor or 0.0):.3g}" for name, factor in shown.items())
    if config.distill.attention_only:
        rates = ""
    kind = {"muon": "Muon", "adamw": "AdamW"}[optim.kind]
    among = "AdamW for " if optim.kind == "muon" else ""
    final = f"{schedule.final_factor:.0%} of the peak" if schedule.final_factor else "0"
    decay = {
        "wsd": f"linear decay to {final} over {schedule.decay_fraction:.0%} of the run",
        "cosine": f"cosine decay to {final}",
        "constant": "constant learning rate",
    }
    decays = f"{'cautious ' if optim.cautious_decay else ''}weight decay {optim.weight_decay:g}"
    if optim.head_decay != optim.weight_decay and not model.tie_word_embeddings:
        decays += f", head {optim.head_decay:g}"
    if optim.embedding_decay:
        decays += f", embedding {optim.embedding_decay:g}"
    return [
        f"Recipe: {kind} {optim.lr:.3g}" + (f", {among}{rates}" if rates else ""),
        f"  warm-up {Schedule.of(config).warmup} steps, {decay[schedule.kind]}; {decays}",
    ]


def train_line(record: dict, steps: int) -> str:
    """Return a training record as a line of at most 80 columns; its `grad` is the gradient norm before clipping."""
    line = f"step {record['step']:5d}/{steps}  loss {record['loss']:.4f}"
    line += f"  kl {record['kl']:.4f}" if "kl" in record else ""
    line += f"  lr {record['lr']:.1e}  grad {record['grad_norm']:.2f}"
    line += f"  maxvio {record['maxvio']:.2f}" if "maxvio" in record else ""
    return line + f"  {record['tokens_per_second']:,.0f} tok/s"


def validation_line(record: dict, steps: int) -> str:
    """Return an evaluation's record as a line of at most 80 columns."""
    line = f"val  {record['step']:5d}/{steps}  loss {record['val_loss']:.4f}"
    line += f"  kl {record['val_kl']:.4f}" if "val_kl" in record else ""
    line += f"  perplexity {record['val_perplexity']:.2f}  bits/byte {record['val_bits_per_byte']:.4f}"
    return line + (f"  maxvio {record['val_maxvio']:.2f}" if "val_maxvio" in record else "")


def training_summary(config: ModelConfig, progress: Progress, frozen_tokens: int, run: RunFolder) -> list[str]:
    """Return the summary lines for the end of a run, with each expert's share of the validation tokens.

    `frozen_tokens` is the number of tokens that were read while the weights were frozen.
    """
    lines = ["", "Training summary"]
    lines += [f"  {line}" for line in summary.parameter_lines(config) + summary.architecture(config)]
    also = f" and {frozen_tokens:,} to calibrate the router biases" if frozen_tokens else ""
    lines.append(f"  Steps: {progress.step:,}, tokens: {progress.tokens - frozen_tokens:,}{also}")
    if progress.seconds:
        rate = progress.tokens / progress.seconds
        lines.append(f"  Training time: {progress.seconds:.1f} s, {rate:,.0f} tokens/s")
    lines.append(f"  Final training loss: {progress.loss:.4f}, final validation loss: {progress.val_loss:.4f}")
    records = reversed(run.read_metrics())
    load_LE: list[list[int]] = next((record["val_load"] for record in records if "val_load" in record), [])
    for layer, load_E in enumerate(load_LE, config.first_k_dense_replace):
        shares = [f"{load * len(load_E) / sum(load_E):.2f}" for load in sorted(load_E, reverse=True)]
        shown = " ".join(shares) if len(shares) <= 16 else f"{shares[0]}-{shares[-1]}"
        lines.append(f"  Expert load in layer {layer} (1 is an equal share): {shown}")
    lines.append(f"  Checkpoint: {run.checkpoint_path(progress.step)}")
    return lines


class Clock:
    """Measures the time of training steps, without evaluation and saving, and counts the steps.

    Inside `with clock:` the clock is paused.
    """

    def __init__(self) -> None:
        self.restart()

    def seconds(self) -> float:
        """Return the seconds since the last `restart`, without the pauses."""
        return time.perf_counter() - self.started - self.paused

    def restart(self) -> None:
        """Begin a new interval, in which `steps` counts from 0.

        After a resume in the middle of a log interval, `steps` is less than the number of losses in the interval.
        """
        self.started, self.paused, self.steps = time.perf_counter(), 0.0, 0

    def __enter__(self) -> None:
        self._pause = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.paused += time.perf_counter() - self._pause
