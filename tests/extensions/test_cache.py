"""Reuse of the denoiser's last estimate: what it predicts, when it stops, how it is calibrated, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.cli import main
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Mip
from action_diffusion.policy.diffusion.sampler import Hook
from action_diffusion.policy.extensions import cache
from action_diffusion.policy.extensions.cache import Cache, Reuse, ReuseCost, conformal, said
from action_diffusion.policy.extensions.extension import Fitted, read
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film

STEPS = 10
SAMPLER = {"scheduler": "ddim", "num_inference_steps": STEPS}
X0 = {"name": "diffusion", "prediction": "sample"}
OPTIONS = {"tolerance": 2.0, "alpha": 0.2, "seed": 0}


def source(buffer, episodes) -> BatchSource:
    windows = make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4, episodes=episodes)
    keys = {"state": ObsKey("state", None, "state")}
    return BatchSource(buffer=buffer, windows=windows, observations=keys, action_key="action", n_obs_steps=2)


def made(**changes):
    return tiny_policy(demonstrations(), **({"sampler": SAMPLER, "process": X0} | changes))


@pytest.fixture(scope="module")
def fitted():
    buffer, policy = demonstrations(), made()
    return policy, Cache.fit(policy, source(buffer, np.arange(4)), source(buffer, np.arange(4, 6)), OPTIONS)


def observations(rows: int) -> dict[str, torch.Tensor]:
    return source(demonstrations(), np.arange(6)).gather(np.arange(rows) * 17).obs


def sampled(policy, rows, hook=None, seed=0, **options):
    """The same noise for each row, whatever rows are beside it."""
    generators = [[torch.Generator().manual_seed(seed + 10 * row) for row in rows] for _ in range(2)]
    obs = {key: value[rows] for key, value in observations(max(rows) + 1).items()}
    with torch.no_grad():
        return policy.sample(
            obs, noise_generator=generators[0], generator=generators[1], hooks=[hook] if hook else [], **options
        )


def fixed(*steps: int) -> ReuseCost:
    """That of nobody: the network is asked at these steps, whatever the change."""
    spent = np.full((STEPS, STEPS), np.inf)
    for first, after in zip(steps, [*steps[1:], STEPS], strict=True):
        spent[first, first:after] = 0.0
    return ReuseCost(np.ones((STEPS, STEPS)), spent)


class Linear(Denoiser):
    """Says x0 = gain of the step · x."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.6))

    def prepare(self, condition, times):
        return Film(0.2 + self.gain * torch.cos(times)[:, None] ** 2, torch.zeros(len(condition), 1))

    def forward(self, x, film):
        return film[:, :, None] * x


def test_for_a_linear_denoiser_the_predicted_deviation_is_exact():
    policy = made(sampler={**SAMPLER, "clip": None})
    policy.denoiser = Linear()
    windows, train = np.arange(16), source(demonstrations(), np.arange(4))
    arrays = cache.fitted_to(cache.recorded(policy, train, windows, 0), cache.Distance(policy))
    arrays["sensitivity"] = cache.sensitivities(policy, train, windows, 0)
    prediction = ReuseCost.of(arrays, STEPS)
    record = Recording()
    plain = sampled(policy, [0, 1, 2], record).action[:, 1:5]
    for step in (3, 6, STEPS - 2):
        change = cache.Distance(policy)(record.estimates[step], record.estimates[step - 1]).numpy()
        predicted = prediction.ahead(step, np.full(3, step - 1), change)[:, 0]
        hook = Reuse(policy, fixed(*(k for k in range(STEPS) if k != step + 1)), 1.0)
        moved = (sampled(policy, [0, 1, 2], hook).action[:, 1:5] - plain).abs().amax(dim=(1, 2)).numpy()
        assert moved.min() > 0
        np.testing.assert_allclose(predicted, moved, rtol=1e-3)


class Recording(Hook):
    """The estimates of each step."""

    def begin(self, x, steps):
        self.estimates = []

    def edit_x0(self, state):
        self.estimates.append(state.x0_hat)
        return state.x0_hat


class Spy(ReuseCost):
    """Remembers what was predicted of one row: (step, [after it])."""

    asked: list[tuple[Any, ...]]

    def ahead(self, step, last, change):
        result = super().ahead(step, last, change)
        self.asked.append((step, int(last[0]), float(change[0]), result[0]))
        return result


@pytest.mark.parametrize("budget", [0.3, 1.5, 6.0])
def test_reuse_goes_on_until_the_budget_is_spent_and_never_beyond(fitted, budget):
    policy, found = fitted
    known = ReuseCost.of(found.arrays, STEPS)
    for row in range(4):
        spy, record = Spy(known.typical, known.spent), Recording()
        object.__setattr__(spy, "asked", [])
        sampled(policy, [row], Both(Reuse(policy, spy, budget), record))
        steps = [step for step, *_ in spy.asked]
        assert steps[0] == 0
        for (step, last, change, ahead), following in zip(spy.asked, [*steps[1:], STEPS], strict=True):
            reused = following - step - 1
            assert (ahead[:reused] < budget).all()
            assert following == STEPS or ahead[reused] >= budget
            if step:
                assert last == max(k for k in steps if k < step)
                moved = cache.Distance(policy)(record.estimates[step], record.estimates[last])
                np.testing.assert_allclose(change, moved.item(), rtol=1e-5)
            for k in range(step + 1, following):
                torch.testing.assert_close(record.estimates[k], record.estimates[step])


class Both(Hook):
    """Two hooks as one, the second of which only looks on."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def begin(self, x, steps):
        self.first.begin(x, steps)
        self.second.begin(x, steps)

    def wrap_denoiser(self, denoise):
        return self.first.wrap_denoiser(denoise)

    def edit_x0(self, state):
        self.second.edit_x0(state)
        return self.first.edit_x0(state)


def test_a_row_does_not_depend_on_its_neighbours(fitted):
    policy, found = fitted
    hook = Reuse(policy, ReuseCost.of(found.arrays, STEPS), 1.5)
    together = sampled(policy, list(range(6)), hook).action
    evaluations = hook.evaluations.tolist()
    assert len(set(evaluations)) > 1
    for row in range(6):
        alone = sampled(policy, [row], hook).action[0]
        assert hook.evaluations.tolist() == [evaluations[row]]
        torch.testing.assert_close(alone, together[row], rtol=1e-4, atol=1e-3)


def test_the_network_is_asked_for_few_more_rows_than_it_has_to(fitted):
    policy, found = fitted
    counted = []
    handle = policy.denoiser.register_forward_pre_hook(lambda module, given: counted.append(len(given[0])))
    hook = Reuse(policy, ReuseCost.of(found.arrays, STEPS), 50.0)
    sampled(policy, list(range(6)), hook)
    handle.remove()
    assert set(counted) <= {1, 2, 4, 6}
    assert hook.evaluations.sum() <= sum(counted) < 6 * STEPS


def test_rows_are_repeated_to_a_power_of_two():
    assert [len(cache.repeated(np.arange(n), 6)) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert cache.repeated(np.array([2, 5, 7]), 9).tolist() == [2, 5, 7, 2]


def test_with_hardly_any_tolerance_every_step_is_evaluated_and_nothing_changes():
    buffer, policy = demonstrations(), made()
    parts = source(buffer, np.arange(4)), source(buffer, np.arange(4, 6))
    found = Cache.fit(policy, *parts, OPTIONS | {"tolerance": 1e-6})
    assert found.options["evaluations"] == STEPS
    plain = sampled(policy, [0, 1])
    policy.extensions = [Cache(policy, found)]
    kept = sampled(policy, [0, 1])
    assert kept.notes["cache.evaluations"].tolist() == [STEPS, STEPS]
    assert torch.equal(kept.action, plain.action)


def test_a_larger_tolerance_takes_fewer_evaluations_and_keeps_to_alpha():
    buffer, policy = demonstrations(), made()
    parts = source(buffer, np.arange(4)), source(buffer, np.arange(4, 6))
    found = [Cache.fit(policy, *parts, OPTIONS | {"tolerance": tolerance}).options for tolerance in (0.5, 5.0)]
    assert found[1]["evaluations"] < found[0]["evaluations"] < STEPS
    assert max(some["violations"] for some in found) <= OPTIONS["alpha"]


@pytest.mark.parametrize(("alpha", "rung"), [(0.1, 0), (0.2, 1), (0.3, 2), (0.5, 4)])
def test_the_conformal_budget_of_a_known_sample(alpha, rung):
    """Of nine chunks the n-th is beyond after n budgets, so rung l has l beyond. One is not beyond later: it counts."""
    moved = np.where(np.arange(10) > np.arange(9)[:, None], 2.0, 0.5)
    moved[0, 2:] = 0.5
    assert conformal(moved, 1.0, alpha) == rung


@pytest.mark.parametrize(
    ("process", "step"),
    [
        *((Diffusion(prediction=name), 7) for name in ("epsilon", "sample", "v_prediction")),
        *((Flow(prediction=name), 3) for name in ("velocity", "sample")),
        (Mip(), 0),
    ],
    ids=lambda value: getattr(value, "prediction", None),
)
def test_what_the_network_would_say_of_an_estimate(process, step):
    name = {"diffusion": "ddim", "flow": "flow", "mip": "mip"}[process.family]
    at = process.solver(name, 2 if name == "mip" else 10).steps[step]
    x0, x = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(process.x0_from_output(said(process, x0, x, at), x, at), x0, rtol=1e-4, atol=1e-5)


def test_where_a_gradient_is_asked_for_nothing_is_reused(fitted):
    policy, found = fitted
    hook = Reuse(policy, ReuseCost.of(found.arrays, STEPS), 1e6)
    hook.needs_gradient = True
    plain = sampled(policy, [0]).action
    torch.testing.assert_close(sampled(policy, [0], hook).action.detach(), plain, rtol=1e-4, atol=1e-3)
    assert hook.evaluations.tolist() == [STEPS]


def test_it_belongs_to_one_sampler(fitted):
    policy, found = fitted
    Cache(policy, found)
    for changed in ({"num_inference_steps": 20}, {"eta": 1.0}, {"clip": None}):
        other = tiny_policy(demonstrations(), sampler=SAMPLER | changed)
        with pytest.raises(InputError, match=rf"cache was fitted to sampler\.{next(iter(changed))}="):
            Cache(other, found)


@pytest.mark.parametrize("damage", ["no array", "shape", "negative", "budget", "no sampler"])
def test_what_is_damaged_is_named(fitted, damage):
    policy, found = fitted
    options, arrays = dict(found.options), dict(found.arrays)
    if damage == "no array":
        del arrays["ratio"]
    elif damage == "shape":
        arrays["typical"] = arrays["typical"][:-1]
    elif damage == "negative":
        arrays["sensitivity"] = -arrays["sensitivity"]
    elif damage == "budget":
        options["budget"] = "much"
    else:
        del options["sampler"]
    with pytest.raises(InputError, match="extension cache"):
        Cache(policy, Fitted(options, arrays))


def test_too_few_held_out_windows_are_named():
    buffer, policy = demonstrations(6, length=6), made()
    parts = source(buffer, np.arange(5)), source(buffer, np.arange(5, 6))
    with pytest.raises(InputError, match=r"3 held-out windows are too few.*alpha=0\.2.*4 at least"):
        Cache.fit(policy, *parts, OPTIONS)


def test_it_is_fitted_by_the_command_and_acts_in_the_bundle(tmp_path, capsys):
    buffer = demonstrations()
    buffer.save(tmp_path / "data.zarr")
    policy, path = made(), tmp_path / "bundle"
    config = load("train", ["task=pusht_state_generic", f"data={tmp_path / 'data.zarr'}"])
    bundles.save(path, policy, config | {"policy": TINY | {"sampler": SAMPLER, "process": X0}})
    assert main(["fit", "cache", f"bundle={path}", "tolerance=200", "alpha=0.2", "device=cpu"]) == 0
    assert "evaluations: " in capsys.readouterr().out
    assert read(path, "cache").options["tolerance"] == 200.0
    loaded = bundles.load(path, extensions=["cache"])
    made_of = loaded.predict({"state": observations(2)["state"].numpy()})
    assert (made_of["cache.evaluations"] < STEPS).all()
    with pytest.raises(InputError, match="num_inference_steps"):
        bundles.load(path, extensions=["cache"], sampler={"num_inference_steps": 5})


@pytest.mark.parametrize("word", ["tolerance=0", "tolerance=-1", "tolerance=nan", "alpha=0", "alpha=1"])
def test_values_that_cannot_be_are_named(tmp_path, capsys, word):
    words = {"tolerance": "tolerance=3"} | {word.partition("=")[0]: word}
    assert main(["fit", "cache", f"bundle={tmp_path}", *words.values()]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err
