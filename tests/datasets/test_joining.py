"""`data=[a,b]`: several buffers as one, without a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.columns import ObsKey, load, load_cached
from action_diffusion.datasets.batches.joining import joined
from action_diffusion.datasets.robomimic.attributes import subset
from action_diffusion.datasets.storage.store import ZarrColumn, blocks
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError


def saved(path: Path, ends: list[int], attrs: dict[str, Any] | None = None, **columns: np.ndarray) -> ReplayBuffer:
    random = np.random.default_rng(len(path.name))
    given = {"state": random.normal(size=(ends[-1], 3)).astype(np.float32), **columns}
    given.setdefault("action", random.normal(size=(ends[-1], 2)).astype(np.float32))
    ReplayBuffer.from_arrays(given, ends, attrs).save(path)
    return ReplayBuffer.open(path)


@pytest.fixture
def pair(tmp_path: Path) -> list[ReplayBuffer]:
    return [
        saved(tmp_path / "a.zarr", [4, 10], {"control_rate": 20.0, "source": "a person"}),
        saved(tmp_path / "bb.zarr", [5], {"source": "corrections", "units": {"state": "m"}}),
    ]


def test_episodes_of_all_one_after_the_other(pair: list[ReplayBuffer]) -> None:
    both = joined(pair, ["state", "action"])
    assert both.episode_ends.tolist() == [4, 10, 15]
    for key in ("state", "action"):
        np.testing.assert_array_equal(both[key][:], np.concatenate([pair[0][key][:], pair[1][key][:]]))
    np.testing.assert_array_equal(both.episode(2)["action"], pair[1]["action"][:])
    assert both.rate == 20
    assert both.attrs["units"] == {"state": "m"}
    assert both.attrs["source"] == "a person and corrections"
    assert both.name == f"{pair[0].name} and {pair[1].name}"


@pytest.mark.parametrize("how", [load, load_cached])
def test_rows_are_loaded_from_both(how: Any, pair: list[ReplayBuffer], tmp_path: Path) -> None:
    both = joined(pair, ["state"])
    folder = {"folder": tmp_path / "cache"} if how is load_cached else {}
    values = how(both, ObsKey("state", (2, 0), "state"), **folder)
    expected = np.concatenate([part["state"][:] for part in pair])[:, [2, 0]]
    np.testing.assert_array_equal(values, expected)
    if how is load_cached:
        assert isinstance(values.base, np.memmap)
        # another second buffer is another file
        pair[1].save(tmp_path / "bb.zarr")
        changed = saved(tmp_path / "bb.zarr", [5], state=np.ones((5, 3), np.float32))
        assert how(joined([pair[0], changed], []), ObsKey("state", None, "state"), **folder)[-1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"grip": np.zeros(4)}, {}, r"bb.zarr has no column grip, which .*a.zarr has: what is trained on together"),
        ({}, {"grip": np.zeros(4)}, r"a.zarr has no column grip, which .*bb.zarr has"),
        (
            {"grip": np.zeros((4, 2))},
            {"grip": np.zeros((4, 3))},
            r"grip has rows \[3\] of float64 in .*bb.zarr, and \[2\] of float64 in .*a.zarr",
        ),
        (
            {"grip": np.zeros((4, 16, 16, 3), np.uint8)},
            {"grip": np.zeros((4, 16, 12, 3), np.uint8)},
            r"grip has rows \[16, 12, 3\] of uint8 in .*bb.zarr",
        ),
    ],
)
def test_a_column_that_differs_is_named_with_its_place(
    ours: dict[str, Any], theirs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pair = [saved(tmp_path / "a.zarr", [4], **ours), saved(tmp_path / "bb.zarr", [4], **theirs)]
    with pytest.raises(InputError, match=message):
        joined(pair, ["action", "grip"])
    left_out = joined(pair, ["action"]).left_out  # one that is not needed
    assert list(left_out) == ["grip"]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"control_rate": 20.0}, {"fps": 30}, r"bb.zarr has 30 steps a second, .*a.zarr has 20"),
        (
            {"units": {"action": "m"}},
            {"units": {"action": "cm"}},
            r"bb.zarr: action is in 'cm', .*a.zarr has it in 'm'",
        ),
    ],
)
def test_rates_and_units_must_agree(ours: dict[str, Any], theirs: dict[str, Any], message: str, tmp_path: Path) -> None:
    pair = [saved(tmp_path / "a.zarr", [4], ours), saved(tmp_path / "bb.zarr", [4], theirs)]
    with pytest.raises(InputError, match=message):
        joined(pair, [])
    third = saved(tmp_path / "none.zarr", [4])  # says nothing; the others still differ
    with pytest.raises(InputError, match=message):
        joined([third, *pair], [])


def test_rotations_that_one_says_are_those_of_all(tmp_path: Path) -> None:
    said, other = ({"rotations": {"state": text}} for text in ("rotation_vector", ["rotation_vector@0"]))
    names = ("a.zarr", "bb.zarr", "c.zarr")
    three = [saved(tmp_path / name, [4], attrs) for name, attrs in zip(names, ({}, said, other), strict=True)]
    assert joined(three, ["state"]).attrs["rotations"] == {"state": ["rotation_vector@0"]}
    euler = saved(tmp_path / "euler.zarr", [4], {"rotations": {"state": "euler"}})
    with pytest.raises(InputError, match=r"euler.zarr: state has the rotations euler@0, .*bb.zarr has rotation_v"):
        joined([*three, euler], ["state"])


def test_the_same_buffer_twice_is_refused(pair: list[ReplayBuffer]) -> None:
    with pytest.raises(InputError, match=r"data= names .*a.zarr twice"):
        joined([*pair, pair[0]], [])


def test_numbers_of_other_types_become_the_wider_one(tmp_path: Path) -> None:
    wide = np.arange(12, dtype=np.float64).reshape(4, 3) / 3
    pair = [saved(tmp_path / "a.zarr", [4]), saved(tmp_path / "bb.zarr", [4], state=wide)]
    both = joined(pair, ["state"])
    assert both["state"].dtype == both["state"][:2].dtype == np.float64
    np.testing.assert_array_equal(both["state"][4:], wide)


def test_pictures_that_are_stored_otherwise_become_what_is_seen_of_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 12, 3), np.uint8)
    forms = {
        "as.zarr": pixels,
        "floats.zarr": pixels.astype(np.float32),
        "to-one.zarr": pixels.astype(np.float32) / 255,
        "moved.zarr": np.moveaxis(pixels, -1, 1).copy(),
    }
    buffers = [saved(tmp_path / name, [4], img=values) for name, values in forms.items()]
    both = joined(buffers, ["img"])
    assert both["img"].dtype == np.uint8
    np.testing.assert_array_equal(both["img"][:], np.concatenate([pixels] * 4))


def test_each_chunk_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces whose chunks begin anywhere, one of them seen otherwise than it is stored."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 9, 12, 3), np.uint8)
    pair = [
        saved(tmp_path / "a.zarr", [23], img=pixels),
        saved(tmp_path / "bb.zarr", [23], img=pixels.astype(np.float32)),
    ]
    monkeypatch.setattr(ZarrColumn, "chunk_rows", 7)
    both = joined(pair, ["img"])["img"]
    found = list(blocks(both, 1))
    assert [first for first, _ in found] == [0, 7, 14, 21, 23, 30, 37, 44]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in found]), np.concatenate([pixels, pixels]))
    assert [(first, len(rows)) for first, rows in blocks(both, 1, 5, 32)] == [
        (5, 2),
        (7, 7),
        (14, 7),
        (21, 2),
        (23, 7),
        (30, 2),
    ]


def test_names_subsets_and_tasks_stay_those_of_their_episodes(tmp_path: Path) -> None:
    first = ReplayBuffer.create(tmp_path / "a.zarr", attrs={"subsets": {"good": ["demo_1"]}})
    second = ReplayBuffer.create(tmp_path / "bb.zarr", attrs={"subsets": {"good": ["demo_0"], "bad": ["demo_1"]}})
    for buffer, words in ((first, ("push", "pull")), (second, ("pull", "lift"))):
        for text in words:
            buffer.append({"action": np.zeros((3, 2), np.float32)}, task=text)
    both = joined([ReplayBuffer.open(tmp_path / name) for name in ("a.zarr", "bb.zarr")], ["action"])
    assert subset(both, "good").tolist() == [1, 2]
    assert subset(both, "bad").tolist() == [3]
    assert episode_tasks(both) == ["push", "pull", "pull", "lift"]
