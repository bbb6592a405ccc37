"""How much memory there is, where arrays go, and freed memory that is kept for the next step.

A training step frees and takes the same large arrays each time. Above 32 MB glibc maps each anew and unmaps it, and it
gives back the free end of its heap: up to 150,000 page faults a step of the image policy, up to a tenth of its time
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… in glibc's malloc.h
LARGEST = 2**30
"""Bytes from which an array is mapped by itself, and goes back to the system when freed: data, not activations."""

Mode = Literal["device", "memory", "disk", "decode"]

_MEMORY_SHARE = 0.7  # of what is free; the rest is for networks, batches and the page cache
_DEVICE_SHARE = 0.5  # activations need more of a GPU than of the host


def keep_freed_memory() -> bool:
    """Ask this process's allocator for it; returns whether it agreed: glibc does, where no MALLOC_… variable is set.

    The process then holds the most that it ever needed, beside arrays of more than `LARGEST` bytes.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGEST) and mallopt(_TRIM_THRESHOLD, -1))


def choose_mode(n_bytes: int, device: torch.device, memory_gb: float | None = None) -> Mode:
    """The fastest place that holds `n_bytes`. `memory_gb` (10^9 bytes) replaces what is measured as free."""
    import torch  # here, because the commands that look at data do without

    if device.type == "cuda" and n_bytes <= _limit(memory_gb, _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]):
        return "device"
    return "memory" if n_bytes <= memory_limit(memory_gb) else "disk"


def memory_limit(memory_gb: float | None) -> float:
    """Bytes of host memory that arrays may take."""
    return _limit(memory_gb, _MEMORY_SHARE * free_memory())


def _limit(memory_gb: float | None, measured: float) -> float:
    return measured if memory_gb is None else memory_gb * 1e9


def free_memory() -> int:
    """Bytes that this process could still take: of the machine, and of the container where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return free


def sized(n_bytes: float) -> str:
    """1.5 GB"""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:.0f} B"
