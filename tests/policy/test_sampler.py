"""The sampler and its hooks, for every scheduler: the same promises whichever is chosen."""

from __future__ import annotations

import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Process
from action_diffusion.policy.diffusion.sampler import Hook, Sampler, StepState, StopSampling, draw_noise

SHAPE = (3, 8, 2)
CASES = [
    ("ddpm", "epsilon", 100, {}),
    ("ddpm", "sample", 20, {}),
    ("ddim", "epsilon", 10, {}),
    ("ddim", "sample", 10, {"eta": 0.5}),
    ("ddim", "v_prediction", 16, {"timestep_spacing": "leading"}),
    ("dpm_solver++", "epsilon", 8, {}),
    ("dpm_solver++", "v_prediction", 4, {"solver_order": 3}),
    ("flow", "velocity", 8, {}),
    ("flow", "sample", 1, {}),
]
IDS = [f"{name}-{prediction}-{n}" for name, prediction, n, _ in CASES]


def make(case: tuple) -> tuple[Process, Sampler]:
    name, prediction, n, options = case
    process = Flow(prediction=prediction) if name == "flow" else Diffusion(prediction=prediction)
    return process, Sampler(process=process, scheduler=name, num_inference_steps=n, **options)


def oracle(process: Process, x0: torch.Tensor):
    """A network that knows the clean sample, and answers in its own prediction type."""

    def denoise(x, step, rows=None):
        target = x0 if rows is None else x0[rows]
        eps = (x - step.a * target) / step.b
        if process.prediction == "epsilon":
            return eps
        if process.prediction == "sample":
            return target
        return target - eps if process.family == "flow" else step.a * eps - step.b * target

    return denoise


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_perfect_denoiser_gives_the_clean_sample(case, x0, noise):
    process, sampler = make(case)
    result, chain = sampler.run(oracle(process, x0), noise, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(result, x0, atol=2e-3, rtol=0)
    assert chain == []


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_hook_that_edits_x0_hat_decides_what_comes_out(case, x0, noise):
    process, sampler = make(case)
    seen: list[StepState] = []

    class Inpaint(Hook):
        def edit_x0(self, state):
            seen.append(state)
            edited = state.x0_hat.clone()
            edited[:, :, 1] = 0.25
            return edited

    class Watch(Hook):
        def after_step(self, state, x_next):
            assert (state.x0_hat[:, :, 1] == 0.25).all()
            # eps and velocity follow from the edited estimate
            torch.testing.assert_close(state.step.a * state.x0_hat + state.step.b * state.eps, state.x)
            torch.testing.assert_close(state.velocity, state.x0_hat - state.eps)
            assert state.tau == pytest.approx(1 / (1 + state.sigma))
            return x_next

    result, _ = sampler.run(
        oracle(process, x0), noise, generator=torch.Generator().manual_seed(0), hooks=[Inpaint(), Watch()]
    )
    torch.testing.assert_close(result[:, :, 1], torch.full(SHAPE[:2], 0.25), atol=1e-5, rtol=0)
    torch.testing.assert_close(result[:, :, 0], x0[:, :, 0], atol=2e-3, rtol=0)
    assert [state.k for state in seen] == list(range(case[2]))
    taus = [state.tau for state in seen]
    assert taus == sorted(taus)
    assert taus[0] < 0.2 or case[3].get("timestep_spacing") == "leading"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_flow_through_every_step(case, noise):
    _, sampler = make(case)
    weight = torch.full((2,), 0.3, requires_grad=True)
    calls = []

    def denoise(x, step, rows=None):
        out = torch.tanh(x * weight + 0.1 * step.a)
        out.retain_grad()
        calls.append(out)
        return out

    start = noise.clone().requires_grad_()
    result, _ = sampler.run(denoise, start, generator=torch.Generator().manual_seed(0), grad=True)
    result.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert (weight.grad != 0).all()
    assert all(call.grad is not None and call.grad.isfinite().all() for call in calls)


def test_gradient_of_the_sampler_agrees_with_differences(noise):
    _, sampler = make(("ddim", "sample", 10, {}))

    def value(weight: torch.Tensor) -> torch.Tensor:
        result, _ = sampler.run(lambda x, step, rows: torch.tanh(weight * x), noise.double(), grad=weight.requires_grad)
        return result.square().sum()

    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value(weight).backward()
    step = 1e-3
    difference = (value(torch.tensor(0.4 + step).double()) - value(torch.tensor(0.4 - step).double())) / (2 * step)
    assert weight.grad.item() == pytest.approx(difference.item(), rel=1e-3)


def test_without_grad_nothing_is_recorded(noise):
    _, sampler = make(CASES[2])
    weight = torch.ones(2, requires_grad=True)
    result, _ = sampler.run(lambda x, step, rows: x * weight, noise)
    assert not result.requires_grad


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_equals_the_plain_loop_of_diffusers(cls, noise):
    """Without hooks, the loop is what a reader of diffusers' documentation would write."""
    name = {DDPMScheduler: "ddpm", DDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpm_solver++"}[cls]
    spacing = {"timestep_spacing": "linspace"} if name == "dpm_solver++" else {"timestep_spacing": "trailing"}
    clip = {} if name == "dpm_solver++" else {"clip_sample": False}
    plain = cls(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **spacing, **clip
    )
    plain.set_timesteps(10)

    def network(x, k):
        return torch.tanh(0.7 * x + 0.01 * k)

    x = noise
    generator = torch.Generator().manual_seed(3)
    for k in plain.timesteps:
        x = plain.step(network(x, float(k)), k, x, generator=generator).prev_sample
    process = Diffusion(prediction="v_prediction")
    sampler = Sampler(process=process, scheduler=name, num_inference_steps=10, clip=None)
    ours, _ = sampler.run(
        lambda x, step, rows: network(x, step.time), noise, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_noise_of_a_clipped_estimate_is_as_diffusers_has_it(prediction, own, noise):
    """diffusers keeps the noise of the estimate before it is clipped, unless told `use_clipped_model_output`."""
    plain: Any = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample_range=1.2
    )
    plain.set_timesteps(10)

    def network(x, k):
        return torch.tanh(0.7 * x + 0.01 * k) * 3

    x = noise
    for k in plain.timesteps:
        x = plain.step(network(x, float(k)), k, x, use_clipped_model_output=own).prev_sample
    options = {"timestep_spacing": "leading", "use_clipped_model_output": own, "clip_to": "unit", "clip_range": 1.2}
    far = (torch.tensor([-9.0, -9.0]), torch.tensor([9.0, 9.0]))  # which `clip_to` overrules
    sampler = Sampler(
        process=Diffusion(prediction=prediction), scheduler="ddim", num_inference_steps=10, demonstrated=far, **options
    )
    ours, chain = sampler.run(lambda x, step, rows: network(x, step.time), noise, return_chain=True)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    last = chain[-1]
    torch.testing.assert_close(sampler.mean(network(last.x, last.step.time), last.x, last.step), last.x_next)


SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm_solver++": DPMSolverMultistepScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize(
    ("name", "n", "options"),
    [
        ("ddpm", 100, {}),
        ("ddpm", 10, {"timestep_spacing": "leading", "variance_type": "fixed_small_log"}),
        ("ddim", 16, {"timestep_spacing": "leading", "steps_offset": 1}),
        ("ddim", 10, {"eta": 0.5}),
        ("ddim", 20, {"eta": 1.0, "set_alpha_to_one": False}),
        ("dpm_solver++", 1, {}),
        ("dpm_solver++", 4, {"solver_order": 3}),
        ("dpm_solver++", 20, {"solver_order": 3, "use_karras_sigmas": True}),
        ("dpm_solver++", 20, {"solver_type": "heun"}),
        ("dpm_solver++", 10, {"solver_order": 1, "timestep_spacing": "trailing"}),
        ("flow", 1, {}),
        ("flow", 10, {"shift": 3.0}),
        ("flow", 10, {"stochastic_sampling": True}),
    ],
)
def test_every_move_is_the_one_of_diffusers(name, n, options, noise):
    """The numbers read off a scheduler give what the scheduler itself gives, for any estimates and with its noise."""
    process = Flow() if name == "flow" else Diffusion()
    sampler = Sampler(process=process, scheduler=name, num_inference_steps=n, clip=None, **options)
    spacing = {"timestep_spacing": "linspace" if name == "dpm_solver++" else "trailing"}
    common = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"} | spacing
    common |= {} if name == "dpm_solver++" else {"clip_sample": False}
    common = {} if name == "flow" else common
    theirs = SCHEDULERS[name](**(common | {key: value for key, value in options.items() if key != "eta"}))
    theirs.set_timesteps(
        **({"sigmas": [1 - i / n for i in range(n)]} if name == "flow" else {"num_inference_steps": n})
    )
    eta = {"eta": options["eta"]} if "eta" in options else {}
    estimates = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(8))
    x, generator, expected = noise, torch.Generator().manual_seed(3), []
    for step, estimate, time in zip(sampler.steps, estimates, theirs.timesteps, strict=True):
        output = (x - estimate) / step.b if name == "flow" else estimate
        x = theirs.step(output, time, x, generator=generator, **eta).prev_sample
        expected.append(x)
    process.x0_from_output = lambda output, x, step: output
    answer = lambda x, step, rows: estimates[step.index]  # noqa: E731
    _, chain = sampler.run(answer, noise, generator=torch.Generator().manual_seed(3), return_chain=True)
    for link, x in zip(chain, expected, strict=True):
        torch.testing.assert_close(link.x_next, x, atol=1e-5, rtol=1e-5)


SPACINGS = ("leading", "trailing", "linspace", "karras", None)
VARIANTS = (
    ("ddpm", "variance_type", ("fixed_small", "fixed_large", "fixed_small_log", "learned")),
    ("ddim", "eta", (0.0, 0.5, 1.0, 2.0, float("nan"), "all")),
    ("ddim", "set_alpha_to_one", (False, True)),
    ("ddim", "rescale_betas_zero_snr", (True,)),
    ("dpm_solver++", "solver_order", (1, 2, 3, 4, True)),
    ("dpm_solver++", "use_karras_sigmas", (True,)),
    ("dpm_solver++", "use_exponential_sigmas", (True,)),
    ("dpm_solver++", "use_lu_lambdas", (True,)),
    ("dpm_solver++", "use_flow_sigmas", (True,)),
    ("dpm_solver++", "use_dynamic_shifting", (True,)),
    ("dpm_solver++", "final_sigmas_type", ("zero", "sigma_min")),
    ("dpm_solver++", "algorithm_type", ("sde-dpmsolver++",)),
    ("flow", "shift", (0.1, 3.0, 0.0, -1.0)),
    ("flow", "use_dynamic_shifting", (True,)),
    ("flow", "invert_sigmas", (True,)),
    ("flow", "stochastic_sampling", (True,)),
    ("flow", "timestep_spacing", ("trailing",)),
)


def accepted(name: str, n: int, options: dict) -> bool:
    """Whether a sampler takes these options; where it does, its noise levels are checked."""
    process = Flow(prediction="sample") if name == "flow" else Diffusion(prediction="sample")
    try:
        sampler = Sampler(process=process, scheduler=name, num_inference_steps=n, clip=None, **options)
    except InputError:
        return False
    steps, moves = sampler.steps, sampler.solver.moves
    assert len(steps) == n
    assert steps[0].b >= 0.95
    for step, move, following in zip(steps, moves, steps[1:], strict=False):
        assert move.keep * step.a + sum(move.blend) == pytest.approx(following.a, abs=1e-3)
        assert (move.keep * step.b) ** 2 + move.spread**2 == pytest.approx(following.b**2, abs=1e-3 * following.b)
        if isinstance(process, Diffusion):  # what the network is told stands for the level that it is in training
            low, high = (float(process._alphas[index]) for index in (int(step.time), -int(-step.time // 1)))
            assert high - 1e-9 <= step.a**2 <= low + 1e-9
    return True


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_spacing_that_is_accepted_meets_its_levels(name):
    taken = {
        (spacing, n)
        for spacing in SPACINGS
        for n in (1, 2, 3, 4, 5, 7, 10, 16, 20, 33, 50, 60, 99, 100, 101)
        if accepted(name, n, {"timestep_spacing": spacing})
    }
    assert {(None, 1), (None, 10)} <= taken
    if name == "ddim":  # the two that were reported
        assert not {("linspace", 7), ("leading", 1)} & taken
        assert {("leading", 16), ("trailing", 20), ("linspace", 100)} <= taken
    if name == "dpm_solver++":
        assert not {("leading", 100), ("linspace", 100)} & taken  # the second stood still once, and divided by that
        assert all(("trailing", n) in taken for n in (1, 2, 3, 7, 33, 60, 99, 100))


@pytest.mark.parametrize(("name", "option", "values"), VARIANTS)
def test_every_option_that_is_accepted_meets_its_levels(name, option, values):
    for value, n, offset in itertools.product(values, (1, 2, 7, 10, 100), (None, 1, 90, 1000)):
        extra = {} if offset is None or name == "flow" else {"steps_offset": offset, "timestep_spacing": "leading"}
        accepted(name, n, {option: value, **extra})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_spacing": "linspace", "num_inference_steps": 7}, r"step \d ends at a noise.*trailing.*dpm_solver"),
        ({"timestep_spacing": "leading", "num_inference_steps": 1}, "0.03 of its input is noise.*trailing"),
        ({"timestep_spacing": "leading", "steps_offset": 1, "num_inference_steps": 100}, "leave the 100 of training"),
        ({"timestep_spacing": "karras"}, "timestep_spacing=karras: choose from leading, trailing, linspace"),
        ({"eta": 1.5}, "sampler.eta=1.5 must be at most 1"),
    ],
)
def test_levels_that_do_not_meet_are_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(**{"process": Diffusion(), "scheduler": "ddim", "num_inference_steps": 10} | options)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_a_process_that_ends_before_noise_is_refused(schedule):
    with pytest.raises(InputError, match=f"{schedule} over 100 steps ends at 0.* of noise"):
        Diffusion(beta_schedule=schedule)
    assert Diffusion(beta_schedule=schedule, num_train_timesteps=1000).solver("ddim", 10).steps[0].b > 0.999


@pytest.mark.parametrize(
    ("options", "message"),
    [({"thresholding": True}, "thresholding=true.*sampler.clip=x0"), ({"variance_type": "learned"}, "fixed_small")],
)
def test_schedulers_whose_steps_are_not_linear_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampler(process=Diffusion(), scheduler="ddpm", num_inference_steps=10, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_step_waits_for_the_gpu(case, noise):
    """Generators on the CPU, as rollouts have; all that is drawn and copied is so before the first step."""
    _, sampler = make(case)
    started = noise.cuda()
    torch.cuda.synchronize()

    class Watch(Hook):
        def wrap_denoiser(self, denoise):
            def call(x, step, rows=None):
                torch.cuda.set_sync_debug_mode("error")
                return denoise(x, step, rows)

            return call

    try:
        sampler.run(
            lambda x, step, rows: torch.tanh(x),
            started,
            generator=[torch.Generator().manual_seed(i) for i in range(len(noise))],
            hooks=[Watch()],
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=["ddpm", "ddim-eta"])
def test_chain_holds_the_distribution_of_every_step(case, x0, noise):
    process, sampler = make(case)
    _, chain = sampler.run(oracle(process, x0), noise, generator=torch.Generator().manual_seed(5), return_chain=True)
    assert len(chain) == case[2]
    generator = torch.Generator().manual_seed(5)
    for link in chain[:-1]:
        expected = torch.randn(SHAPE, generator=generator)
        torch.testing.assert_close((link.x_next - link.mean) / link.std, expected, atol=5e-3, rtol=5e-3)
    assert chain[-1].std == 0.0
    for before, after in pairwise(chain):
        assert before.x_next is after.x


def test_a_row_does_not_depend_on_its_neighbours():
    _, sampler = make(("ddpm", "sample", 20, {}))

    def chunk(seeds: list[int]) -> torch.Tensor:
        starts = [torch.Generator().manual_seed(s) for s in seeds]
        steps = [torch.Generator().manual_seed(s + 100) for s in seeds]
        noise = draw_noise((len(seeds), 8, 2), starts, torch.device("cpu"), torch.float32)
        return sampler.run(lambda x, step, rows: torch.tanh(x), noise, generator=steps)[0]

    together, alone = chunk([1, 2, 3]), chunk([2])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_a_list_of_generators_must_have_one_per_row():
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        draw_noise((3, 8, 2), [torch.Generator(), torch.Generator()], torch.device("cpu"), torch.float32)


class Guide(Hook):
    """Needs the gradient of the estimate with respect to the sample."""

    needs_gradient = True

    def __init__(self) -> None:
        self.products: list[torch.Tensor] = []

    def edit_x0(self, state):
        (product,) = torch.autograd.grad(state.x0_raw, state.x, torch.ones_like(state.x))
        self.products.append(product)
        return state.x0_hat.detach()


def test_guidance_differentiates_through_the_network_under_no_grad(noise):
    _, sampler = make(("ddim", "sample", 10, {}))
    guide = Guide()
    with torch.no_grad():
        result, _ = sampler.run(lambda x, step, rows: torch.tanh(2 * x), noise, hooks=[guide])
    assert not result.requires_grad
    torch.testing.assert_close(guide.products[0], 2 / torch.cosh(2 * noise) ** 2)  # not the identity


def test_guidance_says_why_it_cannot_run_in_inference_mode(noise):
    _, sampler = make(("ddim", "sample", 10, {}))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad, not inference_mode"):
        sampler.run(lambda x, step, rows: x, noise, hooks=[Guide()])


def test_wrapping_the_denoiser_can_reuse_outputs_for_some_rows(x0, noise):
    process, sampler = make(("ddim", "sample", 10, {}))
    evaluated: list[Any] = []

    class FreezeFirstRow(Hook):
        """Caching in miniature: row 0 keeps its first output, the others are evaluated."""

        def wrap_denoiser(self, denoise):
            kept = None

            def call(x, step, rows=None):
                nonlocal kept
                if kept is None:
                    kept = denoise(x, step, rows)
                    return kept
                others = torch.arange(1, len(x))
                fresh = denoise(x[1:], step, others)
                evaluated.append(len(fresh))
                return torch.cat([kept[:1], fresh])

            return call

    result, _ = sampler.run(oracle(process, x0), noise, hooks=[FreezeFirstRow()])
    assert evaluated == [2] * 9
    torch.testing.assert_close(result, x0, atol=1e-4, rtol=0)


def test_a_hook_can_stop_early(x0, noise):
    process, sampler = make(("ddim", "epsilon", 10, {}))

    class Stop(Hook):
        def after_step(self, state, x_next):
            if state.k == 4:
                raise StopSampling(state.x0_hat)
            return x_next

    result, chain = sampler.run(oracle(process, x0), noise, hooks=[Stop()], return_chain=True)
    assert len(chain) == 5
    torch.testing.assert_close(result, x0, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("clip", "limit"), [("x0", 0.5), ("x", 0.5), (None, None)])
def test_the_clip_target_is_explicit(clip, limit, noise):
    process = Diffusion(prediction="sample")
    sampler = Sampler(process=process, scheduler="ddim", num_inference_steps=10, clip=clip, clip_range=0.5)
    states = []

    class Watch(Hook):
        def after_step(self, state, x_next):
            states.append((state.x0_hat.abs().max(), x_next.abs().max()))
            return x_next

    sampler.run(lambda x, step, rows: torch.full_like(x, 3.0), noise, hooks=[Watch()])
    if clip == "x0":
        assert all(x0_hat <= limit for x0_hat, _ in states)
    elif clip == "x":
        assert all(x_next <= limit for _, x_next in states)
        assert all(x0_hat == 3.0 for x0_hat, _ in states)
    else:
        assert states[-1][1] == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (Diffusion(), {"scheduler": "flow"}, "flow family.*trained as diffusion.*ddpm, ddim"),
        (Flow(), {"scheduler": "ddim"}, "diffusion family.*trained as flow"),
        (Diffusion(), {"scheduler": "dddim"}, "did you mean ddim"),
        (Diffusion(), {"scheduler": "ddim", "num_inference_steps": 16}, "does not divide 100"),
        (Diffusion(), {"scheduler": "ddim", "num_inference_steps": 0}, "between 1 and 100"),
        (Diffusion(), {"scheduler": "ddpm", "num_inference_steps": 200}, "between 1 and 100"),
        (Diffusion(), {"scheduler": "ddim", "etta": 1.0}, "not known to ddim.*etta"),
        (Diffusion(), {"scheduler": "ddim", "clip": "x1"}, "did you mean x"),
    ],
)
def test_what_does_not_fit_is_refused(process, options, message):
    with pytest.raises(InputError, match=message):
        Sampler(**({"process": process, "num_inference_steps": 10} | options))


@pytest.mark.parametrize(("cls", "prediction"), [(Diffusion, "velocity"), (Flow, "epsilon"), (Flow, "v_prediction")])
def test_predictions_belong_to_families(cls, prediction):
    with pytest.raises(InputError, match="unknown prediction"):
        cls(prediction=prediction)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(0, 99), seed=st.integers(0, 1000), prediction=st.sampled_from(["epsilon", "sample", "v_prediction"])
)
def test_training_target_and_sampling_estimate_are_inverse(k, seed, prediction):
    """What the network is trained on is turned back into the clean sample that it came from."""
    generator = torch.Generator().manual_seed(seed)
    process = Diffusion(prediction=prediction)
    x0 = torch.rand(SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    eps = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    times = torch.full((3,), float(k))
    x = process.add_noise(x0, eps, times)
    steps = process.solver("ddpm", 100).steps
    step = next(s for s in steps if s.time == k)
    found = process.x0_from_output(process.target(x0, eps, times), x, step)
    torch.testing.assert_close(found, x0, atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 20), seed=st.integers(0, 1000), prediction=st.sampled_from(["velocity", "sample"]))
def test_flow_target_and_estimate_are_inverse(n, seed, prediction):
    generator = torch.Generator().manual_seed(seed)
    process = Flow(prediction=prediction)
    x0, eps = torch.rand(SHAPE, generator=generator) * 2 - 1, torch.randn(SHAPE, generator=generator)
    for step in process.solver("flow", n).steps:
        times = torch.full((3,), step.time)
        x = process.add_noise(x0, eps, times)
        torch.testing.assert_close(x, step.a * x0 + step.b * eps, atol=1e-5, rtol=0)
        found = process.x0_from_output(process.target(x0, eps, times), x, step)
        torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
