"""Small demonstrations with what real ones have: a hand that follows targets, an object, a camera, a rate."""

from __future__ import annotations

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

SIZE = 24


def demonstrations(n_episodes: int = 40, length: int = 70, seed: int = 0) -> ReplayBuffer:
    """state float32 [N, 3]: hand (x, y) and an angle in 0..2π. action [N, 2]: where the hand is to go. img uint8: hand.

    The hand is a damped spring at the end of the action, so that its next position follows from what is recorded.
    """
    random = np.random.default_rng(seed)
    states, actions, ends = [], [], []
    for _ in range(n_episodes):
        steps = length + int(random.integers(0, 20))
        hand, speed, angle = random.uniform(5, SIZE - 5, 2), np.zeros(2), random.uniform(0, 2 * np.pi)
        target, goal = hand.copy(), random.uniform(4, SIZE - 4, 2)
        for _ in range(steps):
            if random.random() < 0.1:
                goal = random.uniform(4, SIZE - 4, 2)
            target = target + 0.2 * (goal - target) + random.normal(0, 0.1, 2)
            speed = 0.6 * speed + 0.3 * (target - hand)
            states.append([*hand, angle % (2 * np.pi)])
            actions.append(target)
            hand, angle = hand + speed + random.normal(0, 0.002, 2), angle + random.normal(0.05, 0.05)
        ends.append(len(states))
    state = np.asarray(states, np.float32)
    arrays = {"state": state, "action": np.asarray(actions, np.float32), "img": pictures(state)}
    return ReplayBuffer.from_arrays(arrays, ends, {"control_rate": 10.0})


def pictures(state: np.ndarray) -> np.ndarray:
    """uint8 [N, SIZE, SIZE, 3]: a green stripe, and a blurred blue spot where the hand is."""
    y, x = np.mgrid[:SIZE, :SIZE]
    distance = (x - state[:, 0, None, None]) ** 2 + (y - state[:, 1, None, None]) ** 2
    spot = np.exp(-distance / (2 * 1.5**2))[..., None]
    image = np.full((len(state), SIZE, SIZE, 3), 230.0)
    image[:, :, 10:13] = (140, 230, 140)
    mixed: np.ndarray = image * (1 - spot) + spot * np.asarray([60.0, 90.0, 220.0])
    return mixed.astype(np.uint8)
