"""Other formats: what comes back is what was there, a kill costs nothing, and what does not fit together is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from action_diffusion.commands import data_convert
from action_diffusion.datasets.formats import conversion, journal
from action_diffusion.datasets.formats.columns import PiecewiseColumn, pieces
from action_diffusion.datasets.formats.folder.csv_rows import grouped
from action_diffusion.datasets.formats.lerobot.stats import ColumnStatistics
from action_diffusion.datasets.formats.registry import NAMES, detected
from action_diffusion.datasets.formats.video import EncodedVideoWriter, video_info
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

pytest.importorskip("imagecodecs")
pytest.importorskip("pyarrow")
pytest.importorskip("h5py")

ENDINGS = {"zarr": ".zarr", "zarr2": ".zarr.zip", "umi": ".zarr.zip", "robomimic": ".hdf5"}
ATTRS = {"control_rate": 12.0, "units": {"state": "m"}, "task": "push", "seeds": [1, 2]}


def arrays(lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    random, n = np.random.default_rng(seed), sum(lengths)
    return {
        "state": random.normal(size=(n, 5)).astype(np.float32),
        "action": random.normal(size=(n, 2)),
        "reward": random.normal(size=n).astype(np.float32),
        "done": random.random(n) > 0.5,
        "keypoint": random.normal(size=(n, 3, 2)).astype(np.float32),
        "count": random.integers(-(2**40), 2**40, size=(n, 1)),
        "depth": random.integers(0, 2**16, size=(n, 40, 40)).astype(np.uint16),
        "img": random.integers(0, 256, size=(n, 18, 25, 3)).astype(np.float32),
        "wrist": random.integers(0, 256, size=(n, 16, 16, 3)).astype(np.uint8),
    }


def save(path: Path, lengths: list[int], attrs: dict[str, Any] | None = None, **changed: np.ndarray) -> Path:
    columns = {**arrays(lengths), **changed}
    ReplayBuffer.from_arrays(columns, np.cumsum(lengths), ATTRS if attrs is None else attrs).save(path)
    return path


def convert(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    return dict(data_convert.run({"in": str(source), "out": str(output), **options}))


def same(one: ReplayBuffer, other: ReplayBuffer, *, but: tuple[str, ...] = ()) -> None:
    assert set(one.keys) == set(other.keys)
    assert one.episode_ends.tolist() == other.episode_ends.tolist()
    for key in one.keys:
        assert one[key].dtype == other[key].dtype, key
        assert one[key].shape == other[key].shape, key
        if key not in but:
            assert np.array_equal(one[key][:], other[key][:], equal_nan=one[key].dtype.kind == "f"), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.zarr", [4, 1, 9])
    there = tmp_path / f"there{ENDINGS.get(name, '')}"
    summary = convert(source, there, format=name)
    assert detected(there) == {"zarr2": "zarr", "umi": "zarr", "lerobot21": "lerobot"}.get(name, name)
    assert (summary["episodes"], summary["steps"]) == (3, 14)
    convert(there, tmp_path / "b.zarr")
    back, before = ReplayBuffer.open(tmp_path / "b.zarr"), ReplayBuffer.open(source)
    lossy = ("img", "wrist") if name in ("lerobot", "lerobot21", "folder") else ()
    same(before, back, but=lossy)
    assert back.attrs == ATTRS
    for key in lossy:
        assert "PSNR" in summary[f"data/{key}"]
        error = back[key][:].astype(float) - before[key][:]
        assert 10 * np.log10(255**2 / (error**2).mean()) >= 40
    for key in set(before.keys) - set(lossy):
        assert summary[f"data/{key}"].startswith("identical, sha256 ")
    assert not list(tmp_path.glob(".*"))


NUMBERS = st.sampled_from(["float16", "float32", "float64", "int8", "uint16", "int64", "uint64", "bool"])


@st.composite
def buffers(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], list[int]]:
    """A few columns of any type and shape, with whatever bits, and images of any size."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    n, columns = sum(lengths), {}
    for index in range(draw(st.integers(1, 4))):
        dtype = np.dtype(draw(NUMBERS))
        row = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        count = n * int(np.prod(row, dtype=int))
        bits = np.frombuffer(
            draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)), np.uint8
        )
        values = (bits > 127) if dtype == np.bool_ else bits.view(dtype)
        columns[draw(st.sampled_from(["state", "action", f"x_{index}", f"a.{index}"]))] = values.reshape(n, *row)
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    columns["top"] = random.integers(0, 256, size=(n, *size, 3)).astype(draw(st.sampled_from(["uint8", "float32"])))
    return columns | {"action": columns.get("action", np.zeros((n, 1), np.float32))}, lengths


@pytest.mark.slow
@pytest.mark.parametrize("name", ["umi", "robomimic", "lerobot", "lerobot21", "folder"])
def test_anything_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    @settings(
        max_examples=3, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(buffers())
    def check(drawn: tuple[dict[str, np.ndarray], list[int]]) -> None:
        columns, lengths = drawn
        folder = tmp_path / "one"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ReplayBuffer.from_arrays(columns, np.cumsum(lengths)).save(folder / "a.zarr")
        there = folder / f"there{ENDINGS.get(name, '')}"
        convert(folder / "a.zarr", there, format=name, video="lossless")
        convert(there, folder / "b.zarr")
        same(ReplayBuffer.open(folder / "a.zarr"), ReplayBuffer.open(folder / "b.zarr"))

    check()


def test_the_older_layout_is_one_that_zarr_2_reads(tmp_path: Path) -> None:
    convert(save(tmp_path / "a.zarr", [3]), tmp_path / "b.zarr", format="zarr2")
    assert json.loads((tmp_path / "b.zarr/data/state/.zarray").read_text())["zarr_format"] == 2
    convert(tmp_path / "a.zarr", tmp_path / "umi.zarr.zip", format="umi")
    image: Any = zarr.open_group(zarr.storage.ZipStore(tmp_path / "umi.zarr.zip", mode="r"), mode="r")["data/wrist"]
    assert image.metadata.compressor.codec_id == "imagecodecs_jpegxl"
    assert image.chunks == (1, 16, 16, 3)
    assert ReplayBuffer.open(tmp_path / "umi.zarr.zip")["img"].dtype == np.uint8


@pytest.mark.slow
def test_a_rate_that_nobody_gave_is_said(tmp_path: Path) -> None:
    save(tmp_path / "a.zarr", [3], {})
    assert "10 Hz, assumed" in convert(tmp_path / "a.zarr", tmp_path / "l", format="lerobot")["rate"]
    convert(tmp_path / "l", tmp_path / "b.zarr")
    assert ReplayBuffer.open(tmp_path / "b.zarr").attrs == {}
    assert "rate" not in convert(tmp_path / "a.zarr", tmp_path / "m", format="lerobot", rate=25.0)
    assert json.loads((tmp_path / "m/meta/info.json").read_text())["fps"] == 25
    convert(tmp_path / "m", tmp_path / "c.zarr")
    assert ReplayBuffer.open(tmp_path / "c.zarr").attrs == {"control_rate": 25.0}


def test_tasks_in_words_come_back(tmp_path: Path) -> None:
    indices = np.array([0, 0, 1, 1, 1])
    save(tmp_path / "a.zarr", [2, 3], {"control_rate": 10, "tasks": ["push", "pull"]}, task_index=indices)
    convert(tmp_path / "a.zarr", tmp_path / "l", format="lerobot21")
    lines = (tmp_path / "l/meta/episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["tasks"] for line in lines] == [["push"], ["pull"]]
    info = json.loads((tmp_path / "l/meta/info.json").read_text())
    del info["action_diffusion"]  # as somebody else's
    (tmp_path / "l/meta/info.json").write_text(json.dumps(info))
    convert(tmp_path / "l", tmp_path / "b.zarr")
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.attrs["tasks"] == ["push", "pull"]
    assert buffer.attrs["control_rate"] == 10
    assert buffer["task_index"][:].ravel().tolist() == indices.tolist()
    assert buffer["keypoint"].shape == (5, 6)
    assert buffer["reward"].shape == (5,)
    assert buffer["img"].dtype == np.uint8
    assert {"state", "action", "wrist", "done"} <= set(buffer.keys)


def somebody_s_folder(root: Path, lengths: list[int]) -> Path:
    """CSV files with other people's headers, and a video each."""
    root.mkdir()
    random = np.random.default_rng(0)
    for number, length in enumerate(lengths):
        lines = ["time,joint_0,joint_1,gripper"] + [f"{row / 10},{row * 0.5},{-row},{row % 2}" for row in range(length)]
        (root / f"run{number}.csv").write_text("\n".join(lines) + "\n")
        with EncodedVideoWriter(
            root / f"run{number}_top.mp4", (16, 16), rate=10, quality="high", keyframe_every=5
        ) as video:
            video.add(random.integers(0, 256, size=(length, 16, 16, 3)).astype(np.uint8))
    return root


def test_somebody_else_s_folder_is_read(tmp_path: Path) -> None:
    somebody_s_folder(tmp_path / "runs", [3] * 11)
    shutil.copy(tmp_path / "runs/run1_top.mp4", tmp_path / "runs/other.mp4")
    assert convert(tmp_path / "runs", tmp_path / "a.zarr")["left_out"] == "other.mp4"
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert buffer.n_episodes == 11
    assert {key: buffer[key].shape[1:] for key in buffer.keys} == {
        "time": (),
        "joint": (2,),
        "gripper": (),
        "top": (16, 16, 3),
    }
    assert buffer["gripper"].dtype == np.int64
    assert buffer["joint"][2].tolist() == [1.0, -2.0]


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lerobot")
    convert(save(folder / "a.zarr", [4, 6]), folder / "l", format="lerobot21")
    return folder / "l"


Make = Callable[[Path, Path], Path]


def damage_lerobot(change: Callable[[Path], None]) -> Make:
    def make(lerobot: Path, tmp_path: Path) -> Path:
        shutil.copytree(lerobot, tmp_path / "l")
        change(tmp_path / "l")
        return tmp_path / "l"

    return make


def other_video(length: int, rate: float = 12) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / "videos/chunk-000/observation.images.wrist/episode_000001.mp4"
        with EncodedVideoWriter(path, (16, 16), rate=rate, quality="high", keyframe_every=2) as video:
            video.add(np.zeros((length, 16, 16, 3), np.uint8))

    return change


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return change


def damage_folder(change: Callable[[Path], object]) -> Make:
    def make(_: Path, tmp_path: Path) -> Path:
        change(somebody_s_folder(tmp_path / "runs", [3, 4]))
        return tmp_path / "runs"

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damage_lerobot(other_video(5)), "episode_000001.mp4: 5 frames, but its episodes have 6 rows"),
        (damage_lerobot(other_video(7)), "episode_000001.mp4: 7 frames, but its episodes have 6 rows"),
        (damage_lerobot(other_video(6, rate=10)), "frame 1 is 0.2 frames late for 12 Hz"),
        (damage_lerobot(lambda root: (root / "data/chunk-000/episode_000000.parquet").unlink()), "no such file"),
        (damage_lerobot(edit("meta/episodes.jsonl", '"length": 6', '"length": 5')), "6 rows, but meta/episodes.jsonl"),
        (damage_lerobot(edit("meta/info.json", '"total_frames": 10', '"total_frames": 11')), "says 2 with 11"),
        (damage_lerobot(edit("meta/info.json", '"v2.1"', '"v1.6"')), "v2.0, v2.1 and v3.0 are read"),
        (damage_lerobot(edit("meta/info.json", '"fps": 12', '"fps": 6')), "row 2 has timestamp"),
        (damage_lerobot(edit("meta/info.json", '"name": "action"', '"name": "actoin"')), "no 'actoin'"),
        (damage_lerobot(edit("meta/info.json", '"codebase', "[")), "cannot be read"),
        (damage_lerobot(edit("meta/episodes.jsonl", '"length"', '"len"')), "cannot be read"),
        (damage_folder(edit("run1.csv", "0.3,1.5,-3,1\n", "")), "run1_top.mp4: 4 frames, but run1.csv has 3 rows"),
        (damage_folder(edit("run1.csv", "0.3,1.5,-3,1", "0.3,1.5,-3")), "run1.csv: line 5 has 3 columns, the header 4"),
        (damage_folder(edit("run1.csv", "0.3,1.5,-3,1", "0.3,x,-3,1")), "joint: 'x' in row 3 is no float64"),
        (damage_folder(edit("run1.csv", "gripper", "joint_0")), "column 'joint_0' is there twice"),
        (damage_folder(edit("run1.csv", "gripper", "grip")), "is missing"),
        (damage_folder(lambda root: (root / "run1_top.mp4").unlink()), "top is missing"),
        (damage_folder(lambda root: (root / "run1_top.mp4").write_bytes(b"no video")), "run1_top.mp4 cannot be read"),
        (lambda _, tmp_path: tmp_path, "no known format"),
        (lambda _, tmp_path: tmp_path / "nothing", "no such file or folder"),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Make, message: str, lerobot: Path, tmp_path: Path) -> None:
    source = make(lerobot, tmp_path)
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "out.zarr")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("format", ["lerobot", "lerobot21"])
def test_a_camera_s_rate_is_called_the_whole_one_that_it_nearly_is(format: str, tmp_path: Path) -> None:
    action = np.arange(8.0).reshape(4, 2)
    ReplayBuffer.from_arrays({"action": action}, [4], attrs={"control_rate": 29.97}).save(tmp_path / "a.zarr")
    with pytest.raises(InputError, match=r"not 29\.97 Hz: rate=30 keeps every row, and calls them that"):
        convert(tmp_path / "a.zarr", tmp_path / "l", format=format)
    said = convert(tmp_path / "a.zarr", tmp_path / "l", format=format, rate=30.0)
    assert "30 Hz for 29.97 Hz: every row, 0.1% faster" in said["note"]
    assert json.loads((tmp_path / "l" / "meta" / "info.json").read_text())["fps"] == 30
    convert(tmp_path / "l", tmp_path / "b.zarr")
    back = ReplayBuffer.open(tmp_path / "b.zarr")
    assert (back["action"][:].tolist(), back.attrs["control_rate"]) == (action.tolist(), 30.0)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"img": np.full((4, 9, 9, 3), 0.5)}, {"format": "lerobot"}, "this looks like 0..1: multiply by 255"),
        ({"img": np.full((4, 9, 9, 3), np.nan)}, {"format": "umi"}, "data/img is NaN at row 0"),
        ({"state": np.zeros((4, 2)), "observation.state": np.zeros((4, 2))}, {"format": "lerobot"}, "rename it"),
        ({}, {"format": "lerobot", "rate": 7.5}, "LeRobot takes whole frames a second, not 7.5 Hz: rate=7 "),
        (
            {},
            {"format": "lerobot", "rate": 12.5},
            "has 12 Hz: for a lower rate rows are left out, they are never made",
        ),
        ({"a:b": np.zeros(4)}, {"format": "folder"}, "'a:b' is no name for a file"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    changed: dict[str, Any], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "a.zarr", [4], **changed)
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "a.zarr", tmp_path / "out", **options)
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


def test_an_output_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path / "a.zarr", [4])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists"):
        convert(tmp_path / "a.zarr", tmp_path / "out", format="lerobot")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zarr", "umi", "lerobot", "folder"])
def test_a_conversion_that_was_cut_off_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("action_diffusion.datasets.formats.lerobot.write.FILE_BYTES", 1)
    source = save(tmp_path / "a.zarr", [4, 1, 9])
    output = tmp_path / f"out{ENDINGS.get(name, '')}"
    done: list[str] = []

    each = journal.Journal.each

    def counting(self: journal.Journal, steps: Any, description: str) -> dict[str, Any]:
        def counted(step: journal.JournalStep) -> journal.JournalStep:
            def do() -> Any:
                if len(done) == limit:
                    raise KeyboardInterrupt
                done.append(step.name)
                return step.do()

            return step._replace(do=do)

        return each(self, [counted(step) for step in steps], description)

    monkeypatch.setattr(journal.Journal, "each", counting)
    limit = 2
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, format=name)
    assert not output.exists()
    limit = -1
    convert(source, output, format=name)
    assert len(done) == len(set(done)) > 2
    convert(output, tmp_path / "b.zarr")
    same(ReplayBuffer.open(source), ReplayBuffer.open(tmp_path / "b.zarr"), but=("img", "wrist"))


@pytest.mark.slow
def test_another_source_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = save(tmp_path / "a.zarr", [4, 3]), tmp_path / "out"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "verified", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output, format="folder")
    state = np.ones((7, 5), np.float32)
    shutil.rmtree(source)
    save(source, [4, 3], state=state)
    convert(source, output, format="folder")
    convert(output, tmp_path / "b.zarr")
    assert np.array_equal(ReplayBuffer.open(tmp_path / "b.zarr")["state"][:], state)


def test_a_difference_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a.zarr", [4, 3])
    from action_diffusion.datasets.formats import zarr_buffer

    fill = zarr_buffer._fill

    def wrong(folder: Path, key: str, column: Any, first: int, end: int) -> None:
        fill(folder, key, column, first, end)
        if key == "state":
            zarr_buffer._array(folder, "data/state")[5, 1] = 7

    monkeypatch.setattr(zarr_buffer, "_fill", wrong)
    with pytest.raises(InputError, match=r"state did not arrive as it is in .* row 5: convert again"):
        convert(source, tmp_path / "b.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr"]


@pytest.mark.slow
def test_a_kill_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    n = 300
    images = np.random.default_rng(0).integers(0, 256, size=(n, 64, 64, 3)).astype(np.uint8)
    ReplayBuffer.from_arrays({"img": images, "action": np.zeros((n, 2))}, np.arange(15, n + 1, 15)).save(
        tmp_path / "a.zarr"
    )
    words = ["convert", f"in={tmp_path / 'a.zarr'}", f"out={tmp_path / 'out'}", "format=lerobot21"]
    code = f"from action_diffusion.commands import data; data.run({words})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    lines = tmp_path / ".out.converting/journal"
    while not lines.exists() or lines.read_text().count("\n") < 1:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = lines.read_text().count("\n")
    assert done < 20
    first = (tmp_path / ".out.converting/out/data/chunk-000/episode_000000.parquet").stat().st_mtime_ns
    summary = convert(tmp_path / "a.zarr", tmp_path / "out", format="lerobot21")
    assert summary["episodes"] == 20
    assert (tmp_path / "out/data/chunk-000/episode_000000.parquet").stat().st_mtime_ns == first


@pytest.mark.slow
def test_memory_does_not_grow_with_the_buffer(tmp_path: Path) -> None:
    """Many more rows, in about the same memory, of which 20 MB depend on how the threads meet."""
    code = (
        "import sys; from action_diffusion.commands import data_convert;"
        "data_convert.run({'in': sys.argv[1], 'out': sys.argv[2], 'format': 'zarr'});"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for n in (1500, 8000):
        images = np.zeros((n, 96, 96, 3), np.uint8)
        path = tmp_path / f"{n}.zarr"
        ReplayBuffer.from_arrays({"img": images, "action": np.zeros((n, 2))}, np.arange(100, n + 1, 100)).save(path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"{n}.copy")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-2]) * 1024)
    assert peaks[1] - peaks[0] < 6500 * 96 * 96 * 3 / 2


def test_pieces_cover_their_rows() -> None:
    ends = np.array([3, 4, 9])
    column = PiecewiseColumn(
        (), np.dtype(np.int64), ends, lambda piece: np.array(piece)[None].repeat(piece.end - piece.first, 0)[:, 0]
    )
    assert column[:].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert [tuple(piece) for piece in pieces(ends, 2, 6)] == [(0, 2, 3), (1, 0, 1), (2, 0, 2)]
    assert column[-1] == 2
    assert column[[3, 0]].tolist() == [1, 0]
    assert column[4:4].shape == (0,)


def test_numbered_columns_are_vectors() -> None:
    assert grouped(["t", "x.1", "x.0", "y[0]", "z_1", "z_2", "w", "w_0"]) == {
        "t": [0],
        "x": [2, 1],
        "y": [3],
        "z": [4, 5],
        "w": [6],
        "w_0": [7],
    }


def test_statistics_are_those_of_all_rows_together() -> None:
    random = np.random.default_rng(0)
    rows, images = random.normal(size=(50, 3)) + 1e6, random.integers(0, 256, size=(20, 4, 5, 3)).astype(np.uint8)
    for values, image in ((rows, False), (images, True)):
        found = ColumnStatistics(image=image)
        for part in np.array_split(values, 3):
            found.add(part)
        axes, scale = ((0, 1, 2), 255) if image else (0, 1)
        for name in ("min", "max", "mean", "std"):
            expected = getattr(values, name)(axis=axes) / scale
            assert np.allclose(np.ravel(found.result()[name]), expected, rtol=1e-9), name
        assert found.result()["count"] == [len(values)]


def test_a_video_has_as_many_frames_as_it_was_given(tmp_path: Path) -> None:
    with EncodedVideoWriter(tmp_path / "a.mp4", (10, 12), rate=30, quality="lossless", keyframe_every=3) as video:
        video.add(np.zeros((7, 10, 12, 3), np.uint8))
    info = video_info(tmp_path / "a.mp4")
    assert info[:3] == (7, (10, 12), 30.0)
    assert np.allclose(info.times, np.arange(7) / 30)
