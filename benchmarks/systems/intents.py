"""Two ways: a finger that goes round PushT's block, left or right, to a place behind it, and a policy told which.

A script shows either way as often from the same starts, in the simulator. The policy learns from all of it, and does
either. Then intents are found without labels, by what whole episodes do, and learnt as tokens of the same policy.
An episode follows an intent where the finger arrives and has gone round on that side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows, split_episodes
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.pusht.block import GRAVITY, BlockPose, rotated
from action_diffusion.envs.pusht.simulator import PushT
from action_diffusion.envs.rollout import generators
from action_diffusion.options.extensions import IntentsOptions as Options
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.intents import Intents, intents_of
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

AWAY, ROUND = 150.0, 125.0
"""From the block's centre (px): where the finger starts and arrives, and how far out it goes round."""
AHEAD, MOST_STEPS, ARRIVED = 35.0, 70, 25.0
DEMONSTRATIONS, HELD_OUT, EPISODES = 400, 40, 100
HORIZON, OBSERVED, EXECUTED = 16, 2, 8
STEPS, TOKEN_STEPS = 1200, 400
FOLLOWED = 0.95
SIDES = {"left": 1, "right": -1}
"""Of someone who looks from the start to the block (y points down): the sense of turning round the block."""


class Round:
    """One episode: a start of the block and the finger, and a place behind the block, of a seed.

    passed: the angle (rad) by which the finger has gone round the block.
    """

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._env = PushT(max_steps=MOST_STEPS)
        angle, centre, at = random.uniform(0, 2 * np.pi), random.uniform(180, 332, 2), random.uniform(0, 2 * np.pi)
        self._env.restore(np.array([*(centre + AWAY * _unit(at)), *(centre - rotated(GRAVITY, angle)), angle]))
        self.goal = centre + AWAY * _unit(at + np.pi + random.uniform(-0.4, 0.4))
        self.passed = 0.0
        self._look()

    def _look(self) -> None:
        self._state = self._env.observe(["state"])["state"].astype(np.float64)
        self.centre = BlockPose.of(self._state).centre
        self.finger = self._state[:2] - self.centre

    def observe(self) -> np.ndarray:
        """Where the finger and its goal are from the block's centre, that centre, and how the block is turned: [8]."""
        angle = self._state[4]
        return np.array([*self.finger, *(self.goal - self.centre), *self.centre, np.sin(angle), np.cos(angle)])

    def step(self, action: np.ndarray) -> None:
        """action: the target of the finger [2], from the block's centre (px)."""
        before = self.finger
        self._env.step(np.clip(self.centre + action, 0, 512))
        self._look()
        self.passed += _between(before, self.finger)

    @property
    def arrived(self) -> bool:
        return bool(np.linalg.norm(self.centre + self.finger - self.goal) < ARRIVED)

    @property
    def side(self) -> str:
        """On which it has gone round, as `SIDES` names it."""
        return "left" if self.passed > 0 else "right"


def shown(side: str, round_: Round) -> np.ndarray:
    """The script's action [2]: along a circle round the block on that side, then straight to the goal."""
    finger, goal = round_.finger, round_.goal - round_.centre
    left_over = (SIDES[side] * _between(finger, goal)) % (2 * np.pi)
    if left_over < 0.5 or left_over > 2 * np.pi - 0.5:
        way = goal - finger
        return finger + way * min(1.0, AHEAD / max(float(np.linalg.norm(way)), 1e-9))
    at = np.arctan2(finger[1], finger[0]) + SIDES[side] * AHEAD / ROUND
    return ROUND * _unit(at)


def demonstrations(seed: int) -> tuple[ReplayBuffer, list[str]]:
    """Episodes of the script, and the side of each."""
    random = np.random.default_rng(seed)
    state, action, ends, sides = [], [], [0], []
    for number in range(DEMONSTRATIONS):
        episode, side = Round(1000 * seed + number), str(random.choice(list(SIDES)))
        left = MOST_STEPS
        while left:
            state.append(episode.observe())
            action.append(shown(side, episode) + random.normal(0, 2, 2))
            episode.step(action[-1])
            left = min(left - 1, EXECUTED) if episode.arrived else left - 1  # it stays a little where it is to be
        ends.append(len(state))
        sides.append(side)
    columns = {"state": np.array(state, np.float32), "action": np.array(action, np.float32)}
    return ReplayBuffer.from_arrays(columns, np.array(ends[1:])), sides


def sources(buffer: ReplayBuffer, seed: int) -> tuple[BatchSource, BatchSource]:
    """Windows to learn from, and others."""
    sizes = {"horizon": HORIZON, "n_obs_steps": OBSERVED, "n_action_steps": EXECUTED}
    parts = split_episodes(buffer.n_episodes, HELD_OUT / buffer.n_episodes, seed)
    first, second = (make_windows(buffer.episode_ends, episodes=part, **sizes) for part in parts)
    source = BatchSource(
        buffer=buffer,
        windows=first,
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        n_obs_steps=OBSERVED,
    )
    return source, source.with_windows(second)


def episodes(policy: DiffusionPolicy, seeds: range) -> list[Round]:
    """As the policy ends them. Each draws its noise from its own seed."""
    rounds, drawing = [Round(seed) for seed in seeds], [generators(seed) for seed in seeds]
    before = [one.observe() for one in rounds]
    for _ in range(0, MOST_STEPS, EXECUTED):
        state = np.stack([np.stack([old, one.observe()]) for old, one in zip(before, rounds, strict=True)])
        made = policy.predict(
            {"state": state.astype(np.float32)},
            noise_generator=[noise for noise, _ in drawing],
            generator=[steps for _, steps in drawing],
        )
        for row, one in enumerate(rounds):
            for action in made["action"][row]:
                before[row] = one.observe()
                if not one.arrived:
                    one.step(action)
        if all(one.arrived for one in rounds):
            break
    return rounds


def measure(seed: int) -> Measured:
    buffer, sides = demonstrations(seed)
    train, held_out = sources(buffer, seed)
    every = train.gather(np.arange(len(train)))
    obs, chunks = {"state": every.obs["state"].numpy()}, every.action.numpy()
    policy = trained(obs, chunks, n_action_steps=EXECUTED, steps=STEPS, seed=seed, batch_size=128)
    seeds = range(500_000, 500_000 + EPISODES)
    alone = episodes(policy, seeds)

    options = vars(Options(bundle="", aligned=True, steps=TOKEN_STEPS, seed=seed))
    fitted = Intents.fit(policy, train, held_out, options)
    purity, names = called(train, held_out, sides, options)

    def told(**given: Any) -> list[Round]:
        policy.extensions = [Intents(policy, Fitted({**fitted.options, "names": names, **given}, fitted.arrays))]
        return episodes(policy, seeds)

    found = {f"{side} followed": followed(told(name=side), side) for side in SIDES}
    drawn = told(preference={"left": 0.8, "right": 0.2})
    again = told(preference={"left": 0.8, "right": 0.2})
    found |= {"purity": purity, "left where preferred at 0.8": float(np.mean([one.side == "left" for one in drawn]))}
    found["same side again"] = float(np.mean([a.side == b.side for a, b in zip(drawn, again, strict=True)]))
    baseline = {f"{side} followed": followed(alone, side) for side in SIDES}
    baseline["arrived"] = float(np.mean([one.arrived for one in alone]))
    baseline["purity of motion that is not aligned"] = called(train, held_out, sides, options | {"aligned": False})[0]
    passed = min(found["left followed"], found["right followed"]) >= FOLLOWED and purity >= FOLLOWED
    return Measured(found, baseline, passed and found["same side again"] == 1.0)


def called(
    train: BatchSource, held_out: BatchSource, sides: list[str], options: dict[str, Any]
) -> tuple[float, list[str]]:
    """Which share of the windows is of an episode of its intent's more frequent side, and that side of each intent."""
    found = intents_of(train, held_out, options)
    episode = np.searchsorted(train.buffer.episode_ends, train.windows.first, side="right")
    side = np.array(sides)[episode]
    counts = np.array(
        [[np.sum((found.train == way) & (side == name)) for name in SIDES] for way in range(len(found.names))]
    )
    return float(counts.max(axis=1).sum() / counts.sum()), [list(SIDES)[most] for most in counts.argmax(axis=1)]


def followed(rounds: list[Round], side: str) -> float:
    """The share that arrived, having gone round on this side."""
    return float(np.mean([one.arrived and one.side == side for one in rounds]))


def _unit(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def _between(a: np.ndarray, b: np.ndarray) -> float:
    """The angle from a to b, in (−pi, pi)."""
    return float(np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b))


SYSTEM = System(
    name="intents",
    what="a policy that goes round PushT's block on either side goes round on the one that is named (DIAL)",
    bar=f"either side is followed in {FOLLOWED} of {EPISODES} episodes, found without labels with that purity",
    measure=measure,
)
