"""ROS 2's bags: each row holds what a topic said last, and bags that are damaged or hostile are one line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import bags
import numpy as np
import pytest

from action_diffusion import cli
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.formats import registry
from action_diffusion.datasets.formats.mcap.bag import _header_stamp
from action_diffusion.datasets.formats.mcap.format import opened
from action_diffusion.datasets.formats.mcap.topics import read_topics
from action_diffusion.errors import InputError

TOPICS = """
rate: 20
columns:
  state: {topic: /joint_states, field: [position, velocity]}
  front: {topic: /front}
  wrist: {topic: /wrist}
  depth: {topic: /depth}
  action: {topic: /command, field: data}
task: put it there
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two bags of one file each, and topics.yaml."""
    bags.write_bag(tmp_path / "bags" / "one.mcap", bags.episode())
    bags.write_bag(tmp_path / "bags" / "two.mcap", bags.episode(seconds=0.5, begin=300.0), compression="lz4")
    (tmp_path / "bags" / "topics.yaml").write_text(TOPICS)
    return tmp_path / "bags"


def test_a_row_holds_what_each_topic_said_last(folder: Path) -> None:
    buffer = opened(folder).buffer
    assert buffer.episode_ends.tolist() == [20, 30]
    assert buffer.attrs["control_rate"] == 20.0
    assert buffer.attrs["task"] == "put it there"
    times = 0.003 + np.arange(20) / 20  # commands have no header: they are of when they were recorded
    np.testing.assert_allclose(buffer["state"][:20, 0], np.floor(times * 100) / 100, atol=1e-6)
    np.testing.assert_array_equal(buffer["state"][:20, 1], np.floor(times * 100))
    np.testing.assert_array_equal(buffer["state"][:20, 2:], np.tile([0.0, 1.0], (20, 1)))
    frames = np.floor(times * 30 + 1e-6)
    assert buffer["front"].shape == (30, 6, 8, 3)
    np.testing.assert_array_equal(buffer["front"][:20, 0, 0, 0], frames)  # bgr8: blue was 200
    np.testing.assert_array_equal(buffer["front"][:20, 0, 0, 2], np.full(20, 200))
    np.testing.assert_array_equal(buffer["wrist"][:20, 0, 0, 1], frames)
    np.testing.assert_array_equal(buffer["wrist"][:20, 0, 0, 0], np.full(20, 200))
    np.testing.assert_array_equal(buffer["depth"][:20, 2, 3, 0], 1000 + frames)
    assert buffer["depth"].dtype == np.uint16


def test_commands_have_no_header_and_are_of_when_they_were_recorded(folder: Path) -> None:
    actions = opened(folder).buffer["action"][:20]
    np.testing.assert_allclose(
        actions, np.stack([np.arange(20) / 20, -np.arange(20) / 20, np.full(20, 7.0)], 1), atol=0.021
    )
    assert (actions[:, 2] == 7).all()


@pytest.mark.parametrize("rows", [slice(3, 9), slice(18, 24), [29, 2, 2, 17], 5, slice(0, 0)])
def test_pictures_are_read_wherever_they_are_asked_for(folder: Path, rows: Any) -> None:
    column = opened(folder).buffer["front"]
    np.testing.assert_array_equal(column[rows], np.asarray(column[:])[rows])


def test_episodes_may_be_marked_by_a_topic(tmp_path: Path) -> None:
    told = bags.episode(seconds=2.0)
    for time, on in ((100.0, False), (100.5, True), (101.0, False), (101.2, True), (101.6, False)):
        told.append((time, "/recording", "std_msgs/msg/Bool", {"data": on}))
    bags.write_bag(tmp_path / "a.mcap", told)
    (tmp_path / "t.yaml").write_text(TOPICS + "episodes: {topic: /recording, field: data}\n")
    buffer = opened(tmp_path / "a.mcap", tmp_path / "t.yaml").buffer
    lengths = np.diff([0, *buffer.episode_ends])
    np.testing.assert_allclose(lengths, [10, 8], atol=1)
    assert abs(buffer["state"][0, 0] - 0.5) <= 0.05


def test_parts_of_a_bag_of_ros_are_one_episode(tmp_path: Path) -> None:
    told = sorted(bags.episode(), key=lambda one: one[0])
    bags.write_bag(tmp_path / "bag" / "bag_1.mcap", told[len(told) // 2 :])
    bags.write_bag(tmp_path / "bag" / "bag_0.mcap", told[: len(told) // 2])
    (tmp_path / "bag" / "metadata.yaml").write_text("rosbag2_bagfile_information: {}\n")
    bags.write_bag(tmp_path / "whole.mcap", told)
    (tmp_path / "t.yaml").write_text(TOPICS)
    parts, whole = (opened(tmp_path / name, tmp_path / "t.yaml").buffer for name in ("bag", "whole.mcap"))
    assert parts.episode_ends.tolist() == whole.episode_ends.tolist()
    for key in whole.keys:
        np.testing.assert_array_equal(parts[key][:], whole[key][:])


def test_nested_fields(tmp_path: Path) -> None:
    pose = {"position": {"x": 1.0, "y": 2.0, "z": 3.0}, "orientation": {"x": 0.0, "y": 0.1, "z": 0.2, "w": 0.9}}
    bags.write_bag(tmp_path / "a.mcap", [(100 + i / 10, "/tool", "geometry_msgs/msg/Pose", pose) for i in range(9)])
    (tmp_path / "t.yaml").write_text(
        "rate: 10\ncolumns:\n"
        "  pose: {topic: /tool, field: [position, orientation.w]}\n"
        "  y: {topic: /tool, field: position.y}\n"
    )
    buffer = opened(tmp_path / "a.mcap", tmp_path / "t.yaml").buffer
    np.testing.assert_allclose(buffer["pose"][0], [1, 2, 3, 0.9], rtol=1e-6)
    assert buffer["y"].shape[1:] == (1,)


def test_the_command_converts_and_says_what_was_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out.zarr"
    assert cli.main(["data", "convert", f"in={folder}", f"out={output}"]) == 0
    buffer = ReplayBuffer.open(output)
    np.testing.assert_array_equal(buffer["front"][:], opened(folder).buffer["front"][:])
    assert "episodes: 2" in capsys.readouterr().out


def test_a_header_alone_gives_the_stamp() -> None:
    content = bytes([0, 1, 0, 0]) + (12).to_bytes(4, "little") + (500_000_000).to_bytes(4, "little")
    assert _header_stamp(content) == 12_500_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: 0\ncolumns: {a: {topic: /a}}", "rate=0 must be above 0"),
        ("rate: 10", "columns"),
        ("rate: 10\ncolumns: {a: {topic: /a, fields: x}}", "fields"),
        ("rate: 10\ncolumns: {'../a': {topic: /a}}", "letters, digits"),
        ("rate: 10\ncolumns: {a: {topic: /a}}\ntime: wall", "header, log"),
        ("[1", "cannot be read"),
        ("5", "expected rate: and columns:"),
    ],
)
def test_topics_that_cannot_be_meant_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_topics(tmp_path / "t.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("/command", "/commands", "has no messages of /commands; it has /command (std_msgs/msg/Float64MultiArray"),
        ("field: data", "field: dada", "no numbers: 'dada' of data"),
        ("field: [position, velocity]", "field: name", "no numbers: it is text"),
        ("{topic: /front}", "{topic: /joint_states}", "is no picture: name a field"),
        ("task: put", "max_age: 0.01\ntask: put", "says nothing for"),
    ],
)
def test_what_does_not_fit_the_bag_is_refused(folder: Path, old: str, new: str, message: str) -> None:
    (folder / "topics.yaml").write_text(TOPICS.replace(old, new))
    with pytest.raises(InputError) as error:
        opened(folder)
    assert message in str(error.value)


def test_without_topics_it_says_which_there_are(folder: Path) -> None:
    with pytest.raises(InputError, match=r"topics=FILE.yaml says it .*/joint_states \(sensor_msgs/msg/JointState"):
        opened(folder / "one.mcap")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_recording_that_was_cut_off_is_one_line(folder: Path, share: float) -> None:
    content = (folder / "one.mcap").read_bytes()
    (folder / "one.mcap").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"one\.mcap (has no index|cannot be read|is damaged)"):
        opened(folder)


def test_flipped_bits_are_found(folder: Path) -> None:
    content = bytearray((folder / "one.mcap").read_bytes())
    random = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(content)
        damaged[random.integers(20, len(content) - 400)] ^= 1 << random.integers(8)
        (folder / "one.mcap").write_bytes(damaged)
        with contextlib.suppress(InputError):  # anything else is a failure
            buffer = opened(folder).buffer
            [buffer[key][:] for key in buffer.keys]


def test_a_chunk_that_unpacks_to_more_than_it_claims_is_refused(folder: Path) -> None:
    import zstandard

    file = folder / "one.mcap"
    content = file.read_bytes()
    at = content.index(b"\x28\xb5\x2f\xfd")
    bomb = zstandard.ZstdCompressor().compress(bytes(5_000_000))
    length = int.from_bytes(content[at - 8 : at], "little")
    assert len(bomb) <= length
    file.write_bytes(content[:at] + bomb.ljust(length, b"\0") + content[at + length :])
    with pytest.raises(InputError, match=r"one\.mcap is damaged: a chunk of"):
        opened(folder)


def test_links_are_not_followed(folder: Path) -> None:
    (folder / "three.mcap").symlink_to(folder / "one.mcap")
    with pytest.raises(InputError, match="links are not followed"):
        opened(folder)


def test_formats_are_told_by_their_content(folder: Path) -> None:
    assert registry.detected(folder) == registry.detected(folder / "one.mcap") == "mcap"
    with pytest.raises(InputError, match="unknown format 'mcap'"):
        registry.asked_for(Path("x.mcap"), "mcap")
