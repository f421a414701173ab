"""The wheel in an environment of its own: every command works without a clone, without a compiler, in odd places."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = "--data builtin --steps 4 --eval-every 2 --eval-tokens 2048 --sample-tokens 4 --device cpu"
TRAIN = ["train", "tiny", *OPTIONS.split()]

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the command `smolseek` of a new environment, in a path with a space and letters that are not ASCII.

    The environment has the wheel of smolseek, and sees the packages of this Python, but not the clone.
    """
    folder = tmp_path_factory.mktemp("Größe und 空")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # in which pip finds the clone
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, env=clean)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True, env=clean)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    # Python reads no .pth files in this folder, such as the one of an editable installation.
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    show = [python, "-c", "import smolseek; print(smolseek.__file__)"]
    where = subprocess.run(show, stdout=subprocess.PIPE, encoding="utf-8", check=True, cwd="/", env={"PYTHONUTF8": "1"})
    assert str(packages) in where.stdout
    return folder / "venv" / "bin" / "smolseek"


@pytest.fixture
def run(program: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs `smolseek *arguments` with an empty home folder and without a compiler."""
    home, work = tmp_path / "home", tmp_path / "été 中"
    home.mkdir()
    work.mkdir()

    def start(*arguments: str, env: dict[str, str] | None = None, **options: object) -> subprocess.CompletedProcess:
        environment = {"HOME": str(home), "PATH": str(program.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"} | options
        return subprocess.run([program, *arguments], env=environment | (env or {}), cwd=work, timeout=900, **streams)

    return start


def require_success(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "Traceback" not in (done.stderr or ""), done.stderr


def test_the_demo_the_report_and_the_doctor(run, program):
    done = run("demo", "--steps", "8")
    require_success(done)
    assert done.stdout.count("opens in transformers as DeepseekV3ForCausalLM") == 2
    assert done.stdout.count("\n> ") >= 5 and "Audit passed" in done.stdout and "\x1b" not in done.stdout
    assert done.stderr.count("no C compiler is installed") == 1  # said once, not in every part of the demo
    assert run("demo").returncode == 2  # its folders exist
    require_success(run("report", "smolseek-demo/demo"))
    report = json.loads(run("doctor", "--json").stdout)
    assert report["works"] and any("no C compiler" in finding["text"] for finding in report["findings"])
    packages = next(program.parents[1].glob("lib/python*/site-packages/smolseek"))
    assert (packages / "serve" / "playground" / "page.html").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"LANG": "C", "LC_ALL": "C"},  # Python then takes UTF-8 for names
        {"PYTHONIOENCODING": "ascii"},
        {"HOME": "/proc/sys"},  # where nobody can write
        {"HOME": "", "XDG_CACHE_HOME": "/proc/sys"},
    ],
    ids=["LANG=C", "ascii", "read-only home", "no home"],
)
def test_training_in_odd_surroundings(run, tmp_path, variables):
    done = run(*TRAIN, "--run", "läufe/erster lauf", env=variables)
    require_success(done)
    assert "Audit passed" in done.stdout
    run_folder = tmp_path / "été 中" / "läufe" / "erster lauf"
    assert (run_folder / "checkpoints" / "step-000004" / "model.safetensors").exists()
    text = run("generate", "läufe/erster lauf", "The function", "--max-tokens", "4", env=variables)
    require_success(text)


def test_training_without_stdout_and_into_a_closed_pipe(run, tmp_path):
    require_success(run(*TRAIN, "--run", "closed", stdout=None, preexec_fn=lambda: os.close(1)))
    read, write = os.pipe()
    os.close(read)
    done = run(*TRAIN, "--run", "pipe", stdout=write)
    os.close(write)
    require_success(done)
    assert "the work continues without output" in done.stderr
    for name in ("closed", "pipe"):
        log = (tmp_path / "été 中" / name / "train.log").read_text(encoding="utf-8")
        assert "Audit passed" in log
