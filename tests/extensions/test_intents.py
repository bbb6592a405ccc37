"""Intents: ways found by motion or by labels, a token each, and which one an episode has."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.special import expit
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.commands import preflight
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import settings
from action_diffusion.options.extensions import IntentsOptions as Options
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions import intents as intents_module
from action_diffusion.policy.extensions.extension import Fitted, write
from action_diffusion.policy.extensions.intents import Intents, intents_of
from action_diffusion.policy.extensions.motion import clusters, motions, nearest, separation
from action_diffusion.policy.policy import DiffusionPolicy

N, LENGTH = 12, 20


def two_ways(seed: int = 0) -> ReplayBuffer:
    """Episodes that all begin alike, and go up or down; `side` says which, as a number, `mixed` changes on the way."""
    random = np.random.default_rng(seed)
    side = np.repeat(np.arange(N) % 3 == 0, LENGTH)
    along = np.tile(np.linspace(0, 1, LENGTH), N)
    bend = np.where(side, 1.0, -1.0) * np.sin(np.pi * along)
    action = np.stack([along, bend], axis=1) + 0.01 * random.normal(size=(N * LENGTH, 2))
    state = along[:, None] + 0.01 * random.normal(size=(len(action), 5))  # which does not tell the side
    columns: dict[str, np.ndarray] = {"state": state.astype(np.float32), "action": action.astype(np.float32)}
    columns |= {"side": side.astype(np.float32), "mixed": (along > 0.5).astype(np.int64), "pair": action}
    columns |= {"task_index": side.astype(np.int64)}
    attrs = {"tasks": ["go down", "go up"]}
    return ReplayBuffer.from_arrays(columns, np.arange(1, N + 1) * LENGTH, attrs=attrs)


def source(buffer: ReplayBuffer, episodes: np.ndarray | None = None) -> BatchSource:
    return BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4, episodes=episodes),
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        n_obs_steps=2,
    )


def parts() -> tuple[BatchSource, BatchSource]:
    buffer = two_ways()
    return source(buffer, np.arange(9)), source(buffer, np.arange(9, N))


def options(**changes):
    return vars(Options(bundle="", steps=2, hidden=16)) | changes


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return tiny_policy(two_ways())


@pytest.fixture(scope="module")
def fitted(policy) -> Fitted:
    return Intents.fit(policy, *parts(), options(names=["down", "up"]))


def test_an_aligned_path_goes_from_0_0_to_1_0_wherever_it_was() -> None:
    """A quarter of a circle, turned, moved and made larger: its middle is always as far aside."""
    angle = np.linspace(0, np.pi / 2, 31)
    path = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    turned = 7.0 + 3.0 * path @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    found = motions([path, turned], None, aligned=True).reshape(2, -1, 2)
    np.testing.assert_allclose(found[:, [0, -1]], [[[0, 0], [1, 0]]] * 2, atol=1e-12)
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)
    assert np.abs(found[0, :, 1]).max() == pytest.approx((1 - np.sqrt(0.5)) / np.sqrt(2), abs=2e-3)


def test_motions_are_shares_of_each_columns_range_at_even_times() -> None:
    path = np.stack([np.linspace(-5, 5, 100), np.linspace(0, 1e-3, 100), np.ones(100)], axis=1)
    found = motions([path], None, aligned=False).reshape(-1, 3)
    np.testing.assert_allclose(found[:, 0], np.linspace(0, 1, 16), atol=1e-12)
    np.testing.assert_allclose(found[:, 1], np.linspace(0, 1, 16), atol=1e-12)
    np.testing.assert_array_equal(found[:, 2], 0.0)
    assert motions([path], [1], aligned=False).shape == (1, 16)


def test_clusters_are_found_and_the_largest_is_the_first() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate(
        [random.normal(0, 0.1, (5, 3)), random.normal(4, 0.1, (20, 3)), random.normal(-4, 0.1, (9, 3))]
    )
    belongs, centres = clusters(points, 3, seed=1)
    assert belongs.tolist() == [2] * 5 + [0] * 20 + [1] * 9
    np.testing.assert_allclose(centres, [[4] * 3, [-4] * 3, [0] * 3], atol=0.15)
    np.testing.assert_array_equal(nearest(centres, centres), [0, 1, 2])
    assert separation(points, centres) > 0.95
    assert separation(np.zeros((1, 3)), np.array([[1.0, 0, 0], [0, 1, 0]])) == 0


def test_the_two_ways_are_found_by_what_episodes_do() -> None:
    train, held_out = parts()
    found = intents_of(train, held_out, options())
    np.testing.assert_array_equal(found.train, train.windows.first // LENGTH % 3 == 0)
    np.testing.assert_array_equal(found.held_out, held_out.windows.first // LENGTH % 3 == 0)
    assert found.names == ["way_1", "way_2"]
    assert [episode % 3 == 0 for episode in found.examples] == [False, True]


def test_chunks_have_intents_of_their_own() -> None:
    """The second half of an episode is elsewhere: a chunk is what it does from now on, and not what was before."""
    action = np.repeat([[0.0, 1.0], [5.0, 1.0]], 20, axis=0).astype(np.float32)
    buffer = ReplayBuffer.from_arrays({"state": np.zeros((40, 5), np.float32), "action": action}, np.array([40]))
    windows = source(buffer)
    found = intents_of(windows, windows, options(by="chunk", columns=[0]))
    later = windows.windows.now(np.arange(len(windows))) > 16
    np.testing.assert_array_equal(found.train == found.train[-1], later)
    assert found.examples == [0, 0]


@pytest.mark.parametrize(("column", "names"), [("side", ["0", "1"]), ("task", ["go down", "go up"])])
def test_labels_are_a_column_or_the_words_of_a_task(column, names) -> None:
    train, held_out = parts()
    found = intents_of(train, held_out, options(labels=column))
    assert found.names == names
    np.testing.assert_array_equal(found.train, train.windows.first // LENGTH % 3 == 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": "sid"}, "no key 'sid'"),
        ({"labels": "mixed"}, "changes within episode 0"),
        ({"labels": "pair"}, "has 2 values a row"),
        ({"aligned": True, "columns": [0]}, "two columns of a plane, not 1"),
        ({"columns": [0, 2]}, "the action has the columns 0 to 1"),
        ({"count": 10}, "count=10 clusters of fewer than 10"),
        ({"names": ["a", "a"]}, "expected 2 different ones, for way_1, way_2"),
        ({"names": ["a", "b", "c"]}, "expected 2 different ones"),
        ({"preference": {"left": 1.0}}, "left"),
        ({"preference": {"way_1": 0.0}}, "prefers none"),
    ],
)
def test_what_cannot_be_is_named(policy, changes, words) -> None:
    with pytest.raises(InputError, match=words):
        Intents.fit(policy, *parts(), options(**changes))


def test_a_label_that_is_only_held_out_is_no_intent() -> None:
    buffer = two_ways()
    number = buffer.with_column("which", np.repeat([0, 1, 2], 4 * LENGTH))
    with pytest.raises(InputError, match="'2' is only among what is held out"):
        intents_of(source(number, np.arange(8)), source(number, np.arange(8, N)), options(labels="which"))
    with pytest.raises(InputError, match="has 1 values, expected 2 to 64"):
        intents_of(source(number, np.arange(4)), source(number, np.arange(4)), options(labels="which"))


def test_untrained_tokens_change_nothing(policy, fitted) -> None:
    still = {name: np.zeros_like(value) if name.startswith("out.") else value for name, value in fitted.arrays.items()}
    obs = {"state": np.full((2, 5), 0.5, np.float32)}
    noise = np.random.default_rng(0).normal(size=(1, 8, 2)).astype(np.float32)
    policy.extensions = ()
    plain = policy.predict(obs, noise=noise, generator=torch.Generator().manual_seed(0))
    policy.extensions = [Intents(policy, Fitted(fitted.options, still))]
    told = policy.predict(obs, noise=noise, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(plain["action_pred"], told["action_pred"])
    policy.extensions = ()


def test_the_token_is_added_to_what_the_denoiser_is_told_of_its_row(policy, fitted) -> None:
    """δ by hand: the MLP of the condition and the token of the row's intent."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(0, 0.2, value.shape).astype(np.float32) for name, value in fitted.arrays.items()}
    intents = Intents(policy, Fitted({**fitted.options, "name": "up"}, arrays))
    seen = policy.see({"state": torch.from_numpy(random.uniform(-1, 1, (3, 2, 5)).astype(np.float32))})
    film = policy.denoiser.prepare(seen.condition, policy.sampler.times(policy.device))
    found = intents.modulate(seen, film)
    inside = np.concatenate([seen.condition.numpy(), np.tile(arrays["token.weight"][1], (3, 1))], axis=1)
    inside = inside @ arrays["inside.weight"].T + arrays["inside.bias"]
    expected = (inside * expit(inside)) @ arrays["out.weight"].T + arrays["out.bias"]
    np.testing.assert_allclose(found.condition - film.condition, expected, rtol=1e-4, atol=1e-4)
    assert found.steps is film.steps


def test_an_episode_keeps_its_intent_and_another_run_of_its_seed_has_the_same(policy, fitted) -> None:
    policy.extensions = [Intents(policy, fitted)]
    obs = {"state": np.random.default_rng(0).normal(size=(30, 2, 5)).astype(np.float32)}

    def chunks(n: int, seeds: range) -> list[list[float]]:
        drawing = [generators(seed) for seed in seeds]
        noise = {"noise_generator": [one for one, _ in drawing], "generator": [two for _, two in drawing]}
        return [policy.predict(obs, **noise)["intents.intent"].tolist() for _ in range(n)]

    first, second, third = chunks(3, range(30))
    assert first == second == third == chunks(1, range(30))[0]
    assert set(first) == {0.0, 1.0}
    assert chunks(1, range(100, 130))[0] != first
    policy.extensions = ()


def test_a_generator_whose_state_came_from_elsewhere_is_of_the_same_episode(policy, fitted) -> None:
    """As for a policy server: the state travels, and the noise that was drawn already does not change the episode."""
    policy.extensions = [Intents(policy, fitted)]
    obs = {"state": np.zeros((1, 2, 5), np.float32)}
    for seed in range(8):
        here = torch.Generator().manual_seed(seed)
        torch.randn(5, generator=here)
        there = torch.Generator()
        there.set_state(here.get_state())
        said = [policy.predict(obs, generator=one)["intents.intent"][0] for one in (here, there)]
        assert said[0] == said[1] == policy.extensions[0].drawn([seed], 1)[0]
    policy.extensions = ()


def test_intents_are_drawn_as_often_as_they_are_preferred_or_demonstrated(policy, fitted) -> None:
    shares = np.array(fitted.options["shares"])
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3])

    def share_of_up(**given) -> float:
        return float(
            np.mean(Intents(policy, Fitted({**fitted.options, **given}, fitted.arrays)).drawn(range(4000), 4000))
        )

    assert share_of_up() == pytest.approx(1 / 3, abs=0.03)
    assert share_of_up(preference={"up": 4, "down": 1}) == pytest.approx(0.8, abs=0.03)
    assert share_of_up(preference={"up": 0.5}) == share_of_up(name="up") == 1.0
    intents = Intents(policy, Fitted({**fitted.options, "preference": {"up": 2, "down": 1}}, fitted.arrays))
    assert intents.drawn(None, 2) == [1, 1]


def test_tokens_learn_what_nothing_else_tells(monkeypatch) -> None:
    """Only the intent says whether it goes up or down, and the policy has learnt to do both."""
    monkeypatch.setattr(intents_module, "BATCH", 64)
    policy = tiny_policy(two_ways(), process={"name": "diffusion", "prediction": "sample"}).train()
    train, held_out = parts()
    optimizer, random = torch.optim.Adam(policy.parameters(), lr=1e-2), np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        batch = train.gather(random.integers(len(train), size=64))
        optimizer.zero_grad()
        policy(batch.obs, batch.action, generator=generator).backward()
        optimizer.step()
    weights = {name: value.clone() for name, value in policy.eval().state_dict().items()}
    found = Intents.fit(policy, train, held_out, options(steps=100, lr=1e-2)).options
    assert found["loss with"] < 0.7 * found["loss without"]
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert "way_1 (0.67, such as episode" in found["intents"]


def test_it_lies_in_a_bundle_and_a_command_says_which(tmp_path, policy, fitted) -> None:
    bundles.save(tmp_path / "bundle", policy, {"policy": TINY})
    write(tmp_path / "bundle", "intents", fitted)

    def said(**given) -> float:
        loaded = bundles.load(tmp_path / "bundle", extensions=["intents"], given={"intents": given}, precision="fp32")
        return float(loaded.predict({"state": np.full((2, 5), 0.5, np.float32)})["intents.intent"])

    assert [said(name="up"), said(name="down"), said(name=None, preference=None)] == [1.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"intents\.name.*'upp'.*up"):
        said(name="upp")
    with pytest.raises(InputError, match=r"preference.*'upp'"):
        said(preference={"upp": 1.0})


def test_an_intent_without_the_extension_is_refused(tmp_path, policy) -> None:
    bundles.save(tmp_path / "bundle", policy, {"policy": TINY})
    words = [f"bundle={tmp_path}/bundle", "intents.name=left"]
    with pytest.raises(InputError, match=r"intents\.name=left needs extensions=\[intents\]"):
        preflight.evaluate(settings("evaluate", words))


@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden": 32}, {"hidden": 10**9}, {"size": 8}, {"size": "x"}),
        *({"names": ["a"]}, {"names": "ab"}, {"names": ["a"] * 65}, {"shares": [1.0]}, {"shares": None}),
    ],
)
def test_what_does_not_belong_to_the_policy_is_refused(policy, fitted, changes) -> None:
    with pytest.raises(InputError, match="does not belong to this policy"):
        Intents(policy, Fitted({**fitted.options, **changes}, fitted.arrays))


def test_options_survive_json(fitted) -> None:
    assert json.loads(json.dumps(fitted.options)) == fitted.options


def test_unrelated_motion_is_no_error() -> None:
    buffer = demonstrations()
    found = intents_of(source(buffer), source(buffer), options(count=3))
    assert set(found.train) == {0, 1, 2}
