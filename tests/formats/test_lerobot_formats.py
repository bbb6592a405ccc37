"""What we write for LeRobot, read by lerobot 0.4.4: v3.0 as it is, v2.1 through its own converter.

lerobot's bounds do not fit ours. `tests/peers/lerobot.txt` says what it needs in a folder of its own, without its
older torch; where `python -m benchmarks` has made it a whole environment, that one is taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.commands import data_convert
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.files import cache_folder

peer_environment = import_module("benchmarks.peer.peer_environment")
PEER = peer_environment.PeerEnvironment(peer_environment.default_folder())
HAS_PEER = (PEER.folder / "complete.json").exists()
FOLDER = cache_folder() / "peers" / "lerobot-drivers"

pytestmark = pytest.mark.skipif(
    not HAS_PEER and not (FOLDER / "jsonlines").exists(),
    reason=f"no lerobot: pip install --no-deps --target {FOLDER} -r tests/peers/lerobot.txt, or python -m benchmarks",
)


def interpreter(scratch: Path) -> tuple[Path, dict[str, str]]:
    """A Python that has lerobot, and what it needs in its environment."""
    variables = {"HF_HOME": str(scratch / "huggingface"), "OMP_NUM_THREADS": "1"}
    if HAS_PEER:
        return PEER.python, {**PEER.variables, **variables}
    peer_environment.link_ffmpeg(Path(sys.prefix), scratch / "ffmpeg")
    own = {"PYTHONPATH": str(FOLDER), "LD_LIBRARY_PATH": str(scratch / "ffmpeg"), "HF_HUB_OFFLINE": "1"}
    return Path(sys.executable), {**own, **variables}


@pytest.fixture(scope="module")
def buffer() -> ReplayBuffer:
    random, lengths = np.random.default_rng(0), [4, 1, 7]
    n = sum(lengths)
    columns = {
        "state": random.normal(size=(n, 5)).astype(np.float32),
        "action": random.normal(size=(n, 2)).astype(np.float32),
        "reward": random.normal(size=n).astype(np.float32),
        "done": random.random(n) > 0.5,
        "keypoint": random.normal(size=(n, 3, 2)).astype(np.float32),
        "depth": random.integers(0, 65_536, size=(n, 9, 16)).astype(np.uint16),
        "img": random.integers(0, 256, size=(n, 18, 25, 3)).astype(np.float32),
    }
    return ReplayBuffer.from_arrays(columns, np.cumsum(lengths), {"control_rate": 12.0, "task": "push the block"})


@pytest.fixture(scope="module")
def folders(buffer: ReplayBuffer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Path]]:
    """By the quality of the videos: what lerobot said, and the folder with what it read."""
    made = {quality: tmp_path_factory.mktemp(quality) for quality in ("high", "lossless")}
    for quality, folder in made.items():
        buffer.save(folder / "a.zarr")
        for name in ("lerobot", "lerobot21"):
            words = {"in": str(folder / "a.zarr"), "out": str(folder / name), "format": name, "video": quality}
            data_convert.run(words)
    python, variables = interpreter(tmp_path_factory.mktemp("lerobot"))
    script = Path(__file__).parents[1].joinpath("peers", "lerobot_formats_peer.py")
    done = subprocess.run(
        [str(python), str(script), *map(str, made.values())],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {quality: (said, folder) for (quality, folder), said in zip(made.items(), found, strict=True)}


@pytest.fixture(params=["high", "lossless"])
def read(request: pytest.FixtureRequest, folders: dict[str, tuple[dict[str, Any], Path]]) -> Any:
    return *folders[request.param], request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lerobot", "lerobot21"])
def test_lerobot_reads_the_same_rows_and_frames(name: str, read: Any, buffer: ReplayBuffer) -> None:
    found, folder, quality = read
    assert found[name]["episodes"] == 3
    assert found[name]["fps"] == 12
    assert found[name]["tasks"] == ["push the block"]
    assert np.allclose(found[name]["mean"], buffer["action"][:].mean(0), atol=1e-6)
    columns = np.load(folder / f"{name}.npz")
    rows = {"observation.state": "state", "action": "action", "next.reward": "reward", "next.done": "done"}
    for there, here in rows.items():
        assert np.array_equal(columns[there], buffer[here][:]), there
    assert np.array_equal(columns["observation.keypoint"], buffer["keypoint"][:].reshape(-1, 6))
    assert np.array_equal(columns["observation.depth"], buffer["depth"][:].reshape(-1, 144))
    assert columns["episode_index"].tolist() == [0] * 4 + [1] + [2] * 7
    frames = (columns["observation.images.img"] * 255).round().transpose(0, 2, 3, 1)
    errors = ((frames - buffer["img"][:]) ** 2).reshape(len(frames), -1).mean(1)
    if quality == "lossless":
        assert not errors.any()
    else:
        assert 10 * np.log10(255**2 / errors.max()) >= 40  # another row would be at 8


def test_what_lerobot_converted_comes_back(read: Any, buffer: ReplayBuffer) -> None:
    _, folder, quality = read
    data_convert.run({"in": str(folder / "converted/some/one"), "out": str(folder / "b.zarr")})
    back = ReplayBuffer.open(folder / "b.zarr")
    assert back.attrs == buffer.attrs
    for key in buffer.keys:
        if key != "img" or quality == "lossless":
            assert np.array_equal(back[key][:], buffer[key][:]), key
