"""Policies without a simulator: asked about episodes that are new to them, beside one another and baselines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import demonstrations
from web_pages import Page

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy.bundle import read_spec
from action_diffusion.training import episodes
from action_diffusion.training.evaluation import baselines
from action_diffusion.training.evaluation.results import compare, summarise_seeds

SMALL = [
    "task=custom",
    "device=cpu",
    "policy.denoiser.channels=[8,16]",
    "policy.denoiser.time_dim=16",
    "policy.sampler.num_inference_steps=2",
    "train.max_steps=2",
    "train.batch_size=16",
    "train.validate_every=0",
    "train.tensorboard=false",
    "dataset.val_fraction=0.3",
]


def train(data: Path, output: Path, *words: str) -> Path:
    assert main(["train", f"data={data}", f"output_dir={output}", *SMALL, *words]) == 0
    return output / "bundle"


def evaluate(output: Path, *words: str) -> dict:
    assert main(["evaluate", f"output_dir={output}", "device=cpu", *words]) == 0
    return json.loads((output / "results.json").read_text())


def joined(*parts: tuple[ReplayBuffer, list[int]], dtype: type = np.float32) -> ReplayBuffer:
    """Episodes of several buffers, in this order."""
    found = [buffer.episode(index) for buffer, indices in parts for index in indices]
    arrays: dict[str, np.ndarray] = {
        key: np.concatenate([episode[key] for episode in found]).astype(dtype) for key in found[0]
    }
    return ReplayBuffer.from_arrays(arrays, np.cumsum([len(episode["action"]) for episode in found]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Demonstrations of six episodes, and runs a and b, which hold out other two."""
    path = tmp_path_factory.mktemp("own")
    demonstrations().save(path / "demos.zarr")
    train(path / "demos.zarr", path / "a")
    train(path / "demos.zarr", path / "b", "seed=1", "task.horizon=20", "task.n_action_steps=4", "task.n_obs_steps=1")
    return path


@pytest.fixture
def kinds(folder):
    """What each episode of a buffer is to run a."""
    bundle = folder / "a" / "bundle"
    known = episodes.read(bundle)
    assert known is not None
    return lambda buffer: episodes.recognise(buffer, read_spec(bundle), known).tolist()


@pytest.mark.slow
def test_the_end_of_training_and_evaluate_ask_about_the_same_held_out_episodes(folder, tmp_path, kinds):
    assert kinds(demonstrations()).count("held_out") == 2
    ended = json.loads((folder / "a" / "evaluation" / "results.json").read_text())
    found = evaluate(tmp_path, f"bundle={folder}/a/bundle")
    for name in ("episode_ids", "errors", "n_windows", "origin", "baselines"):
        assert found[name] == ended[name]
    assert (found["origin_kind"], found["n_episodes"]) == ("held_out", 2)
    assert "4 that it was trained on are left out" in found["origin"]


@pytest.mark.slow
def test_episodes_of_the_training_buffer_are_known_again(folder, tmp_path, capsys):
    """Given as data=, the training's own buffer gives the error on the two episodes that were held out."""
    own = evaluate(tmp_path / "own", f"bundle={folder}/a/bundle")
    given = evaluate(tmp_path / "given", f"bundle={folder}/a/bundle", f"data={folder}/demos.zarr")
    assert given["action_error"] == own["action_error"]
    assert given["episode_ids"] == own["episode_ids"]
    assert "origin: 2 episodes that the policy was not trained on" in capsys.readouterr().out


def test_in_another_order_type_and_company_and_when_they_were_cut(kinds):
    old, new = demonstrations(), demonstrations(seed=7)
    before = kinds(old)
    mixed = joined((new, [0]), (old, [5, 3, 1]), (new, [1]), dtype=np.float64)
    assert kinds(mixed) == ["new", before[5], before[3], before[1], "new"]
    cut = {key: np.concatenate([old.episode(e)[key][5:32] for e in range(6)]) for key in ("state", "action")}
    assert kinds(ReplayBuffer.from_arrays(cut, np.arange(1, 7) * 27)) == before
    whole = {key: old[key][:] for key in ("state", "action")}
    assert kinds(ReplayBuffer.from_arrays(whole, [240])) == ["trained"]  # two thirds of its rows were
    parts = kinds(ReplayBuffer.from_arrays(whole, np.arange(1, 25) * 10))
    assert parts == [kind for kind in before for _ in range(4)]
    keep = np.arange(240) % 40 != 20
    thinned = ReplayBuffer.from_arrays({key: column[keep] for key, column in whole.items()}, np.arange(1, 7) * 39)
    assert kinds(thinned) == before


def test_a_common_beginning_does_not_make_episodes_the_same(kinds):
    """Ten rows at home before the arm moves: in each episode, whichever was trained on."""
    old, new = demonstrations(), demonstrations(seed=7)
    for key in ("state", "action"):
        new[key][0:40][:10] = old[key][0:10]
    assert kinds(new)[0] == "new"


def test_few_different_actions_do_not_make_episodes_the_same(folder, kinds):
    """As of a keyboard, to a policy that sees cameras only: pieces of 8 rows still differ."""
    random = np.random.default_rng(0)
    walks = [random.integers(-1, 2, (400, 2)).astype(np.float32) for _ in range(2)]
    spec = dataclasses.replace(read_spec(folder / "a" / "bundle"), observations={}, estimates={})
    first, second = (ReplayBuffer.from_arrays({"action": walk}, [400]) for walk in walks)
    known = episodes.Known(episodes.pieces(first, spec)[0], np.zeros(0, np.uint32))
    assert episodes.recognise(first, spec, known).tolist() == ["trained"]
    assert episodes.recognise(second, spec, known).tolist() == ["new"]


@pytest.mark.slow
def test_copies_of_trained_episodes_are_not_held_out(tmp_path):
    """Every episode is the same one: what training holds out it was trained on, and the run still ends well."""
    joined((demonstrations(), [0, 0, 0, 0])).save(tmp_path / "copies.zarr")
    bundle = train(tmp_path / "copies.zarr", tmp_path / "run")
    ended = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert ended["origin_kind"] == evaluate(tmp_path / "out", f"bundle={bundle}")["origin_kind"] == "trained"


@pytest.mark.slow
def test_only_trained_episodes_are_never_called_held_out(folder, tmp_path, kinds, capsys):
    old = demonstrations()
    trained = [index for index, kind in enumerate(kinds(old)) if kind == "trained"]
    joined((old, trained)).save(tmp_path / "trained.zarr")
    found = evaluate(tmp_path / "out", f"bundle={folder}/a/bundle", f"data={tmp_path}/trained.zarr")
    assert (found["origin_kind"], found["n_episodes"]) == ("trained", 4)
    words = "4 episodes that the policy was trained on: this is no measure of how it does on new ones"
    assert found["origin"] == words
    assert f"origin: {words}" in capsys.readouterr().out
    page = Page(tmp_path / "out" / "report.html")
    assert words in page.text
    assert "eld-out" not in page.text
    assert "not trained on" not in page.text


@pytest.mark.slow
def test_new_episodes_beside_trained_ones(folder, tmp_path, kinds):
    old, new = demonstrations(), demonstrations(n_episodes=3, seed=7)
    joined((old, [0, 1, 2, 3, 4, 5]), (new, [0, 1, 2])).save(tmp_path / "grown.zarr")
    found = evaluate(tmp_path / "out", f"bundle={folder}/a/bundle", f"data={tmp_path}/grown.zarr")
    assert found["origin"] == (
        "5 episodes that the policy was not trained on; of the data's 9, 4 that it was trained on are left out"
    )


@pytest.mark.slow
def test_a_bundle_without_hashes_says_that_it_is_unknown(folder, tmp_path):
    old = tmp_path / "a"
    old.mkdir()
    for file in (folder / "a" / "bundle").iterdir():
        if file.name != episodes.FILE:
            (old / file.name).write_bytes(file.read_bytes())
    given = evaluate(tmp_path / "given", f"bundle={old}", f"data={folder}/demos.zarr")
    assert (given["origin_kind"], given["n_episodes"]) == ("unknown", 6)
    assert "is unknown: no hashes of its episodes are kept" in given["origin"]
    own = evaluate(tmp_path / "own", f"bundle={old}")
    assert own["episode_ids"] == evaluate(tmp_path / "new", f"bundle={folder}/a/bundle")["episode_ids"]
    assert own["origin_kind"] == "unknown"
    assert "by its configuration" in own["origin"]


@pytest.mark.slow
def test_what_a_run_began_with_counts_as_trained_on(folder, tmp_path):
    """Fine-tuned on new demonstrations, a policy still was trained on the old ones."""
    demonstrations(seed=7).save(tmp_path / "new.zarr")
    tuned = train(tmp_path / "new.zarr", tmp_path / "tuned", f"init={folder}/a/bundle", "evaluation.n_episodes=0")
    known = episodes.read(tuned)
    assert known is not None
    assert (len(known.trained), len(known.held_out)) == (8 * 33, 2 * 33)  # pieces of 8 of 40 rows
    kinds = episodes.recognise(demonstrations(), read_spec(tuned), known)
    assert sorted(kinds) == ["new"] * 2 + ["trained"] * 4
    (folder / "a" / "bundle").joinpath(episodes.FILE).rename(tmp_path / "kept")
    try:
        unknown = train(tmp_path / "new.zarr", tmp_path / "unknown", f"init={folder}/a/bundle")
    finally:
        (tmp_path / "kept").rename(folder / "a" / "bundle" / episodes.FILE)
    assert episodes.read(unknown) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(b"hello"), "not a readable safetensors file"),
        (lambda file: save_file({"trained": np.arange(2, dtype=np.uint32)}, file), "no 'held_out' of shape"),
        (lambda file: save_file({k: v[None] for k, v in load_file(file).items()}, file), "no 'trained' of"),
        (lambda file: save_file({k: v.astype(np.int64) for k, v in load_file(file).items()}, file), "type uint32"),
        (lambda file: save_file({k: v[::-1].copy() for k, v in load_file(file).items()}, file), "does not increase"),
    ],
)
def test_hashes_that_are_damaged(folder, tmp_path, change, message):
    file = tmp_path / episodes.FILE
    file.write_bytes((folder / "a" / "bundle" / episodes.FILE).read_bytes())
    change(file)
    with pytest.raises(InputError, match=message):
        episodes.read(tmp_path)


@pytest.mark.slow
def test_two_policies_on_the_same_windows(folder, tmp_path, capsys):
    """Whatever windows each was trained on, and on episodes that neither was trained on."""
    new = demonstrations(n_episodes=3, seed=7)
    joined((demonstrations(), list(range(6))), (new, [0, 1, 2])).save(tmp_path / "grown.zarr")
    a, b, out = f"{folder}/a/bundle", f"{folder}/b/bundle", tmp_path / "out"
    one = evaluate(out, f"bundle={a}", f"compare={b}", f"data={tmp_path}/grown.zarr")
    other, difference = (json.loads((out / name / "results.json").read_text()) for name in ("compare", "comparison"))
    assert one["origin_kind"] == other["origin_kind"] == "held_out"
    assert 3 <= one["n_episodes"] < 5
    assert one["n_action_steps"] == other["n_action_steps"] == 4
    assert (one["episode_ids"], one["episode_steps"]) == (other["episode_ids"], other["episode_steps"])
    assert difference["error_difference"] == pytest.approx(
        one["action_error_relative"] - other["action_error_relative"]
    )
    low, high = difference["error_interval"]
    assert low <= difference["error_difference"] <= high
    assert difference["verdict"].startswith(f"{a} minus {b}: ")
    assert difference["verdict"] in capsys.readouterr().out
    assert difference["verdict"] in Page(out / "comparison" / "report.html").text


@pytest.mark.slow
def test_several_trainings_of_a_policy_without_a_simulator(folder, tmp_path, capsys):
    out, a, b = tmp_path / "out", f"{folder}/a/bundle", f"{folder}/b/bundle"
    demonstrations(n_episodes=3, seed=7).save(tmp_path / "new.zarr")
    assert main(["evaluate", f"bundle=[{a},{b}]", f"output_dir={out}", f"data={tmp_path}/new.zarr", "device=cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    errors = [json.loads((out / f"bundle_{n}" / "results.json").read_text())["action_error_relative"] for n in (0, 1)]
    assert summary["action_error_relative"]["mean"] == pytest.approx(np.mean(errors))
    (difference,) = summary["differences"]
    assert difference["error_difference"] == pytest.approx(errors[1] - errors[0])
    assert f"{b} minus {a}: " in Page(out / "report.html").text
    assert f"{b} minus {a}: " in capsys.readouterr().out


@pytest.mark.slow
def test_policies_that_share_no_held_out_episode(folder, tmp_path, capsys):
    old = demonstrations()
    joined((old, [0])).save(tmp_path / "one.zarr")
    words = [f"bundle={folder}/a/bundle", f"compare={folder}/b/bundle", f"data={tmp_path}/one.zarr"]
    found = evaluate(tmp_path / "out", *words)
    assert found["origin"].startswith("1 episode that at least one of the policies was trained on")
    difference = json.loads((tmp_path / "out" / "comparison" / "results.json").read_text())
    assert difference["error_interval"] is None
    assert "no measure of how it does on new ones" in difference["verdict"]


def measured(errors: list[float], kind: str = "held_out", **changes) -> dict:
    return {
        "task": "arm",
        "n_windows": 9,
        "n_action_steps": 4,
        "origin": "these",
        "origin_kind": kind,
        "n_episodes": len(errors),
        "episode_ids": [str(index) for index in range(len(errors))],
        "episode_steps": [10] * len(errors),
        "episode_errors": errors,
        "action_error_relative": float(np.mean(errors)),
        **changes,
    }


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4], "ours minus theirs: -10.0 % of range in mean action error, 95 % interval "
         "-10.0 to -10.0. On these episodes ours errs less."),
        ([0.3, 0.3], [0.1, 0.1], "ours minus theirs: +20.0 % of range in mean action error, 95 % interval +20.0 to "
         "+20.0. On these episodes ours errs more."),
        ([0.1, 0.3], [0.2, 0.2], "ours minus theirs: +0.0 % of range in mean action error, 95 % interval -10.0 to "
         "+10.0. On these episodes the two cannot be told apart."),
        ([0.1], [0.2], "ours minus theirs: -10.0 % of range in mean action error; one of the episodes alone does not "
         "say what others would give."),
    ],
)  # fmt: skip
def test_the_verdict_says_which_minus_which(first, second, verdict):
    assert compare(measured(first), measured(second), ("ours", "theirs"))["verdict"] == verdict


def test_longer_episodes_count_for_more():
    steps: dict[str, Any] = {"episode_steps": [30, 10]}
    found = compare(measured([0.1, 0.5], **steps), measured([0.0, 0.0], **steps))
    assert found["error_difference"] == pytest.approx(0.2)
    assert found["error_interval"] == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_ids": ["x", "y"]}, "other episodes"),
        ({"episode_steps": [1, 2]}, "other episodes"),
        ({"n_action_steps": 8}, "other episodes"),
        ({"episode_errors": None}, "every dimension of the action is constant"),
    ],
)
def test_other_windows_do_not_compare(changes, message):
    for function in (compare, lambda a, b: summarise_seeds([a, b])):
        with pytest.raises(InputError, match=message):
            function(measured([0.1, 0.2]), measured([0.1, 0.2]) | changes)


def test_holding_still_is_where_the_arm_is_or_what_it_was_told_last():
    """x is a position that is measured, with a lag; the speed is measured as well; the gripper is not."""
    random = np.random.default_rng(0)
    x = np.cumsum(random.normal(size=200))
    action = np.stack([x, random.normal(size=200), np.arange(200) % 2], axis=1)
    states = {"arm": np.stack([np.ones(200), x + 0.1], axis=1), "joint_velocity": action[:, 1:2] + 0.01}
    before = np.roll(action, 1, axis=0)
    found = baselines.chunks(states, before, action, np.ptp(action, axis=0), ["x", "speed", "grip"])
    still, made_of = found["hold_still"]
    assert made_of == {"x": "arm[1]", "speed": "the action before", "grip": "the action before"}
    assert (still[:, 0] == x + 0.1).all()
    assert (still[:, 1:] == before[:, 1:]).all()
    assert (found["repeat_last_action"][0] == before).all()


@pytest.mark.slow
def test_baselines_stand_beside_the_policy(folder, tmp_path, kinds, capsys):
    found = evaluate(tmp_path, f"bundle={folder}/a/bundle")
    assert found["baselines"]["hold_still"]["made_of"] == {"action 0": "state[0]", "action 1": "state[1]"}
    buffer, errors = demonstrations(), []
    for index in (e for e, kind in enumerate(kinds(buffer)) if kind == "held_out"):
        action = buffer.episode(index)["action"].astype(float)
        for now in range(33):  # windows as training makes them: up to the last of which all 8 steps are real
            errors.append(np.abs(action[now : now + 8] - action[max(now - 1, 0)]))
    expected = np.concatenate(errors).mean()
    assert found["baselines"]["repeat_last_action"]["action_error"] == pytest.approx(expected)
    for one in found["baselines"].values():
        assert one["error_difference"] == pytest.approx(found["action_error_relative"] - one["action_error_relative"])
    out, page = capsys.readouterr().out, Page(tmp_path / "report.html").text
    for name in ("hold still", "repeat last action"):
        assert f"policy minus {name}: " in out
        assert f"policy minus {name}: " in page


@pytest.mark.slow
def test_the_report_of_an_image_policy_shows_what_it_saw_and_a_whole_episode(tmp_path):
    """Names and units come from the buffer; large pictures are made small."""
    old = demonstrations(n_episodes=4, length=30)
    arrays = {key: old[key][:] for key in ("state", "action")}
    arrays["front"] = np.random.default_rng(0).integers(0, 256, (120, 200, 220, 3), dtype=np.uint8)
    attrs = {"names": {"action": ["pan", "<b>tilt</b>"]}, "units": {"action": "deg, rad"}, "control_rate": 15}
    ReplayBuffer.from_arrays(arrays, old.episode_ends, attrs).save(tmp_path / "demos.zarr")
    words = [
        "policy.encoder.crop=[32,32]",
        "policy.encoder.resize=[40,44]",
        "policy.encoder.width=0.25",
        "policy.encoder.stages=1",
        "policy.encoder.keypoints=4",
    ]
    train(tmp_path / "demos.zarr", tmp_path / "run", *words)
    page = Page(tmp_path / "run" / "evaluation" / "report.html")
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("image") == 4  # the camera's, of four windows
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.source) < 1_000_000
    assert page.text.count("pan [deg]") == page.text.count("<b>tilt</b> [rad]") == 3  # the table and two plots
    assert "Along an episode" in page.text
