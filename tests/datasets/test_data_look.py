"""`action-diffusion data inspect`, `view` and `edit`: what is said, shown and written."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic import demonstrations

from action_diffusion import cli
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.edit import plotting
from action_diffusion.datasets.edit.editing import numbers
from action_diffusion.datasets.robomimic.attributes import demo_names, subset
from action_diffusion.datasets.storage.pieces import Changed, JoinedColumn, Piece
from action_diffusion.datasets.storage.provenance import file_hash


@pytest.fixture
def buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReplayBuffer:
    """demos.zarr in the working folder: five episodes."""
    monkeypatch.chdir(tmp_path)
    demonstrations(5, 20).save("demos.zarr")
    return ReplayBuffer.open("demos.zarr")


def run(*words: str) -> int:
    return cli.main(["data", *words])


@pytest.mark.slow
def test_inspect(buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert run("inspect", "demos.zarr", "plot=plot.png") == 0
    out = capsys.readouterr().out
    assert f"episodes: 5, steps: {buffer.n_steps}\n" in out
    assert "rate: 10 Hz" in out
    assert "on disk: " in out
    row = next(line.split() for line in out.splitlines() if line.startswith("img"))
    assert row[:3] == ["img", "24×24×3", "uint8"]
    state = buffer["state"][:]
    row = [line.split() for line in out.splitlines() if line.startswith("state")][-1]
    assert row[-4:-1] == [f"{value:.4g}" for value in (state[:, 0].min(), state[:, 0].max(), state[:, 0].mean())]
    assert Path("plot.png").read_bytes()[:4] == b"\x89PNG"


def test_inspect_many_dimensions_and_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = np.arange(60, dtype=float).reshape(5, 12)
    wide[2, 3] = np.nan
    ReplayBuffer.from_arrays({"wide": wide, "flag": np.ones(5, bool)}, [2, 5]).save(tmp_path / "a.zarr.zip")
    assert run("inspect", str(tmp_path / "a.zarr.zip"), f"plot={tmp_path / 'a.png'}") == 0
    out = capsys.readouterr().out
    assert "… 11" in out
    assert "nan" in out
    assert "rate: not said (attribute control_rate)" in out


def test_inspect_keeps_numbers_and_names_whole_in_narrow_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    keys = [f"observation.of_the_left_arm.joint_velocities_{side}" for side in ("one", "other")]
    arrays = {key: np.asarray([[-1.2341e-12, 1.7e38], [5.4321e-12, -0.55512]]) for key in keys}
    bytes_ = base64.b64encode(bytes(range(256)) * 4).decode()
    columns = {f"arm_{n}": f"observations/arm_{n}/joints" for n in range(8)}
    attrs = {"columns": columns, "task": "x", "thumbnail": bytes_, "made": {"by": f"me {bytes_}"}, "sha256": "a1" * 32}
    ReplayBuffer.from_arrays(arrays, [2], attrs).save(tmp_path / "a.zarr")
    assert run("inspect", str(tmp_path / "a.zarr")) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100  # the path
    words = out.split()
    for number in ("-1.234e-12", "5.432e-12", "-0.5551", "1.7e+38", "float64"):
        assert words.count(number) >= 2, number
    for key in keys:
        assert "".join(line.split(" ")[0] for line in out.splitlines() if not line.startswith("  ")).count(key) == 2
    assert max(map(len, out.partition("unpacked\n")[2].splitlines())) <= 80
    assert "arm_7: observations/arm_7/joints" in " ".join(words)
    assert bytes_[:40] not in out
    assert "thumbnail: (1368 characters of base64)" in out
    assert "a1" * 32 in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["episode=2"], "give plot=FILE.png as well"),
        (["plot=a.png", "episode=5"], "episode=5: expected numbers from 0 to 4"),
        (["plot=a.png", "episode=1-2"], "episode=1-2: expected one number"),
    ],
)
def test_inspect_draws_one_episode(
    buffer: ReplayBuffer, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "demos.zarr", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("a.png").exists()


def test_an_episode_is_drawn_over_time(buffer: ReplayBuffer) -> None:
    """By what is handed to the curves and the strip of frames."""
    figure = Figure()
    axes = figure.subplots(1, 3)
    start, end = (int(end) for end in buffer.episode_ends[1:3])
    plotting._series(axes[0], buffer["state"], start, end, 10.0)
    plotting._series(axes[1], buffer["state"], start, end, None)
    for line, values in zip(axes[0].lines, buffer["state"][start:end].T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
        np.testing.assert_allclose(line.get_xdata(), np.arange(end - start) / 10)
    np.testing.assert_array_equal(axes[1].lines[0].get_xdata(), np.arange(start, end))
    plotting._strip(axes[2], buffer["img"], start, end)
    strip = np.asarray(axes[2].images[0].get_array())
    assert strip.shape == (24, 24 * plotting.FRAMES, 3)
    np.testing.assert_array_equal(strip[:, :24], buffer["img"][start])
    np.testing.assert_array_equal(strip[:, -24:], buffer["img"][end - 1])


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        (np.full((1, 3, 9, 8), 7, np.uint8), 7),
        (np.full((1, 9, 8), 7, np.uint8), 7),
        (np.full((1, 9, 8, 3), 0.2, np.float32), 51),
        (np.full((1, 9, 8), 500, np.uint16), 255),
        (np.full((1, 9, 8, 5), 7, np.uint8), None),
    ],
)
def test_frames_of_every_layout_are_shown(rows: np.ndarray, seen: int | None) -> None:
    frame = plotting.shown_frame(rows, 0)
    if seen is None:
        assert frame is None
        assert plotting.small_png(rows, 0) is None
    else:
        np.testing.assert_array_equal(frame, np.full((9, 8, 3), seen))


@pytest.mark.slow
def test_report_is_one_page_that_stands_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = demonstrations(3, 20)
    state = made["state"][:].copy()
    state[30, 0] = np.nan
    hostile = "<script>alert('x')</script>$x_1$"
    arrays = {"state": state, "action": made["action"][:], "img": made["img"][:]}
    demos = ReplayBuffer.create("demos.zarr", attrs={"control_rate": 10.0, hostile: hostile})
    for episode, (a, b) in enumerate(zip([0, *made.episode_ends[:-1]], made.episode_ends, strict=True)):
        task = "push the cube" if episode else f"pull {hostile}"
        rows = {key: values[a:b] for key, values in arrays.items()}
        demos.append({"state": np.nan_to_num(rows["state"]), "action": rows["action"], "img": rows["img"]}, task=task)
    demos = ReplayBuffer.open("demos.zarr").with_column("state", state)
    ReplayBuffer.from_arrays(
        {key: demos[key][:] for key in demos.keys} | {"x<b>": np.zeros(demos.n_steps)}, demos.episode_ends, demos.attrs
    ).save("odd.zarr")
    assert run("report", "odd.zarr") == 0
    assert "output: odd.report.html\nepisodes: 3\n" in capsys.readouterr().out
    page = Path("odd.report.html").read_text()
    assert hostile not in page
    assert "x<b>" not in page
    assert page.count("data:image/png;base64,") == 1 + 3  # an episode over time, and first frames
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+|http-equiv", "", page)
    for words in ("push the cube", "nan", "NaN", ">30<", f"0-{made.episode_ends[0] - 1}", f"{state[:, 1].max():.4g}"):
        assert words in page, words


@pytest.mark.slow
def test_view_writes_a_recording(buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rerun", reason="needs the extra [view]")
    assert run("view", "demos.zarr", "output=demos.rrd", "episodes=1,3-4") == 0
    assert capsys.readouterr().out == "output: demos.rrd\nepisodes: 3\nof: 5\n"
    command = [str(Path(sys.executable).parent / "rerun"), "rrd"]
    subprocess.run([*command, "verify", "demos.rrd"], check=True, timeout=60, capture_output=True)
    shown = subprocess.run(
        [*command, "print", "-v", "demos.rrd"], check=True, timeout=60, capture_output=True, text=True
    )
    n = buffer.n_steps - len(buffer.episode(0)["state"]) - len(buffer.episode(2)["state"])
    for key in ("/state", "/action", "/img", "/episode"):
        lines = [line for line in shown.stdout.splitlines() if line.startswith("Chunk(") and f" - {key} - " in line]
        assert sum(int(line.partition(" with ")[2].split()[0]) for line in lines) == n, key


def test_view_says_what_to_install(
    buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert run("view", "demos.zarr", "output=demos.rrd") == 2
    assert "data view needs rerun: pip install 'action-diffusion[view]'" in capsys.readouterr().err


def test_view_without_a_screen_says_what_to_do(
    buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rerun", reason="needs the extra [view]")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert run("view", "demos.zarr") == 2
    assert "there is no screen for rerun's viewer: write a file with output=FILE.rrd" in capsys.readouterr().err


def rows_of(buffer: ReplayBuffer, *spans: tuple[int, int]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([buffer[key][a:b] for a, b in spans]) for key in buffer.keys}


def check(path: str, expected: dict[str, np.ndarray], lengths: list[int]) -> ReplayBuffer:
    copy = ReplayBuffer.open(path)
    assert np.diff(copy.episode_ends, prepend=0).tolist() == lengths
    for key, values in expected.items():
        np.testing.assert_array_equal(copy[key][:], values)
        assert copy[key].dtype == values.dtype
    return copy


def test_drop_trim_and_split_at_once(buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [int(end) for end in buffer.episode_ends]
    trims = f"{ends[0]}-{ends[0] + 2},{ends[2] - 4}-{ends[2] - 1}"
    assert run("edit", "demos.zarr", "out=a.zarr", "drop=0,4", f"trim={trims}", f"split={ends[2] + 7}") == 0
    spans = [(ends[0] + 3, ends[1]), (ends[1], ends[2] - 4), (ends[2], ends[2] + 7), (ends[2] + 7, ends[3])]
    copy = check("a.zarr", rows_of(buffer, *spans), [b - a for a, b in spans])
    assert capsys.readouterr().out == f"output: a.zarr\nepisodes: 4\nsteps: {copy.n_steps}\n"
    assert copy.attrs["control_rate"] == 10.0


def test_merge_keeps_everybodys_provenance(buffer: ReplayBuffer) -> None:
    assert run("edit", "demos.zarr", "out=a.zarr.zip", "drop=0-3") == 0
    assert run("edit", "demos.zarr", "out=b.zarr", "merge=a.zarr.zip") == 0
    ends = [int(end) for end in buffer.episode_ends]
    spans = [(0, ends[4]), (ends[3], ends[4])]
    lengths = [*np.diff(ends, prepend=0).tolist(), ends[4] - ends[3]]
    copy = check("b.zarr", rows_of(buffer, *spans), lengths)
    steps = copy.attrs["provenance"]
    assert [(step["what"], step["source"]) for step in steps] == [
        ("edit merge=a.zarr.zip", "demos.zarr"),
        ("edit drop=0-3", "demos.zarr"),
        ("edit merge=a.zarr.zip", "a.zarr.zip"),
    ]
    assert steps[0]["sha256"] == steps[1]["sha256"] == file_hash(Path("demos.zarr"))
    assert steps[2]["sha256"] == hashlib.sha256(Path("a.zarr.zip").read_bytes()).hexdigest()
    assert all(step["when"].endswith("+00:00") for step in steps)


def test_relabel_makes_subsets_that_stay(buffer: ReplayBuffer) -> None:
    assert run("edit", "demos.zarr", "out=a.zarr", "relabel=1-2:valid") == 0
    assert subset(ReplayBuffer.open("a.zarr"), "valid").tolist() == [1, 2]
    middle = int(buffer.episode_ends[1]) + 5
    assert run("edit", "a.zarr", "out=b.zarr", "drop=0", "relabel=1:train", f"split={middle}") == 0
    copy = ReplayBuffer.open("b.zarr")
    assert demo_names(copy) == ["demo_1", "demo_2", "demo_2_2", "demo_3", "demo_4"]
    assert subset(copy, "train").tolist() == [0]
    assert subset(copy, "valid").tolist() == [1, 2]


def test_rename(buffer: ReplayBuffer) -> None:
    assert run("edit", "demos.zarr", "out=a.zarr", "rename=img:top_image,state:agent", "drop=1-4") == 0
    copy = ReplayBuffer.open("a.zarr")
    assert copy.keys == ["action", "agent", "top_image"]
    np.testing.assert_array_equal(copy["top_image"][:], buffer["img"][: int(buffer.episode_ends[0])])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=a.zarr"], "nothing to do: give one of drop, trim, split, merge, relabel, rename"),
        (["drop=1"], "out is required: action-diffusion data edit out=…"),
        (["out=demos.zarr", "drop=1"], "demos.zarr exists: choose another path"),
        (["out=a.zarr", "drop=5"], "drop=5: expected numbers from 0 to 4"),
        (["out=a.zarr", "drop=3-1"], "drop=3-1: expected numbers from 0 to 4, the smaller one first"),
        (["out=a.zarr", "drop=x"], "drop=x: expected numbers and ranges, such as 3,7-9"),
        (["out=a.zarr", "drop=0-4"], "no episode would be left"),
        (["out=a.zarr", "trim=5-6"], "trim=5-6: expected rows at the beginning or the end of an episode; episode 0"),
        (["out=a.zarr", "merge=b.zarr"], "b.zarr: no such file or folder"),
        (["out=a.zarr", "merge=other.zarr"], "do not have the same keys: img, state"),
        (["out=a.zarr", "relabel=3"], "relabel=3: expected EPISODES:NAME"),
        (["out=a.zarr", "rename=image:x"], "demos.zarr: no key 'image' in data/; it has action, img, state"),
        (["out=a.zarr", "rename=img:state"], "two columns would have the same name"),
        (["out=a.zarr", "rename=img"], "rename=img: expected KEY:NAME"),
        (["out=a.zarr", "rotations=state"], "rotations=state: expected KEY:KIND"),
        (["out=a.zarr", "rotations=stat:angle"], "unknown column of the buffer for a rotation 'stat'"),
        (["out=a.zarr", "rotations=state:angel"], "unknown rotation 'angel'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    buffer: ReplayBuffer, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ReplayBuffer.from_arrays({"action": np.zeros((3, 2), np.float32)}, [3]).save("other.zarr")
    assert run("edit", "demos.zarr", *words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["demos.zarr", "other.zarr"]


def test_columns_in_pieces_read_like_arrays(buffer: ReplayBuffer) -> None:
    pieces = [Piece(buffer, 3, 9), Piece(buffer, 20, 40, {"img": 2}), Piece(buffer, 0, 4)]
    whole = rows_of(buffer, (3, 9), (20, 40), (0, 4))["state"]
    joined = JoinedColumn("state", pieces)
    for rows in (slice(None), slice(2, 28), slice(6, 6), slice(0, 30, 3), [1, 27, 5]):
        np.testing.assert_array_equal(joined[rows], whole[rows])
    np.testing.assert_array_equal(JoinedColumn("img", pieces)[6:26], buffer["img"][22:42])
    changed = Changed(buffer["action"], np.asarray([2, 5]), np.full((2, 2), 7, np.float32))
    expected = np.array(buffer["action"][:])
    expected[[2, 5]] = 7
    np.testing.assert_array_equal(changed[:], expected)
    np.testing.assert_array_equal(changed[4:9], expected[4:9])


def test_rotations_are_said_and_keep_with_their_column(buffer: ReplayBuffer) -> None:
    assert run("edit", "demos.zarr", "out=a.zarr", "rotations=state:angle@2,action:angle,action:angle@1") == 0
    said = {"state": ["angle@2"], "action": ["angle@0", "angle@1"]}
    assert ReplayBuffer.open("a.zarr").attrs["rotations"] == said
    assert run("edit", "a.zarr", "out=b.zarr", "rename=state:pose", "rotations=action:angle@1") == 0
    assert ReplayBuffer.open("b.zarr").attrs["rotations"] == {"pose": ["angle@2"], "action": ["angle@1"]}


def test_numbers() -> None:
    assert numbers("3,7-9,8", "drop", 10) == [3, 7, 8, 9]


def test_inspect_calls_dimensions_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attrs = {"names": {"action": ["pan", "lift"], "state": ["only"]}, "control_rate": 10.0, "hdf5_attributes": "x"}
    rows = {"action": np.ones((4, 2)), "state": np.ones((4, 2))}
    ReplayBuffer.from_arrays(rows, [4], attrs).save(tmp_path / "a.zarr")
    assert run("inspect", str(tmp_path / "a.zarr")) == 0
    out = capsys.readouterr().out
    assert [line.split()[-5] for line in out.splitlines()[-4:]] == ["pan", "lift", "0", "1"]
    assert not any(line.startswith(("names", "control_rate", "hdf5")) for line in out.splitlines())
