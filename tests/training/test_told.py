"""Policies that are told in words what to do: from the data's words to training, simulators, servers and robots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deployments import TO, deploy, save_bundle
from letters import Letters

from action_diffusion import cli, envs
from action_diffusion.commands import preflight
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.run import run
from action_diffusion.deploy.serve.session import ClientSession
from action_diffusion.envs.told import ToldEnv
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load, settings
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.opening import load as open_policy
from action_diffusion.policy.spec import ObservationSpec, PolicySpec, TextSpec
from action_diffusion.policy.text import words
from action_diffusion.policy.text.words import Words, describe, embed
from action_diffusion.training.evaluation.rollouts import evaluate_policy
from action_diffusion.training.run import train

TASKS = ("go right", "go left")
TOLD = "task.observations={told: {kind: text, encoder: {name: letters}}}"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words._opened.cache_clear()
    yield
    words._opened.cache_clear()


def recorded(path: Path, tasks: Sequence[str | None] = TASKS, episodes: int = 8) -> Path:
    """Actions are half the state, or, when told to go left, its opposite."""
    random, buffer = np.random.default_rng(0), ReplayBuffer.create(path, attrs={"control_rate": 10})
    for number in range(episodes):
        state = random.uniform(-1, 1, (12, 2)).astype(np.float32)
        task = tasks[number % len(tasks)]
        buffer.append({"state": state, "action": -state / 2 if task == TASKS[1] else state / 2}, task=task)
    return path


def configured(data: object, folder: Path, *options: str, steps: int = 2) -> dict[str, Any]:
    sizes = ["task.horizon=4", "task.n_obs_steps=1", "task.n_action_steps=1", "train.batch_size=32", "train.lr=3e-3"]
    net = ["encoder=state", "policy.denoiser.channels=[32]", "policy.denoiser.time_dim=16", "train.validate_every=0"]
    run = [f"data={data}", f"output_dir={folder}", f"train.max_steps={steps}", "train.tensorboard=false", "device=cpu"]
    return load("train", ["task=custom", *sizes, *net, *run, TOLD, *options])


def test_a_policy_does_what_it_is_told(tmp_path: Path) -> None:
    """Its data are two buffers that number their tasks otherwise."""
    one, two = recorded(tmp_path / "a.zarr"), recorded(tmp_path / "b.zarr", TASKS[::-1])
    train(configured(f"[{one},{two}]", tmp_path / "run", steps=400))
    policy = bundles.load(tmp_path / "run/bundle", verify=True)
    assert policy.spec.observations["told"] == ObservationSpec(
        (26,), kind="text", source="task_index", text=TextSpec({"name": "letters"}, "letters 1", TASKS)
    )
    assert policy.spec.normalizer["told"]["kind"] == "identity"
    assert policy.spec.buffer_columns["task_index"] == "observed (as told, letters): 'go right', 'go left'"
    state = np.random.default_rng(1).uniform(-1, 1, (64, 1, 2)).astype(np.float32)
    for task, sign in zip(TASKS, (1, -1), strict=True):
        told = np.broadcast_to(embed(policy.spec.texts["told"], [task])[0], (64, 1, 26))
        action = policy.predict({"state": state, "told": told})["action"]
        assert np.corrcoef(sign * action.ravel(), state.ravel())[0, 1] > 0.9


def test_a_run_that_goes_on_means_the_same_by_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, init = recorded(tmp_path / "a.zarr"), f"init={tmp_path / 'run/bundle'}"
    train(configured(data, tmp_path / "run", "evaluation.n_episodes=0"))
    other = recorded(tmp_path / "b.zarr", ["go up"])
    train(configured(other, tmp_path / "next", init, "evaluation.n_episodes=0"))
    assert bundles.read_spec(tmp_path / "next/bundle").texts["told"].sentences == ("go up",)
    monkeypatch.setattr(Letters, "version", "letters 2")
    words._opened.cache_clear()
    with pytest.raises(InputError, match=r"told by \{'name': 'letters'\} \(letters 1\), those of this run"):
        train(configured(other, tmp_path / "last", init))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["go right", None], [], "episode 1 does not say in words what was to be done"),
        (TASKS, ["drop=[tolt]"], "unknown observation 'tolt'"),
        (
            TASKS,
            ["task.env={name: pusht}"],
            "does not say which to evaluate: give evaluation.instruction=…, such as",
        ),
    ],
)
def test_what_cannot_be_told_is_said_before_training(
    tasks: list[str | None], options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        preflight.train(configured(recorded(tmp_path / "a.zarr", tasks), tmp_path / "run", *options))


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ("{kind: text, encoder: {name: minilmm}}", "did you mean minilm"),
        ("{kind: text, source: state}", "without source, columns, unit"),
        ("{kind: state, encoder: {name: minilm}}", "encoder= is for kind: text"),
        ("{kind: text, encoder: {name: task_id, tasks: []}}", "tasks"),
        ("{kind: words}", "choose from state, image, text"),
    ],
)
def test_observations_that_are_no_words(observation: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load("train", ["task=custom", "data=x", f"task.observations={{told: {observation}}}"])


def told_bundle(path: Path, *, sentences: Sequence[str] = TASKS) -> Path:
    """PushT's states, and words."""
    told = describe({"name": "letters"}, sentences)
    corners = np.array([[200.0, 200.0, 200.0, 200.0, -3.0], [300.0, 300.0, 300.0, 300.0, 3.0]])
    vectors = embed(told.text, sentences)
    return save_bundle(
        path,
        observations={"state": ObservationSpec(shape=(5,), source="state"), "told": told},
        normalizer={"state": fit(corners), "action": fit(corners[:, :2]), "told": fit(vectors, "identity")},
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return told_bundle(tmp_path / "bundle")


def vector(spec: PolicySpec, sentence: str) -> np.ndarray:
    found: np.ndarray = embed(spec.texts["told"], [sentence])[0]
    return found


def test_in_a_simulator(bundle: Path, tmp_path: Path) -> None:
    policy = bundles.load(bundle)
    options: dict[str, Any] = {"settings": {}, "metrics_file": None, "n_episodes": 2, "n_videos": 1}
    options |= {"n_envs": 2, "policy_batch": 2, "workers": None, "seed": 100_000}
    with pytest.raises(InputError, match="give instruction=…, such as 'go right', 'go left'"):
        evaluate_policy(policy, output_dir=tmp_path / "a", **options)
    results = [
        evaluate_policy(policy, output_dir=tmp_path / str(n), instruction=task, **options)
        for n, task in enumerate((*TASKS, TASKS[0]))
    ]
    assert results[0]["scores"] == results[2]["scores"]
    assert results[1]["settings"]["instruction"] == TASKS[1]
    env = envs.make("pusht", words=Words(policy.spec.texts, TASKS[1]))
    env.reset(100_000)
    seen = env.observe(["told", "state"])
    assert list(seen) == ["told", "state"]
    np.testing.assert_array_equal(seen["told"], vector(policy.spec, TASKS[1]))
    env.close()


def test_a_simulator_may_say_what_to_do_itself(bundle: Path) -> None:
    spec = bundles.read_spec(bundle)

    class Speaking(SimpleNamespace):
        def reset(self, seed: int) -> None:
            self.instruction = TASKS[seed % 2]

        def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
            return {key: np.zeros(5, np.float32) for key in keys}

    env: Any = ToldEnv(Speaking(), Words.of(spec))
    for seed in (0, 1):
        env.reset(seed)
        np.testing.assert_array_equal(env.observe(["told"])["told"], vector(spec, TASKS[seed]))


def encoded(value: np.ndarray) -> dict[bytes, object]:
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}


def test_clients_may_send_words(bundle: Path) -> None:
    spec, state = bundles.read_spec(bundle), encoded(np.zeros(5, np.float32))
    session = ClientSession(spec=spec, words=Words.of(spec, TASKS[0]))
    right, left = (vector(spec, task) for task in TASKS)
    heard: list[tuple[dict[str, object], np.ndarray]] = [
        ({}, right),
        ({"told": TASKS[1]}, left),
        ({"prompt": TASKS[1]}, left),
        ({"told": TASKS[0], "prompt": TASKS[1]}, right),
        ({"told": encoded(left)}, left),
        ({"prompt": ""}, right),
    ]
    for message, expected in heard:
        question = session.take({"state": state, "action_diffusion": {"reset": True}, **message})
        np.testing.assert_array_equal(question.obs["told"], np.broadcast_to(expected, (1, TO, 26)))
    whole = {"state": encoded(np.zeros((TO, 5), np.float32)), "told": TASKS[1], "action_diffusion": {"history": True}}
    assert session.take(whole).obs["told"].shape == (1, TO, 26)
    refused: list[tuple[dict[str, object], str]] = [
        ({"told": "x" * 5000}, "at most 1000 letters"),
        ({"told": "12"}, "has no letters"),
        ({"told": 3}, "not a numpy array"),
        ({"told": encoded(left[:5])}, r"has shape \[5\]"),
    ]
    for message, said in refused:
        with pytest.raises(InputError, match=said):
            session.take({"state": state, **message})
    with pytest.raises(InputError, match="give instruction="):
        ClientSession(spec=spec).take({"state": state})


def test_on_a_robot(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give instruction=…, such as 'go right', 'go left'"):
        run(deploy(bundle, tmp_path / "none"))
    assert run(deploy(bundle, tmp_path / "run", "instruction=go left")) == 0
    record = ReplayBuffer.open(tmp_path / "run/record.zarr")
    assert record.attrs["task"] == "go left"
    np.testing.assert_array_equal(record["told"][:], np.tile(vector(bundles.read_spec(bundle), "go left"), (12, 1)))


@pytest.mark.slow
def test_as_an_onnx_file(bundle: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra [onnx]")
    pytest.importorskip("onnxruntime")
    file = bundle.with_name("policy.onnx")
    assert cli.main(["bundle", "export", f"in={bundle}", f"out={file}", "format=onnx"]) == 0
    ours, theirs = bundles.load(bundle), open_policy(file)
    obs = {"state": np.full((1, TO, 5), 250.0, np.float32), "told": np.tile(vector(ours.spec, TASKS[1]), (1, TO, 1))}
    noise = np.random.default_rng(0).standard_normal((1, *ours.spec.noise_shape)).astype(np.float32)
    found = [policy.predict(obs, noise=noise)["action_pred"] for policy in (ours, theirs)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-2)
    assert theirs.spec.texts == ours.spec.texts


def test_lerobot_has_no_words(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words_of = [f"in={bundle}", f"out={bundle.with_name('theirs')}", "format=lerobot"]
    assert cli.main(["bundle", "export", *words_of]) == 2
    assert "no counterpart" in capsys.readouterr().err


def test_a_missing_instruction_is_asked_for_before_anything_starts(bundle: Path) -> None:
    for check, command in ((preflight.evaluate, "evaluate"), (preflight.deploy, "deploy")):
        with pytest.raises(InputError, match="give instruction=…, such as 'go right', 'go left'"):
            check(settings(command, [f"bundle={bundle}"]))
        check(settings(command, [f"bundle={bundle}", "instruction=go left"]))


def test_the_commands_take_an_instruction(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings("evaluate", [f"bundle={bundle}", "instruction=push the T, then wait", "text_model=/clip"])
    assert (asked.instruction, asked.text_model) == ("push the T, then wait", "/clip")
    assert cli.main(["serve", f"bundle={save_bundle(bundle.with_name('plain'))}", "instruction=go", "port=0"]) == 2
    assert "this one is not" in capsys.readouterr().err
