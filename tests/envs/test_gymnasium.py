"""Any environment of Gymnasium behind `Env`: what it shows, what counts as success, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from action_diffusion import envs
from action_diffusion.envs.gymnasium.metaworld import MetaWorldExpert
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder
from action_diffusion.options.task import Environment
from action_diffusion.schema import check

METAWORLD = cache_folder() / "peers" / "metaworld"
needs_metaworld = pytest.mark.skipif(
    not (METAWORLD / "metaworld").is_dir(),
    reason=f"no MetaWorld: pip install --no-deps --target {METAWORLD} -r tests/peers/metaworld.txt",
)


class Line(gymnasium.Env):
    """A point on a line that is to reach 1; `info` says what `says` gives it."""

    def __init__(self, render_mode: str | None = None, says: str = "success", actions: int = 1) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.render_mode, self.says = render_mode, says
        picture = Box(0, 255, (6, 8, 3), np.uint8)
        self.observation_space = Dict({"pixels": Dict({"top": picture}), "agent_pos": Box(-9, 9, (2,), np.float64)})
        self.action_space = Box(-0.4, 0.4, (1,), np.float32) if actions else Discrete(2)

    def _seen(self) -> dict[str, Any]:
        top = np.full((6, 8, 3), int(self.x * 100) % 256, np.uint8)
        return {"pixels": {"top": top}, "agent_pos": np.array([self.x, 1.0])}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(0, 0.2))
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x += float(action[0])
        done = self.x >= 1
        kinds: dict[str, dict[str, Any]] = {
            "success": {"success": float(done)},
            "is_success": {"is_success": done},
            "tasks": {
                "episode_task_completions": ["a"] * (self.x > 0.6) + ["b"] * done,
                "tasks_to_complete": ["b"] if self.x > 0.6 else ["a", "b"],
            },
            "nothing": {},
        }
        return self._seen(), 4 * self.x, False, False, kinds[self.says]

    def render(self) -> np.ndarray:
        return np.full((40, 50, 3), int(self.x * 100) % 256, np.uint8)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)
    gymnasium.register("tests/Line-v0", entry_point=cast(Any, Line), max_episode_steps=10)


def line(**settings: Any) -> Any:
    return envs.make("gymnasium", id="tests/Line-v0", **settings)


def test_what_it_shows_is_cut_by_the_space() -> None:
    env = line(image_size=12)
    env.reset(3)
    seen = env.observe(["pixels_top", "agent_pos", "image"])
    assert {key: (value.shape, str(value.dtype)) for key, value in seen.items()} == {
        "pixels_top": ((6, 8, 3), "uint8"),
        "agent_pos": ((2,), "float32"),
        "image": ((12, 12, 3), "uint8"),
    }
    assert env.recorded == ("agent_pos",)
    assert (env.control_rate, env.max_steps, env.action_shape) == (20.0, 10, (1,))
    assert env.render(32).shape == (32, 32, 3)


def test_other_names() -> None:
    env = line(observations={"top": "pixels_top", "state": "agent_pos"})
    env.reset(3)
    assert list(env.observe(["state", "top"])) == ["state", "top"]
    assert env.recorded == ("state",)
    with pytest.raises(InputError, match="unknown observation of tests/Line-v0 'agent_pos': choose from"):
        env.observe(["agent_pos"])


def test_the_same_seed_gives_the_same_start() -> None:
    env = line()
    starts = []
    for seed in (3, 4, 3):
        env.reset(seed)
        starts.append(env.observe(["agent_pos"])["agent_pos"][0])
    assert starts[0] == starts[2] != starts[1]


@pytest.mark.parametrize(
    ("says", "settings", "scores"),
    [
        ("success", {}, [0, 0, 1]),
        ("is_success", {}, [0, 0, 1]),
        ("tasks", {}, [0, 0.5, 1]),
        ("tasks", {"success": "episode_task_completions", "success_total": 4}, [0, 0.25, 0.5]),
        ("nothing", {"success": "reward", "success_total": 8}, None),
    ],
)
def test_the_score_is_how_much_of_success_is_reached(says: str, settings: Any, scores: list[float] | None) -> None:
    env = line(kwargs={"says": says}, **settings)
    env.reset(0)
    start = float(env.observe(["agent_pos"])["agent_pos"][0])
    steps = [env.step(np.array([9.0])) for _ in range(3)]  # cut to 0.4, the bound
    expected = [(start + 0.4 * n) * 4 / 8 for n in (1, 2, 3)] if scores is None else scores
    np.testing.assert_allclose([score for score, _ in steps], np.minimum(expected, 1), atol=1e-6)
    assert [done for _, done in steps] == [score >= 1 for score, _ in steps]


def test_an_episode_ends_after_its_steps() -> None:
    env = line(max_steps=2)
    env.reset(0)
    assert [env.step(np.zeros(1))[1] for _ in range(2)] == [False, True]


def test_success_that_nothing_tells_of_is_refused() -> None:
    env = line(kwargs={"says": "nothing"})
    env.reset(0)
    with pytest.raises(InputError, match=r"says nothing of success: env\.success=KEY, of info \(empty\), or env\.su"):
        env.step(np.zeros(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "os:system"}, "a module is not imported by its name: plugins=FILE.py may import it"),
        ({"id": "tests/Lime-v0"}, "unknown env.id 'tests/Lime-v0': did you mean tests/Line-v0?"),
        ({"kwargs": {"says": "../secret"}}, "env.kwargs.says=../secret: names a file"),
        ({"kwargs": {"xml_file": "/etc/passwd"}}, "names a file"),
        ({"kwargs": {"actions": 0}}, "takes actions of Discrete(2): a policy's are vectors of numbers"),
        ({"kwargs": {"color": 3}}, "unexpected keyword argument 'color'"),
        ({"observations": {"top": "pixels"}}, "did you mean pixels_top?"),
    ],
)
def test_what_cannot_be_made_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        envs.make("gymnasium", **{"id": "tests/Line-v0"} | settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("action", [np.zeros(2), np.array([np.nan])])
def test_actions_of_another_kind_are_refused(action: np.ndarray) -> None:
    env = line()
    env.reset(0)
    with pytest.raises(InputError, match=r"an action of tests/Line-v0 is 1 finite numbers"):
        env.step(action)


def test_a_known_package_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_aloha", None)
    with pytest.raises(InputError, match=r"pip install 'action-diffusion\[gym-aloha\]'"):
        envs.make("gymnasium", id="gym_aloha/AlohaTransferCube-v0")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"name": "gymnasium"}, "id"),
        ({"name": "gymnasium", "id": "A-v0", "success_total": 0}, "success_total=0 must be above 0"),
        ({"name": "gymnasium", "id": "A-v0", "control_rate": float("nan")}, "control_rate"),
        ({"name": "gymnasium", "id": "A-v0", "entry_point": "x"}, "entry_point"),
    ],
)
def test_options_are_checked_without_the_simulator(env: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(env, Environment, "task.env")


def test_only_metaworld_has_experts() -> None:
    with pytest.raises(InputError, match=r"env\.id=tests/Line-v0 has no scripted expert"):
        MetaWorldExpert(seed=0, about=line().metadata())


@pytest.mark.slow
@needs_metaworld
def test_metaworlds_experts_reach_goals_that_differ_by_seed() -> None:
    code = """
import numpy as np
from action_diffusion.envs.demonstration import Demonstrator, Source

settings = {"id": "Meta-World/goal_observable", "kwargs": {"env_name": "reach-v3", "seed": 0}}
demonstrator = Demonstrator(Source("gymnasium", settings))
one, two, again = map(demonstrator.record, (1, 4, 1))
assert one.columns["state"].shape[1:] == (39,) and one.columns["action"].shape[1:] == (4,)
assert one.score == two.score == 1.0, (one.score, two.score)
assert np.array_equal(one.columns["state"], again.columns["state"])
assert np.abs(one.columns["state"][0, 36:] - two.columns["state"][0, 36:]).max() > 0.01
assert one.attrs["control_rate"] == 80.0
"""
    environment = {**os.environ, "PYTHONPATH": str(METAWORLD)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
