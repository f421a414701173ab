"""The device, the processes and the number format of a run."""

from contextlib import nullcontext

import torch

from smolseek import launch
from smolseek.config import TrainConfig
from smolseek.device import capability, select
from smolseek.distributed.mesh import check_optimizer, choose
from smolseek.distributed.single_process import SingleProcess
from smolseek.errors import SmolseekError


def choose_device(name: str) -> torch.device:
    """Return the device of this process: that of `select`, and among several CUDA devices one for each process.

    Raises:
        SmolseekError: if the device is not available, or if this machine has fewer GPUs than processes.
    """
    device = select(name)
    if device.type == "cpu" or launch.number("WORLD_SIZE", 1) <= 1:
        return device
    if device.type == "mps":
        raise SmolseekError("--device mps trains with one process, because gloo needs the CPU: use --device cpu")
    local_rank = launch.number("LOCAL_RANK", -1)
    if local_rank < 0:
        raise SmolseekError(
            "LOCAL_RANK is not set, so all processes would use the same GPU: start all processes with torchrun"
        )
    local, there = max(launch.number("LOCAL_WORLD_SIZE", 1), local_rank + 1), torch.cuda.device_count()
    if local > there:
        raise SmolseekError(
            f"{local} processes run on this machine, but it has only {there} CUDA device{'s' if there > 1 else ''}: "
            f"use torchrun --nproc-per-node {there}, or --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def init_distributed(config: TrainConfig, device: torch.device) -> SingleProcess:
    """Check the number of processes that torchrun started, and return their distributed context.

    Raises:
        SmolseekError: if the mesh does not fit the number of processes, the experts or the batch, or if an option needs
            a single process or unsharded weights.
    """
    size = launch.world_size()
    mesh = choose(config.mesh, config.model, size, config.batch_size)
    check_optimizer(mesh, config.optim.kind)
    if size == 1:
        return SingleProcess()
    options = {
        "distill.teacher": config.distill.teacher is not None,
        "distill.attention-only": config.distill.attention_only,
        "sample-every": config.sample_every > 0,
        "compile on": config.compile == "on",
        "grad-checkpointing selective": config.grad_checkpointing == "selective",
    }
    for option, is_set in options.items():
        if is_set:
            raise SmolseekError(
                f"--{option} works with one process only, but {size} processes were started: leave out this option"
            )
    from smolseek.distributed.context import DistributedContext

    return DistributedContext(mesh, device, config.mesh.timeout)


def autocast(precision: str, device: torch.device) -> torch.autocast | nullcontext:
    """Return the context of the forward pass: autocast to `precision` with float32 weights, or plain float32.

    `auto` chooses the precision by what the device can do.
    """
    name = capability(device).precision(precision)
    return nullcontext() if name == "float32" else torch.autocast(device.type, getattr(torch, name))
