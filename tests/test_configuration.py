"""Configuration: every combination composes and builds, and what does not fit is named."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from action_diffusion.errors import InputError
from action_diffusion.options import TrainSettings
from action_diffusion.options.configuration import GROUPS, _parse, choices, load
from action_diffusion.options.policy import FAMILIES
from action_diffusion.policy.build import build_policy, fit_normalizer
from action_diffusion.policy.registry import build
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

UNET = ["policy.denoiser.channels=[8,16]", "policy.denoiser.time_dim=16"]
TRANSFORMER = ["policy.denoiser.width=16", "policy.denoiser.layers=2"]
ACTIONS = {"pusht": 2, "custom": 7, "lift": 7, "can": 7, "square": 7, "transport": 14, "tool_hang": 7}
ACTIONS |= {"metaworld": 4, "aloha_sim": 14, "kitchen": 9}
SHAPES: dict[str, tuple[int, ...]] = {
    "state": (5,),
    "agent_pos": (2,),
    "image": (96, 96, 3),
    "top": (96, 128, 3),
    "points": (128, 6),
}
OBJECTS = {"lift": 10, "can": 14, "square": 14, "transport": 41, "tool_hang": 44}
ENDINGS: dict[str, tuple[int, ...]] = {"_image": (84, 84, 3), "_pos": (3,), "_quat": (4,), "_qpos": (2,)}
CUSTOM = {"front": (48, 64, 3), "wrist": (48, 48, 3), "joints": (7,)}


def combinations() -> list[tuple[str, ...]]:
    """Rows (task, encoder, denoiser, scheduler) in which every two choices meet, chosen greedily.

    The groups write to sections of their own, so that what goes wrong between them goes wrong between two.
    """
    pairs = {
        row: set(itertools.combinations(enumerate(row), 2))
        for row in itertools.product(*(choices(group) for group in GROUPS["train"]))
    }
    missing = set[tuple[Any, ...]]().union(*pairs.values())
    rows = []
    while missing:
        rows.append(max(pairs, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[rows[-1]]
    return rows


def shape_of(key: str, task: str) -> tuple[int, ...]:
    if key.endswith("_image") and task.startswith("tool_hang"):
        return (240, 240, 3)
    if key == "object":
        return (OBJECTS[task.removesuffix("_state")],)
    return SHAPES.get(key) or next(shape for ending, shape in ENDINGS.items() if key.endswith(ending))


def actions_of(task: str) -> int:
    return ACTIONS[re.sub("(_(state|image|points|generic))+$", "", task)]


def kind_of(key: str, shape: tuple[int, ...]) -> str:
    return "points" if key == "points" else "image" if len(shape) == 3 else "state"


def specification(task: dict[str, Any]) -> PolicySpec:
    shapes = {key: shape_of(key, task["name"]) for key in task["observations"]} if task["observations"] else CUSTOM
    return PolicySpec(
        observations={
            key: ObservationSpec(
                shape=shape,
                kind=kind_of(key, shape),
                dtype="uint8" if len(shape) == 3 else "float32",
            )
            for key, shape in shapes.items()
        },
        estimates={key: ObservationSpec(shape=shape_of(key, task["name"])) for key in task.get("estimates") or {}},
        action=ActionSpec(shape=(actions_of(task["name"]),)),
        n_obs_steps=task["n_obs_steps"],
        horizon=task["horizon"],
        n_action_steps=task["n_action_steps"],
        control_rate=task["control_rate"] or 10.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", combinations(), ids="-".join)
def test_every_combination_builds_and_samples(row):
    words = [f"{group}={choice}" for group, choice in zip(GROUPS["train"], row, strict=True)]
    small = [*(UNET if row[2].startswith("unet") else TRANSFORMER), "policy.encoder.width=0.25"]
    scheduler, objective = row[3:]
    if objective in FAMILIES and scheduler != FAMILIES[objective]:
        with pytest.raises(InputError, match="use scheduler="):
            load("train", [*words, *small, "data=x.zarr"])
        words.remove(f"scheduler={scheduler}")  # the objective's own
    n_steps = 1 if objective == "distillation" else 2
    config = load("train", [*words, *small, f"policy.sampler.num_inference_steps={n_steps}", "data=x.zarr"])
    TrainSettings(**config["train"])
    spec = specification(config["task"])
    if objective == "sobolev" and spec.camera_order:
        config["policy"]["objective"] = {"name": "denoising"}  # it is for states: test_sobolev.py
    random = np.random.default_rng(0)

    def read(key: str) -> np.ndarray:
        shape = spec.action.shape if key == "action" else (spec.states | spec.points)[key].shape
        return random.normal(size=(20, *shape)).astype(np.float32)

    def read_chunks(key: str) -> tuple[np.ndarray, np.ndarray]:
        return read(key), random.normal(size=(20, spec.horizon, *spec.action.shape)).astype(np.float32)

    statistics = fit_normalizer(config["policy"], spec, read, read_chunks)
    policy = build_policy(config["policy"], PolicySpec(**{**spec.__dict__, "normalizer": statistics})).eval()
    obs = {key: np.zeros((2, *value.shape), value.dtype) for key, value in spec.observations.items()}
    assert policy.predict(obs)["action"].shape == (spec.n_action_steps, actions_of(row[0]))


@pytest.mark.parametrize("denoiser", choices("denoiser"))
def test_denoisers_fit_the_horizon_at_full_size(denoiser):
    config = load("train", [f"denoiser={denoiser}"])
    with torch.device("meta"):  # sizes without memory: the largest has 250 million weights
        network = build("denoiser", config["policy"]["denoiser"], action_dim=2, condition_dim=10)
    network.check_horizon(config["task"]["horizon"])


def test_data_that_is_given_is_the_data_that_a_task_asks_for():
    assert load("train", ["task=custom", "data=x.zarr"])["data"] == "x.zarr"
    assert load("collect", ["task=custom", "output=x.zarr"])["task"]["env"] is None


def test_all_that_ships_is_a_choice():
    root = Path(__file__).resolve().parents[1] / "configs"
    groups = {path.parent.name for path in root.glob("*/*.yaml")}
    assert groups == {*GROUPS["train"], *GROUPS["finetune"]}


# Budgets.


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        ([], {"max_steps": 2200}),
        (["task=pusht_image"], {"max_steps": 6000}),
        (["train.max_steps=100"], {"max_steps": 100}),
        (["train.max_epochs=2"], {"max_epochs": 2.0}),
        (["task=pusht_image", "train.max_steps=100"], {"max_steps": 100}),
        (["train.max_steps=100", "train.max_minutes=3"], {"max_steps": 100, "max_minutes": 3.0}),
        (["train.max_minutes=null", "train.max_steps=5"], {"max_steps": 5}),
    ],
)
def test_a_budget_that_is_given_replaces_the_task_s_own(words, budget):
    settings = TrainSettings(**load("train", words)["train"])
    given = {name: getattr(settings, name) for name in ("max_minutes", "max_steps", "max_epochs")}
    assert {name: value for name, value in given.items() if value is not None} == budget


def test_a_task_s_values_stand_until_they_are_replaced():
    assert load("train", [])["train"]["lr"] == 1e-3
    assert load("train", ["task=pusht_image"])["train"]["lr"] == 5e-4
    assert load("train", ["train.lr=0.1", "task=pusht_image"])["train"]["lr"] == 0.1


def test_defaults_are_those_of_the_settings():
    plain = asdict(TrainSettings(max_steps=1))
    config = load("train", ["train.max_steps=1"])["train"]
    own = {"max_steps", "validate_every", "batch_size", "lr"}  # of task=pusht_state
    kept = config.keys() - own - {"betas"}
    assert {key: config[key] for key in kept} == {key: plain[key] for key in kept}
    assert config.keys() == plain.keys()


# Names and types.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("train", "seed=abc", "seed=abc: expected a whole number, such as 0"),
        ("train", "seed=null", "seed=null: expected a whole number"),
        ("train", "seed=1.5", "seed=1.5: expected a whole number"),
        ("train", "seed=true", "seed=True: expected a whole number"),
        ("train", "resume=maybe", "resume=maybe: expected true or false"),
        ("train", "device=null", "device=null: expected a word, such as auto"),
        ("train", "data=[a,3]", r"data\[1\]=3: expected a path"),
        ("train", "data=[]", "data has 0 values, expected 1 to 64"),
        ("train", "drop=", "drop=: expected names in brackets, such as"),
        (
            "train",
            "task.observations.stat=null",
            "unknown observation 'stat' in task.observations: did you mean state?",
        ),
        ("train", "output_dir=[a]", r"output_dir=\['a'\]: expected a path"),
        ("train", "train.lr=fast", "train.lr=fast: expected a number, such as 0.001"),
        ("train", "train.lr=nan", "train.lr=nan: expected a number"),
        ("train", "train.batch_size=1.5", "train.batch_size=1.5: expected a whole number, such as 256"),
        ("train", "train.betas=0.9", "train.betas=0.9: expected a list, such as"),
        ("train", "train.max_steps=many", "train.max_steps=many: expected a whole number"),
        ("train", "train.max_minutes=nan", "train.max_minutes=nan: expected a number"),
        ("train", "train=null", "train is a section: give its values one by one, such as train.max_minutes"),
        ("train", "dataset.memory_gb=all", "dataset.memory_gb=all: expected a number"),
        ("train", "evaluation.n_episodes=many", "evaluation.n_episodes=many: expected a whole number, such as 50"),
        ("train", "task.horizon=long", "task.horizon=long: expected a whole number, such as 12"),
        ("train", "task.control_rate=fast", "task.control_rate=fast: expected a number"),
        ("train", "data='x", '"data=\'x" cannot be read'),
        ("evaluate", "n_episodes=ten", "n_episodes=ten: expected a whole number, such as 50"),
        ("evaluate", "sampler.num_inference_steps=ten", "sampler.num_inference_steps=ten: expected a whole number"),
        ("collect", "episodes=ten", "episodes=ten: expected a whole number, such as 20"),
        ("deploy", "safety.margin=wide", "safety.margin=wide: expected a number, such as 0.1"),
    ],
)
def test_values_of_another_type_are_refused_by_key(name, word, message):
    with pytest.raises(InputError, match=message):
        load(name, [word])


def test_values_of_the_right_type_pass():
    words = ["train.lr=1", "task.control_rate=12", "device=0", "dataset.memory_gb=2", "policy.sampler.clip=null"]
    config = load("train", [*words, "policy.features=null", "task.env=null", "train.warmup=0"])
    assert (config["train"]["lr"], config["task"]["control_rate"], config["device"]) == (1.0, 12, 0)
    assert (config["policy"]["features"], config["task"]["env"], config["policy"]["sampler"]["clip"]) == (None,) * 3


def test_options_of_components_need_not_stand_in_a_file():
    config = load("train", ["policy.encoder.crop=[84,84]", "policy.sampler.eta=0.5", "policy.encoder.share=true"])
    assert config["policy"]["encoder"] == {"name": "observation", "crop": [84, 84], "share": True}
    assert config["policy"]["sampler"]["eta"] == 0.5
    assert load("evaluate", ["bundle=x", "sampler.eta=0.5"])["sampler"]["eta"] == 0.5


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("train", "drop=wrist", ["wrist"]),
        ("train", "drop=wrist,front", ["wrist", "front"]),
        ("train", "drop=[wrist]", ["wrist"]),
        ("train", "drop=null", None),
        ("evaluate", "extensions=guard", ["guard"]),
        ("collect", "gripper=0,1", [0, 1]),
        ("fit guard", "sigmas=0.2", [0.2]),
        ("fit constraint", "columns=2,3", [2, 3]),
    ],
)
def test_a_list_needs_no_brackets(name, word, expected):
    parsed = _parse(name, word)
    assert parsed.value() == expected
    if name == "train":
        value = load("train", [word])
        for key in word.partition("=")[0].split("."):
            value = value[key]
        assert value == expected


@pytest.mark.parametrize("key", ["policy.crop", "dataset.foo", "evaluation.foo.bar", "hydra.run.dir", "nothing"])
def test_other_keys_do(key):
    with pytest.raises(InputError, match=f"unknown option '{key}'"):
        load("train", [f"{key}=1"])


@pytest.mark.parametrize(
    "path", ["2024", "lr=3/bundle", "a,b", "a b", "it's", "run (1)", "ü#{x}", "~/x", "a\\b", "1e3"]
)
def test_paths_are_taken_as_typed(path):
    config = load("evaluate", [f"bundle={path}", f"compare={path}", f"output_dir={path}", f"data={path}"])
    assert {config[key] for key in ("bundle", "compare", "output_dir", "data")} == {path}


def test_several_bundles_are_a_list():
    assert load("evaluate", ["bundle=[a/bundle,b/bundle]"])["bundle"] == ["a/bundle", "b/bundle"]
    assert load("evaluate", ["bundle=x", "data=[a.zarr,b.zarr]"])["data"] == ["a.zarr", "b.zarr"]
    assert load("train", ["data=[a.zarr,b.zarr]"])["data"] == ["a.zarr", "b.zarr"]
    assert load("train", ["plugins=[]"])["plugins"] == []


# A user's own task.

OWN = """\
# @package _global_
defaults:
  - override /encoder: resnet18
  - _self_

task:
  name: my_arm
  data: demos.zarr
  env: null
  control_rate: 20
  n_obs_steps: 2
  horizon: 16
  n_action_steps: 8
  observations:
    wrist: {source: camera_1, kind: image}
  action: {source: action, unit: rad}

train:
  max_minutes: 30
"""


@pytest.fixture
def own(tmp_path) -> Path:
    folder = tmp_path / "my, own = configs"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "my_arm.yaml").write_text(OWN)
    return folder


@pytest.mark.slow
def test_a_folder_of_one_s_own_adds_a_task(own):
    config = load("train", ["task=my_arm", "task.control_rate=12.5", "task.observations.wrist.unit=x"], str(own))
    assert config["data"] == "demos.zarr"
    assert config["task"]["control_rate"] == 12.5
    assert config["task"]["observations"]["wrist"] == {"source": "camera_1", "kind": "image", "unit": "x"}
    assert config["train"]["max_minutes"] == 30
    assert config["policy"]["encoder"]["backbone"] == "resnet18"
    assert load("train", ["task=my_arm", "train.max_steps=5"], str(own))["train"]["max_minutes"] is None
    assert load("train", [], str(own))["task"]["name"] == "pusht_state"


def test_a_misspelt_task_of_one_s_own_is_suggested(own):
    with pytest.raises(InputError, match="unknown task 'my_arn': did you mean my_arm"):
        load("train", ["task=my_arn"], str(own))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: {name: x\n", r"task/my_arm.yaml\", line 1"),
        (OWN.replace("  horizon: 16\n", ""), "task my_arm does not say horizon"),
        (OWN.replace("# @package _global_", ""), "my_arm"),
        (OWN.replace("max_minutes: 30", "lrr: 3"), "'task/my_arm'.*'lrr' not in 'TrainSettings'"),
        (OWN.replace("max_minutes: 30", "lr: fast"), "'task/my_arm'.*'fast'.*Float"),
        (OWN.replace("resnet18", "resnet19"), "Could not find 'encoder/resnet19'.*resnet18"),
        ("- a list\n", "data"),
    ],
)
def test_a_broken_task_of_one_s_own_is_one_line(own, text, message):
    (own / "task" / "my_arm.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load("train", ["task=my_arm"], str(own))
    assert "\n" not in str(caught.value)


# Settings.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a run needs a budget"),
        ({"max_steps": 0}, r"train\.max_steps=0 must be above 0"),
        ({"max_minutes": -1.0}, r"train\.max_minutes=-1\.0 must be above 0"),
        ({"max_epochs": 0.0}, r"train\.max_epochs=0\.0 must be above 0"),
        ({"max_steps": 1, "batch_size": 0}, r"train\.batch_size=0 must be at least 1"),
        ({"max_steps": 1, "gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"max_steps": 1, "num_processes": 0}, "num_processes=0 must be at least 1"),
        ({"max_steps": 1, "log_every": 11}, r"train\.log_every=11 must be at most 10"),
        ({"max_steps": 1, "checkpoint_every": -1}, "checkpoint_every=-1 must not be negative"),
        ({"max_steps": 1, "mixed_precision": "fp8"}, "mixed_precision=fp8: choose from no, bf16, fp16"),
        ({"max_steps": 1, "lr_schedule": "linear"}, "lr_schedule=linear: choose from cosine, constant"),
    ],
)
def test_settings_that_make_no_run_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**values)


def test_turning_things_off_is_allowed():
    TrainSettings(max_steps=1, checkpoint_every=0, validate_every=0, rollout_every=0, keep_best=0, warmup=0)
