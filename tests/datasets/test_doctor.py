"""The doctor finds what is planted, nothing where there is nothing, and repairs a copy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from synthetic import demonstrations

from action_diffusion import cli
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.doctor.examine import examine
from action_diffusion.datasets.doctor.finding import KINDS, Finding, as_json, ordered, show
from action_diffusion.datasets.doctor.repair import repair
from action_diffusion.datasets.doctor.survey import survey
from benchmarks.robustness import doctor as benchmark


@pytest.fixture(scope="module")
def buffer() -> ReplayBuffer:
    return demonstrations()


def arrays(buffer: ReplayBuffer) -> dict[str, np.ndarray]:
    return {key: np.array(buffer[key][:]) for key in buffer.keys}


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_nothing_is_found_where_there_is_nothing(buffer: ReplayBuffer) -> None:
    assert examine(buffer) == []


@pytest.mark.slow
def test_planted_faults_are_found_and_nothing_else(buffer: ReplayBuffer) -> None:
    result = benchmark.measure(buffer, 100, seed=0)
    assert {kind: score.planted for kind, score in result.scores.items()} == dict.fromkeys(KINDS_PLANTED, 10)
    assert result.original == []
    assert result.false_alarms == []
    assert result.share >= 0.95


KINDS_PLANTED = [kind for kind in KINDS if kind not in ("timing", "leak", "rotation")]  # they have their own tests


@pytest.mark.slow
def test_in_the_human_pusht_file_too() -> None:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("needs ACTION_DIFFUSION_DATA, the folder of pusht_cchi_v7_replay.zarr.zip")
    whole = ReplayBuffer.open(Path(folder) / benchmark.HUMAN)
    end = int(whole.episode_ends[79])
    rows = {key: whole[key][:end] for key in whole.keys}
    rows["img"] = rows["img"].astype(np.uint8)
    some = ReplayBuffer.from_arrays(rows, whole.episode_ends[:80])
    result = benchmark.measure(some, 20, seed=0)
    assert result.original == []
    assert result.false_alarms == []
    assert result.share >= 0.9  # of a part of the file; `python -m benchmarks.robustness.doctor` has all of it


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(buffer: ReplayBuffer, value: float) -> None:
    rows = arrays(buffer)
    rows["state"][200:203, 1] = value
    found = only(examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)))
    assert (found.kind, found.key, found.first, found.last, found.dimensions) == ("nan", "state", 200, 202, (1,))
    assert found.episode == np.searchsorted(buffer.episode_ends, 200, side="right")


def test_angles_may_wrap_and_quaternions_change_sign(buffer: ReplayBuffer) -> None:
    rows = arrays(buffer)
    assert np.abs(np.diff(rows["state"][:, 2])).max() > 6
    half = np.cumsum(np.random.default_rng(0).normal(0.02, 0.01, len(rows["state"]))) / 2
    signs = np.where(np.arange(len(half)) % 7 < 3, 1, -1)
    rows["eef_quat"] = np.stack([0 * half, 0 * half, np.sin(half), np.cos(half)], axis=1) * signs[:, None]
    findings = examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends), ("jump", "outlier"))
    assert findings == []


@pytest.mark.parametrize("lag", [-3, 1])
def test_a_camera_that_is_late_or_early_everywhere(buffer: ReplayBuffer, lag: int) -> None:
    rows = arrays(buffer)
    for start, end in zip([0, *buffer.episode_ends[:-1]], buffer.episode_ends, strict=True):
        shown = np.clip(np.arange(start, end) + lag, start, end - 1)
        rows["img"][start:end] = rows["img"][shown]
    late = ReplayBuffer.from_arrays(rows, buffer.episode_ends)
    found = [finding for finding in examine(late) if finding.kind == "skew"]
    assert (only(found).episode, only(found).lag) == (None, lag)
    assert ("late" if lag < 0 else "early") in found[0].how_bad


@pytest.mark.parametrize("step", [0.3, 0.7, 1.7, 2.3, 3.1])
def test_a_copy_at_another_rate_is_a_copy(step: float) -> None:
    """Between the rows, with another end: no row but the first is the same."""
    found = [finding for finding in examine(resampled(ways(6), 2, step)) if finding.kind == "duplicate"]
    assert [finding.episode for finding in found] == [6]
    assert "the way of episode 2 at another rate" in found[0].how_bad


def test_other_ways_of_other_lengths_are_no_copies() -> None:
    """From the same place to the same place; nor is what is nearly as long, whose rows a hash compares."""
    for buffer in (ways(12), resampled(ways(12), 3, 1.05)):
        assert not [finding for finding in examine(buffer) if finding.kind == "duplicate"]


def ways(n: int) -> ReplayBuffer:
    """Smooth ways of 120 to 219 rows in two dimensions, each its own between the same two places."""
    random, rows, ends = np.random.default_rng(0), list[np.ndarray](), list[int]()
    for index in range(n):
        t = np.linspace(0, 1, 120 + 99 * index // max(1, n - 1))[:, None]
        waves = sum(random.normal(0, 0.3 / k, 2) * np.sin(np.pi * k * t) for k in range(1, 5))
        rows.append(np.array([0.0, 1.0]) * (1 - t) + np.array([1.0, 0.0]) * t + waves)
        ends.append(len(rows[-1]) + (ends[-1] if ends else 0))
    state = np.concatenate(rows)
    return ReplayBuffer.from_arrays({"state": state, "action": np.roll(state, -1, axis=0)}, ends)


def resampled(buffer: ReplayBuffer, episode: int, step: float) -> ReplayBuffer:
    """With one more episode: that one at every `step`th row, by straight lines."""
    start, end = ([0, *buffer.episode_ends])[episode], buffer.episode_ends[episode]
    places = np.arange(0, end - start - 1 + 1e-9, step)
    arrays = {}
    for key in buffer.keys:
        rows = buffer[key][start:end]
        more = [np.interp(places, np.arange(len(rows)), column) for column in rows.T]
        arrays[key] = np.concatenate([buffer[key][:], np.stack(more, axis=1)])
    return ReplayBuffer.from_arrays(arrays, [*buffer.episode_ends.tolist(), buffer.n_steps + len(places)])


def test_times_that_have_gaps_and_jitter(buffer: ReplayBuffer) -> None:
    rows = arrays(buffer)
    random = np.random.default_rng(0)
    time = np.arange(buffer.n_steps) * 0.1
    time[300:] += 0.2
    jittery = slice(int(buffer.episode_ends[9]), int(buffer.episode_ends[10]))
    time[jittery] += random.uniform(-0.04, 0.04, jittery.stop - jittery.start)
    time[2000] = time[1999]
    rows["timestamp"] = time
    findings = examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends))
    gap = next(finding for finding in findings if finding.first == 300)
    assert gap.how_bad == "3.0 periods after the row before: about 2 rows are missing"
    assert {(finding.kind, finding.first) for finding in findings} >= {("timing", 2000), ("timing", jittery.start)}
    assert {finding.kind for finding in findings} == {"timing"}


def last_actions(buffer: ReplayBuffer) -> np.ndarray:
    """[N, A]: the action of the row before, in an episode's first row its own."""
    actions = np.asarray(buffer["action"][:])
    before = np.concatenate([actions[:1], actions[:-1]])
    firsts = np.concatenate([[0], buffer.episode_ends[:-1]])
    before[firsts] = actions[firsts]
    return before


@pytest.mark.parametrize(
    ("column", "dimensions"),
    [
        (lambda actions: actions, (0, 1)),
        (lambda actions: np.degrees(actions).astype(np.float32) + 3, (0, 1)),
        (lambda actions: actions[:, 1], (1,)),
        (lambda actions: actions @ np.array([[1.0, 2, 3], [4, 5, 6]]), (0, 1)),
        (lambda actions: np.concatenate([np.roll(actions, 1, axis=0), actions], axis=1), (0, 1)),
    ],
)
def test_columns_that_tell_the_action_of_their_own_row(buffer: ReplayBuffer, column: object, dimensions: tuple) -> None:
    rows = arrays(buffer)
    rows["told"] = column(rows["action"])  # type: ignore[operator]
    found = only(examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends), ("leak",)))
    assert (found.kind, found.key, found.episode, found.dimensions) == ("leak", "told", None, dimensions)


def test_an_action_that_goes_on_as_it_did_is_told_by_nothing_else() -> None:
    angle = 0.02 * np.arange(1200) + np.repeat([0.0, 1.0, 2.0], 400)
    turning = np.stack([np.cos(angle), np.sin(angle)], axis=1) + np.random.default_rng(0).normal(0, 1e-6, (1200, 2))
    rows = {"state": turning, "action": np.stack([np.cos(angle + 0.02), np.sin(angle + 0.02)], axis=1)}
    assert examine(ReplayBuffer.from_arrays(rows, [400, 800, 1200]), ("leak",)) == []


@pytest.mark.parametrize(
    ("smooth", "seen"),
    [
        *((False, seen) for seen in ("as it is", "in degrees", "on the way", "with noise")),
        *((True, seen) for seen in ("as it is", "in degrees", "with noise")),  # on the way it tells the action indeed
    ],
)
def test_states_that_follow_the_action_tell_nothing(buffer: ReplayBuffer, smooth: bool, seen: str) -> None:
    rows = arrays(buffer)
    n = buffer.n_steps
    if smooth:  # what is linear in its own past, so that the action before tells all
        rows["action"] = np.stack([np.sin(np.arange(n) / 90), np.cos(np.arange(n) / 90)], axis=1)
    before = last_actions(ReplayBuffer.from_arrays(rows, buffer.episode_ends))
    rows["follows"] = {
        "as it is": before,
        "in degrees": np.degrees(before),
        "on the way": (before + np.roll(before, 1, axis=0)) / 2,
        "with noise": before + np.random.default_rng(0).normal(0, 0.05, before.shape),
    }[seen]
    assert examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends), ("leak",)) == []


def test_depth_is_a_camera_and_a_wrench_may_jump(buffer: ReplayBuffer, tmp_path: Path) -> None:
    rows, touches = arrays(buffer), np.abs(np.arange(buffer.n_steps) - 60) < 2
    rows["depth"] = rows.pop("img")[..., 0].astype(np.uint16) * 9 + 400
    random = np.random.default_rng(0)
    rows["wrench"] = (random.normal(size=(len(touches), 6)) + 50 * touches[:, None]).astype(np.float32)
    assert examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)) == []
    assert survey(ReplayBuffer.from_arrays(rows, buffer.episode_ends), tmp_path).cameras["depth"].points.max() == 1
    rows["depth"][50] = 60_000 - rows["depth"][50]
    found = only(examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)))
    assert (found.kind, found.key, found.first, found.last) == ("outlier", "depth", 50, 50)


@pytest.mark.parametrize("layout", ["colours first", "grey"])
def test_pictures_of_other_layouts_are_cameras(buffer: ReplayBuffer, layout: str) -> None:
    rows = arrays(buffer)
    rows["img"] = rows["img"].transpose(0, 3, 1, 2) if layout == "colours first" else rows["img"][..., 0]
    assert examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)) == []


def test_dimensions_that_never_move_are_no_fault(buffer: ReplayBuffer) -> None:
    rows = arrays(buffer) | {"gripper": np.ones((buffer.n_steps, 2), np.float32)}
    rows["state"] = np.concatenate([rows["state"], np.full((buffer.n_steps, 1), 0.3, np.float32)], axis=1)
    assert examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)) == []


@pytest.mark.parametrize("n_episodes", [1, 2, 40])
def test_ends_of_a_gripper_are_no_fault(n_episodes: int) -> None:
    """It opens and closes within some rows in every episode but one, and is at an end at other times."""
    buffer = demonstrations(n_episodes)
    random = np.random.default_rng(0)
    wanted = (np.arange(buffer.n_steps) // 33 % 2).astype(float)
    if n_episodes > 1:
        wanted[: buffer.episode_ends[0]] = 0
    slow = np.convolve(wanted, np.full(7, 1 / 7), mode="same")
    width = np.where((slow > 0) & (slow < 1), slow + random.normal(0, 0.01, len(slow)), slow).clip(0, 1)
    rows = arrays(buffer) | {"gripper": (0.08 * width).astype(np.float32)[:, None]}
    found = examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends))
    assert [finding for finding in found if finding.key == "gripper"] == []


def turning(buffer: ReplayBuffer) -> np.ndarray:
    """[N, 4], x, y, z, w: a hand that points down, half a turn from the identity, and sways."""
    time = 0.1 * np.arange(buffer.n_steps) + np.random.default_rng(1).normal(0, 0.01, buffer.n_steps)
    sway = np.stack([0.4 * np.sin(time), 0.3 * np.cos(0.7 * time), 0.5 * np.sin(0.6 * time)], axis=1)
    return (Rotation.from_rotvec(sway) * Rotation.from_rotvec([0, np.pi, 0])).as_quat()


def flipped(buffer: ReplayBuffer, kind: str) -> np.ndarray:
    """The same as a column of a file that changes the rotation's name within episodes."""
    quaternion = turning(buffer)
    rotation = Rotation.from_quat(quaternion)
    if kind == "rotation vector":
        return rotation.as_rotvec()
    if kind == "euler":
        return rotation.as_euler("xyz")
    if kind == "degrees":
        return rotation.as_euler("xyz", degrees=True) % 360
    if kind == "one episode":
        signs = np.where(np.arange(buffer.n_steps) < buffer.episode_ends[0], -1.0, 1.0)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], buffer.n_steps)
    return np.roll(quaternion, 1, axis=1) * signs[:, None] if kind == "w first" else quaternion * signs[:, None]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("w first", "eef"),
        ("w last", "pose"),
        ("one episode", "eef"),
        ("rotation vector", "pose"),
        ("rotation vector", "pose near the origin"),
        ("euler", "pose"),
        ("euler", "pose near the origin"),
        ("degrees", "eef"),
    ],
)
def test_rotations_that_change_their_name_are_found_and_mended(kind: str, key: str, tmp_path: Path) -> None:
    buffer = demonstrations(6)
    values = flipped(buffer, kind)
    first = 0 if key == "eef" else 3
    place = buffer["state"][:, [0, 1, 1]] / (50 if key == "pose" else 1e5)
    values = np.concatenate([place, values], axis=1) if first else values
    rows = {"state": buffer["state"][:], "action": buffer["action"][:], key: values.astype(np.float32)}
    broken = ReplayBuffer.from_arrays(rows, buffer.episode_ends)
    findings = examine(broken)
    assert {(finding.kind, finding.key) for finding in findings} == {("rotation", key)}
    assert min(finding.dimensions[0] for finding in findings) >= first
    repair(broken, findings, tmp_path / "fixed.zarr")
    fixed = ReplayBuffer.open(tmp_path / "fixed.zarr")
    assert examine(fixed) == []
    assert key in fixed.attrs["rotations"]
    np.testing.assert_array_equal(fixed[key][:, :first], place[:, :first].astype(np.float32))
    made = fixed[key][:, first:]
    inner = np.setdiff1d(np.arange(1, buffer.n_steps), buffer.episode_ends)
    assert np.abs(made[inner] - made[inner - 1]).max() < (15 if kind == "degrees" else 0.25)
    if kind in ("euler", "degrees"):
        made = Rotation.from_euler("xyz", made, degrees=kind == "degrees")
    elif kind == "rotation vector":
        made = Rotation.from_rotvec(made)
    else:
        made = Rotation.from_quat(made, scalar_first=kind == "w first")
    assert (made.inv() * Rotation.from_quat(turning(buffer))).magnitude().max() < 1e-5
    np.testing.assert_array_equal(fixed["state"][:], buffer["state"][:])


@pytest.mark.parametrize(("case", "keys"), [("zarr_quat_flip", 2), ("zarr_rotvec_few", 1)])
def test_in_what_people_have(case: str, keys: int, tmp_path: Path) -> None:
    path = Path(os.environ.get("ACTION_DIFFUSION_DATA", "")).parent / "cases" / case / "d.zarr"
    if not path.exists():
        pytest.skip("no cases beside ACTION_DIFFUSION_DATA")
    buffer = ReplayBuffer.open(path)
    findings = [finding for finding in examine(buffer) if finding.kind == "rotation"]
    assert len({finding.key for finding in findings}) == keys
    repair(buffer, findings, tmp_path / "fixed.zarr")
    fixed = ReplayBuffer.open(tmp_path / "fixed.zarr")
    assert examine(fixed, ("rotation",)) == []
    assert fixed.n_episodes == buffer.n_episodes
    inner = np.setdiff1d(np.arange(1, buffer.n_steps), buffer.episode_ends)
    for key in fixed.attrs["rotations"]:
        assert np.abs(fixed[key][:][inner] - fixed[key][:][inner - 1]).max() < 0.2


@pytest.mark.parametrize("size", [3, 4, 6])
@pytest.mark.parametrize("unit", [False, True])
def test_noise_is_no_rotation(size: int, unit: bool) -> None:
    noise = np.random.default_rng(3).normal(size=(1500, size))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True) if unit else 1.0
    found = examine(ReplayBuffer.from_arrays({"state": noise, "quat": noise}, [500, 1000, 1500]), ("rotation",))
    assert found == []


def test_rotations_that_the_buffer_says() -> None:
    buffer = demonstrations(6)
    angle = np.arange(buffer.n_steps) * 0.3 % (2 * np.pi)
    rows = {"yaw_of_it": angle, "other": np.stack([100 * angle, angle], axis=1)}
    attrs = {"rotations": {"other": "angle@1"}}
    found = examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends, attrs), ("rotation",))
    assert {(finding.key, finding.rotation) for finding in found} == {("yaw_of_it", "angle@0"), ("other", "angle@1")}


def test_quaternions_of_zeros_are_named() -> None:
    buffer = demonstrations(6)
    rows = np.tile([0.0, 0.0, 0.0, 1.0], (buffer.n_steps, 1))
    rows[[10, 12]] = 0
    found = examine(
        ReplayBuffer.from_arrays({"quat": rows}, buffer.episode_ends, {"rotations": {"quat": "quaternion_xyzw"}}),
        ("rotation",),
    )
    assert [(finding.episode, finding.first, finding.last) for finding in found] == [(0, 10, 12)]
    assert "zeros, which are no rotation" in found[0].how_bad


def test_switches_and_rewards_may_jump_and_rest(buffer: ReplayBuffer) -> None:
    rows = arrays(buffer)
    rows["gripper_action"] = np.where(np.arange(buffer.n_steps) % 60 < 30, -1.0, 1.0)[:, None]
    rows["reward"] = (np.arange(buffer.n_steps) % 70 > 50).astype(np.float32)
    rows["demo"] = np.repeat(np.arange(buffer.n_episodes), np.diff(buffer.episode_ends, prepend=0))
    assert examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends)) == []


@pytest.mark.parametrize("keys", [["img"], ["action"], ["state"], ["img", "action"]])
def test_any_keys_will_do(buffer: ReplayBuffer, keys: list[str]) -> None:
    rows = {key: values for key, values in arrays(buffer).items() if key in keys}
    found = examine(ReplayBuffer.from_arrays(rows, buffer.episode_ends))
    assert {finding.kind for finding in found} <= ({"idle"} if keys == ["img"] else set())  # it hardly moves


@pytest.mark.parametrize("ends", [[1], [1, 2, 3], [7, 9]])
def test_buffers_may_be_short(buffer: ReplayBuffer, ends: list[int]) -> None:
    rows = {key: values[: ends[-1]] for key, values in arrays(buffer).items()}
    examine(ReplayBuffer.from_arrays(rows, ends))


def faulty(buffer: ReplayBuffer) -> ReplayBuffer:
    """NaN in episode 1, a jump in 3, frozen frames in 5, a late camera in 7, idle rows after 9, and 12 is 11 again."""
    rows, ends = arrays(buffer), buffer.episode_ends
    rows["state"][ends[0] + 20, 0] = np.nan
    rows["state"][ends[2] + 30 : ends[3], 0] += 15
    rows["img"][ends[4] + 20 : ends[4] + 30] = rows["img"][ends[4] + 20]
    rows["img"][ends[6] + 2 : ends[7]] = rows["img"][ends[6] : ends[7] - 2]
    for values in rows.values():
        values[ends[9] - 15 : ends[9]] = values[ends[9] - 15]
    episodes = [{key: values[a:b] for key, values in rows.items()} for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    episodes[12] = episodes[11]
    joined = {key: np.concatenate([episode[key] for episode in episodes]) for key in rows}
    return ReplayBuffer.from_arrays(joined, np.cumsum([len(e["state"]) for e in episodes]), buffer.attrs)


def test_a_repaired_copy_has_nothing_left_to_find(buffer: ReplayBuffer, tmp_path: Path) -> None:
    broken = faulty(buffer)
    findings = examine(broken)
    assert {f.kind for f in findings} >= {"nan", "jump", "frozen", "skew", "idle", "duplicate"}
    lines = repair(broken, findings, tmp_path / "fixed.zarr")
    fixed = ReplayBuffer.open(tmp_path / "fixed.zarr")
    assert examine(fixed) == []
    assert lines[0].startswith(f"{tmp_path / 'fixed.zarr'}: {fixed.n_episodes} episodes, {fixed.n_steps} of ")
    assert "1 nan" in fixed.attrs["provenance"][0]["what"]
    ends = buffer.episode_ends
    np.testing.assert_array_equal(fixed.episode(0)["img"], buffer.episode(0)["img"])
    was = buffer["state"][ends[0] : ends[1], 0]
    np.testing.assert_allclose(fixed.episode(1)["state"][20, 0], (was[19] + was[21]) / 2, rtol=1e-6)


@pytest.mark.slow
def test_the_command(buffer: ReplayBuffer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, broken = tmp_path / "demos.zarr.zip", faulty(buffer)
    buffer.save(path)
    assert cli.main(["data", "doctor", str(path)]) == 0
    assert capsys.readouterr().out == "nothing found\n"
    broken.save(path)
    before = path.read_bytes()
    found, page = tmp_path / "found.json", tmp_path / "found.html"
    words = ["data", "doctor", str(path), "--fix", "--json", str(found), f"page={page}"]
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert "findings: " in out
    assert "NaN" in out
    assert [line.split()[:4] for line in out.splitlines() if line.startswith(("nan", "idle"))][:2] == [
        ["nan", "state", "1", "1"],
        ["idle", "all", "1", "9"],
    ]
    assert path.read_bytes() == before
    assert examine(ReplayBuffer.open(tmp_path / "demos.fixed.zarr")) == []
    rows = json.loads(found.read_text())
    assert rows == as_json(ordered(examine(broken)))
    start = int(buffer.episode_ends[0])
    expected = {"kind": "nan", "key": "state", "episode": 1, "first": start + 20, "last": start + 20}
    assert expected.items() <= next(row for row in rows if row["kind"] == "nan").items()
    assert page.read_text().count("<img") >= 5
    assert cli.main(words) == 2
    assert "demos.fixed.zarr exists: choose another path with --fix OUT" in capsys.readouterr().err


@pytest.mark.parametrize("details", [False, True])
def test_many_findings_are_a_line_unless_each_is_asked_for(
    details: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "observation.gripper_width_of_the_left_arm"
    many = [Finding("jump", long, e, 70 * e + 3, 70 * e + 3, 1.0 + e, f"a step of {e}.5") for e in range(40)]
    show(many, details=details)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("jump") for line in lines) == (41 if details else 2)  # and what to do
    assert any(" observation.gripper_width_" in line for line in lines)  # parted between words
    assert any(" of_the_left_arm" in line for line in lines)
    text = "".join(line[11:].rstrip() for line in lines)
    assert "0-39" in text or details
    assert "39.5" in " ".join(lines)
    assert lines[-1].startswith("40 findings: 40 jump")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.zarr"], "nothing.zarr: no such file or folder"),
        ([], "PATH is required: action-diffusion data doctor PATH"),
        (["a.zarr", "b.zarr"], "'b.zarr' is not of the form name=value"),
        (["a.zarr", "--jsn", "x"], "unknown flag '--jsn': did you mean --json?"),
        (["a.zarr", "--json"], "--json is empty"),
        (["a.zarr", "--json", "--fix"], "--json is empty"),
        (["a.zarr", "--fix", "x", "--fix=y"], "--fix is given twice"),
        (["a.zarr", "details=yes"], "details=yes: expected true or false"),
        (["a.zarr", "kinds=jmp"], "unknown kind 'jmp' in kinds=: did you mean jump?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "doctor", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_cannot_be_read(buffer: ReplayBuffer, tmp_path: Path) -> None:
    path = tmp_path / "demos.zarr"
    buffer.save(path)
    chunk = next(file for file in (path / "data" / "state" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:100])
    assert cli.main(["data", "doctor", str(path)]) == 2
