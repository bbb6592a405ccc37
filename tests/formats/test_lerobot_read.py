"""LeRobot sets as people have them: values come as they are stored, and what does not fit is one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.commands import data_convert
from action_diffusion.datasets.formats.lerobot.read import opened
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

pa = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
pq = pytest.importorskip("pyarrow.parquet")
av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

LENGTHS = [4, 6, 5]
ROWS = sum(LENGTHS)
SIZE = (16, 20)
EPISODES, DATA = "meta/episodes/**/*.parquet", "data/**/*.parquet"
CAMERA, START = "observation.images.cam", "videos/observation.images.cam/from_timestamp"


def convert(source: Path, output: Path, **options: str | float) -> dict[str, Any]:
    return dict(data_convert.run({"in": str(source), "out": str(output), **options}))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "state": random.normal(size=(ROWS, 6)).astype(np.float32),
        "action": random.normal(size=(ROWS, 6)).astype(np.float32),
        "cam": random.integers(0, 256, size=(ROWS, *SIZE, 3)).astype(np.uint8),
    }


@pytest.fixture(scope="module")
def written(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the version: a set as somebody else's tools write it, without our notes."""
    folder = tmp_path_factory.mktemp("written")
    ReplayBuffer.from_arrays(arrays, np.cumsum(LENGTHS), {"control_rate": 10}).save(folder / "a.zarr")
    for name in ("lerobot", "lerobot21"):
        convert(folder / "a.zarr", folder / name, format=name, video="lossless")
        change_info(folder / name, lambda info: info.pop("action_diffusion"))
    return {"v30": folder / "lerobot", "v21": folder / "lerobot21"}


@pytest.fixture
def v30(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["v30"], tmp_path / "set"))


@pytest.fixture
def v21(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["v21"], tmp_path / "set"))


def change_info(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = root / "meta/info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def info_of(**values: Any) -> Callable[[Path], None]:
    return lambda root: change_info(root, lambda info: info.update(values))


def feature_of(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda root: change_info(root, lambda info: info["features"].setdefault(name, {}).update(values))


def columns_of(pattern: str, number: int = 0, **values: Any) -> Callable[[Path], None]:
    """Other values in columns of a parquet file; None leaves one out. A / in a name is written __."""

    def change(root: Path) -> None:
        file = sorted(root.glob(pattern))[number]
        table = pq.read_table(file)
        for name, value in values.items():
            name = name.replace("__", "/")
            table = table.drop_columns([name]) if name in table.column_names else table
            table = table if value is None else table.append_column(name, value)
        pq.write_table(table, file)

    return change


def without(pattern: str, *parts: str) -> Callable[[Path], None]:
    """Leaves out the columns with one of these in their names."""

    def change(root: Path) -> None:
        file = next(root.glob(pattern))
        table = pq.read_table(file)
        left_out = [name for name in table.column_names if any(part in name for part in parts)]
        pq.write_table(table.drop_columns(left_out), file)

    return change


def video_of(frames: np.ndarray, pixels: str, codec: str, times: Any = None, container: str = "mp4") -> Any:
    """Another video. times: of each frame, ms."""

    def change(root: Path) -> None:
        with av.open(str(next(root.glob("videos/**/*.mp4"))), "w", format=container) as file:
            stream = file.add_stream(codec, rate=10)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.codec_context.time_base = pixels, Fraction(1, 1000)
            for number, pixel in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixel, format="rgb24" if pixel.ndim == 3 else pixels)
                frame.pts, frame.time_base = (100 * number if times is None else times[number]), Fraction(1, 1000)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())

    return change


GREY = np.random.default_rng(1).integers(0, 256, size=(ROWS, *SIZE)).astype(np.uint8)
DEPTH = np.random.default_rng(2).integers(0, 2**16, size=(ROWS, *SIZE)).astype(np.uint16)
COLOURS = np.random.default_rng(3).integers(0, 256, size=(ROWS, *SIZE, 4)).astype(np.uint8)


def pictures(images: np.ndarray, shape: list[int], kind: str = "PNG", dtype: str = "image") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        encoded = []
        for image in images:
            Image.fromarray(image).save(content := BytesIO(), kind)
            encoded.append({"bytes": content.getvalue(), "path": "frame.png"})
        columns_of(DATA, picture=pa.array(encoded))(root)
        feature_of("picture", dtype=dtype, shape=shape)(root)

    return change


def test_the_type_that_is_stored_counts(v30: Path, arrays: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    feature_of("action", dtype="int64")(v30)
    feature_of("observation.state", dtype="float16")(v30)
    said = convert(v30, tmp_path / "b.zarr")["note"]
    assert "action is float32 as it is stored; info.json says int64" in said
    assert "observation.state is float32 as it is stored; info.json says float16" in said
    back = ReplayBuffer.open(tmp_path / "b.zarr")
    for key, values in arrays.items():
        assert back[key].dtype == values.dtype
        assert np.array_equal(back[key][:], values), key


@pytest.mark.parametrize(
    ("images", "shape", "kind", "expected"),
    [
        (DEPTH, [1, *SIZE], "PNG", DEPTH),
        (DEPTH, [*SIZE, 1], "PNG", DEPTH),
        (DEPTH, [*SIZE, 3], "PNG", DEPTH),
        (DEPTH.astype(np.float32) / 1000, [*SIZE], "TIFF", DEPTH.astype(np.float32) / 1000),
        (GREY, [*SIZE, 1], "PNG", GREY),
        (GREY, [*SIZE, 3], "PNG", np.repeat(GREY[..., None], 3, axis=3)),
        (COLOURS[..., :3], [3, *SIZE], "PNG", COLOURS[..., :3]),
        (COLOURS, [*SIZE, 4], "PNG", COLOURS[..., :3]),
    ],
)
def test_pictures_are_read_as_they_are_stored(
    images: np.ndarray, shape: list[int], kind: str, expected: np.ndarray, v30: Path
) -> None:
    pictures(images, shape, kind, "depth" if images is DEPTH else "image")(v30)
    found = opened(v30)
    column = found.buffer["picture"]
    assert (column.dtype, column.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(column[:], expected)
    assert any("alpha channel, which was dropped" in words for words in found.said) == (images is COLOURS)


@pytest.mark.parametrize(("depth", "pixels"), [(DEPTH >> 4, "gray12le"), (DEPTH, "gray16le")])
def test_depth_in_video_comes_as_its_codes(depth: np.ndarray, pixels: str, v30: Path) -> None:
    video_of(depth, pixels, "ffv1", container="matroska")(v30)
    column = opened(v30).buffer["cam"]
    assert column.dtype == np.uint16
    assert np.array_equal(column[:], depth)


@pytest.mark.slow
def test_depth_goes_to_lerobot_and_back(v30: Path, tmp_path: Path) -> None:
    pictures(DEPTH, [1, *SIZE])(v30)
    convert(v30, tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "again", format="lerobot")
    convert(tmp_path / "again", tmp_path / "b.zarr")
    back = ReplayBuffer.open(tmp_path / "b.zarr")["picture"]
    assert back.dtype == np.uint16
    assert np.array_equal(back[:], DEPTH)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (info_of(fps="10"), None),
        (info_of(codebase_version="3.0"), None),
        (info_of(codebase_version="v3.1"), "LeRobotDataset v3.1 is later than v3.0"),
        (info_of(codebase_version="v2.1"), "info.json says v2.1, the files are v3.0's"),
        (
            info_of(video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"),
            "video_path",
        ),
        (info_of(data_path=None), None),
        (info_of(fps=29.97), "the rows' timestamps are 10 Hz, which counts; info.json says 29.97"),
        (without(EPISODES, "chunk_index", "file_index"), "which video of observation.images.cam an episode is in"),
        (without(EPISODES, "_timestamp"), None),
        (without(EPISODES, "dataset_"), None),
        (without(DATA, "timestamp", "_index"), "the files have no episode_index: rows were counted"),
        (columns_of(EPISODES, **{"length": pa.array([4.0, 6.0, 5.0])}), None),
        (columns_of(EPISODES, **{START.replace("/", "__"): pa.array([0, 0.402, 1.003])}), None),
        (
            columns_of(DATA, timestamp=pa.array((np.arange(ROWS) - np.repeat([0, 4, 10], LENGTHS)) / 10 + 0.02)),
            "20.0 ms",
        ),
        (lambda root: (root / "meta/tasks.parquet").unlink(), "there is no meta/tasks"),
    ],
)
def test_what_is_said_otherwise_is_read(
    change: Callable[[Path], None], said: str | None, v30: Path, arrays: Mapping[str, np.ndarray]
) -> None:
    change(v30)
    found = opened(v30)
    for key, values in arrays.items():
        assert np.array_equal(found.buffer[key][:], values), key
    assert found.buffer.attrs["control_rate"] == 10
    assert (said is None and not found.said) or any(said in words for words in found.said if said)


def test_a_rate_of_ntsc(v30: Path, arrays: Mapping[str, np.ndarray]) -> None:
    frames = np.arange(ROWS) - np.repeat([0, 4, 10], LENGTHS)
    columns_of(DATA, timestamp=pa.array((frames / 29.97).astype(np.float32)))(v30)
    columns_of(EPISODES, **{START.replace("/", "__"): pa.array(np.array([0, 4, 10]) / 29.97)})(v30)
    info_of(fps=29.97)(v30)
    times = np.round(np.arange(ROWS) * 1000 / 29.97).astype(int)
    video_of(arrays["cam"], "yuv420p", "libx264", times)(v30)
    found = opened(v30)
    assert found.said == ()
    assert found.buffer.attrs["control_rate"] == 29.97


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (feature_of("observation.effort", dtype="float32", shape=[6]), "observation.effort (not in the parquet files)"),
        (feature_of("observation.state", shape=[0]), "observation.state (no values)"),
        (columns_of(DATA, note=pa.array(["words"] * ROWS)), "note (not in meta/info.json)"),
    ],
)
def test_what_is_no_column_is_left_out_by_name(change: Callable[[Path], None], left_out: str, v30: Path) -> None:
    change(v30)
    assert left_out in opened(v30).left_out


def test_words_beside_the_rows_are_left_out_by_name(v30: Path) -> None:
    columns_of(DATA, language=pa.array(["push it"] * ROWS))(v30)
    feature_of("language", dtype="string", shape=[1])(v30)
    assert opened(v30).left_out == ("language (words)",)


def link(name: str, target: Callable[[Path], Path]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = next(root.glob(name))
        elsewhere = target(root)
        shutil.move(file, elsewhere) if not elsewhere.exists() else file.unlink()
        file.symlink_to(elsewhere)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = next(root.glob(name))
        file.unlink()
        os.mkfifo(file)

    return change


def sparse(name: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, 1 << 30)


def pointer(name: str) -> Callable[[Path], object]:
    words = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    return lambda root: next(root.glob(name)).write_text(words)


def sound(root: Path) -> None:
    with av.open(str(next(root.glob("videos/**/*.mp4"))), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())


FRAMES = COLOURS[..., :3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (columns_of(EPISODES, episode_index=pa.array([0, 1, 1])), "episode_index 1 is there twice"),
        (
            columns_of(EPISODES, **{START.replace("/", "__"): pa.array([0.02, 0.42, 1.02])}),
            "frame 0 is 0.2 frames early",
        ),
        (
            columns_of(EPISODES, **{START.replace("/", "__"): pa.array([0, 0.404, 1.012])}),
            "frame 10 is 0.1 frames early",
        ),
        (columns_of(EPISODES, **{START.replace("/", "__"): pa.array([0, None, 1.0])}), "from_timestamp of"),
        (video_of(FRAMES, "yuv420p", "libx264", [100 * n + 20 for n in range(ROWS)]), "frame 0 is 0.2 frames late"),
        (
            video_of(FRAMES, "yuv420p", "libx264", [100 * n + 20 * (n > 7) for n in range(ROWS)]),
            "frame 8 is 0.2 frames",
        ),
        (
            video_of(np.concatenate([FRAMES, FRAMES[:3]]), "yuv420p", "libx264"),
            "18 frames, but its episodes have 15 rows",
        ),
        (video_of(FRAMES[:-1], "yuv420p", "libx264"), "14 frames, but its episodes have 15 rows"),
        (sound, "holds no video"),
        (pointer("videos/**/*.mp4"), "is a pointer of Git LFS, its content was not downloaded: git lfs pull"),
        (pointer(DATA), "is a pointer of Git LFS"),
        (pointer("meta/info.json"), "is a pointer of Git LFS"),
        (sparse("meta/info.json"), "info.json has 1074 MB, at most 268 MB are read"),
        (sparse("meta/tasks.parquet"), "tasks.parquet has 1074 MB"),
        (pipe("videos/**/*.mp4"), "is a named pipe, expected a file"),
        (pipe(DATA), "is a named pipe, expected a file"),
        (pipe("meta/tasks.parquet"), "is a named pipe, expected a file"),
        (link(DATA, lambda root: root.parent / "elsewhere"), "outside of the folder, which is not read"),
        (link("data", lambda root: root.parent / "elsewhere"), "outside of the folder, which is not read"),
        (link(DATA, lambda root: next(root.glob(DATA))), "cannot be read: Symlink loop"),
        (
            info_of(video_path="videos/{video_key:>10000000000}.mp4"),
            "video_path is 'videos/{video_key:>10000000000}.mp4'",
        ),
        (info_of(data_path="{chunk_index:>10000000000}"), "data_path is '{chunk_index:>10000000000}'"),
        (info_of(video_path="v" * 10**6), "expected one such as videos/"),
        (info_of(video_path="{video_key.__class__}"), "expected one such as videos/"),
        (info_of(video_path="../../{video_key}"), "outside of the folder"),
        (info_of(data_path="/etc/passwd"), "outside of the folder"),
        (info_of(fps=float("nan")), "fps is nan"),
        (info_of(fps="ten"), "fps is 'ten'"),
        (info_of(fps=0), "fps is 0"),
        (info_of(fps=10**400), "fps is a number of more than 40 digits"),
        (info_of(fps=[10]), "fps is [10]"),
        (info_of(codebase_version="v4.0"), "v2.0, v2.1 and v3.0 are read"),
        (info_of(features=[1]), "expected features"),
        (feature_of("action", shape=[10**12]), "action: rows have other lengths than [1000000000000]"),
        (feature_of("action", shape=[-6]), "a shape of whole numbers"),
        (feature_of("action", shape=["6"]), "a shape of whole numbers"),
        (columns_of(DATA, action=None), "action: not in the parquet files, but meta/info.json lists it"),
        (columns_of(DATA, action=pa.array(["left"] * ROWS)), "action: words"),
        (columns_of(DATA, action=pa.array([[1.0] * 6] * (ROWS - 2) + [[1.0] * 7, [1.0] * 5])), "have other lengths"),
        (columns_of(DATA, task_index=pa.array([7] * ROWS)), "task_index 7, which meta/tasks does not describe"),
        (columns_of("meta/tasks.parquet", task_index=pa.array([10**12])), "task_index 1000000000000"),
        (pictures(np.zeros((ROWS, 6000, 6000), bool), [6000, 6000, 1]), "6000 x 6000 pixels"),
        (columns_of(DATA, timestamp=pa.array([float("nan")] * ROWS)), "row 0 has timestamp nan"),
        (columns_of(DATA, timestamp=pa.array(np.arange(ROWS) * 100.0)), "row 1 has timestamp 100"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    change: Callable[[Path], None], message: str, v30: Path, tmp_path: Path
) -> None:
    change(v30)
    with pytest.raises(InputError) as caught:
        convert(v30, tmp_path / "b.zarr")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "b.zarr").exists()


def test_an_episode_that_is_listed_twice_is_refused_in_lines_too(v21: Path) -> None:
    file = v21 / "meta/episodes.jsonl"
    first, second, _ = file.read_text().splitlines()
    file.write_text("\n".join([first, second, second]))
    with pytest.raises(InputError, match="episode_index 1 is there twice, so that another episode is missing"):
        opened(v21)


def test_a_file_of_no_episode_is_named(v21: Path) -> None:
    shutil.copy(v21 / "data/chunk-000/episode_000002.parquet", v21 / "data/chunk-000/episode_000003.parquet")
    assert opened(v21).said == ("data/chunk-000/episode_000003.parquet belongs to no episode, and was left out",)


def test_types_that_differ_between_files(v21: Path) -> None:
    wide = pa.array(np.full((LENGTHS[1], 6), 1 / 3).tolist())
    columns_of(DATA, 1, action=wide)(v21)
    column = opened(v21).buffer["action"]
    assert column.dtype == np.float64
    assert (column[4:10] == 1 / 3).all()
    columns_of(DATA, 1, action=pa.array([[1] * 6] * LENGTHS[1]))(v21)
    with pytest.raises(InputError, match="action is float32, int64 in different files"):
        opened(v21)


def test_a_task_that_was_deleted_keeps_the_words_of_the_others(v21: Path, tmp_path: Path) -> None:
    lines = [{"task_index": 0, "task": "push"}, {"task_index": 2, "task": "open"}]
    (v21 / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns_of(DATA, 2, task_index=pa.array([2] * LENGTHS[2]))(v21)
    convert(v21, tmp_path / "b.zarr")
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    words = [buffer.attrs["tasks"][number] for number in buffer["task_index"][:].ravel()]
    assert words == ["push"] * 10 + ["open"] * 5


@pytest.mark.parametrize(
    "table", [{"task_index": [0], "note": ["no"], "task": ["push it"]}, {"task_index": [0], "words": ["push it"]}]
)
def test_words_in_a_column(table: dict[str, list[Any]], v30: Path) -> None:
    pq.write_table(pa.table(table), v30 / "meta/tasks.parquet")
    assert opened(v30).buffer.attrs["tasks"] == ["push it"]


def test_versions_of_the_action_keep_their_names(arrays: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    parts = {"action.joint_position": arrays["state"], "action.cartesian_position": -arrays["state"]}
    columns = {"state": arrays["state"], "action": arrays["action"], **parts}
    ReplayBuffer.from_arrays(columns, np.cumsum(LENGTHS)).save(tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "l", format="lerobot")
    change_info(tmp_path / "l", lambda info: info.pop("action_diffusion"))
    found = opened(tmp_path / "l").buffer
    assert set(found.keys) == set(columns)
    for key, values in columns.items():
        assert np.array_equal(found[key][:], values), key


def test_our_own_notes_never_round(arrays: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    ReplayBuffer.from_arrays(dict(arrays), np.cumsum(LENGTHS)).save(tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "l", format="lerobot")
    change_info(tmp_path / "l", lambda info: info["action_diffusion"]["columns"]["action"].update(dtype="float16"))
    with pytest.raises(InputError, match="action: row 0 has a value that float16 does not hold"):
        convert(tmp_path / "l", tmp_path / "b.zarr")


@pytest.mark.parametrize(
    ("rate", "rows", "said"),
    [
        (5.0, [0, 2, 4, 6, 8, 10, 12, 14], "5 Hz of 10 Hz: rows 0, 2, 4, 6, … of each episode; 8 of 15"),
        (4.0, [0, 3, 4, 7, 9, 10, 13], "the nearest, up to 50.0 ms off"),
    ],
)
def test_a_lower_rate_leaves_rows_out_in_the_open(
    rate: float, rows: list[int], said: str, v30: Path, arrays: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    assert said in convert(v30, tmp_path / "b.zarr", rate=rate)["note"]
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.attrs["control_rate"] == float(rate)
    assert buffer.n_episodes == 3
    for key, values in arrays.items():
        assert np.array_equal(buffer[key][:], values[rows]), key


def test_a_higher_rate_is_refused(v30: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rate=20: .* has 10 Hz: for a lower rate rows are left out, they are never"):
        convert(v30, tmp_path / "b.zarr", rate=20.0)


@pytest.mark.parametrize("wrapped", [list, lambda names: {"motors": names}])
def test_names_of_dimensions_are_kept_and_written(wrapped, v30: Path, tmp_path: Path) -> None:
    joints = ["pan", "lift", "elbow", "roll", "yaw", "gripper"]
    feature_of("action", names=wrapped(joints))(v30)
    feature_of("observation.state", names=["too", "few"])(v30)
    convert(v30, tmp_path / "b.zarr")
    assert ReplayBuffer.open(tmp_path / "b.zarr").attrs["names"] == {"action": joints}
    convert(tmp_path / "b.zarr", tmp_path / "back", format="lerobot")
    features = json.loads((tmp_path / "back/meta/info.json").read_text())["features"]
    assert features["action"]["names"] == joints
    assert features["observation.state"]["names"] is None
