"""Python programs forked from a process that has imported torch, transformers and DeepSpeed.

These imports take a rank 5 s of CPU, more than the rest of a run of a tiny model. They are all that a fork is spared:
it is a process of its own, with its own signals, exit code, output and environment; nothing of fullft is imported
before, and the process had one thread when it was forked. What launchers, imports or memory are tested by are real
starts. So is every start in an environment other than that of the tests, since libraries read theirs when imported.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

# These may differ between the environments of the tests and of a fork: no library reads them when imported.
READ_LATE = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK",  # torch sets them
}  # fmt: skip
INHERITED = dict(os.environ)  # by the process that has the imports; fixtures may change os.environ before it is started


def start(
    script: Path,
    *arguments: str,
    stdout: IO[Any],
    stderr: IO[Any],
    cwd: Path,
    group: bool = False,
    forked: bool = True,
    **env: str,
) -> subprocess.Popen[Any] | Fork:
    """Start `python script arguments` with these variables beside ours.

    group:  in a session and process group of its own, as a terminal does
    forked: False for a process that imports all by itself
    """
    environment = os.environ | env
    names = (environment.keys() | INHERITED.keys()) - READ_LATE
    if forked and all(environment.get(name) == INHERITED.get(name) for name in names):
        return Fork([str(script), *arguments], stdout, stderr, environment, cwd, group)
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=cwd, start_new_session=group)


class Fork:
    """As much of a subprocess.Popen as tests need."""

    def __init__(
        self, argv: list[str], stdout: IO[Any], stderr: IO[Any], environment: dict[str, str], cwd: Path, group: bool
    ) -> None:
        self.args = argv
        self.returncode: int | None = None
        self._keeper = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._keeper.connect(_server())
        request = {"argv": argv, "environment": environment, "cwd": str(cwd), "group": group}
        socket.send_fds(self._keeper, [json.dumps(request).encode()], [stdout.fileno(), stderr.fileno()])
        self.pid = int(self._keeper.recv(100))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._keeper.recv(100))
            self._keeper.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> str:
    """The socket of the process that has the imports. It is started when the first test asks, and ends with the tests:
    its standard input is closed then, however they end."""
    path = f"{tempfile.mkdtemp(prefix='fullft-')}/socket"
    process = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=INHERITED
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    atexit.register(process.communicate)
    return path


def _serve(path: str) -> str:
    """Fork for each connection. Returns in the forks only, with the script to run."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen(64)
    _import()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lack the other threads"
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([server, 0], [], [])
        with contextlib.suppress(ChildProcessError):  # there are none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if server not in ready:  # the tests have ended
            shutil.rmtree(Path(path).parent)
            os._exit(0)
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            return _fork(connection)
        connection.close()


def _import() -> None:
    """All that training imports of others, and nothing of fullft, so that forks import that themselves."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as launch/train.py does, before transformers reads it
    for name in ("deepspeed.ops", "torch.utils.cpp_extension", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # of all
    sys.dont_write_bytecode = False  # whatever the environment says: else each fork compiles all of fullft
    importlib.import_module("fullft.trainer")
    for name in [name for name in sys.modules if name.split(".")[0] == "fullft"]:
        del sys.modules[name]
    # A collection, which DeepSpeed asks for, would look at all these objects, and so copy their memory, in each fork.
    gc.collect()
    gc.freeze()


def _fork(connection: socket.socket) -> str:
    """Fork once more: this process tells the tests how that one ended."""
    message, (out, error), _, _ = socket.recv_fds(connection, 1 << 20, 2)
    if pid := os.fork():
        os.close(out)
        os.close(error)
        connection.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # nobody wants to know
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    request = json.loads(message)
    if request["group"]:
        os.setsid()
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (error, 2)):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    random.seed()
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    return sys.argv[0]


if __name__ == "__main__":
    runpy.run_path(_serve(sys.argv[1]), run_name="__main__")
