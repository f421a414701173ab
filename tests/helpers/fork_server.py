"""Forks processes that have loaded PyTorch already, for tests whose point is a process: it starts in no time.

What reads the environment when it is imported, as huggingface_hub does, is imported after the fork. The server takes
requests on a socket: `{"argv": ..., "env": ...}` and the descriptors of stdin, stdout, stderr and of a pipe, into which
go the process's number and, when it has ended, its status.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping


class ForkedProcess:
    """A running process, with what the tests need of `subprocess.Popen`."""

    def __init__(self, server: socket.socket, argv: list[str], env: Mapping[str, str]) -> None:
        self._streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  read after the end
        read, write = os.pipe()
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), *(stream.fileno() for stream in self._streams), write]
            socket.send_fds(server, [json.dumps({"argv": argv, "env": dict(env)}).encode()], files)
        os.close(write)
        self._pipe = os.fdopen(read)
        self.args, self.pid = argv, int(self._pipe.readline())
        self._ended: int | None = None

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended; a signal's number is below 0."""
        return self._code(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, at most `timeout` seconds later."""
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
        """Wait for the end and return what came out, as text; a process that takes longer is killed."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        texts = []
        for stream in self._streams:
            stream.seek(0)
            texts.append(stream.read().decode())
        return subprocess.CompletedProcess(self.args, code, *texts)

    def _code(self, timeout: float | None) -> int | None:
        if self._ended is None and select.select([self._pipe], [], [], timeout)[0]:
            self._ended = os.waitstatus_to_exitcode(int(self._pipe.readline()))
        return self._ended


class ForkServer:
    """The server, started at the first use."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def start(self, *argv: object, env: Mapping[str, str] | None = None) -> ForkedProcess:
        """Run `python *argv`, which begins with `-c CODE` or `-m MODULE`."""
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, __file__, str(theirs.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return ForkedProcess(self._socket, list(map(str, argv)), os.environ if env is None else env)

    def run(
        self, *argv: object, env: Mapping[str, str] | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess:
        """Run `python *argv` to its end."""
        return self.start(*argv, env=env).finish(timeout)

    def close(self) -> None:
        """End the server."""
        if self._socket is not None:
            self._socket.close()
            self._process.wait()


def serve(requests: socket.socket) -> None:
    """Fork a process for each request; another one waits for it and tells its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 18, 4)
        if not request:
            return
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
        job = json.loads(request)
        os.environ.clear()
        os.environ.update(job["env"])
        del sys.path[0]  # this file's folder
        kind, program, *words = job["argv"]
        sys.argv = [kind, *words]
        if kind == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            import runpy

            runpy.run_module(program, run_name="__main__", alter_sys=True)
        sys.exit()


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  with all of PyTorch; the optimizers import it

    serve(socket.socket(fileno=int(sys.argv[1])))
