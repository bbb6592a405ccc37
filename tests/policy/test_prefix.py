"""Policies that are trained to go on from steps that are fixed already (training-time real-time chunking)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from action_diffusion.deploy.loop.prediction import Guidance, predict
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import Request
from action_diffusion.policy.diffusion.sampler import Hook
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.rtc import running_chunks
from action_diffusion.policy.sample import Prefix

OBJECTIVE = {"objective": {"loss": "mse", "max_delay": 3}}
CASES = [
    {"sampler": {"scheduler": "ddpm", "num_inference_steps": 100}},
    {"sampler": {"scheduler": "ddim", "num_inference_steps": 5, "eta": 1.0}},
    {"sampler": {"scheduler": "dpm_solver++", "num_inference_steps": 5}},
    {"process": {"name": "flow"}, "sampler": {"scheduler": "flow", "num_inference_steps": 4, "clip": None}},
    {"process": {"name": "diffusion", "prediction": "sample"}},
    {"process": {"name": "diffusion", "prediction": "v_prediction"}},
]
IDS = ["ddpm", "ddim", "dpm", "flow", "sample", "v"]
STATE = np.arange(10, dtype=np.float32).reshape(2, 5) + 100


@pytest.fixture
def policy(make_policy):
    return make_policy(**OBJECTIVE).eval()


def observations(n: int) -> dict[str, torch.Tensor]:
    return {"state": torch.from_numpy(np.stack([STATE + i for i in range(n)]))}


def prefix(n: int, delays: list[int], seed: int = 0) -> Prefix:
    """Of chunks of 8 steps, of which step 1 is now."""
    action = torch.rand(n, 8, 2, generator=torch.Generator().manual_seed(seed)) - 0.5
    step = torch.arange(8) - 1
    return Prefix(action, (step >= 0) & (step < torch.tensor(delays)[:, None]))


def sample(policy, known: Prefix | None, n: int = 3, **options) -> torch.Tensor:
    noise = torch.randn(n, 8, 2, generator=torch.Generator().manual_seed(1))
    steps = [torch.Generator().manual_seed(row) for row in range(n)]
    return policy.sample(observations(n), noise=noise, generator=steps, prefix=known, **options).normalized


def test_without_it_nothing_changes(make_policy):
    plain, named = make_policy(), make_policy(objective={"loss": "mse", "max_delay": 0})
    assert plain.state_dict().keys() == named.state_dict().keys()
    action, losses = torch.rand(4, 8, 2), []
    for policy in (plain, named):
        losses.append(policy(observations(4), action, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*losses)
    with pytest.raises(InputError, match=r"trained with policy\.objective\.max_delay=0"):
        plain.sample(observations(3), prefix=prefix(3, [1, 1, 1]))


@pytest.mark.parametrize(("max_delay", "message"), [(-1, "must not be negative"), (7, "must be between 0 and 6")])
def test_delays_that_leave_nothing_to_learn_are_refused(make_policy, max_delay, message):
    with pytest.raises(InputError, match=f"max_delay={max_delay} {message}"):
        make_policy(objective={"loss": "mse", "max_delay": max_delay})


def test_training_gives_prefix_steps_clean_and_learns_the_others(policy, monkeypatch):
    seen = {}

    def denoise(x, film):
        seen["x"] = x.detach()
        seen["output"] = torch.zeros(len(x), 8, 2, requires_grad=True)
        return seen["output"]

    monkeypatch.setattr(policy.denoiser, "forward", denoise)
    action = 100 + 5 * torch.rand(64, 8, 2, generator=torch.Generator().manual_seed(0))
    policy(observations(64), action, generator=torch.Generator().manual_seed(0)).backward()
    given, x0 = seen["x"][..., 2] > 0, policy.normalize_action(action, observations(64))
    assert torch.equal(seen["x"][..., 2], given.float())
    assert set(given.sum(1).tolist()) == {0, 1, 2, 3}
    assert not given[:, 0].any()  # past
    assert (given[:, 1:].int().diff(dim=1) <= 0).all()  # from now on, without a gap
    assert torch.equal(seen["x"][..., :2][given], x0[given])
    assert (seen["x"][..., :2][~given] != x0[~given]).any(dim=-1).all()
    assert (seen["output"].grad[given] == 0).all()
    assert (seen["output"].grad[~given] != 0).any(dim=-1).all()


def test_the_loss_is_a_mean_over_what_counts(make_policy):
    policy = make_policy(objective={"loss": "mse", "max_delay": 3, "loss_on_padding": False})
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, 5:] = False
    action = torch.rand(4, 8, 2)
    losses = []
    for padding in (0.0, 50.0):
        action[:, 5:] = padding
        torch.manual_seed(0)
        policy.denoiser.forward = lambda x, film: torch.zeros(len(x), 8, 2)
        losses.append(policy(observations(4), action, mask, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_chunk_keeps_the_prefix_and_rows_are_independent(make_policy, case):
    policy = make_policy(**(OBJECTIVE | case)).eval()
    known = prefix(3, [2, 0, 3])
    with torch.inference_mode():  # no gradients anywhere
        together = sample(policy, known)
    assert torch.equal(together[known.steps], known.action[known.steps])
    other = prefix(3, [2, 0, 3], seed=5)
    mixed = Prefix(torch.cat([known.action[:2], other.action[2:]]), known.steps)
    changed = sample(policy, mixed)
    torch.testing.assert_close(changed[:2], together[:2], atol=1e-5, rtol=0)
    assert (changed[2, 4:] - together[2, 4:]).abs().max() > 1e-4  # the rest goes on from it
    torch.testing.assert_close(sample(policy, None)[1], together[1], atol=1e-5, rtol=0)
    whatever = Prefix(torch.where(known.steps[..., None], known.action, torch.nan), known.steps)
    torch.testing.assert_close(sample(policy, whatever), together, atol=0, rtol=0)


def test_hooks_that_pick_rows_and_several_samples_get_their_own(policy):
    known = prefix(3, [2, 0, 3])

    class OneByOne(Hook):
        def wrap_denoiser(self, denoise):
            def call(x, step, rows=None):
                return torch.cat([denoise(x[[row]], step, torch.tensor([row])) for row in range(len(x))])

            return call

    torch.testing.assert_close(sample(policy, known, hooks=[OneByOne()]), sample(policy, known), atol=1e-5, rtol=0)
    noise = torch.randn(6, 8, 2, generator=torch.Generator().manual_seed(1))
    twice = policy.sample(observations(3), noise=noise, n_samples=2, prefix=known).normalized
    for copy in range(2):
        assert torch.equal(twice[:, copy][known.steps], known.action[known.steps])
    with pytest.raises(InputError, match="prefix steps of shape"):
        sample(policy, prefix(2, [1, 1]))


def test_a_chunk_as_a_function_of_tensors_takes_them(make_policy):
    for sampler in ({"scheduler": "ddim", "num_inference_steps": 5, "eta": eta} for eta in (0.0, 1.0)):
        policy = make_policy(**(OBJECTIVE | {"sampler": sampler})).eval()
        known = prefix(3, [2, 0, 3])
        expected, none = sample(policy, known), sample(policy, None)
        with torch.no_grad():
            torch.testing.assert_close(sample(policy, known), expected, atol=0, rtol=0)
            torch.testing.assert_close(sample(policy, None), none, atol=0, rtol=0)


def test_prepared_weights_and_bundles_keep_it(policy, tmp_path, tiny_config):
    known, expected = prefix(3, [2, 0, 3]), sample(policy, prefix(3, [2, 0, 3]))
    accelerate(policy, precision="fp32")
    with torch.no_grad():
        torch.testing.assert_close(sample(policy, known), expected, atol=1e-5, rtol=0)
    bundles.save(tmp_path / "bundle", policy, {"policy": tiny_config | OBJECTIVE}, golden_obs={"state": STATE})
    loaded = bundles.load(tmp_path / "bundle", verify=True)
    assert loaded.max_delay == 3
    torch.testing.assert_close(sample(loaded, known), expected, atol=1e-6, rtol=0)


def chunk(policy, running: np.ndarray, delay: int, **guidance) -> np.ndarray:
    noise, steps = generators(0)
    request = Request(step=0, running=running, delay=delay)
    options: dict[str, Any] = {"noise_generator": [noise], "generator": [steps], "guidance": Guidance(**guidance)}
    return predict(policy, {"state": STATE[None]}, [request], **options).chunks[0]


def test_real_time_chunking_goes_on_from_the_running_chunk(policy, monkeypatch):
    running = np.linspace([100, 100], [104, 104], 5).astype(np.float32)
    found = chunk(policy, running, 2)
    np.testing.assert_allclose(found[1:3], running[:2], atol=1e-4)
    np.testing.assert_array_equal(found, chunk(policy, running, 2, method="trained"))
    assert np.abs(found - chunk(policy, running, 2, method="both")).max() > 1e-4
    guided = chunk(policy, running, 2, method="guidance")
    assert np.abs(found - guided).max() > 1e-4
    for delay in (0, 4):  # nothing to go on from; more than was learnt
        np.testing.assert_array_equal(chunk(policy, running, delay), chunk(policy, running, delay, method="guidance"))
    known = running_chunks(policy, {"state": STATE[None]}, [running], [9]).prefix()
    assert known.steps.sum() == 5  # as many as there are


def test_what_a_policy_has_not_learnt_is_said(make_policy):
    with pytest.raises(InputError, match=r"rtc\.method=trained needs .* policy\.objective\.max_delay above 0"):
        chunk(make_policy().eval(), np.full((5, 2), 100.0), 2, method="trained")
    with pytest.raises(InputError, match="guidence"):
        Guidance(method="guidence")


@pytest.mark.slow
def test_a_trained_policy_continues_what_it_is_given(make_policy):
    """Chunks that go up or down by chance, which the observation does not tell: the beginning does."""
    policy = make_policy(
        denoiser={"name": "unet1d", "channels": [16, 32], "time_dim": 16},
        objective={"loss": "mse", "max_delay": 3},
        process={"name": "diffusion", "prediction": "sample"},
    ).train()
    low, high = policy.normalizer.unnormalize("action", torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(250):
        up = (torch.randint(2, (64, 1, 1), generator=random) * 2 - 1).float()
        normalized = (up * torch.linspace(0.1, 0.8, 8)[:, None]).expand(64, 8, 2)
        action = low + (normalized + 1) / 2 * (high - low)
        loss = policy(observations(64), action, generator=random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    up = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1)
    expected = (up * torch.linspace(0.1, 0.8, 8)[:, None]).expand(4, 8, 2)
    step = torch.arange(8) - 1
    known = Prefix(expected, ((step >= 0) & (step < 2)).expand(4, 8))
    with torch.no_grad():
        error = (sample(policy, known, 4) - expected)[:, 3:].abs().mean()
        free = (sample(policy, None, 4) - expected)[:, 3:].abs().mean()
    assert error < 0.1 < free
