"""A system call filter for programs that nobody has read: no network, no processes, no writing.

Run as a script it is the sandbox's child: it reads a program from its standard input, limits itself
and runs it. It imports nothing but the standard library, because that is all the program gets too.
Linux only (seccomp, see `man 2 seccomp`). Verified on x86_64; the numbers for aarch64 are the
kernel's (`include/uapi/asm-generic/unistd.h`), never run here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused whatever the arguments, by errno; a name that a machine does not have is left out.
DENIED = {
    "x86_64": dict(
        socket=41, socketpair=53, connect=42, bind=49, fork=57, vfork=58, execve=59, kill=62,
        ptrace=101, tkill=200, tgkill=234, execveat=322, process_vm_writev=311,
        pidfd_send_signal=424, io_uring_setup=425, rename=82, mkdir=83, rmdir=84, creat=85,
        link=86, unlink=87, symlink=88, chmod=90, fchmod=91, chown=92, truncate=76, mknod=133,
        renameat=264, mkdirat=258, unlinkat=263, linkat=265, symlinkat=266, fchmodat=268,
        fchownat=260, mknodat=259, renameat2=316, memfd_create=319, bpf=321, mount=165,
        unshare=272, setns=308,
    ),
    "aarch64": dict(
        socket=198, socketpair=199, connect=203, bind=200, execve=221, kill=129, ptrace=117,
        tkill=130, tgkill=131, execveat=281, process_vm_writev=271, pidfd_send_signal=424,
        io_uring_setup=425, mknodat=33, mkdirat=34, unlinkat=35, symlinkat=36, linkat=37,
        renameat=38, mount=40, truncate=45, fchmod=52, fchmodat=53, fchownat=54, unshare=97,
        setns=268, renameat2=276, memfd_create=279, bpf=280,
    ),
}  # fmt: skip
# Refused as if the kernel did not have them, so that libc takes the older call, which is filtered.
UNKNOWN = {"clone3": 435, "openat2": 437}
CLONE = {"x86_64": 56, "aarch64": 220}
OPEN = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}  # call -> index of its flags
CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
X32_BIT = 0x40000000


def supported() -> bool:
    """Whether this machine can run untrusted programs."""
    return sys.platform == "linux" and platform.machine() in AUDIT_ARCH


def build_filter(machine: str) -> bytes:
    """The filter's BPF instructions (8 bytes each) for a machine."""

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    number, arch, arguments = 0, 4, 16  # offsets in struct seccomp_data
    parts = [
        op(LOAD, arch),
        op(EQUAL, AUDIT_ARCH[machine], yes=1),
        op(RETURN, KILL),
        op(LOAD, number),
        op(AT_LEAST, X32_BIT, no=1),
        op(RETURN, KILL),
    ]
    for call in DENIED[machine].values():
        parts += [op(EQUAL, call, no=1), op(RETURN, ERRNO | EPERM)]
    for call in UNKNOWN.values():
        parts += [op(EQUAL, call, no=1), op(RETURN, ERRNO | ENOSYS)]
    # A new thread is fine, a new process is not.
    parts += [op(EQUAL, CLONE[machine], no=4), op(LOAD, arguments)]
    parts += [op(ANY_BIT, CLONE_THREAD, yes=1), op(RETURN, ERRNO | EPERM), op(RETURN, ALLOW)]
    for call, index in OPEN[machine].items():
        parts += [op(EQUAL, call, no=4), op(LOAD, arguments + 8 * index)]
        parts += [op(ANY_BIT, WRITING, no=1), op(RETURN, ERRNO | EPERM), op(RETURN, ALLOW)]
    return b"".join([*parts, op(RETURN, ALLOW)])


def install() -> None:
    """Apply the filter to this process, for good.

    Raises:
        OSError: when the kernel refuses it; nothing may be run then.
    """
    code = build_filter(platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code) // 8, code)
    set_no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    for arguments in (
        (set_no_new_privs, 1, 0, 0, 0),
        (set_seccomp, mode_filter, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"prctl: {os.strerror(error)}; no sandbox, nothing is run")


def main() -> None:
    """Read limits, a word and a program; print the word once the program has run to its end."""
    import resource

    memory, seconds, word = sys.stdin.buffer.readline().decode().split()
    source = sys.stdin.buffer.read().decode()
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for limit, most in (
        (resource.RLIMIT_AS, int(memory)),
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    sys.setrecursionlimit(5000)
    install()
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    # RLIMIT_FSIZE does not touch pipes.
    os.write(report, word.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
