"""What tests on emulated arms share."""

from __future__ import annotations

import time
from collections.abc import Callable

from action_diffusion.files import cache_folder

LEROBOT = cache_folder() / "peers" / "lerobot-drivers"
"""Where test_lerobot.py wants lerobot 0.4.4."""
PATIENCE = 20.0


def until(true: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether it becomes true within so long: much longer than it takes, on a computer that is busy."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
