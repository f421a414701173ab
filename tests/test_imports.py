"""Every module can be imported on a machine without POSIX modules, without Triton and without a C compiler."""

import os
import subprocess
import sys

from small_models import MLA, small_tokenizer

from smolseek.model.transformer import new_model
from smolseek.storage.hf_folder import save_folder

HIDDEN = ["resource", "fcntl", "readline", "termios", "pwd", "grp", "triton"]
# Runs in a process that has PyTorch, but no module of smolseek. Only smolseek is kept from the hidden modules, since
# other packages have substitutes of their own.
PROGRAM = f"""
import builtins, importlib, os, pkgutil, signal
real = builtins.__import__
def hiding(name, globals=None, *rest):
    if name.partition(".")[0] in {HIDDEN} and (globals or {{}}).get("__name__", "").startswith("smolseek"):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return real(name, globals, *rest)
builtins.__import__ = hiding
for name in ("EX_TEMPFAIL", "sysconf", "pwrite"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
    delattr(signal, name)
import smolseek
for module in pkgutil.walk_packages(smolseek.__path__, "smolseek."):
    if not module.name.endswith((".triton", ".__main__")):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "lm_eval":  # the extra `eval`
                raise
from smolseek import memory
from smolseek.files import FolderLock
from smolseek.train.guard import StopRequest
assert memory.peak_resident_bytes() == 0 and memory.free_bytes() > 1 << 60
with FolderLock(".") as lock, StopRequest() as stop:
    lock.acquire()
    assert not lock.supported
print("imported", len([name for name in __import__("sys").modules if name.startswith("smolseek.")]))
"""


def test_every_module_is_imported_without_posix_modules_triton_and_a_compiler(fork_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = {"HOME": str(tmp_path), "PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    result = fork_server.run("-c", PROGRAM, env=os.environ | home)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[1]) > 150
    assert list(tmp_path.iterdir()) == []  # no import compiles or writes anything


def test_generating_imports_neither_the_compiler_of_pytorch_nor_data_sets(tmp_path):
    """These imports would delay the first token by a second or two."""
    save_folder(new_model(MLA, seed=3), tmp_path, small_tokenizer())
    code = (
        "import sys; from smolseek import load; load(sys.argv[1]).generate('in', max_tokens=2); "
        "print({'torch._dynamo', 'sympy', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done
