"""The C library's heap, told to keep what it has.

By default glibc returns freed memory to the operating system at once; a step's tensors of megabytes
then come back as untouched pages, and on a virtual machine faulting them in takes longer than many
of the operations on them. A process of nothing but such steps does better to keep its peak.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_IN_HEAP = 32 * 2**20  # glibc takes no more
_PAD = 64 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in this process; whether the C library understood."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP),
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, _PAD),
    )
    done = [mallopt(name, value) for name, value in settings]
    return done == [1, 1, 1]
