"""glibc's allocator gives large buffers back to the kernel after every step; here it is told to keep them."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Keep freed activation buffers in this process (glibc only; elsewhere it does nothing and says False).

    Without it every activation of a convolution is mapped, page-faulted and unmapped again each step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20))
    return all(bool(mallopt(option, value)) for option, value in settings)
