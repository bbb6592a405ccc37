"""What robomimic's files know of each episode, the scene that it took place in, for episodes that people recorded.

Episode i began at start `seed` + i, which says what its scene was: it is made again when a session ends, for those
episodes that have none. So a session that was killed lacks nothing once another one ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from action_diffusion.datasets.robomimic.attributes import pack, unpack
from action_diffusion.files import atomic_path

KEY = "hdf5_attributes"


def describe(path: Path, scene_of: Callable[[int], Mapping[str, str]], *, n_episodes: int, known: int) -> None:
    """Keep the scenes of all episodes in the attributes of the buffer at `path`. Its recorder must be held.

    scene_of: the episode's index → what the simulator says of it; nothing for simulators with one scene.
    known: so many of the first episodes are as they were when their scenes were kept.
    Raises `InputError` where the disk refuses.
    """
    file = path / "zarr.json"
    content: dict[str, Any] = json.loads(file.read_bytes())
    attrs = content.setdefault("attributes", {})
    kept = dict(unpack(attrs[KEY], str(path))) if KEY in attrs else {}
    scenes: dict[str, Mapping[str, Any]] = {}
    for index in range(n_episodes):
        name = f"data/demo_{index}"
        scenes[name] = kept[name] if index < known and name in kept else scene_of(index)
    if not any(scenes.values()) or scenes == kept:
        return
    attrs[KEY] = pack(scenes.items(), str(path))
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
