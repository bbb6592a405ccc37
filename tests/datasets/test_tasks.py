"""Tasks in words: given with an episode, shown, and kept wherever the episodes go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from action_diffusion.commands import data, data_convert
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError


def episode(length: int, value: float = 0.0) -> dict[str, np.ndarray]:
    return {"state": np.full((length, 2), value), "action": np.full((length, 2), -value)}


def filled(buffer: ReplayBuffer) -> ReplayBuffer:
    for number, task in enumerate(["push it", "open the drawer", "push it"]):
        buffer.append(episode(3 + number, float(number)), task=task)
    return buffer


WORDS = ["push it", "open the drawer", "push it"]


def test_words_are_given_with_an_episode(tmp_path: Path) -> None:
    filled(ReplayBuffer.create(tmp_path / "a.zarr", attrs={"control_rate": 10}))
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert episode_tasks(buffer) == WORDS
    assert buffer.attrs["tasks"] == ["push it", "open the drawer"]
    assert buffer["task_index"][:].tolist() == [0] * 3 + [1] * 4 + [0] * 5
    buffer.append(episode(2))
    buffer.append(episode(2), task="a third")
    assert episode_tasks(ReplayBuffer.open(tmp_path / "a.zarr")) == [*WORDS, "", "a third"]


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(("attrs", "before"), [({}, ""), ({"task": "lift"}, "lift")])
def test_episodes_before_the_first_words_keep_theirs(
    attrs: dict[str, str], before: str, on_disk: bool, tmp_path: Path
) -> None:
    if on_disk:
        buffer = ReplayBuffer.create(tmp_path / "a.zarr", attrs=attrs)
        buffer.append(episode(300, 1.0))
    else:
        buffer = ReplayBuffer.from_arrays(episode(300, 1.0), [300], attrs)
    buffer.append(episode(2, 2.0), task="push it")
    assert episode_tasks(ReplayBuffer.open(tmp_path / "a.zarr") if on_disk else buffer) == [before, "push it"]
    assert buffer["state"][:].ravel().tolist() == [1.0] * 600 + [2.0] * 4


@pytest.mark.parametrize("task", [3, ["push it"], b"push it"])
def test_words_are_text(task: object, tmp_path: Path) -> None:
    buffer = ReplayBuffer.create(tmp_path / "a.zarr")
    with pytest.raises(InputError, match="expected words"):
        buffer.append(episode(2), task=task)  # type: ignore[arg-type]
    assert not (tmp_path / "a.zarr").exists()


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(ReplayBuffer.create(tmp_path / "a.zarr"))
    assert data.run(["inspect", str(tmp_path / "a.zarr")]) == 0
    out = capsys.readouterr().out
    assert "task 'push it': 2 of 3 episodes (0, 2)\n" in out
    assert "task 'open the drawer': 1 of 3 episodes (1)\n" in out


def test_they_stay_right_when_episodes_are_dropped_and_joined(tmp_path: Path) -> None:
    filled(ReplayBuffer.create(tmp_path / "a.zarr"))
    other = ReplayBuffer.create(tmp_path / "b.zarr")
    other.append(episode(4), task="open the drawer")
    other.append(episode(4), task="wave")
    words = [str(tmp_path / "a.zarr"), f"out={tmp_path / 'c.zarr'}", "drop=0", f"merge={tmp_path / 'b.zarr'}"]
    assert data.run(["edit", *words]) == 0
    buffer = ReplayBuffer.open(tmp_path / "c.zarr")
    assert episode_tasks(buffer) == [*WORDS[1:], "open the drawer", "wave"]
    buffer.drop([0])
    assert episode_tasks(ReplayBuffer.open(tmp_path / "c.zarr")) == ["push it", "open the drawer", "wave"]


@pytest.mark.parametrize("name", ["lerobot", "lerobot21"])
def test_through_lerobot_and_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    filled(ReplayBuffer.create(tmp_path / "a.zarr", attrs={"control_rate": 10}))
    data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "l"), "format": name})
    data_convert.run({"in": str(tmp_path / "l"), "out": str(tmp_path / "b.zarr")})
    back = ReplayBuffer.open(tmp_path / "b.zarr")
    assert episode_tasks(back) == WORDS
    assert back.attrs == ReplayBuffer.open(tmp_path / "a.zarr").attrs


@pytest.mark.parametrize(
    ("attrs", "tasks", "expected"),
    [
        ({}, ["push it"], {"task": "push it"}),
        ({"task": "lift"}, ["push it"], {"task": "push it"}),
        ({"tasks": ["lift"]}, ["push it"], {"tasks": ["push it"]}),
        ({"task": "lift"}, ["push it", "open"], {"tasks": ["push it", "open"]}),
    ],
)
def test_edited_tasks_of_a_set_that_was_written_here_are_read(
    attrs: dict[str, object], tasks: list[str], expected: dict[str, object], tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    pq = pytest.importorskip("pyarrow.parquet")
    ReplayBuffer.from_arrays(episode(4), [4], {"control_rate": 10, **attrs}).save(tmp_path / "a.zarr")
    data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "l"), "format": "lerobot"})
    pq.write_table(pa.table({"task_index": range(len(tasks)), "task": tasks}), tmp_path / "l/meta/tasks.parquet")
    data_convert.run({"in": str(tmp_path / "l"), "out": str(tmp_path / "b.zarr")})
    back = ReplayBuffer.open(tmp_path / "b.zarr")
    assert back.attrs == {"control_rate": 10, **expected}
    assert set(episode_tasks(back)) == {"push it"}


def test_one_task_with_its_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    ReplayBuffer.create(tmp_path / "a.zarr", attrs={"control_rate": 10}).append(episode(3), task="push it")
    data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "l"), "format": "lerobot"})
    data_convert.run({"in": str(tmp_path / "l"), "out": str(tmp_path / "b.zarr")})
    assert episode_tasks(ReplayBuffer.open(tmp_path / "b.zarr")) == ["push it"]
