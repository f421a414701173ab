"""Forks processes that have PyTorch already loaded, so that tests can start processes quickly.

Modules that read the environment when they are imported, such as huggingface_hub, are imported after the fork, unless
`modules` names them. The server receives requests on a socket: `{"argv": ..., "env": ..., "modules": ...}`, with the
descriptors of stdin, stdout, stderr and a pipe. The server writes the id of the process to the pipe, and its status
when the process ends.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


class ForkedProcess:
    """A running process, with the methods of `subprocess.Popen` that the tests need."""

    def __init__(self, server: socket.socket, request: dict, output: Path | None) -> None:
        if output is None:
            self._streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  read after the end
        else:
            self._streams = [open(output, "a+b")] * 2  # noqa: SIM115
        read, write = os.pipe()
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), *(stream.fileno() for stream in self._streams), write]
            socket.send_fds(server, [json.dumps(request).encode()], files)
        os.close(write)
        self._pipe = os.fdopen(read)
        self.args, self.pid = request["argv"], int(self._pipe.readline())
        self._ended: int | None = None

    def poll(self) -> int | None:
        """Return the exit code if the process has ended; a signal has the negative of its number."""
        return self._code(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait up to `timeout` seconds, and return the exit code."""
        code = self._code(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self, timeout: float) -> subprocess.CompletedProcess:
        """Wait for the end, and return the output as text. A process that takes too long is killed."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        texts = []
        for stream in self._streams:
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
        return subprocess.CompletedProcess(self.args, code, *texts)

    def _code(self, timeout: float | None) -> int | None:
        if self._ended is None and select.select([self._pipe], [], [], timeout)[0]:
            self._ended = os.waitstatus_to_exitcode(int(self._pipe.readline()))
        return self._ended


class ForkServer:
    """The fork server, which starts at its first use."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def start(
        self,
        *argv: object,
        env: Mapping[str, str] | None = None,
        output: Path | None = None,
        modules: Sequence[str] = (),
    ) -> ForkedProcess:
        """Run `python *argv`, which begins with `-c CODE` or `-m MODULE`.

        `output` is a file for stdout and stderr. The server imports `modules` before it forks.
        """
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, __file__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        request = {"argv": list(map(str, argv)), "env": dict(os.environ if env is None else env), "modules": modules}
        return ForkedProcess(self._socket, request, output)

    def run(
        self, *argv: object, env: Mapping[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess:
        """Run `python *argv` and wait for its end."""
        return self.start(*argv, env=env).finish(timeout)

    def close(self) -> None:
        """End the server."""
        if self._socket is not None:
            self._socket.close()
            self._process.wait()


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, and a second process that waits for the first and reports its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1 << 18, 4)
        if not message:
            return
        request = json.loads(message)
        for module in request["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        if os.fork():
            for file in files:
                os.close(file)
            continue
        requests.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        *streams, pipe = files
        pid = os.fork()
        if pid:
            for file in streams:
                os.close(file)
            os.write(pipe, f"{pid}\n".encode())
            os.write(pipe, f"{os.waitpid(pid, 0)[1]}\n".encode())
            os._exit(0)
        os.close(pipe)
        for number, file in enumerate(streams):
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["env"])
        del sys.path[0]  # the folder of this file
        kind, program, *arguments = request["argv"]
        sys.argv = [kind, *arguments]
        if kind == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            import runpy

            runpy.run_module(program, run_name="__main__", alter_sys=True)
        sys.exit()


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  with all of PyTorch; the optimizers import it

    serve(socket.socket(fileno=int(sys.argv[1])))
