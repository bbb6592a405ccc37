"""What denoisers are trained to say: objectives against flows whose answer is known, and policies of one step."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.diffusion.process import Diffusion, Flow, Mip
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.objectives.consistency import Consistency
from action_diffusion.policy.objectives.distillation import Distillation
from action_diffusion.policy.objectives.flow_maps import FlowMap, MeanFlow, Shortcut
from action_diffusion.policy.objectives.objective import Denoising, Objective, Pair, Teacher
from action_diffusion.training.run import train

SPREAD = 0.5
MAPS = {"shortcut": Shortcut, "flow_map": FlowMap, "mean_flow": MeanFlow}
ONE_STEP = [
    {
        "process": {"name": "flow"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 1},
        "objective": {"name": name},
    }
    for name in MAPS
] + [
    {
        "process": {"name": "mip"},
        "sampler": {"scheduler": "mip", "num_inference_steps": 2},
        "objective": {"name": "mip"},
    }
]


def variance(s: Tensor) -> Tensor:
    """Of x_s, where x0 ~ N(0, SPREAD²)."""
    return ((1 - s) * SPREAD) ** 2 + s**2


class Exact:
    """Normal data, whose flow is x_r = x_s · √(v(r) / v(s)): the network that knows it. It counts its calls."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def __call__(self, x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        self.told.append(times)
        s, r = (times.double() / 100).unbind(dim=1)
        direction = ((1 - s) * SPREAD**2 - s) / variance(s)
        span = (s - r).clamp_min(1e-9)
        mean = ((variance(r) / variance(s)).sqrt() - 1) / span
        return (x.double() * torch.where(s - r > 1e-6, mean, direction).view(-1, 1, 1)).to(x.dtype)


def flow_sampler(steps: int) -> Sampler:
    return Sampler(process=Flow(), scheduler="flow", num_inference_steps=steps, clip=None)


def pairs(objective: Objective, n: int = 4000) -> tuple[list[Pair], Exact]:
    network, generator = Exact(), torch.Generator().manual_seed(0)
    x0 = SPREAD * torch.randn(n, 2, 1, generator=generator, dtype=torch.float64)
    return list(objective.pairs(network, Flow(), x0, generator)), network


@pytest.mark.parametrize(
    "objective", [Shortcut(), Shortcut(finest=4, distilled=1.0), FlowMap(), FlowMap(distilled=1.0)]
)
def test_an_exact_flow_agrees_with_itself(objective: Shortcut | FlowMap) -> None:
    found, _ = pairs(objective)
    taught = found[-1]
    if isinstance(objective, Shortcut):  # halves of the shortest steps are the velocity itself, which is not exact
        error = (taught.output - taught.target).abs().amax(dim=(1, 2))
        exact = (error < 1e-6).double().mean()
        assert exact == pytest.approx(1 - 1 / objective.levels, abs=0.03)
    else:
        torch.testing.assert_close(taught.output, taught.target, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", [Shortcut(), FlowMap(), MeanFlow(), Consistency()])
def test_by_the_clean_chunk_the_same_is_taught(objective: Objective) -> None:
    """F = x + s u is another way to say u: errors of F are s times those of u."""
    network, drawn = Exact(), torch.Generator().manual_seed(1)
    x0 = SPREAD * torch.randn(2000, 2, 1, dtype=torch.float64, generator=drawn)

    def clean(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        both = torch.stack([times, times], dim=1) if times.ndim == 1 else times
        return x + both[:, 0].view(-1, 1, 1) / 100 * 1.1 * network(x, both, rows)

    def velocity(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        return 1.1 * network(x, torch.stack([times, times], dim=1) if times.ndim == 1 else times, rows)

    found = []
    for prediction, said in (("velocity", velocity), ("sample", clean)):
        taught = {"teacher": Teacher(said, flow_sampler(1))} if objective.taught else {}
        generator = torch.Generator().manual_seed(0)
        found.append(list(objective.pairs(said, Flow(prediction=prediction), x0, generator, **taught)))
    for by_velocity, by_sample in zip(*found, strict=True):
        error, scaled = (pair.output - pair.target for pair in (by_velocity, by_sample))
        share = (scaled / error).flatten(1)
        clear = error.abs().flatten(1).amin(dim=1) > 1e-2
        assert clear.any()
        torch.testing.assert_close(share[clear, 0], share[clear, 1], rtol=5e-3, atol=5e-3)
        assert ((share[clear] > 0) & (share[clear] < 1.001)).all()


@pytest.mark.parametrize("objective", [Shortcut(distilled=0.25), FlowMap(distilled=0.25), MeanFlow(distilled=0.25)])
def test_what_is_taught_by_data_and_by_itself(objective: Objective) -> None:
    """Both are right in the mean: no multiple of x would be nearer to the target than the exact flow."""
    found, network = pairs(objective, 40_000)
    assert [len(pair.output) for pair in found] == [30_000, 10_000]
    assert torch.equal(
        torch.cat([pair.rows for pair in found if pair.rows is not None]).sort().values, torch.arange(40_000)
    )
    assert (network.told[0][:, 0] == network.told[0][:, 1]).all()
    for pair in found:
        error, output = pair.target - pair.output, pair.output
        slope = (error * output).mean() / output.square().mean()
        assert abs(slope) < 0.02
    assert (network.told[-1][:, 0] > network.told[-1][:, 1]).all()


def test_steps_of_a_shortcut_are_powers_of_two_at_multiples_of_their_size() -> None:
    s, m, r, shortest = Shortcut(finest=8)._spans(2000, torch.Generator().manual_seed(0), torch.device("cpu"))
    size = s - r
    assert set(size.tolist()) == {1.0, 0.5, 0.25}
    assert torch.equal(m, s - size / 2)
    assert torch.equal(s / size, (s / size).round())
    assert (r >= 0).all()
    assert (s <= 1).all()
    assert torch.equal(shortest, size == 0.25)


def test_mean_flow_weighs_errors_by_their_size() -> None:
    found, _ = pairs(MeanFlow())
    taught = found[-1]
    assert taught.weight is not None
    error = (taught.output - taught.target).square().mean(dim=(1, 2))
    torch.testing.assert_close(taught.weight, 1 / (error + 1e-3))
    loss = MeanFlow().reduced([taught._replace(rows=None)], Flow(), None, len(error))
    assert loss == pytest.approx(float((error * taught.weight).mean()))


def test_a_loss_is_the_mean_over_all_that_counts() -> None:
    zeros, rows = torch.zeros(1, 4, 1), torch.arange(4)
    counts = torch.tensor([[True, True, False, False]]).repeat(4, 1)
    first, second = (
        Pair(zeros.repeat(2, 1, 1), torch.full((2, 4, 1), value), part)
        for value, part in ((1.0, rows[:2]), (3.0, rows[2:]))
    )
    assert Denoising().reduced([first, second], Flow(), counts, 4) == pytest.approx((1.0 + 9.0) / 2)
    assert Denoising(loss="l1").reduced([first, second], Flow(), None, 4) == pytest.approx((1.0 + 3.0) / 2)


def test_regression_from_nothing_and_from_nearly_all() -> None:
    process, generator = Mip(level=0.9), torch.Generator().manual_seed(0)
    times = process.draw_times(1000, generator=generator, device=torch.device("cpu"))
    x0, eps = torch.full((1000, 2, 1), 3.0), torch.full((1000, 2, 1), 1.0)
    x = process.add_noise(x0, eps, times)[:, 0, 0]
    nearly = times < 50
    assert 400 < int(nearly.sum()) < 600
    assert (x[~nearly] == 0).all()
    torch.testing.assert_close(x[nearly], torch.full_like(x[nearly], 0.9 * 3 + 0.1))
    assert sorted(set(times.tolist())) == pytest.approx([10.0, 100.0])
    sampler = Sampler(process=process, scheduler="mip", num_inference_steps=2, clip=None)
    seen = []

    def denoise(x: Tensor, step: object, rows: Tensor | None) -> Tensor:
        seen.append(x)
        return x + 1.0

    chunk, _ = sampler.run(denoise, torch.randn(1, 4, 2))
    torch.testing.assert_close(seen[0], torch.zeros(1, 4, 2))
    torch.testing.assert_close(seen[1], torch.full((1, 4, 2), 0.9))
    torch.testing.assert_close(chunk, torch.full((1, 4, 2), 1.9))
    assert sampler.times(torch.device("cpu")).tolist() == pytest.approx([100.0, 10.0])
    alone = Sampler(process=process, scheduler="mip", num_inference_steps=1, clip=None)
    torch.testing.assert_close(alone.run(denoise, torch.randn(1, 4, 2))[0], torch.ones(1, 4, 2))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_flow_map_needs_one_step(steps: int) -> None:
    sampler = Sampler(process=Flow(), scheduler="flow", num_inference_steps=steps, clip=None, two_times=True)
    times, network, noise = sampler.times(torch.device("cpu")), Exact(), torch.randn(5, 8, 2, dtype=torch.float64)
    assert times.shape == (steps, 2)
    assert times[0, 0] == 100
    assert times[-1, 1] == 0
    chunk, _ = sampler.run(lambda x, step, rows: network(x, times[step.index].expand(len(x), 2)), noise)
    torch.testing.assert_close(chunk, SPREAD * noise, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", ONE_STEP, ids=[*MAPS, "mip"])
def test_they_learn_are_saved_and_run_by_the_same_code(changes, tmp_path) -> None:
    buffer = demonstrations()
    policy = tiny_policy(buffer, **changes).train()
    state = torch.from_numpy(buffer["state"][:64]).view(32, 2, 5)
    action = torch.from_numpy(buffer["action"][:64]).view(8, 8, 2).repeat(4, 1, 1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    errors = []
    for step in range(100):
        loss = policy({"state": state}, action, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, 99):
            with torch.no_grad():
                sample = policy.sample({"state": state}, noise_generator=torch.Generator().manual_seed(0))
            errors.append(float((sample.normalized - policy.normalize_action(action, {"state": state})).abs().mean()))
    assert errors[1] < 0.8 * errors[0]
    policy.eval()
    bundles.save(tmp_path / "bundle", policy, {"policy": TINY | changes}, golden_obs={"state": buffer["state"][:2]})
    loaded = bundles.load(tmp_path / "bundle", verify=True)
    obs = {"state": buffer["state"][:2]}
    noise = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)[None]
    expected = policy.predict(obs, noise=noise)["action_pred"]
    np.testing.assert_allclose(loaded.predict(obs, noise=noise)["action_pred"], expected, atol=1e-4)
    accelerate(loaded, precision="fp32")
    np.testing.assert_allclose(loaded.predict(obs, noise=noise)["action_pred"], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("objective", "process"),
    [(objective, process) for objective in (Shortcut, FlowMap, MeanFlow) for process in (Diffusion(), Mip())],
)
def test_flow_maps_are_of_flows(objective: type[Shortcut], process: Diffusion) -> None:
    with pytest.raises(InputError, match=rf"{objective.__name__} needs a flow process.*use scheduler=flow"):
        objective().check(process)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shortcut(finest=3), "finest=3 must be a power of two"),
        (lambda: FlowMap(distilled=0.0), "distilled=0.0 must be above 0"),
        (lambda: MeanFlow(distilled=math.nan), "distilled=nan must be above 0"),
        (lambda: Mip(level=1.0), "level=1.0 must be between 0 and 1"),
        (lambda: Sampler(process=Mip(), scheduler="mip", num_inference_steps=3), "between 1 and 2"),
        (lambda: Sampler(process=Mip(), scheduler="ddim", num_inference_steps=2), "trained as mip: choose from mip"),
    ],
)
def test_what_cannot_be(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("objective", ["denoising", *MAPS, "mip"])
def test_an_objective_is_chosen_by_a_word(objective: str) -> None:
    policy = load("train", [f"objective={objective}"])["policy"]
    assert policy["objective"]["name"] == objective
    families = dict.fromkeys(MAPS, "flow") | {"denoising": "diffusion", "mip": "mip"}
    assert policy["process"]["name"] == families[objective]
    assert policy["sampler"]["num_inference_steps"] == {"denoising": 20, "mip": 2}.get(objective, 1)


@pytest.mark.parametrize("objective", [*MAPS, "mip"])
@pytest.mark.parametrize("scheduler", ["ddim", "flow", "mip"])
def test_an_objective_beside_a_scheduler_that_it_is_not_for(objective: str, scheduler: str) -> None:
    fitting = "mip" if objective == "mip" else "flow"
    words = [f"objective={objective}", f"scheduler={scheduler}"]
    if scheduler == fitting:
        assert load("train", words)["policy"]["objective"]["name"] == objective
    else:
        with pytest.raises(InputError, match=f"{objective} needs a {fitting} process .* use scheduler={fitting}"):
            load("train", words)


def test_a_bundle_from_before_objectives_had_names(policy) -> None:
    config = TINY | {"objective": {"loss": "l1", "noise_draws": 2}}
    made = build_policy(config, policy.spec)
    assert type(made.objective) is Denoising
    assert made.objective.noise_draws == 2


def test_a_teacher_that_is_right_and_a_network_that_is_agree() -> None:
    network, generator = Exact(), torch.Generator().manual_seed(0)
    x0 = SPREAD * torch.randn(2000, 2, 1, generator=generator, dtype=torch.float64)

    def teacher(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        return network(x, torch.stack([times, times], dim=1), rows)

    objective = Consistency(distilled=1.0, solver_steps=64)
    (taught,) = objective.pairs(network, Flow(), x0, generator, Teacher(teacher, flow_sampler(1)))
    torch.testing.assert_close(taught.output, taught.target, atol=2e-3, rtol=2e-3)


def test_times_of_a_consistency_policy_are_in_order_and_of_its_bins() -> None:
    s, m, r = 5 * torch.stack(Consistency(bins=5)._times(2000, torch.Generator().manual_seed(0), torch.device("cpu")))
    for times in (s, m, r):
        torch.testing.assert_close(times, times.round())
    assert ((s > r) & (s > m) & (m >= r)).all()
    assert (s.min(), s.max(), r.min(), r.max()) == (1, 5, 0, 4)


def test_a_step_is_taught_where_a_flow_takes_the_same_noise() -> None:
    """The flow of normal data takes z to SPREAD · z; from noise, s = 1, its velocity is then (SPREAD − 1) · z."""
    network, told = Exact(), []

    def teacher(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        return network(x, torch.stack([times, times], dim=1), rows)

    def student(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        told.append(times)
        return (SPREAD - 1) * x

    x0 = torch.zeros(500, 2, 1, dtype=torch.float64)
    (pair,) = Distillation().pairs(
        student, Flow(), x0, torch.Generator().manual_seed(0), Teacher(teacher, flow_sampler(400))
    )
    torch.testing.assert_close(pair.output, pair.target, atol=1e-2, rtol=0)
    assert pair.target.std() == pytest.approx(SPREAD, abs=0.03)
    assert (told[0] == 100).all()


def test_a_step_is_taught_what_two_regressions_say() -> None:
    """Told 100, the teacher says 2; told 10, one more than it sees: 0.9 · 2 + 1 in the end, whatever the noise."""
    process, seen = Mip(level=0.9), []

    def teacher(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        return torch.where((times == 100).view(-1, 1, 1), torch.full_like(x, 2.0), x + 1.0)

    def student(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        seen.append((x, times))
        return torch.full_like(x, 0.5)

    sampler = Sampler(process=process, scheduler="mip", num_inference_steps=2, clip=None)
    (pair,) = Distillation().pairs(student, process, torch.randn(4, 3, 2), None, Teacher(teacher, sampler))
    torch.testing.assert_close(pair.target, torch.full((4, 3, 2), 2.8))
    torch.testing.assert_close(pair.output, torch.full((4, 3, 2), 0.5))
    ((x, times),) = seen
    assert (x == 0).all()
    assert (times == 100).all()


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_what_is_taught_is_what_the_policy_does(prediction: str) -> None:
    """Of the same noise, the pair's output is the chunk that one step makes."""
    process = Diffusion(prediction=prediction)
    teacher, own = (
        Sampler(process=process, scheduler="ddim", num_inference_steps=n, clip=None, eta=0.0) for n in (5, 1)
    )
    Distillation().check_teacher(teacher, own)

    def student(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        return torch.sin(x) + times.view(-1, 1, 1) / 100

    (pair,) = Distillation().pairs(
        student, process, torch.zeros(4, 3, 2), torch.Generator().manual_seed(0), Teacher(student, teacher)
    )
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    chunk, _ = own.run(lambda x, step, rows: student(x, torch.full((4,), step.time)), noise)
    torch.testing.assert_close(pair.output, chunk)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"scheduler": "ddim", "num_inference_steps": 5, "eta": 1.0}, r"draws noise .*ddim.*eta=0"),
        ({"scheduler": "ddpm", "num_inference_steps": 5}, r"draws noise .*ddpm"),
        ({"scheduler": "ddim", "num_inference_steps": 16, "timestep_spacing": "leading"}, "begin alike"),
    ],
)
def test_a_teacher_whose_chunks_are_no_function_of_the_noise_is_refused(sampler, said) -> None:
    process, one = {"name": "diffusion", "prediction": "sample"}, {"scheduler": "ddim", "num_inference_steps": 1}
    student = flow_policy(process=process, sampler=one, objective={"name": "distillation"})
    with pytest.raises(InputError, match=said):
        student.learn_from(flow_policy(process=process, sampler=sampler))


def test_distillation_is_of_one_step() -> None:
    with pytest.raises(InputError, match="num_inference_steps=2 must be 1"):
        flow_policy(objective={"name": "distillation"})


def flow_policy(**changes):
    parts = {
        "process": {"name": "flow"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 2},
        "objective": {"name": "denoising"},
    }
    return tiny_policy(demonstrations(), **(parts | changes))


def test_a_teacher_is_neither_trained_nor_stored() -> None:
    teacher, student = flow_policy(), flow_policy(objective={"name": "consistency"})
    names = set(student.state_dict())
    student.learn_from(teacher)
    batch = {"state": torch.randn(16, 2, 5)}, torch.randn(16, 8, 2)
    student(*batch, generator=torch.Generator().manual_seed(0)).backward()
    assert set(student.state_dict()) == names
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad is not None for weight in student.denoiser.parameters())


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"process": {"name": "diffusion"}, "sampler": {"scheduler": "ddim", "num_inference_steps": 5}}, "a diffusion"),
        ({"objective": {"name": "shortcut"}}, "Shortcut"),
        ({"objective": {"name": "denoising", "max_delay": 2}}, "max_delay=2"),
        ({"normalizer": {"default": "gaussian"}}, "statistics"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(teacher, said) -> None:
    student = flow_policy(objective={"name": "consistency"})
    with pytest.raises(InputError, match=said):
        student.learn_from(flow_policy(**teacher))
    with pytest.raises(InputError, match="learns from no teacher"):
        flow_policy().learn_from(flow_policy())


@pytest.mark.parametrize("objective", ["consistency", "distillation"])
def test_without_its_teacher_a_policy_cannot_be_trained(objective) -> None:
    policy = flow_policy(objective={"name": objective}, sampler={"scheduler": "flow", "num_inference_steps": 1})
    with pytest.raises(InputError, match=r"policy\.objective\.teacher=DIR"):
        policy({"state": torch.randn(4, 2, 5)}, torch.randn(4, 8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["consistency", "distillation"])
def test_a_teacher_trains_a_policy_that_loads_without_it(objective, tmp_path) -> None:
    words = [
        "device=cpu",
        "train.max_steps=3",
        "train.batch_size=8",
        "train.validate_every=0",
        "train.tensorboard=false",
    ]
    words += ["evaluation.n_episodes=0", "dataset.max_episodes=4", "policy.denoiser.channels=[8,16]"]
    train(load("train", [*words, "scheduler=flow", f"output_dir={tmp_path}/a"]))
    teacher = f"policy.objective.teacher={tmp_path}/a/bundle"
    train(load("train", [*words, f"objective={objective}", "scheduler=flow", teacher, f"output_dir={tmp_path}/b"]))
    shutil.rmtree(tmp_path / "a")
    found = bundles.load(tmp_path / "b" / "bundle", verify=True)
    assert found.sampler.num_inference_steps == 1
    assert vars(found.objective)["teacher"] == f"{tmp_path}/a/bundle"
