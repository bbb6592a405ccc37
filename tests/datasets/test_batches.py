"""Batches against a naive loop over samples, in every mode; what is loaded is checked and stays small."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion import memory
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches import columns
from action_diffusion.datasets.batches.loader import Batch, BatchSource, ObsKey, random_crop_offsets
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.errors import InputError
from action_diffusion.memory import Mode

ROOT = Path(__file__).resolve().parents[2]
TO, HORIZON, TA, GAMMA = 2, 8, 4, 0.9
OBSERVATIONS = {
    "front": ObsKey("img", None, "image"),
    "wrist": ObsKey("wrist", None, "image"),
    "xy": ObsKey("state", (3, 0), "state"),
    "all": ObsKey("state", None, "state"),
    "points": ObsKey("points", None, "state"),
    "gripper": ObsKey("gripper", None, "state"),
}
LENGTHS = [12, 1, 3, 20]


def arrays() -> dict[str, np.ndarray]:
    rng, n = np.random.default_rng(0), sum(LENGTHS)
    return {
        "action": rng.standard_normal((n, 2)),
        "gripper": rng.random(n),
        "img": rng.integers(0, 256, (n, 10, 8, 3)).astype(np.float32),
        "points": rng.random((n, 3, 2)),
        "reward": np.where(np.isin(np.arange(n), (11, n - 1)), 1.0, rng.random(n)),  # two episodes succeed
        "state": rng.standard_normal((n, 4)).astype(np.float32),
        "unused": np.full((n, 2), np.nan),
        "wrist": rng.integers(0, 256, (n, 7, 9, 3), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batches") / "saved.zarr"
    ReplayBuffer.from_arrays(arrays(), np.cumsum(LENGTHS)).save(path)
    return path


def source(buffer: ReplayBuffer, **settings_: Any) -> BatchSource:
    settings: dict[str, Any] = {
        "buffer": buffer,
        "windows": make_windows(buffer.episode_ends, horizon=HORIZON, n_obs_steps=TO, n_action_steps=TA),
        "observations": OBSERVATIONS,
        "action_key": "action",
        "n_obs_steps": TO,
        "reward_key": "reward",
        "gamma": GAMMA,
    }
    return BatchSource(**settings | settings_)


@pytest.fixture(scope="module", params=["device", "memory", "disk"])
def batches(request: pytest.FixtureRequest, saved: Path) -> BatchSource:
    limit = 1e-6 if request.param == "disk" else None
    made = source(ReplayBuffer.open(saved), mode=request.param, memory_gb=limit, cache_dir=saved.parent / "cache")
    assert made.mode == request.param
    return made


def naive_sample(index: int, crop: tuple[int, int] | None, corner: tuple[int, int] | None) -> dict:
    """One window, row by row."""
    data, ends = arrays(), np.cumsum(LENGTHS)
    windows = make_windows(ends, horizon=HORIZON, n_obs_steps=TO, n_action_steps=TA)
    start, first, end = (int(values[index]) for values in (windows.start, windows.first, windows.end))

    def row(step: int) -> int:
        return min(max(step, first), end - 1)

    def cut(image: np.ndarray) -> np.ndarray:
        if crop is None:
            return image
        top, left = corner or ((image.shape[0] - crop[0]) // 2, (image.shape[1] - crop[1]) // 2)
        return image[top : top + crop[0], left : left + crop[1]]

    def observe(last: int) -> dict[str, np.ndarray]:
        rows = [row(step) for step in range(last - TO + 1, last + 1)]
        return {
            "front": np.stack([cut(data["img"][i]) for i in rows]),
            "wrist": np.stack([cut(data["wrist"][i]) for i in rows]),
            "xy": np.stack([data["state"][i][[3, 0]] for i in rows]),
            "all": np.stack([data["state"][i] for i in rows]),
            "points": np.stack([data["points"][i] for i in rows]),
            "gripper": np.stack([data["gripper"][i : i + 1] for i in rows]),
        }

    now = start + TO - 1
    n = min(TA, end - now)
    return {
        "obs": observe(now),
        "action": np.stack([data["action"][row(step)] for step in range(start, start + HORIZON)]),
        "mask": np.array([first <= step < end for step in range(start, start + HORIZON)]),
        "critic": {
            "reward": np.float64(sum(GAMMA**i * data["reward"][now + i] for i in range(n))),
            "next_obs": observe(now + n),
            "done": np.bool_(now + n == end and data["reward"][end - 1] >= 1),
            "truncated": np.bool_(now + n == end and data["reward"][end - 1] < 1),
            "discount": np.float64(GAMMA**n),
        },
    }


def assert_equal(batch: Batch, samples: list[dict]) -> None:
    def compare(found: object, expected: list) -> None:
        if isinstance(found, dict):
            assert found.keys() == expected[0].keys()
            for key, value in found.items():
                compare(value, [sample[key] for sample in expected])
        else:
            assert isinstance(found, torch.Tensor)
            np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-6)

    found = asdict(batch)
    assert found.pop("gain") is None
    compare(found, samples)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_batches_are_those_of_a_naive_loop(batches: BatchSource, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(batches) - 1), min_size=1, max_size=5))
    crop = data.draw(st.sampled_from([None, (6, 5), (7, 8), (1, 1)]))
    corners: list[tuple[int, int] | None] = [None] * len(indices)
    if crop and data.draw(st.booleans()):
        corner = st.tuples(st.integers(0, 7 - crop[0]), st.integers(0, 8 - crop[1]))
        corners = [data.draw(corner) for _ in indices]
    offsets = np.array(corners) if corners[0] else None
    batch = batches.gather(np.array(indices), crop=crop, offsets=offsets, critic=True)
    assert_equal(batch, [naive_sample(i, crop, c) for i, c in zip(indices, corners, strict=True)])
    assert batch.action.dtype == batch.obs["xy"].dtype == torch.float32
    assert batch.obs["front"].dtype == batch.obs["wrist"].dtype == torch.uint8
    assert batch.mask.dtype == torch.bool


CHAIN = {"state": np.arange(7.0)[:, None], "action": np.zeros((7, 1)), "reward": np.array([0, 0, 1, 0, 0.2, 0, 0.5])}
"""Two episodes: rows 0 to 2, which succeeds, and 3 to 6, which breaks off; the last says of itself that it ended."""


@pytest.mark.parametrize(
    ("options", "rewards", "done", "truncated"),
    [
        ({}, [0, 0.5, 1, 0.1, 0.2, 0.25, 0.5], [1, 2], [5, 6]),
        ({"counted": "dense"}, [-1.5, -1, 0, -1.4, -1.3, -1.25, -0.5], [1, 2], [5, 6]),
        ({"counted": "success"}, [-1.5, -1, 0, -1.5, -1.5, -1.5, -1], [1, 2], [5, 6]),
        ({"terminal_key": "over"}, [0, 0.5, 1, 0.1, 0.2, 0.25, 0.5], [5, 6], [1, 2]),
    ],
    ids=["given", "dense", "success", "a column of ends"],
)
def test_an_end_is_told_from_a_recording_that_breaks_off(options, rewards, done, truncated) -> None:
    over = np.array([False, True, False, False, False, False, True])  # in the middle it says nothing
    buffer = ReplayBuffer.from_arrays({**CHAIN, "over": over}, np.array([3, 7]))
    made = BatchSource(
        buffer=buffer,
        windows=make_windows(np.array([3, 7]), horizon=2, n_obs_steps=1, n_action_steps=2),
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        n_obs_steps=1,
        reward_key="reward",
        gamma=0.5,
        **options,
    )
    found = made.gather(np.arange(len(made)), critic=True).critic
    assert found is not None
    at = np.arange(7)  # the row now of each window
    np.testing.assert_allclose(found.reward, rewards, rtol=1e-6)
    assert at[found.done.numpy()].tolist() == done
    assert at[found.truncated.numpy()].tolist() == truncated
    assert found.discount.tolist() == [0.25, 0.25, 0.5, 0.25, 0.25, 0.25, 0.5]


def test_other_windows_share_the_arrays(batches: BatchSource) -> None:
    windows = batches.windows
    chosen = make_windows(
        np.cumsum(LENGTHS), horizon=HORIZON, n_obs_steps=TO, n_action_steps=TA, episodes=np.array([3])
    )
    other = batches.with_windows(chosen)
    assert (len(other), len(batches)) == (len(chosen), len(windows))
    everything = batches.gather(np.arange(len(windows) - len(chosen), len(windows)))
    assert torch.equal(other.gather(np.arange(len(chosen))).action, everything.action)


def test_all_rows_are_at_hand_for_statistics(batches: BatchSource) -> None:
    data = arrays()
    np.testing.assert_array_equal(batches.values("action"), data["action"].astype(np.float32))
    np.testing.assert_array_equal(batches.values("xy"), data["state"][:, [3, 0]])
    assert batches.frame_sizes == {"front": (10, 8), "wrist": (7, 9)}


def test_crops_that_do_not_fit_are_refused(batches: BatchSource) -> None:
    with pytest.raises(InputError, match=r"crop \[8, 5\] is larger than the 7 x 9 images of wrist"):
        batches.gather(np.arange(2), crop=(8, 5))
    for bad in ([0, -1], [9, 0]):
        with pytest.raises(ValueError, match="offsets must be"):
            batches.gather(np.arange(2), crop=(2, 2), offsets=np.array([[0, 0], bad]))


def test_views_of_images_are_cropped_right() -> None:
    flipped = source(with_image(lambda images: images.astype(np.uint8)[:, ::-1, ::2]))
    copied = source(with_image(lambda images: images.astype(np.uint8)[:, ::-1, ::2].copy()))
    one, other = (made.gather(np.arange(9), crop=(5, 3)).obs["front"] for made in (flipped, copied))
    assert torch.equal(one, other)


def test_random_offsets_reach_every_corner_and_no_further() -> None:
    offsets = random_crop_offsets(1000, (10, 8), (8, 8), np.random.default_rng(0))
    assert offsets.dtype == np.int64
    assert set(map(tuple, offsets)) == {(0, 0), (1, 0), (2, 0)}


def test_one_offset_serves_all_windows_and_rows_outside_are_refused(batches) -> None:
    several = batches.gather(np.array([0, 3]), crop=(5, 4), offsets=np.array([[1, 2], [1, 2]]))
    one = batches.gather(np.array([0, 3]), crop=(5, 4), offsets=np.array([1, 2]))
    assert torch.equal(one.obs["front"], several.obs["front"])
    longer = make_windows(np.array([100]), horizon=HORIZON, n_obs_steps=TO, n_action_steps=TA)
    with pytest.raises(IndexError):
        batches.with_windows(longer).gather(np.array([90]), crop=(5, 4))


def with_image(change: Callable[[np.ndarray], np.ndarray]) -> ReplayBuffer:
    data = arrays()
    return ReplayBuffer.from_arrays({**data, "img": change(data["img"])}, np.cumsum(LENGTHS))


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(images: np.ndarray) -> np.ndarray:
        images[17, 2, 3, 1] = value
        return images

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(np.nan), "data/img is NaN at row 17, column 2, 3, 1"),
        (put(np.inf), "data/img is infinite at row 17"),
        (put(-1), r"data/img row 17 has values -1 to 25\d that are not whole numbers from 0 to 255"),
        (put(256), r"data/img row 17 has values \d to 256"),
        (put(0.5), "data/img row 17 has values .* not whole numbers"),
        (lambda images: images / 127.5 - 1, r"row 0 has values .* this looks like -1\.\.1"),
        (lambda images: images.astype(np.uint16) * 257, r"values \d+ to 6\d{4} .* 16 bits a colour: divide by 257"),
        (lambda images: images.astype(np.int16) - 9, r"row 0 has values -\d to"),
        (lambda images: images[..., [0, 1, 2, 0, 1]], r"shape \[36, 10, 8, 5\], images must be"),
        (lambda images: images[..., :1], r"shape \[36, 10, 8, 1\], images must be \[N, H, W, 3\]"),
        (lambda images: images[..., 0], r"shape \[36, 10, 8\], images must be"),
    ],
)
def test_wrong_images_are_named(change: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        source(with_image(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda images: images.transpose(0, 3, 1, 2), lambda images: images),
        (lambda images: np.concatenate([images, images[..., :1]], axis=3), lambda images: images),
        (lambda images: images[..., 0], lambda images: images[..., [0, 0, 0]]),
        (lambda images: images[..., :1], lambda images: images[..., [0, 0, 0]]),
        (lambda images: images[:, None, ..., 0], lambda images: images[..., [0, 0, 0]]),
        (lambda images: images.astype(np.float32) / 255, lambda images: images),
        (lambda images: (images.transpose(0, 3, 1, 2) / 255).astype(np.float16), lambda images: images),
        (lambda images: (images > 99).astype(np.float32), lambda images: (images > 99) * 255),
    ],
)
def test_pictures_of_other_layouts_are_seen_as_they_are(change: Callable, seen: Callable, tmp_path: Path) -> None:
    images = arrays()["img"].astype(np.uint8)
    buffer = ReplayBuffer.from_arrays({**arrays(), "img": change(images)}, np.cumsum(LENGTHS))
    buffer.save(tmp_path / "buffer")
    for one in (buffer, ReplayBuffer.open(tmp_path / "buffer")):
        np.testing.assert_array_equal(source(one).values("front"), seen(images))


def test_actions_of_several_axes_are_vectors() -> None:
    made = source(ReplayBuffer.from_arrays(arrays(), np.cumsum(LENGTHS)), action_key="points")
    np.testing.assert_array_equal(made.values("action"), arrays()["points"].reshape(-1, 6).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.int64])
def test_whole_numbers_of_any_type_are_images(dtype: type) -> None:
    made = source(with_image(lambda images: images.astype(dtype)))
    expected = source(with_image(lambda images: images)).gather(np.arange(5))
    assert torch.equal(made.gather(np.arange(5)).obs["front"], expected.obs["front"])


@pytest.mark.parametrize("mode", ["device", "memory", "disk"])
def test_values_that_are_not_finite_are_named_and_leave_no_cache(tmp_path: Path, mode: Mode) -> None:
    for key, row, value, message in [
        ("action", 30, np.nan, "data/action is NaN at row 30, column 1"),
        ("state", 2, -np.inf, "data/state is infinite at row 2, column 1"),
        ("points", 8, 1e300, "data/points is infinite at row 8"),  # in float32
    ]:
        data = arrays()
        data[key][row, 1] = value if key != "state" else np.float32(value)
        ReplayBuffer.from_arrays(data, np.cumsum(LENGTHS)).save(tmp_path / key)
        with pytest.raises(InputError, match=message):
            source(ReplayBuffer.open(tmp_path / key), mode=mode, memory_gb=1e-6, cache_dir=tmp_path / "cache")
        assert not list(tmp_path.glob(f"cache/{key}-{key}-*.npy"))


def test_only_what_is_needed_is_looked_at() -> None:
    data = arrays()
    data["state"][5, 1] = np.nan
    buffer = ReplayBuffer.from_arrays(data, np.cumsum(LENGTHS))
    source(buffer, observations={"xy": OBSERVATIONS["xy"]})
    with pytest.raises(InputError, match="data/state is NaN"):
        source(buffer, observations={"xy": OBSERVATIONS["all"]})


def test_keys_and_columns_that_do_not_exist_are_named(saved: Path) -> None:
    buffer = ReplayBuffer.open(saved)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"observations": {"a": ObsKey("stat", None, "state")}}, "no key 'stat'"),
        ({"observations": {"a": ObsKey("state", (0, 4), "state")}}, "data/state has columns 0 to 3, not 4"),
        ({"reward_key": "rewards"}, "no key 'rewards'"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            source(buffer, **changes)
    with pytest.raises(InputError, match="needs rewards"):
        source(buffer, reward_key=None).gather(np.arange(2), critic=True)


def test_the_place_follows_from_the_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 10_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1_000, 2_000))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [memory.choose_mode(n, cpu) for n in (7_000, 7_001)] == ["memory", "disk"]
    assert [memory.choose_mode(n, cuda) for n in (500, 501, 7_001)] == ["device", "memory", "disk"]
    assert [memory.choose_mode(n, cuda, 2e-6) for n in (2_000, 2_001)] == ["device", "disk"]


def test_free_memory_is_a_plausible_number() -> None:
    assert 1e7 < memory.free_memory() < 1e14


def test_a_cache_is_made_once_and_again_when_the_file_changes(saved: Path, tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(saved)
    buffer.save(tmp_path / "mine")
    wanted, cache = OBSERVATIONS["front"], tmp_path / "cache"
    for _ in range(2):
        columns.load_cached(ReplayBuffer.open(tmp_path / "mine"), wanted, cache)
    (first,) = cache.glob("*.npy")
    written = first.stat().st_mtime_ns
    columns.load_cached(ReplayBuffer.open(tmp_path / "mine"), wanted, cache)
    assert first.stat().st_mtime_ns == written
    ReplayBuffer.open(tmp_path / "mine").drop([0])
    again = columns.load_cached(ReplayBuffer.open(tmp_path / "mine"), wanted, cache)
    assert len(again) == buffer.n_steps - LENGTHS[0]
    (second,) = cache.glob("*.npy")
    assert second != first


def test_a_disk_that_is_full_is_one_line_and_no_file(saved: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*saved-img-.*npy"):
            columns.load_cached(ReplayBuffer.open(saved), OBSERVATIONS["front"], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.npy"))


def test_a_disk_too_small_is_refused_before_anything_is_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(InputError, match=r"decoding img needs 0\.00 GB in .*: make room, or set XDG_CACHE_HOME"):
        columns.load_cached(ReplayBuffer.open(saved), OBSERVATIONS["front"], tmp_path)


_STREAM = """
import sys, numpy as np
from pathlib import Path
from action_diffusion.datasets.batches.loader import *
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.windows import make_windows

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1e6

buffer = ReplayBuffer.open(sys.argv[1])
before = private()
source = BatchSource(
    buffer=buffer,
    windows=make_windows(buffer.episode_ends, horizon=16, n_obs_steps=2, n_action_steps=8),
    observations={"img": ObsKey("img", None, "image")}, action_key="action", n_obs_steps=2,
    memory_gb=0.1, cache_dir=Path(sys.argv[2]),
)
for start in range(0, len(source) - 64, 64):
    source.gather(np.arange(start, start + 64), crop=(84, 84))
print(source.mode, source.n_bytes / 1e9, private() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from Linux's /proc")
def test_streaming_stays_within_its_memory(tmp_path: Path) -> None:
    frames = np.broadcast_to(np.arange(5000)[:, None, None, None], (5000, 96, 96, 3)).astype(np.uint8)
    buffer = ReplayBuffer.from_arrays({"img": frames, "action": np.zeros((5000, 2), np.float32)}, [5000])
    buffer.save(tmp_path / "large")
    command = [sys.executable, "-c", _STREAM, str(tmp_path / "large"), str(tmp_path / "cache")]
    mode, size, used = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert mode == "disk"
    assert float(size) > 0.13
    assert float(used) < 0.1


def test_the_benchmark_runs_on_little(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "speed" / "gather.py"))
    benchmark["main"]([f"data={saved}", "seconds=0.05", "batch_size=8", "crop=6"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["memory:", "uint8", "float32", "resident"]
    assert benchmark["main"](["sceonds=1"]) == 2
    assert capsys.readouterr().err == "error: unknown option 'sceonds': did you mean seconds?\n"


@pytest.mark.slow
def test_the_human_file_is_gathered_fast_and_fits() -> None:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: the folder with pusht_cchi_v7_replay.zarr.zip")
    path = Path(folder) / "pusht_cchi_v7_replay.zarr.zip"
    command = [sys.executable, "-m", "benchmarks.speed.gather", f"data={path}", "seconds=0.4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    _, uint8, _, resident = done.stdout.splitlines()
    assert float(uint8.split()[1].replace(",", "")) >= 5000
    assert float(resident.split()[1]) <= 1.5
