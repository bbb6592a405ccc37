"""The demonstrations that loaders are measured on, as plain arrays that every side can read.

    image.npy uint8 [N, 96, 96, 3]   state.npy float32 [N, 5]   action.npy float32 [N, 2]   episode_ends.npy int64 [E]

They are people's where $ACTION_DIFFUSION_DATA names a folder that has their file, and otherwise as many of the scripted
expert's, with rendered frames.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from action_diffusion.datasets.batches.columns import ObsKey, load
from action_diffusion.datasets.batches.sources import open_data, with_images
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.files import atomic_path, cache_folder, locked

HUMAN_FILE = "pusht_cchi_v7_replay.zarr.zip"
N_EPISODES = 206


def exported_episodes() -> Path:
    """The folder with the arrays, in the user's cache; made now where it is not there."""
    human = Path(os.environ.get("ACTION_DIFFUSION_DATA", ""), HUMAN_FILE)
    kind = "human" if human.is_file() else "expert"
    folder = cache_folder() / "benchmarks" / f"pusht-{kind}-{N_EPISODES}"
    with locked(folder):
        if not folder.exists():
            with atomic_path(folder) as temporary:
                export(ReplayBuffer.open(human) if kind == "human" else _rendered(), temporary)
    return folder


def export(buffer: ReplayBuffer, folder: Path) -> None:
    """Write the first `N_EPISODES` episodes of `buffer` (img, state, action) to `folder`, which is made."""
    folder.mkdir(parents=True)
    ends = buffer.episode_ends[:N_EPISODES]
    for name, key in (("image", "img"), ("state", "state"), ("action", "action")):
        rows = load(buffer, ObsKey(key, None, "image" if name == "image" else "state"))
        np.save(folder / f"{name}.npy", rows[: ends[-1]], allow_pickle=False)
    np.save(folder / "episode_ends.npy", ends, allow_pickle=False)


def _rendered() -> ReplayBuffer:
    from action_diffusion.envs.pusht.simulator import render_states

    buffer = open_data("pusht_expert")
    ends = buffer.episode_ends[:N_EPISODES]
    arrays = {key: np.asarray(buffer[key][: ends[-1]]) for key in ("state", "action")}
    return with_images(ReplayBuffer.from_arrays(arrays, ends), render_states)
