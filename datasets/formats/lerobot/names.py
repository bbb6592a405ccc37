"""What keys are called in a LeRobotDataset, and the `meta/info.json` that is written.

    action ─ action     state ─ observation.state     reward, done, success ─ next.…
    an image ─ observation.images.<key>     any other ─ observation.<key>

Rows of more than one axis become vectors, because LeRobot's own tools do not pass such arrays on; their shape and the
type of images are kept in `info.json` under our name, where LeRobot leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import is_image, native
from action_diffusion.datasets.formats.contract import MARK, Settings, kept
from action_diffusion.datasets.formats.video import PIXELS
from action_diffusion.datasets.storage.dimensions import dimension_names
from action_diffusion.datasets.storage.pieces import SAME_RATE
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.tasks import TASK, task_words
from action_diffusion.errors import InputError

INFO = "meta/info.json"
OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that every LeRobotDataset has beside its data."""
EPISODES_A_CHUNK = 1000
V21, V30 = "v2.1", "v3.0"
TEMPLATES = {
    V21: {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    },
    V30: {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}
"""Where files are, as `meta/info.json` says it."""
_FIXED = {"action": "action", "reward": "next.reward", "done": "next.done", "success": "next.success"}
_IMAGES, _OBSERVATION = "observation.images.", "observation."


def names_for(buffer: ReplayBuffer) -> dict[str, str]:
    """Our key → LeRobot's. Raises `InputError` for two that would get one name."""
    names: dict[str, str] = {}
    for key in buffer.keys:
        if key == "task_index":  # LeRobot's own, with attrs["tasks"]
            continue
        name = _name(key, image=is_image(buffer[key])).replace("/", ".")
        if name in names.values():
            raise InputError(f"{buffer.name}: {key} would be called {name} in LeRobot, as another key is: rename it")
        names[key] = name
    return names


def _name(key: str, *, image: bool) -> str:
    if image:
        return key if key.startswith(_IMAGES) else _IMAGES + key
    key = key.replace("image", "img")  # LeRobot takes whatever has "image" in its name for one
    return key if key.startswith((_OBSERVATION, "next.", "action.")) else _FIXED.get(key, _OBSERVATION + key)


def keys_for(names: Iterable[str]) -> dict[str, str]:
    """LeRobot's name → ours; the full name where two would be alike."""
    keys: dict[str, str] = {}
    for name in names:
        start = next((start for start in (_IMAGES, _OBSERVATION, "next.") if name.startswith(start)), "")
        key = name.removeprefix(start)
        keys[name] = name if key in keys.values() or key in OWN else key
    return keys


def make_info(buffer: ReplayBuffer, names: Mapping[str, str], settings: Settings, version: str) -> dict[str, Any]:
    """Everything but the numbers of tasks and files. The order of features is the buffer's."""
    rate = whole_rate(settings)
    features = {name: _feature(buffer, key, settings, version) for key, name in names.items()}
    own: dict[str, dict[str, Any]] = {
        name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None} for name in OWN
    }
    if version == V30:
        own = {name: {**feature, "fps": rate} for name, feature in own.items()}
    own_names = {"task_index": "task_index"} if "task_index" in buffer else {}
    return {
        "codebase_version": version,
        "robot_type": buffer.attrs.get("robot_type"),
        "total_episodes": buffer.n_episodes,
        "total_frames": buffer.n_steps,
        "chunks_size": EPISODES_A_CHUNK,
        "fps": rate,
        "splits": {"train": f"0:{buffer.n_episodes}"},
        "features": {**features, **own},
        MARK: kept(buffer, {**names, **own_names}),
    }


def whole_rate(settings: Settings) -> int:
    """LeRobot's tools take whole frames a second only."""
    rate, whole = settings.rate, max(1, round(settings.rate))
    if rate == whole:
        return whole
    refused = f"LeRobot takes whole frames a second, not {rate:g} Hz: rate="
    if math.isclose(rate, whole, rel_tol=SAME_RATE):
        raise InputError(f"{refused}{whole} keeps every row, and calls them that")
    raise InputError(f"{refused}{max(1, int(rate))} takes the rows nearest to that")


def _feature(buffer: ReplayBuffer, key: str, settings: Settings, version: str) -> dict[str, Any]:
    column = buffer[key]
    if is_image(column):
        height, width, _ = column.shape[1:]
        info = {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": PIXELS[settings.quality],
            "video.is_depth_map": False,
            "video.fps": whole_rate(settings),
            "video.channels": 3,
            "has_audio": False,
        }
        return {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"], "info": info}
    length = vector_length(column.shape)
    names = dimension_names(buffer.attrs, key, length)
    feature = {"dtype": native(column.dtype).name, "shape": [length], "names": names}
    return {**feature, "fps": whole_rate(settings)} if version == V30 else feature


def vector_length(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def tasks_of(buffer: ReplayBuffer) -> list[str]:
    """What the robot was to do, in words by number; of numbers beyond those, "task 3"."""
    words = task_words(buffer.attrs)
    if TASK in buffer:
        indices = np.asarray(buffer[TASK][:])
        if indices.dtype.kind not in "iu" or indices.size != buffer.n_steps or indices.min() < 0:
            raise InputError(f"{buffer.name}: {TASK} must be one whole number a row, from 0")
        words += [f"task {number}" for number in range(len(words), int(indices.max()) + 1)]
    return words
