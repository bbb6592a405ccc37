"""Recording that cannot be spoiled: what was kept is there, whatever happens afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.datasets.batches.columns import ObsKey, load, load_cached
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.datasets.record.writer import EpisodeWriter
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.disk import Disk
from action_diffusion.errors import InputError

FIELDS = {"image": ("u1", (24, 24, 3)), "state": ("f4", (5,)), "done": ("?", ())}
ATTRS = {"control_rate": 10.0}
DEEDS = ("keep", "discard", "undo", "reopen", "leave")


def step(number: int) -> dict[str, Any]:
    """As many different ones as there are colours, and a picture that video keeps to within a few levels."""
    image = np.full((24, 24, 3), number % 83 * 3, np.uint8)
    return {"image": image, "state": np.full(5, number, np.float32), "done": np.bool_(number % 7 == 0)}


def check(buffer: ReplayBuffer, episodes: list[list[int]]) -> None:
    """The buffer holds these steps."""
    assert buffer.episode_ends.tolist() == np.cumsum([len(episode) for episode in episodes]).tolist()
    expected = [step(number) for episode in episodes for number in episode]
    for key in FIELDS:
        values = np.stack([row[key] for row in expected]).astype(int)
        assert np.abs(buffer[key][:].astype(int) - values).max() <= (1 if key == "image" else 0)


@pytest.mark.slow
@settings(deadline=None, max_examples=10)
@given(
    st.lists(
        st.tuples(st.integers(1, 45), st.sampled_from(["keep", "discard", "undo", "reopen", "leave"])), max_size=7
    ),
    st.booleans(),
)
def test_whatever_is_done(tmp_path_factory, deeds, video):
    """Add some steps, and then keep or discard them, undo the last, close and open, or leave the episode open."""
    path = tmp_path_factory.mktemp("recorder") / "demos.zarr"
    videos = ["image"] if video else []
    writer = EpisodeWriter(path, FIELDS, ATTRS, videos)
    episodes: list[list[int]] = []
    number = 0
    for n, deed in deeds:
        added = list(range(number, number + n))
        number += n
        for i in added:
            writer.add({key: np.asarray(value) for key, value in step(i).items()})
        writer.flush()
        if deed == "keep":
            assert writer.keep() == len(episodes)
            episodes.append(added)
            check(ReplayBuffer.open(path), episodes)
            continue
        if deed == "leave":
            writer.close()
            writer = EpisodeWriter(path, FIELDS, ATTRS, videos)
            assert writer.n_steps == n
            writer.keep()
            episodes.append(added)
            continue
        writer.discard()
        if deed == "undo" and episodes:
            episodes.pop()
            assert writer.undo() == len(episodes)
        if deed == "reopen":
            writer.close()
            if episodes:
                check(ReplayBuffer.open(path), episodes)
            writer = EpisodeWriter(path, FIELDS, ATTRS, videos)
        assert (writer.n_episodes, writer.n_steps) == (len(episodes), 0)
    writer.close()
    assert path.exists() == bool(episodes)
    if episodes:
        check(ReplayBuffer.open(path), episodes)
        assert len(list(path.glob("videos/image/*.mp4"))) == (len(episodes) if video else 0)


@pytest.mark.parametrize("video", [(), ("image",)])
def test_keep_discard_undo(tmp_path, video):
    path = tmp_path / "demos.zarr"
    with Recorder.open(path, FIELDS, ATTRS, video=video) as recorder:
        for first, n, kept in ((0, 3, True), (3, 4, False), (3, 2, True), (5, 6, True)):
            for number in range(first, first + n):
                recorder.add(step(number))
            assert recorder.n_steps == n
            recorder.keep() if kept else recorder.discard()
            assert recorder.n_steps == 0
        assert recorder.undo() == 2
    buffer = ReplayBuffer.open(path)
    check(buffer, [[0, 1, 2], [3, 4]])
    assert buffer.attrs == ATTRS
    assert list(tmp_path.iterdir()) == [path]  # the lock is gone
    if not video:
        buffer.append({key: np.stack([step(number)[key] for number in (5, 6)]) for key in FIELDS})
        check(ReplayBuffer.open(path), [[0, 1, 2], [3, 4], [5, 6]])
    with Recorder.open(path, FIELDS, ATTRS, video=video) as recorder:
        recorder.add(step(9))
        assert recorder.keep() == len(buffer.episode_ends)


def test_what_others_wrote_is_recorded_on(tmp_path):
    """A buffer that was saved, and one that grew by whole episodes; then it grows in both ways, in turn."""
    first = {key: np.stack([step(number)[key] for number in range(3)]) for key in FIELDS}
    ReplayBuffer.from_arrays(first, [3], ATTRS).save(tmp_path / "a.zarr")
    for number in (3, 5):
        with Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS) as recorder:
            recorder.add(step(number))
            recorder.keep()
        ReplayBuffer.open(tmp_path / "a.zarr").append({key: step(number + 1)[key][None] for key in FIELDS})
    check(ReplayBuffer.open(tmp_path / "a.zarr"), [[0, 1, 2], [3], [4], [5], [6]])
    ReplayBuffer.open(tmp_path / "a.zarr").save(tmp_path / "a.zarr.zip")
    with pytest.raises(InputError, match="only a Zarr v3 folder can grow"):
        Recorder.open(tmp_path / "a.zarr.zip", FIELDS, ATTRS)


def test_a_buffer_that_is_damaged_is_not_recorded_on(tmp_path):
    with Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS) as recorder:
        recorder.add(step(0))
        recorder.keep()
    (tmp_path / "a.zarr" / "data" / "state" / "zarr.json").write_text("{")
    for _ in range(2):
        with pytest.raises(InputError, match=r"cannot be read, the file is damaged"):
            Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS)


def test_an_episode_that_is_open_stays_aside(tmp_path):
    path = tmp_path / "demos.zarr"
    with Recorder.open(path, FIELDS, ATTRS) as recorder:
        recorder.add(step(0))
        recorder.keep()
        recorder.add(step(1))
        recorder.add(step(2))
    check(ReplayBuffer.open(path), [[0]])
    with Recorder.open(path, FIELDS, ATTRS) as recorder:
        assert recorder.n_steps == 2
        with pytest.raises(InputError, match="2 steps were left by an interruption: keep or discard them"):
            recorder.add(step(3))
        recorder.discard()
        recorder.add(step(3))
        recorder.keep()
    check(ReplayBuffer.open(path), [[0], [3]])


@pytest.mark.slow
def test_the_second_writer_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "a.zarr"
    again = f"""
from action_diffusion.disk import Disk
from action_diffusion.datasets.batches.columns import ObsKey, load, load_cached
from action_diffusion.datasets.record.recorder import Recorder
Recorder.open({str(path)!r}, {FIELDS}, {ATTRS})"""
    with Recorder.open(path, FIELDS, ATTRS) as recorder:
        other = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
        assert "is being written by process" in other.stderr
        assert "pytest" in other.stderr
        recorder.add(step(0))
        recorder.keep()
        with pytest.raises(InputError, match="is being written by process"):
            ReplayBuffer.open(path).append({key: np.asarray([step(1)[key]]) for key in FIELDS})
    Recorder.open(path, FIELDS, ATTRS).close()
    check(ReplayBuffer.open(path), [[0]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, "has state, done; it must have image, state, done"),
        ({"state": np.zeros(4)}, r"state is \[4\]; it must be \[5\]"),
        ({"state": np.full(5, np.nan)}, "state is NaN"),
        ({"state": np.full(5, 1e300)}, "state is infinite"),
        ({"image": np.full((24, 24, 3), 256)}, "image does not fit uint8"),
        ({"state": "north"}, "only numbers can be used"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_and_nothing_else(tmp_path, changed, message):
    with Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS) as recorder:
        recorder.add(step(0))
        wrong = {key: value for key, value in (step(1) | changed).items() if value is not None}
        with pytest.raises(InputError, match=message):
            recorder.add(wrong)
        recorder.add(step(1))
        recorder.keep()
    check(ReplayBuffer.open(tmp_path / "a.zarr"), [[0, 1]])


@pytest.mark.parametrize(
    ("fields", "attrs", "video", "message"),
    [
        (FIELDS | {"state": ("f4", (6,))}, ATTRS, (), r"other columns: state is \['<f4', \[5\]\], not"),
        (FIELDS, {"control_rate": 20}, (), "other attributes: control_rate is 10.0, not 20"),
        (FIELDS, ATTRS, ("image",), "other columns: image"),
        (FIELDS, ATTRS, ("state",), "a video has frames uint8"),
        (FIELDS, ATTRS, ("front",), "no field 'front'"),
        (FIELDS | {"a/b": ("f4", ())}, ATTRS, (), "cannot be called 'a/b'"),
        (FIELDS | {"a": ("S4", ())}, ATTRS, (), "only numbers"),
        (FIELDS, {"control_rate": 0}, (), "control_rate is 0; it must be a number of steps per second"),
    ],
)
def test_another_file_is_not_spoiled(tmp_path, fields, attrs, video, message):
    path = tmp_path / "a.zarr"
    with Recorder.open(path, FIELDS, ATTRS) as recorder:
        recorder.add(step(0))
        recorder.keep()
    with pytest.raises(InputError, match=message):
        Recorder.open(path, fields, attrs, video=video)
    check(ReplayBuffer.open(path), [[0]])


FULL = """
import resource, sys
import numpy as np
from action_diffusion.disk import Disk
from action_diffusion.datasets.batches.columns import ObsKey, load, load_cached
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.errors import InputError
noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
fields = {"image": ("u1", (64, 64, 3)), "state": ("f4", (5,))}
recorder = Recorder.open(sys.argv[1], fields, {}, video=sys.argv[2:])
for i in range(10):
    recorder.add({"image": noise[i], "state": np.zeros(5)})
recorder.keep()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    for i in range(10000):
        recorder.add({"image": noise[i % 60], "state": np.zeros(5)})
except InputError as error:
    print(error)
try:
    recorder.keep()
except InputError as error:
    print(error)
recorder.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("video", [(), ("image",)])
def test_a_disk_that_refuses(tmp_path, video):
    path = tmp_path / "a.zarr"
    words = [sys.executable, "-c", FULL, str(path), *video]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == 2 * [
        f"cannot write {path}: File too large (committed episodes: 1, all intact)"
    ], done.stderr
    assert done.stderr == ""
    buffer = ReplayBuffer.open(path)
    assert buffer.episode_ends.tolist() == [10]
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    assert np.abs(buffer["image"][:].astype(int) - noise[:10]).mean() < 8  # noise is the worst for video
    fields = {"image": ("u1", (64, 64, 3)), "state": ("f4", (5,))}
    with Recorder.open(path, fields, {}, video=video) as recorder:
        if recorder.n_steps:
            recorder.keep()
        recorder.add({"image": noise[0], "state": np.zeros(5)})
        recorder.keep()
    assert ReplayBuffer.open(path).n_episodes >= 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(recorder: Recorder, noise: np.ndarray) -> None:
    for number in range(10000):
        recorder.add({"image": noise[number % 100], "state": np.full(5, number % 100)})
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("video", [(), ("image",)])
def test_a_full_disk(small_disk, video):
    """The error comes with one of the next calls. Once there is room again, it goes on where it stopped."""
    path, random = small_disk / "a.zarr", np.random.default_rng(0)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2 << 20))
    fields = {"image": ("u1", (64, 64, 3)), "state": ("f4", (5,))}
    noise = random.integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)  # fewer would be compressed to little
    with Recorder.open(path, fields, ATTRS, video=video) as recorder:
        for _ in range(2):
            for number in range(10):
                recorder.add({"image": noise[number], "state": np.full(5, number)})
            recorder.keep()
        with pytest.raises(InputError, match=r"No space left on device \(committed episodes: 2, all intact\)"):
            fill(recorder, noise)
        before = ReplayBuffer.open(path)["image"][:]
    assert ReplayBuffer.open(path).episode_ends.tolist() == [10, 20]
    ballast.unlink()
    with Recorder.open(path, fields, ATTRS, video=video) as recorder:
        n_steps = recorder.n_steps
        assert n_steps > 0
        recorder.keep()
        recorder.add({"image": noise[0], "state": np.zeros(5)})
        recorder.keep()
    buffer = ReplayBuffer.open(path)
    assert buffer.episode_ends.tolist() == [10, 20, 20 + n_steps, 21 + n_steps]
    np.testing.assert_array_equal(buffer["image"][:20], before)
    assert buffer["state"][20 : 20 + n_steps, 0].tolist() == [number % 100 for number in range(n_steps)]
    errors = np.abs(buffer["image"][20 : 20 + n_steps].astype(int) - noise[np.arange(n_steps) % 100])
    assert errors.mean() < (8 if video else 1e-9)


def test_an_error_that_nobody_was_told_is_told_in_the_end(tmp_path, monkeypatch):
    recorder = Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Disk, "write", refuse)
    recorder.add(step(0))
    with pytest.raises(InputError, match="No space left on device"):
        recorder.close()
    recorder.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.slow
def test_video_is_exact_in_number_and_close_in_colour(tmp_path):
    path, random = tmp_path / "a.zarr", np.random.default_rng(0)
    pictures = pushts(57)
    with Recorder.open(path, {"image": ("u1", (96, 96, 3)), "a": ("f4", ())}, ATTRS, video=["image"]) as recorder:
        for first, end in ((0, 25), (25, 26), (26, 57)):
            for number in range(first, end):
                recorder.add({"image": pictures[number], "a": float(number)})
            recorder.keep()
    column = ReplayBuffer.open(path)["image"]
    errors = ((column[:].astype(float) - pictures) ** 2).mean((1, 2, 3))
    assert 10 * np.log10(255**2 / errors.max()) >= 40
    for index in (5, -1, slice(20, 30), slice(None, None, 7), random.integers(0, 57, (3, 4)), (slice(3, 9), 5, 7)):
        np.testing.assert_array_equal(column[index], column[:][index])
    assert column.shape == (57, 96, 96, 3)
    images = ObsKey("image", None, "image")
    for loaded in (load(ReplayBuffer.open(path), images), load_cached(ReplayBuffer.open(path), images, tmp_path)):
        np.testing.assert_array_equal(loaded, column[:])
    ReplayBuffer.open(path).save(tmp_path / "b.zarr")
    assert ReplayBuffer.open(tmp_path / "b.zarr").episode_ends.tolist() == [25, 26, 57]


def pushts(n: int) -> np.ndarray:
    """Pictures [n, 96, 96, 3] of sharp edges in full colours, that move."""
    pictures = np.full((n, 96, 96, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        picture[20 + number % 50 :, 40:55] = (144, 238, 144)
        picture[10:25, number : number + 40] = (119, 136, 153)
        picture[70 - number : 80 - number, 60:70] = (65, 105, 225)
    return pictures


def test_a_video_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.zarr"
    with Recorder.open(path, FIELDS, ATTRS, video=["image"]) as recorder:
        for number in range(20):
            recorder.add(step(number))
        recorder.keep()
    file: Path = path / "videos" / "image" / "episode_000000.mp4"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"episode_000000.mp4 has \d+ frames, its episode has 20 steps"):
        ReplayBuffer.open(path)["image"][3]
    file.unlink()
    with pytest.raises(InputError, match=r"episode_000000.mp4 cannot be read"):
        ReplayBuffer.open(path)["image"][3]
    with pytest.raises(InputError, match="has videos: record to it"):
        ReplayBuffer.open(path).append({key: np.asarray([step(1)[key]]) for key in FIELDS})
