"""Freed memory is kept for the next step, instead of going back to the system and coming again page by page.

A training step frees and takes the same large arrays each time. Above 32 MB glibc maps each anew and unmaps it, and it
gives back the free end of its heap: up to 150,000 page faults a step of the image policy, up to a tenth of its time
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… in glibc's malloc.h
LARGEST = 2**30
"""Bytes from which an array is mapped by itself, and goes back to the system when freed: data, not activations."""


def keep_freed_memory() -> bool:
    """Ask this process's allocator for it; returns whether it agreed: glibc does, where no MALLOC_… variable is set.

    The process then holds the most that it ever needed, beside arrays of more than `LARGEST` bytes.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, -1))
