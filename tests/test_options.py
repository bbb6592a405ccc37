"""Every option has a type and a range: whatever is typed or written ends in a configuration or in one clear line."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from action_diffusion import registry
from action_diffusion.errors import InputError
from action_diffusion.options import COMMANDS, COMPONENTS, Policy, TrainSettings, check_policy
from action_diffusion.options.configuration import _items, choices, load, override
from action_diffusion.options.finetune import METHODS
from action_diffusion.policy.bundle import resolve_device
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.registry import POLICY_PARTS
from action_diffusion.schema import check, hint_at, hints

REQUIRED = {"train": [], "evaluate": ["bundle=x"], "collect": ["output=x"], "deploy": [], "serve": ["bundle=x"]}
REQUIRED["finetune"] = ["bundle=x"]
CONFIGS = {name: load(name, words) for name, words in REQUIRED.items()}
OPTIONS = [(name, path) for name, config in CONFIGS.items() for path, _ in _items(config)]

WORDS = (
    *("null", "true", "false", "0", "-1", "1", "99999999999999999999", "1e400", "nan", "inf", "-inf", "???", ""),
    *("[]", "[1]", "[0,0]", "[[1]]", "{}", "{a: 1}", "{name: x}", "${seed}", "${nowhere}", "1,2", "a b", "'", '"'),
    *("meta", "privateuseone", "cuda:9999", "karras", "../..", "~nobody/x", "choice(1,2)", "range(1,3)", "9" * 5000),
)
TYPED = st.one_of(st.sampled_from(WORDS), st.integers().map(str), st.floats().map(str), st.text(max_size=8))
WRITTEN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(10**9, 10**40), st.floats(), st.text(max_size=6))
    | st.sampled_from(["diffusion", "flow", "ddim", "minmax", "gaussian", "object", "image", "pusht", "_target_"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside, max_size=2),
    max_leaves=4,
)
EXAMPLES = int(os.environ.get("ACTION_DIFFUSION_FUZZ", "60"))
"""Of each test: 5,000 take some minutes."""
OFTEN = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
SELDOM = settings(OFTEN, max_examples=max(1, EXAMPLES // 4))


def refusal(call: Callable[[], Any]) -> str:
    """The one line of an `InputError`; "" where there is none."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


@OFTEN
@given(option=st.sampled_from(OPTIONS), value=TYPED)
def test_whatever_is_typed_is_a_configuration_or_one_line(option, value):
    name, path = option
    word = f"{path}={value}"
    said = refusal(lambda: check(override(name, CONFIGS[name], [word], "config.yaml"), COMMANDS[name]))
    assert "\n" not in said
    assert len(said) < 1000


@pytest.mark.slow
@SELDOM
@given(option=st.sampled_from(OPTIONS), value=TYPED)
def test_so_it_is_where_all_is_composed(option, value):
    name, path = option
    words = [*REQUIRED[name], f"{path}={value}"]
    assert "\n" not in refusal(lambda: check(load(name, words), COMMANDS[name]))


@pytest.mark.parametrize(
    "word",
    [
        *(
            "seed=-1",
            "seed=99999999999999999999",
            "train.betas=[[0.9],0.95]",
            "train.betas=[0.9]",
            "train.betas=[0.9,1]",
        ),
        *("train.ema_max_decay=2", "train.weight_decay=inf", "train.lr_final=-5", "train.rollout_episodes=0"),
        *("dataset.val_windows=0", "dataset.val_windows=-1", "dataset.max_episodes=0", "dataset.max_episodes=-1"),
        *("dataset.val_fraction=1", "device=meta", "device=privateuseone", "device=cuda:-1", "device=fpga"),
        *("policy.sampler.timestep_spacing=karras", "policy.sampler.steps_offset=-1", "policy.sampler.eta=2"),
        *("policy.sampler.use_dynamic_shifting=true", "policy.sampler.clip_range=0.5", "policy.sampler.clip=x1"),
        *("policy.action_frame={name: position, observation: state}", "policy.action_frame={name: position}"),
        *("policy.denoiser.channels=[]", "policy.denoiser.channels=[0]", "policy.denoiser.channels=8"),
        *("policy.denoiser.time_dim=2", "policy.denoiser.kernel_size=-1", "policy.encoder.width=0"),
        *("policy.process.num_train_timesteps=0", "policy.process.beta_end=2", "policy.objective.noise_draws=0"),
        *("policy.normalizer.default=max", "policy.features.state.points=[[1,2,3]]", "policy.encoder=null"),
        *("task.horizon=1000000", "task.n_obs_steps=0", "task.control_rate=0", "task.n_action_steps=99", "task=null"),
        *("task.env.max_steps=-1", "task.env.name=nothing", "task.env.image_size=0"),
        *("task.observations.state.kind=sound", "task.observations.state.columns=[-1]", "task.controlrate=3"),
        *("evaluation.n_episodes=-1", "evaluation.n_envs=0", "evaluation.policy_batch=0", "evaluation.seed=-1"),
        *("train.num_processes=100000", "train.warmup=-1", "train.max_steps=0", "dataset.memory_gb=-1"),
        *("dataset.weights=[-1,1]", "dataset.weights=0", "dataset.weights=[[1]]", "dataset.task_weights={a: [1]}"),
    ],
)
def test_what_trained_nonsense_or_a_traceback_is_refused(word):
    said = refusal(lambda: override("train", CONFIGS["train"], [word], "config.yaml"))
    assert said
    assert "\n" not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_type(name):
    """Those of components are in `COMPONENTS`, those of methods in `METHODS`."""
    without = [path for of, path in OPTIONS if of == name and hint_at(COMMANDS[name], path) is None]
    assert not [path for path in without if not path.startswith(("policy.", "task.env.", "train.", "method."))]
    assert name == "collect" or not [path for path in without if path.startswith("train.")]


@pytest.mark.parametrize("task", choices("task"))
def test_all_that_ships_is_in_range(task):
    check(load("train", [f"task={task}", "data=x"]), COMMANDS["train"])


def parameters(of: type) -> dict[str, inspect.Parameter]:
    """Of a constructor, and of its base's where it passes others on."""
    own = inspect.signature(of).parameters
    named = {name: one for name, one in own.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    return named if len(named) == len(own) else parameters(of.__base__) | named


@pytest.mark.parametrize("name", choices("method"))
def test_options_of_a_method_are_those_of_its_class_and_of_its_file(name):
    taken = parameters(registry.METHODS.load(name))
    declared = dataclasses.asdict(METHODS[name]())
    assert declared.keys() == taken.keys() - {"policy", "seed"}
    written = load("finetune", ["bundle=x", f"method={name}"])["method"]
    assert written == declared | {"name": name}
    for key, value in declared.items():
        default = taken[key].default
        assert value == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, of in COMPONENTS.items() for name in of])
def test_a_component_has_the_options_of_its_constructor(kind, name):
    """Beside what is built for it, and with the same defaults."""
    taken = inspect.signature(POLICY_PARTS[kind].load(name)).parameters
    declared = {field.name: field for field in dataclasses.fields(COMPONENTS[kind][name])}
    built = {"image_keys", "image_shapes", "state_dims", "n_obs_steps", "action_dim", "condition_dim"}
    built |= {"marked", "two_times", "horizon", "spec", "text_dims", "depth_shapes", "point_shapes"}
    assert declared.keys() == taken.keys() - built - {"n", "n_action", "embedding_dim"}
    for key, field in declared.items():
        if taken[key].default is inspect.Parameter.empty:
            assert kind == "denoiser" or field.default is dataclasses.MISSING or key == "known"
        elif field.default is not dataclasses.MISSING:
            assert field.default == taken[key].default


def test_parts_of_a_policy_are_those_that_are_built():
    from action_diffusion.policy.build import SECTIONS

    assert set(hints(Policy)) == set(SECTIONS)


# Files.


def places(data: Any, before: tuple = ()) -> Iterator[tuple]:
    """The path to every value inside."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        yield (*before, key)
        yield from places(value, (*before, key))


def changed(data: Any, place: tuple, value: Any) -> Any:
    data = copy.deepcopy(data)
    section = data
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    return data


@OFTEN
@given(data=st.data(), value=WRITTEN)
def test_whatever_a_specification_holds_it_is_one_or_one_line(policy, data, value):
    plain = json.loads(json.dumps(policy.spec.to_json()))
    place = data.draw(st.sampled_from(list(places(plain))))
    assert "\n" not in refusal(lambda: PolicySpec.from_json(changed(plain, place, value), "spec.json"))


@OFTEN
@given(data=st.data(), value=WRITTEN)
def test_whatever_a_policy_s_configuration_holds(tiny_config, data, value):
    place = data.draw(st.sampled_from(list(places(tiny_config))))
    assert "\n" not in refusal(lambda: check_policy(changed(tiny_config, place, value)))


@pytest.mark.parametrize("key", ["\n", "a\nb", "\x00", "\x1b[2J"])
def test_a_name_that_is_no_line_is_refused_in_one(tiny_config, policy, key):
    for place in [place for place in places(tiny_config) if place[-1] != "columns"]:
        said = refusal(partial(check_policy, changed(tiny_config, place, {key: None})))
        assert said
        assert not set(said) & {"\n", "\x00", "\x1b"}
    plain = json.loads(json.dumps(policy.spec.to_json()))
    for section in ("observations", "normalizer", "action"):
        said = refusal(partial(PolicySpec.from_json, changed(plain, (section, key), {}), "spec.json"))
        assert said
        assert not set(said) & {"\n", "\x00", "\x1b"}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("observations", "state", "shape"), [10**12], r"observations.state.shape\[0\]=1000000000000 must be at most"),
        (("observations", "state", "shape"), ["5"], "expected a whole number"),
        (("observations", "state", "shape"), [400, 400], "has 160,000 values, more than 100,000"),
        (("observations", "state", "kind"), "sound", "choose from state, image"),
        (("observations", "state", "dtype"), "object", "choose from"),
        (("observations",), {}, "observations has 0 values"),
        (("action", "shape"), [2, 2], "action.shape has 2 values, expected 1"),
        (("control_rate",), 0, "control_rate=0 must be above 0"),
        (("control_rate",), -1, "control_rate=-1 must be above 0"),
        (("control_rate",), "fast", "control_rate=fast: expected a number"),
        (("control_rate",), float("nan"), "control_rate=nan: expected a number"),
        (("env", "max_steps"), -1, "env.max_steps=-1 must be at least 1"),
        (("env", "name"), "os", "unknown env.name 'os'"),
        (("env", "colour"), 1, "unknown option 'colour' in env"),
        (("horizon",), 10**6, "horizon=1000000 must be at most"),
        (("horizon",), None, "horizon=null: expected a whole number"),
        (("horizon",), 8.0, "horizon=8.0: expected a whole number"),
        (("horizon",), True, "horizon=True: expected a whole number"),
        (("normalizer", "action", "scale"), [1.0], "of .* dimensions, expected equal numbers"),
        (("normalizer", "action", "scale"), [1.0, float("nan")], "expected a number"),
        (("normalizer", "action", "scale"), [1.0, 0.0], "leads to no number"),
        (("normalizer", "action", "max"), None, "one of min and max"),
        (("normalizer", "state"), None, "expected a section"),
        (("task",), "two\nlines", "expected a word"),
        (("versions", "torch"), 2, "expected a word"),
        (("colour",), 1, "unknown option 'colour'"),
    ],
)
def test_types_and_sizes_of_a_specification(policy, place, value, message):
    plain = json.loads(json.dumps(policy.spec.to_json()))
    assert PolicySpec.from_json(plain, "spec.json") == policy.spec
    with pytest.raises(InputError, match=message):
        PolicySpec.from_json(changed(plain, place, value), "spec.json")


@pytest.mark.parametrize("device", ["meta", "privateuseone", "fpga", "cuda:99", "hpu"])
def test_devices_that_hold_no_numbers(device):
    with pytest.raises(InputError, match=f"device={device} is not there"):
        resolve_device(device)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"betas": ((0.9,), 0.95)}, r"train.betas\[0\]=.*expected a number"),
        ({"betas": (0.9, 1.0)}, r"train.betas\[1\]=1.0 must be below 1"),
        ({"ema_max_decay": 2.0}, "train.ema_max_decay=2.0 must be at most 1"),
        ({"weight_decay": float("inf")}, "train.weight_decay=inf: expected a number"),
        ({"lr_final": -5.0}, "train.lr_final=-5.0 must not be negative"),
        ({"lr": True}, "train.lr=True: expected a number"),
        ({"max_steps": 2.5}, "train.max_steps=2.5: expected a whole number"),
    ],
)
def test_ranges_of_training(values, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**{"max_steps": 1} | values)
