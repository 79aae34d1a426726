"""A real `vllm serve` on the bundled checkpoint, as a subprocess."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import boe_vllm


class Server(str):
    """The base URL of a server, its process, and the model's name."""

    process: subprocess.Popen
    model: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(*args: str, model: str | None = None, timeout: float = 300.0):
    """Yields the base URL, a `Server`, once the server answers; stops it afterwards.

    Raises:
        RuntimeError: with the end of the server's log, if it exits or does not come up.
    """
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        model or boe_vllm.tiny_model_path(),
        *("--host", "127.0.0.1", "--port", str(port), *args),
    ]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ, start_new_session=True
        )
        try:
            _wait_until_up(process, port, Path(log.name), timeout)
            server = Server(f"http://127.0.0.1:{port}")
            server.process, server.model = process, command[2]
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_up(process, port: int, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            end_of_log = log.read_text()[-4000:]
            raise RuntimeError(f"server exited with {process.returncode}:\n{end_of_log}")
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.5)
    raise RuntimeError(f"server did not come up in {timeout} s:\n{log.read_text()[-4000:]}")
