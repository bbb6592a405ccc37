"""Real-time chunking: the published equations whatever the scheduler, through the network, and stable everywhere."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vjp

from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import MASKS
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Process
from action_diffusion.policy.diffusion.sampler import Hook, Sampler, StepState
from action_diffusion.policy.rtc import RealTimeChunking, continuing, running_chunks, weights

ROWS, HORIZON, ACTIONS, BETA = 3, 8, 2, 5.0
SHAPE = (ROWS, HORIZON, ACTIONS)
CASES = [
    ("ddpm", "epsilon", 100, {}),
    ("ddpm", "sample", 20, {}),
    ("ddim", "epsilon", 20, {}),
    ("ddim", "sample", 20, {"eta": 1.0}),
    ("ddim", "v_prediction", 20, {"timestep_spacing": "leading"}),
    ("dpm_solver++", "epsilon", 10, {}),
    ("dpm_solver++", "v_prediction", 10, {}),
    ("flow", "velocity", 5, {}),
    ("flow", "sample", 10, {}),
]
IDS = [f"{name}-{prediction}-{n}" for name, prediction, n, _ in CASES]
SAMPLED = {"num_inference_steps": 5}
PLANAR = {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]}


def make(case: tuple, **changes) -> tuple[Process, Sampler]:
    name, prediction, n, options = case
    process = Flow(prediction=prediction) if name == "flow" else Diffusion(prediction=prediction)
    return process, Sampler(process=process, scheduler=name, num_inference_steps=n, **options | changes)


def network(process: Process, estimate):
    """A network that answers in its own prediction type what `estimate(x in a flow's scale, tau)` says of x0."""

    def denoise(x, step, rows=None):
        x0 = estimate(x / (step.a + step.b), step.tau)
        eps = (x - step.a * x0) / step.b
        if process.prediction == "epsilon":
            return eps
        if process.prediction == "sample":
            return x0
        return x0 - eps if process.family == "flow" else step.a * eps - step.b * x0

    return denoise


def mixing() -> torch.Tensor:
    """What mixes a row's steps and actions: not symmetric, far from the identity, and small."""
    n = HORIZON * ACTIONS
    return torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / (8 * n**0.5)


def bent(x: torch.Tensor, tau: float) -> torch.Tensor:
    return (0.5 * torch.tanh(x.flatten(1) @ mixing() + 0.2 * tau)).view_as(x)


def smooth(x: torch.Tensor, tau: float, sd: float = 0.3) -> torch.Tensor:
    """The exact estimate for chunks that are a Gaussian process with a time scale of three steps."""
    step = torch.arange(HORIZON, dtype=x.dtype)
    spread = sd**2 * torch.exp(-((step[:, None] - step) ** 2) / (2 * 3.0**2))
    noisy = tau**2 * spread + (1 - tau) ** 2 * torch.eye(HORIZON, dtype=x.dtype)
    return torch.einsum("ij,bja->bia", tau * torch.linalg.solve(noisy, spread).T, x)


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Watch(Hook):
    """Remembers every state after the hooks before it."""

    def __init__(self) -> None:
        self.states: list[StepState] = []

    def edit_x0(self, state: StepState) -> torch.Tensor:
        self.states.append(state)
        return state.x0_hat


@pytest.fixture
def running() -> torch.Tensor:
    return 0.5 * torch.tanh(randn(5))


@pytest.fixture
def weight() -> torch.Tensor:
    return weights(torch.tensor([2, 1, 3]), torch.tensor([6, 8, 5]), HORIZON).double()


@pytest.fixture
def prefix() -> torch.Tensor:
    """What will have been executed, of the same rows."""
    return weights(torch.tensor([2, 1, 3]), torch.tensor([6, 8, 5]), HORIZON, "hard") > 0


# The published form, written for a flow, on its own.


def flow_guided(estimate, x: torch.Tensor, tau: float, running: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The guided velocity at x [B, H, A], of time tau from 0 (noise) to 1."""

    def velocity(x: torch.Tensor) -> torch.Tensor:
        return (estimate(x, tau) - x) / (1 - tau)

    clean, pull, *_ = vjp(lambda x: x + (1 - tau) * velocity(x), x)
    (g,) = pull(weight.unsqueeze(-1) * (running - clean))
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    w = min(BETA, (1 - tau) / (tau * r2)) if tau > 0 else BETA
    return velocity(x) + w * g


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_step_of_every_scheduler_is_the_flows(case, running, weight):
    process, sampler = make(case, clip=None)
    watch = Watch()
    hook = RealTimeChunking(running=running, weight=weight, beta=BETA)
    sampler.run(network(process, bent), randn(1), generator=torch.Generator().manual_seed(0), hooks=[hook, watch])
    assert len(watch.states) == case[2]
    for state in watch.states:
        x = state.x.detach() / (state.step.a + state.step.b)
        expected = x + (1 - state.tau) * flow_guided(bent, x, state.tau, running, weight)
        torch.testing.assert_close(state.x0_hat, expected, atol=1e-9, rtol=0)
        assert (state.x0_hat - state.x0_raw).abs().max() > 1e-5  # it does something


@pytest.mark.parametrize(
    "case",
    [("flow", "velocity", 5, {}), ("ddim", "epsilon", 20, {}), ("ddim", "sample", 10, {})],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def test_a_deterministic_run_is_eulers_through_the_guided_flow(case, running, weight):
    process, sampler = make(case, clip=None)
    hook = RealTimeChunking(running=running, weight=weight, beta=BETA)
    result, _ = sampler.run(network(process, bent), randn(1), hooks=[hook])
    first = sampler.steps[0]
    x = randn(1) / (first.a + first.b)
    for tau, following in pairwise([step.tau for step in sampler.steps] + [1.0]):
        x = x + (following - tau) * flow_guided(bent, x, tau, running, weight)
    torch.testing.assert_close(result, x, atol=1e-5, rtol=0)


# Through the network.


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_product_goes_through_the_network(case, running, weight):
    """A linear network's Jacobian is known: what is pulled is residual · mixing, and not the residual itself."""
    process, sampler = make(case, clip=None)
    watch = Watch()
    hook = RealTimeChunking(running=running, weight=weight, beta=BETA)

    def linear(x: torch.Tensor, tau: float) -> torch.Tensor:
        return (x.flatten(1) @ mixing()).view_as(x)

    sampler.run(network(process, linear), randn(1), generator=torch.Generator().manual_seed(0), hooks=[hook, watch])
    for state in watch.states:
        residual = weight.unsqueeze(-1) * (running - state.x0_raw.detach())
        pulled = (residual.flatten(1) @ mixing().T).view_as(residual)
        correction = state.x0_hat - state.x0_raw.detach()
        ratio = (correction * pulled).sum() / pulled.square().sum()
        torch.testing.assert_close(correction, ratio * pulled, atol=1e-9, rtol=0)
        identity = (correction * residual).sum() / (correction.norm() * residual.norm())
        assert identity < 0.5


def test_a_network_that_does_not_look_at_x_is_no_identity(running, weight):
    process, sampler = make(("ddim", "epsilon", 10, {}), clip=None)
    hook = RealTimeChunking(running=running, weight=weight)
    plain, _ = sampler.run(network(process, lambda x, tau: 0 * x + 0.1), randn(1))
    guided, _ = sampler.run(network(process, lambda x, tau: 0 * x + 0.1), randn(1), hooks=[hook])
    torch.testing.assert_close(guided, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_frozen_steps_are_reproduced_and_the_rest_follows(case):
    """Chunks are smooth: what continues the running chunk starts where it stopped."""
    process, sampler = make(case)
    unit = torch.linalg.cholesky(
        0.09 * torch.exp(-((torch.arange(8.0)[:, None] - torch.arange(8.0)) ** 2) / 18.0).double()
        + 1e-6 * torch.eye(8, dtype=torch.float64)
    )
    many = (64, HORIZON, ACTIONS)
    running = torch.einsum("ij,bja->bia", unit, randn(8, many))
    weight = weights(torch.full((64,), 3), torch.full((64,), 6), HORIZON).double()

    def run(hooks):
        return sampler.run(
            network(process, smooth), randn(9, many), generator=torch.Generator().manual_seed(0), hooks=hooks
        )[0]

    plain = (run([]) - running).square().mean((0, 2)).sqrt()
    guided = (run([RealTimeChunking(running=running, weight=weight, beta=BETA)]) - running).square().mean((0, 2)).sqrt()
    assert (plain > 0.3).all()
    assert (guided[:3] < plain[:3] / 3).all()
    assert (guided[:3] < guided[5]).all()
    assert guided[7] > 0.1


# The measured length.


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_is_pinned_comes_out_as_it_was_and_the_network_sees_it(case, running, weight, prefix):
    process, sampler = make(case, clip=None)
    watch = Watch()
    hook = RealTimeChunking(running=running, weight=weight, pinned=prefix)
    noise, steps = randn(1), [torch.Generator().manual_seed(0) for _ in range(2)]
    found, _ = sampler.run(network(process, bent), noise, generator=steps[0], hooks=[hook, watch])
    for state in watch.states:
        assert torch.equal(state.x0_hat[prefix], running[prefix])
    torch.testing.assert_close(found[prefix], running[prefix], atol=1e-6, rtol=0)
    free, _ = sampler.run(
        network(process, bent), noise, generator=steps[1], hooks=[RealTimeChunking(running=running, weight=weight)]
    )
    assert (found - free)[~prefix].abs().max() > 1e-6  # `bent` mixes the steps of a chunk


def test_a_round_is_the_nearest_point_along_the_pull(running, weight):
    """A linear network: the correction is along residual · matrix, and what is left is at right angles to it."""
    matrix = mixing() + 0.1 * torch.eye(HORIZON * ACTIONS)
    process, sampler = make(("ddim", "sample", 10, {}), clip=None)
    watch = Watch()
    hook = RealTimeChunking(running=running, weight=weight, rounds=1)

    def linear(x: torch.Tensor, tau: float) -> torch.Tensor:
        return (x.flatten(1) @ matrix).view_as(x)

    sampler.run(network(process, linear), randn(1), hooks=[hook, watch])
    moved = 0
    for state in watch.states:
        residual = weight.unsqueeze(-1) * (running - state.x0_raw.detach())
        pulled = (residual.flatten(1) @ matrix.T).view_as(residual)
        correction = state.x0_hat - state.x0_raw.detach()
        for row in range(ROWS):
            forward = (residual[row] * pulled[row]).sum() > 0
            expected = forward * pulled[row] * (residual[row] * pulled[row]).sum() / pulled[row].square().sum()
            torch.testing.assert_close(correction[row], expected, atol=1e-9, rtol=0)
            moved += int(forward)
    assert moved > len(watch.states)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_where_little_is_open_only_a_measured_length_reaches_the_running_chunk(case):
    """Chunks that scatter by 0.02 around what the observation says, and a running chunk that is 0.1 beside it."""
    process, sampler = make(case)
    many = (32, HORIZON, ACTIONS)
    running = torch.full(many, 0.1, dtype=torch.float64)
    weight = weights(torch.full((32,), 3), torch.full((32,), 6), HORIZON).double()

    def distance(**options) -> torch.Tensor:
        hook = RealTimeChunking(running=running, weight=weight, **options)
        denoise = network(process, lambda x, tau: smooth(x, tau, sd=0.02))
        result, _ = sampler.run(denoise, randn(9, many), generator=torch.Generator().manual_seed(0), hooks=[hook])
        return (result - running).mean((0, 2)).abs()

    published, measured = distance(beta=BETA), distance(rounds=3)
    assert (published[:3] > 0.05).all()
    assert (measured[:3] < 0.03).all()
    assert measured[3] < 0.05
    assert measured[7] > measured[3]  # free after the running chunk, and smooth up to there


# Numbers.


@pytest.mark.parametrize("clip", ["x0", "x", None], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_wrong_networks_stay_bounded_at_the_noisiest_steps(prediction, clip, running, weight):
    """An epsilon that is off by 1 puts x̂0 off by 2,000: what is added to it is never longer than the residual."""
    _, sampler = make(("ddim", prediction, 100, {}), clip=clip)
    watch = Watch()
    hook = RealTimeChunking(running=running.float(), weight=weight.float(), beta=20.0, clip_range=1.0)

    def wild(x, step, rows=None):
        return torch.tanh(3 * (x.flatten(1) @ mixing().float() * 8)).view_as(x)

    assert sampler.steps[0].sigma > 1000
    result, _ = sampler.run(wild, randn(1).float(), hooks=[hook, watch])
    assert result.isfinite().all()
    for state in watch.states:
        assert state.x0_hat.isfinite().all()
        raw = state.x0_raw.detach()
        residual = weight.float().unsqueeze(-1) * (running.float() - raw.clamp(-1, 1))
        if clip is None:
            longest = (1 + 1e-3) * residual.norm(dim=(1, 2)) + 1e-6 * raw.norm(dim=(1, 2))
            assert ((state.x0_hat - raw).norm(dim=(1, 2)) <= longest).all()
        if clip == "x0":
            assert state.x0_hat.abs().max() <= 1


def test_the_gradient_goes_straight_through_the_clip(running, weight):
    """Far outside the clip range the estimate still moves: a gradient of the clipped one would be 0."""
    process, sampler = make(("ddim", "sample", 10, {}), clip="x0", clip_range=0.1)
    seen = []

    class After(Hook):
        def edit_x0(self, state):
            seen.append(state)
            return state.x0_hat

    hook = RealTimeChunking(running=-running.abs(), weight=weight, clip_range=0.1)
    sampler.run(network(process, lambda x, tau: 0.05 * x + 0.3), randn(1), hooks=[hook, After()])
    assert all((state.x0_raw > 0.1).all() for state in seen)
    assert any((state.x0_hat < 0.1).any() for state in seen)


@pytest.mark.parametrize("tau", [0.0, 1e-9, 0.5, 1 - 1e-9])
def test_the_gain_is_clipped_at_both_ends(tau, running, weight):
    from action_diffusion.policy.diffusion.solver import Step

    hook = RealTimeChunking(running=running, weight=weight, beta=BETA)
    expected = 2.0 if tau == 0.5 else BETA
    assert hook._gain(Step(0, 0.0, tau, 1.0 - tau)) == pytest.approx((1 - tau) * expected)
    a = tau / math.hypot(tau, 1 - tau)  # the same noise over signal, preserving variance
    b = math.sqrt(1 - a**2)
    assert hook._gain(Step(0, 0.0, a, b)) == pytest.approx((1 - tau) * expected * (a + b), abs=1e-7)


# Masks.


def test_the_exponential_mask_is_the_published_one():
    delay, end = 3, 9
    c = [min(max((delay - 1 - i) / (end - delay + 1) + 1, 0), 1) for i in range(12)]
    expected = [value * (math.e**value - 1) / (math.e - 1) for value in c]
    found = weights(torch.tensor([delay]), torch.tensor([end]), 12)[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found[:3].tolist() == [1, 1, 1]
    assert found[9:].tolist() == [0, 0, 0]
    linear = weights(torch.tensor([delay]), torch.tensor([end]), 12, "linear")[0]
    assert linear.tolist() == pytest.approx(c, abs=1e-6)


@given(
    delay=st.integers(0, 12),
    end=st.integers(0, 10),
    length=st.integers(1, 12),
    mask=st.sampled_from(sorted(MASKS)),
    overlap=st.none() | st.integers(0, 12),
)
def test_masks_hold_the_prefix_and_leave_what_the_running_chunk_has_not(delay, end, length, mask, overlap):
    found = weights(torch.tensor([delay, 0]), torch.tensor([end, 0]), length, mask, overlap)
    assert found.shape == (2, length)
    assert (found[1] == 0).all()  # no running chunk
    row = found[0]
    assert row.isfinite().all()
    assert ((row >= 0) & (row <= 1)).all()
    assert (row[: min(delay, end)] == 1).all()
    assert (row[end:] == 0).all()
    assert (row.diff() <= 0).all()
    if overlap is not None:
        end = min(end, delay + overlap)
        assert (row[end:] == 0).all()
    between = row[min(delay, end) : end]
    if mask in ("exponential", "linear"):
        assert ((between > 0) & (between < 1)).all()
    else:
        assert (between == float(mask == "ones")).all()


# With a policy.


def observations(*rows: float) -> dict[str, np.ndarray]:
    base = np.array([110.0, 95.0, 100.0, 102.0, 0.3], np.float32)
    return {"state": np.stack([np.stack([base + row, base + row + 0.5]) for row in rows]).astype(np.float32)}


def chunk(policy, obs, hook: Hook | None = None, rows: list[int] | None = None) -> np.ndarray:
    seeds = range(len(obs["state"])) if rows is None else rows
    drawn = [[torch.Generator().manual_seed(10 * seed + kind) for seed in seeds] for kind in (0, 1)]
    hooks = [] if hook is None else [hook]
    return policy.predict(obs, noise_generator=drawn[0], generator=drawn[1], hooks=hooks)["action_pred"]


@pytest.mark.parametrize(
    "changes",
    [
        {"process": {"name": "diffusion", "prediction": "sample"}},
        {"process": {"name": "diffusion", "prediction": "sample"}, "sampler": {**SAMPLED, "scheduler": "ddpm"}},
        {
            "process": {"name": "diffusion", "prediction": "v_prediction"},
            "sampler": {**SAMPLED, "scheduler": "dpm_solver++"},
        },
        {
            "process": {"name": "flow", "prediction": "velocity"},
            "sampler": {**SAMPLED, "scheduler": "flow", "clip": None},
        },
    ],
    ids=["ddim", "ddpm", "dpm", "flow"],
)
def test_rows_are_independent_and_a_row_without_a_running_chunk_is_not_guided(make_policy, changes):
    policy = make_policy(**changes)
    obs = observations(0.0, 4.0, -3.0)
    plain = chunk(policy, obs)
    before = [plain[2, 3:], None, plain[0, 2:]]
    delays = [2, 1, 3]
    together = chunk(policy, obs, continuing(policy, running_chunks(policy, obs, before, delays)))
    assert np.isfinite(together).all()
    assert np.abs(together[[0, 2]] - plain[[0, 2]]).max() > 1e-3
    np.testing.assert_allclose(together[1], plain[1], atol=1e-3)
    changed = chunk(
        policy, obs, continuing(policy, running_chunks(policy, obs, [plain[1, 1:], None, before[2]], [5, 4, 3]))
    )
    assert np.array_equal(changed[1:], together[1:])
    assert np.abs(changed[0] - together[0]).max() > 1e-3
    for row, delay in enumerate(delays):
        own = {key: value[row : row + 1] for key, value in obs.items()}
        alone = chunk(policy, own, continuing(policy, running_chunks(policy, own, [before[row]], [delay])), [row])
        np.testing.assert_allclose(alone[0], together[row], atol=0.05)  # other batch sizes round otherwise


@pytest.mark.parametrize("frame", [None, PLANAR], ids=["world", "object"])
def test_the_running_chunk_is_expressed_in_the_frame_of_the_new_observation(make_policy, frame):
    policy = make_policy(action_frame=frame)
    old, new = observations(0.0), observations(6.0)
    before = chunk(policy, old)[0, 3:]
    hook = continuing(policy, running_chunks(policy, new, [before], [2]))
    assert hook.weight[0, :, 0].tolist()[:4] == pytest.approx([0, 1, 1, hook.weight[0, 3, 0].item()])
    tensors = {key: torch.from_numpy(value) for key, value in new.items()}
    meant = policy.unnormalize_action(hook.running, tensors)[0, 1:6].numpy()
    np.testing.assert_allclose(meant, before, atol=1e-2)
    assert hook.running.shape == (1, 8, 2)
    same = {key: torch.from_numpy(value) for key, value in old.items()}
    elsewhere = policy.unnormalize_action(hook.running, same)[0, 1:6].numpy()
    assert (np.abs(elsewhere - before).max() > 1) == (frame is not None)


def test_a_running_chunk_that_is_too_long_is_cut_and_what_it_lacks_may_be_anything(policy):
    obs = observations(0.0)
    hook = continuing(policy, running_chunks(policy, obs, [np.zeros((30, 2))], [2]))
    assert (hook.weight[0, :, 0] > 0).tolist() == [False] + 7 * [True]
    running = torch.full((1, 8, 2), torch.nan)
    running[:, 1:4] = 0.0
    weight = torch.nn.functional.pad(weights(torch.tensor([1]), torch.tensor([3]), 7), (1, 0))
    assert np.isfinite(chunk(policy, obs, RealTimeChunking(running=running, weight=weight))).all()


def test_no_gradient_is_left_behind(policy):
    obs = observations(0.0)
    tensors = {key: torch.from_numpy(value) for key, value in obs.items()}
    hook = continuing(policy, running_chunks(policy, obs, [np.full((5, 2), 100.0)], [2]))
    with torch.no_grad():
        sample = policy.sample(tensors, hooks=[hook], noise=torch.zeros(1, 8, 2))
    assert not sample.action.requires_grad
    assert not sample.normalized.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not hook.running.requires_grad
    again = policy.sample(tensors, hooks=[hook], noise=torch.zeros(1, 8, 2))  # whatever the caller's mode
    assert not again.action.requires_grad
    torch.testing.assert_close(again.action, sample.action)


def test_two_guidances_do_not_get_into_each_others_way(running, weight):
    process, sampler = make(("ddim", "sample", 5, {}))
    hooks = [RealTimeChunking(running=running, weight=weight) for _ in range(2)]
    result, _ = sampler.run(network(process, bent), randn(1), hooks=hooks)
    assert result.isfinite().all()


def test_the_whole_run_may_be_differentiated(running, weight):
    """grad=True: through the guidance too, against differences."""
    _, sampler = make(("ddim", "sample", 5, {}))
    hook = RealTimeChunking(running=running, weight=weight)

    def value(scale: torch.Tensor) -> torch.Tensor:
        def denoise(x, step, rows=None):
            return torch.tanh(scale * (x.flatten(1) @ mixing())).view_as(x)

        return sampler.run(denoise, randn(1), hooks=[hook], grad=scale.requires_grad)[0].square().sum()

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    value(scale).backward()
    step = 1e-3
    difference = (value(torch.tensor(3.0 + step).double()) - value(torch.tensor(3.0 - step).double())) / (2 * step)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(difference.item(), rel=1e-3)


# What cannot work says so.


def test_inference_mode_is_refused(policy):
    obs = observations(0.0)
    hook = continuing(policy, running_chunks(policy, obs, [np.full((5, 2), 100.0)], [2]))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad, not inference_mode"):
        chunk(policy, obs, hook)


def test_an_estimate_without_a_gradient_is_refused(running, weight):
    process, sampler = make(("ddim", "sample", 5, {}))

    class Reuse(Hook):
        def wrap_denoiser(self, denoise):
            return lambda x, step, rows=None: torch.zeros_like(x).detach()

    hooks = [Reuse(), RealTimeChunking(running=running, weight=weight)]
    with pytest.raises(RuntimeError, match="has no gradient with respect to x"):
        sampler.run(network(process, bent), randn(1), hooks=hooks)


def test_wrong_values_are_refused():
    good: dict[str, Any] = {"running": torch.zeros(1, 8, 2), "weight": torch.ones(1, 8)}
    for changes, message in (
        ({"weight": torch.ones(1, 7)}, r"weights of shape \[1, 7\]"),
        ({"beta": 0.0}, "beta=0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"rounds": -1}, "rounds=-1"),
        ({"running": torch.full((1, 8, 2), torch.nan)}, "NaN or infinity"),
    ):
        with pytest.raises(InputError, match=message):
            RealTimeChunking(**good | changes)
    with pytest.raises(InputError, match="unknown mask 'exponental': did you mean exponential"):
        weights(torch.tensor([1]), torch.tensor([2]), 4, "exponental")
    hook = RealTimeChunking(**good)
    with pytest.raises(InputError, match=r"running chunks of shape \[1, 8, 2\] for new ones of \[2, 8, 2\]"):
        hook.begin(torch.zeros(2, 8, 2), [])
