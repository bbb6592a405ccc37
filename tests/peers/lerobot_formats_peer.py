"""Runs in lerobot's own environment: opens what was converted with lerobot 0.4.4, and says what it read.

    lerobot_formats_peer.py FOLDER …     each with FOLDER/lerobot (v3.0) and FOLDER/lerobot21 (v2.1), converted first

Each dataset's frames and rows, as lerobot gives them, go to FOLDER/NAME.npz.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

NAME = "some/one"


def read(folder: Path, root: Path, name: str) -> dict[str, object]:
    dataset = LeRobotDataset(NAME, root=root)
    items = [dataset[index] for index in range(len(dataset))]
    columns: dict[str, Any] = {
        key: np.stack([item[key].numpy() for item in items]) for key in items[0] if key != "task"
    }
    np.savez(folder / f"{name}.npz", **columns)
    return {
        "episodes": dataset.num_episodes,
        "fps": dataset.fps,
        "tasks": sorted({item["task"] for item in items}),
        "decoder": dataset.video_backend,
        "mean": np.asarray(dataset.meta.stats["action"]["mean"]).tolist(),
    }


def look(folder: Path) -> dict[str, object]:
    converted = folder / "converted" / NAME
    shutil.copytree(folder / "lerobot21", converted)
    convert_dataset(NAME, root=folder / "converted", push_to_hub=False)
    return {"lerobot": read(folder, folder / "lerobot", "lerobot"), "lerobot21": read(folder, converted, "lerobot21")}


if __name__ == "__main__":
    print(json.dumps([look(Path(word)) for word in sys.argv[1:]]))
