"""Offline learning from reward: targets of a chain, the gradient of a value through a sampler, and runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from action_diffusion.cli import main
from action_diffusion.datasets.batches.loader import Critic
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.objectives.objective import Pair
from action_diffusion.policy.offline.critics import OfflineCritics
from action_diffusion.policy.offline.diffusion_ql import DiffusionQl
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

B = 16
SECTIONS: dict[str, Any] = {
    "encoder": {"name": "observation"},
    "denoiser": {"name": "dit", "width": 16, "layers": 1, "heads": 2},
    "process": {"name": "diffusion", "prediction": "sample"},
    "sampler": {"scheduler": "ddim", "num_inference_steps": 2},
    "normalizer": {"default": "minmax"},
}


def learner(**options: Any) -> tuple[DiffusionPolicy, DiffusionQl, Any]:
    """A policy of one state that executes two steps of four, and its critics."""
    unit = normalizer.fit(np.array([[-1.0], [1.0]]), "minmax")
    spec = PolicySpec(
        observations={"state": ObservationSpec((1,), "float32", "", "state", "state", None)},
        action=ActionSpec(shape=(1,), unit="", source="action"),
        n_obs_steps=1,
        horizon=4,
        n_action_steps=2,
        control_rate=10.0,
        task="test",
        normalizer={"state": unit, "action": unit},
    )
    torch.manual_seed(0)
    settings = {"name": "diffusion_ql", "hidden": [16], "octaves": 0, "warmup": 0, **options}
    policy = build_policy({**SECTIONS, "objective": settings}, spec).train()
    with torch.no_grad():
        for weight in policy.denoiser.parameters():  # some begin at 0
            weight += 0.1 * torch.randn_like(weight)
    policy.learn_from_rewards()
    assert isinstance(policy.objective, DiffusionQl)
    assert isinstance(policy.critics, OfflineCritics)
    return policy, policy.objective, policy.critics


def batch(**changes: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, Critic]:
    random = torch.Generator().manual_seed(1)
    obs = {"state": torch.rand(B, 1, 1, generator=random)}
    no = torch.zeros(B, dtype=torch.bool)
    made = {"reward": torch.rand(B, generator=random), "done": no, "truncated": no, "discount": torch.full((B,), 0.81)}
    return obs, torch.rand(B, 4, 1, generator=random), Critic(**{**made, "next_obs": obs, **changes})


class Sum(nn.Module):
    """Q = weight · the sum of what is executed."""

    def __init__(self, weight: float, members: int = 2) -> None:
        super().__init__()
        self.weight, self.members = nn.Parameter(torch.tensor(weight)), members

    def forward(self, condition: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return (self.weight * action.sum(dim=1)).expand(self.members, len(action))


class Always(nn.Module):
    """A critic of which each member says one number."""

    def __init__(self, *said: float) -> None:
        super().__init__()
        self.said = torch.tensor(said)

    def forward(self, condition: torch.Tensor, *action: torch.Tensor) -> torch.Tensor:
        return self.said.unsqueeze(1).expand(-1, len(condition))


def test_targets_of_a_chain() -> None:
    """r + γⁿ min Q'; r alone where the episode ended."""
    policy, objective, critics = learner()
    done = torch.arange(B) < 3
    _, _, outcome = batch(done=done)
    critics.target = Always(10.0, 4.0)
    with torch.no_grad():
        found = objective.target(policy, critics, outcome, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, outcome.reward + torch.where(done, 0.0, 0.81 * 4.0))


def test_what_breaks_off_teaches_the_critics_nothing() -> None:
    policy, _, critics = learner(eta=0.0, pessimism=0.0)
    cut = torch.arange(B) < 5
    obs, action, outcome = batch(truncated=cut)

    def gradient(given: Critic) -> list[torch.Tensor]:
        policy.zero_grad()
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        policy(obs, action, generator=torch.Generator().manual_seed(2), outcome=given).backward()
        policy.load_state_dict(before)
        return [weight.grad.clone() for weight in critics.value.parameters() if weight.grad is not None]

    usual = gradient(outcome)
    absurd = gradient(batch(truncated=cut, reward=torch.where(cut, 1e6, outcome.reward))[2])
    assert usual
    assert any(grad.abs().max() > 0 for grad in usual)
    torch.testing.assert_close(usual, absurd)


def test_the_policy_climbs_a_value_and_the_critics_do_not_see_it() -> None:
    """−η · mean Q / |mean Q|, and its gradient: that of the chunk's executed sum through the sampler's steps."""
    policy, objective, critics = learner(eta=3.0, pessimism=0.0)
    obs, action, outcome = batch()
    critics.value, critics.target = Sum(2.0), Always(0.0)
    critics.follow = lambda *_: critics.steps.add_(1)
    weights = list(policy.acting().values())
    loss = objective.further_loss(policy, obs, action, {"outcome": outcome}, torch.Generator().manual_seed(3))
    assert loss is not None
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    random = torch.Generator().manual_seed(3)
    torch.randn(action.shape, generator=random)  # of the target's chunk
    noise = torch.randn(action.shape, generator=random)
    made = policy.sample(obs, noise=noise, generator=random, grad=True).normalized[:, :2]
    worth = 2.0 * made.sum(dim=(1, 2))
    expected = torch.autograd.grad(-3.0 * worth.mean() / worth.detach().abs().mean(), weights, allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    tried = policy.normalize_action(action, obs)[:, :2].sum(dim=(1, 2))
    error = (2.0 * (2.0 * tried - outcome.reward) * tried).mean()  # of the critic's own loss, and of nothing else
    torch.testing.assert_close(torch.autograd.grad(loss, critics.value.weight)[0], error)


def test_a_step_up_the_value_s_gradient_makes_chunks_worth_more() -> None:
    """The sign: of a linear sampler's chunk, with the value as its first action."""
    policy, objective, critics = learner(eta=1.0, pessimism=0.0)
    obs, action, outcome = batch()
    critics.value, critics.follow = Sum(1.0), lambda *_: critics.steps.add_(1)
    critics.target = Always(0.0)

    def worth() -> float:
        noise = torch.randn(action.shape, generator=torch.Generator().manual_seed(5))
        return float(policy.sample(obs, noise=noise).normalized[:, :2].sum(dim=(1, 2)).mean())

    before, optimizer = worth(), torch.optim.SGD(list(policy.acting().values()), lr=0.05)
    for _ in range(5):
        loss = objective.further_loss(policy, obs, action, {"outcome": outcome}, torch.Generator().manual_seed(4))
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert worth() > before + 0.01


def test_what_is_unlike_the_recorded_is_told() -> None:
    """By a clone that knows one chunk only: it moves all others there."""
    policy, objective, _ = learner(quantile=0.9)
    recorded = 0.05 * torch.randn(64, 4, 1, generator=torch.Generator().manual_seed(0))

    def clone(x: torch.Tensor, times: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros_like(x)

    judged = torch.cat([torch.zeros(32, 4, 1), torch.full((32, 4, 1), 0.5)])
    found = objective.unlike(clone, policy, judged, recorded, torch.Generator().manual_seed(0))
    assert found.tolist() == [False] * 32 + [True] * 32


def test_good_chunks_are_imitated_more_by_their_advantage() -> None:
    """w ∝ exp(A / (temperature · sd A)) with 1 on average, where A = 1, 2, 3, 4."""
    policy, objective, critics = learner(temperature=2.0)
    critics.value, critics.usual = Sum(1.0), Always(10.0)
    x0 = (torch.tensor([11.0, 12.0, 13.0, 14.0]) / 2).view(4, 1, 1).expand(4, 4, 1)
    advantage = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = (advantage / (2.0 * 1.25**0.5)).exp()
    found = objective.weights(policy, torch.zeros(4, 1), x0)
    assert found is not None
    torch.testing.assert_close(found, expected / expected.mean())
    objective.temperature = 1e-3
    torch.testing.assert_close(objective.weights(policy, torch.zeros(4, 1), x0), torch.tensor([0.0, 0.0, 0.0, 4.0]))
    objective.warmup = 1
    assert objective.weights(policy, torch.zeros(4, 1), x0) is None
    objective.warmup = 0
    assert objective.weights(policy.eval(), torch.zeros(4, 1), x0) is None


def test_weights_say_how_much_an_example_counts() -> None:
    """Two examples with an error of 1 and 3: as a mean 2, and with all the weight on the second 3."""
    policy, objective, _ = learner()
    target = torch.zeros(2, 4, 1)
    pairs = [Pair(torch.tensor([1.0, 3.0]).view(2, 1, 1).expand(2, 4, 1), target)]
    objective.loss = "l1"
    assert float(objective.reduced(pairs, policy.process, None, 2)) == 2.0
    assert float(objective.reduced(pairs, policy.process, None, 2, torch.tensor([0.0, 2.0]))) == 3.0
    counts = torch.tensor([[True] * 4, [False] * 4])
    assert float(objective.reduced(pairs, policy.process, counts, 2, torch.tensor([1.5, 0.5]))) == 1.5


def test_what_chunks_are_worth_on_average_is_learnt() -> None:
    """V(s) of two chunks of one state, worth −1 and 3, is 1."""
    policy, objective, critics = learner(temperature=1.0, eta=0.0, pessimism=0.0, warmup=1000)
    critics.value, critics.target = Sum(1.0), Always(0.0)
    critics.usual = Always(1.0)
    obs, _, outcome = batch()
    chunk = torch.tensor([-0.5, 1.5]).repeat(8).view(B, 1, 1).expand(B, 4, 1)

    def error(said: float) -> float:
        critics.usual = Always(said)
        loss = objective.further_loss(policy, obs, chunk, {"outcome": outcome}, torch.Generator().manual_seed(0))
        assert loss is not None
        return float(loss.detach())

    critics.follow = lambda *_: None
    assert error(1.0) < min(error(0.9), error(1.1))
    assert error(3.0) - error(1.0) == pytest.approx(4.0, abs=1e-4)


def test_without_rewards_it_says_so() -> None:
    policy, _, _ = learner()
    obs, action, _ = batch()
    with pytest.raises(InputError, match="diffusion_ql learns from rewards, and none are given"):
        policy(obs, action)
    assert torch.isfinite(policy.eval()(obs, action))


# -- runs ---------------------------------------------------------------------------------------------------------

WORDS = [
    "train",
    "objective=diffusion_ql",
    "task=custom",
    "task.n_obs_steps=1",
    "task.horizon=4",
    "task.n_action_steps=2",
    "task.control_rate=10",
    "device=cpu",
    "denoiser=dit",
    "policy.denoiser.width=16",
    "policy.denoiser.layers=1",
    "policy.sampler.num_inference_steps=2",
    "policy.objective.hidden=[16]",
    "policy.objective.warmup=2",
    "train.batch_size=8",
    "train.checkpoint_every=3",
    "train.lr_schedule=constant",
    "train.validate_every=0",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "evaluation.n_episodes=0",
]


def recorded(path: Path, **columns: np.ndarray | None) -> Path:
    random = np.random.default_rng(0)
    rows = {
        "state": random.normal(size=(60, 2)).astype(np.float32),
        "action": random.normal(size=(60, 1)).astype(np.float32),
        "reward": np.where(np.arange(60) % 10 == 9, 1.0, 0.0).astype(np.float32),
        **columns,
    }
    buffer = ReplayBuffer.from_arrays({k: v for k, v in rows.items() if v is not None}, np.arange(10, 61, 10))
    buffer.save(path)
    return path


@pytest.mark.slow
def test_a_run_goes_on_bit_exactly_and_its_bundle_only_acts(tmp_path: Path) -> None:
    data = recorded(tmp_path / "data.zarr")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([*WORDS, f"data={data}", f"output_dir={straight}", "train.max_steps=6"]) == 0
    assert main([*WORDS, f"data={data}", f"output_dir={stopped}", "train.max_steps=3"]) == 0
    assert main(["train", f"output_dir={stopped}", "resume=true", f"data={data}", "train.max_steps=6"]) == 0
    for name in ("weights.safetensors", "optimizer.safetensors", "bundle/model.safetensors"):
        one, other = (load_file(run / "checkpoints" / "step_00000006" / name) for run in (straight, stopped))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    everything = load_file(straight / "checkpoints" / "step_00000006" / "weights.safetensors")
    acting = load_file(straight / "bundle" / "model.safetensors")
    assert {key for key in everything if not key.startswith("critics.")} == acting.keys()
    assert int(everything["critics.steps"]) == 6
    spec = json.loads((straight / "bundle" / "spec.json").read_text())
    assert spec["buffer_columns"]["reward"] == "rewards"


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        ({"reward": None}, [], "holds no rewards: add a column reward"),
        ({"reward": np.zeros((60, 2))}, [], "'reward' has [2] values a row, and a reward or an end is one number"),
        ({"reward": np.zeros(60)}, [], "'reward' counts -1 in every row (policy.objective.counted=success)"),
        ({}, ["policy.objective.reward=rewrad"], "did you mean reward"),
        ({}, ["policy.objective.terminal=done"], "key of the buffer for policy.objective.terminal"),
    ],
    ids=["no rewards", "several a row", "constant rewards", "another column", "no column of ends"],
)
def test_rewards_that_are_not_there_are_named(tmp_path, capsys, columns, words, message) -> None:
    data = recorded(tmp_path / "data.zarr", **columns)
    assert main([*WORDS, f"data={data}", f"output_dir={tmp_path / 'run'}", "train.max_steps=1", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said
