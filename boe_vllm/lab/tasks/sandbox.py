"""Run a program that a model has written: bounded time and memory, no network, no writing."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from boe_vllm.lab.tasks import seccomp

CPU_SECONDS = 10
# Wall time depends on what else the machine does, so it is only for programs that sleep.
WALL_SECONDS = 60.0
MEMORY_MB = 1024


def require_sandbox() -> None:
    """A ValueError where programs cannot be run safely."""
    if not seccomp.supported():
        raise ValueError(
            "programs that models write are run where system calls can be filtered: expected Linux "
            f"on x86_64 or aarch64, got {sys.platform} on {platform.machine()}; score them there"
        )


def runs_to_its_end(
    source: str,
    *,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_mb: int = MEMORY_MB,
) -> bool:
    """Whether a Python program reaches its end without an exception or an early exit.

    It runs in a process of its own, with the standard library only (`python -I -S`), an empty
    environment and folder, and the system calls that `boe_vllm.lab.tasks.seccomp` leaves it.

    Args:
        source: the program, with its tests.
        cpu_seconds: processor time, after which it is killed and has failed.
        wall_seconds: the same for time on the clock.
        memory_mb: address space, MiB.

    Raises:
        ValueError: where there is no sandbox; nothing is run then.
        RuntimeError: when it does not start.
    """
    require_sandbox()
    # The program cannot claim success by an early exit: it does not know the word.
    word = secrets.token_hex(16)
    limits = f"{memory_mb << 20} {cpu_seconds} {word}\n"
    command = [sys.executable, "-I", "-S", str(Path(seccomp.__file__))]
    with tempfile.TemporaryDirectory(prefix="boe-vllm-") as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            program = source.encode("utf-8", "replace")
            out, err = process.communicate(limits.encode() + program, timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    # Before the program starts, errors go to the real stderr; afterwards to nowhere.
    if err:
        raise RuntimeError(f"the sandbox did not start: {err.decode(errors='replace')[-500:]}")
    return process.returncode == 0 and out.decode(errors="replace") == word
