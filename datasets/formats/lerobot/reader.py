"""LeRobotDataset v3.0 (lerobot 0.4) and v2.1 (lerobot 0.1 to 0.3), rows in parquet and images in video."""

from __future__ import annotations

import functools

from action_diffusion.datasets.formats.contract import Format, Settings
from action_diffusion.datasets.formats.lerobot.names import V21, V30
from action_diffusion.datasets.formats.lerobot.read import opened
from action_diffusion.datasets.formats.lerobot.write import write


def _lossy(settings: Settings) -> bool:
    return settings.quality != "lossless"


LEROBOT = Format("lerobot", opened, functools.partial(write, version=V30), _lossy)
LEROBOT21 = Format("lerobot21", opened, functools.partial(write, version=V21), _lossy)
