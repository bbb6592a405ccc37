"""Plans through a maze, of three chunks, by a policy that knows pieces of a way only.

Training: pieces of 16 steps of random walks through the maze, each at one speed. A plan of 40 steps leads from a cell
to one at least 11 cells away; two chunks reach 10.8 at the highest speed.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch

from action_diffusion.policy.planning.composition import Plans, compose
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

MAZE = np.array(
    [
        [cell == "." for cell in row]
        for row in ("#########", "#...#...#", "#.#.#.#.#", "#.#...#.#", "#.#.###.#", "#.......#", "#########")
    ]
)
"""Where it is open; a cell is a unit wide, and its middle at whole numbers."""
STEPS, OVERLAP, CHUNKS = 16, 4, 3
SPEEDS = (0.2, 0.4)
"""Of demonstrations, cells a step."""
FAR = (11, 13)
"""Cells from start to goal."""
TASKS = 64

Cell = tuple[int, int]


def neighbours(cell: Cell) -> list[Cell]:
    around = [(cell[0] + down, cell[1] + right) for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    return [place for place in around if MAZE[place]]


def cells() -> list[Cell]:
    return [(int(row), int(column)) for row, column in np.argwhere(MAZE)]


def walk(rng: np.random.Generator, length: int) -> np.ndarray:
    """A way of at most so many cells that never turns back, [n, 2]."""
    everywhere = cells()
    way = [everywhere[rng.integers(len(everywhere))]]
    while len(way) < length and (onward := [cell for cell in neighbours(way[-1]) if cell not in way[-2:-1]]):
        way.append(onward[rng.integers(len(onward))])
    return np.array(way, float)


def pieces(n: int, rng: np.random.Generator) -> np.ndarray:
    """Demonstrations [n, STEPS, 2]: pieces of such ways, with rounded corners."""
    found: list[np.ndarray] = []
    while len(found) < n:
        way = walk(rng, 9)
        at = np.linspace(0, len(way) - 1, 10 * (len(way) - 1) + 1)
        fine = np.stack([np.interp(at, np.arange(len(way)), axis) for axis in way.T])
        fine = np.stack([np.convolve(np.pad(axis, 3, mode="edge"), np.full(7, 1 / 7), "valid") for axis in fine])
        gone = np.concatenate([[0.0], np.linalg.norm(np.diff(fine), axis=0).cumsum()])
        length = rng.uniform(*SPEEDS) * (STEPS - 1)
        if gone[-1] > length:
            along = rng.uniform(0, gone[-1] - length) + np.linspace(0, length, STEPS)
            found.append(np.stack([np.interp(along, gone, axis) for axis in fine], axis=1) + rng.normal(0, 0.04, 2))
    return np.array(found, np.float32)


def tasks(rng: np.random.Generator) -> np.ndarray:
    """Starts and goals [TASKS, 2, 2]."""
    found = []
    for start in cells():
        away, queue = {start: 0}, deque([start])
        while queue:
            cell = queue.popleft()
            for place in neighbours(cell):
                if place not in away:
                    away[place] = away[cell] + 1
                    queue.append(place)
        found += [(start, goal) for goal, distance in away.items() if FAR[0] <= distance <= FAR[1]]
    return np.array(found, float)[rng.integers(len(found), size=TASKS)]


def crossings(plan: np.ndarray) -> np.ndarray:
    """How many steps of each plan [N, L, 2] lead into a wall, [N]."""
    share = np.linspace(0, 1, 8)[:, None]
    way = plan[:, :-1, None] * (1 - share) + plan[:, 1:, None] * share
    row, column = np.clip(np.rint(way).astype(int), 0, np.array(MAZE.shape) - 1).transpose(3, 0, 1, 2)
    found: np.ndarray = (~MAZE[row, column].all(axis=-1)).sum(axis=1)
    return found


def measure(seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    demonstrations = pieces(20_000, rng)
    policy = trained(
        {"maze": np.zeros((len(demonstrations), 1, 1))}, demonstrations, steps=2500, seed=seed, batch_size=128
    )
    start, goal = torch.tensor(tasks(rng), dtype=torch.float32).unbind(dim=1)

    def plans(**options: Any) -> dict[str, float]:
        made: Plans = compose(
            policy,
            {"maze": torch.zeros(1, 1, 1)},
            start,
            goal,
            n_chunks=CHUNKS,
            overlap=OVERLAP,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        hits = crossings(made.action.numpy())
        return {"crossings": hits.mean(), "plans that cross": (hits > 0).mean(), "gap": float(made.gap.mean())}

    plain = {"rounds": 0, "restarts": ()}
    measured, baseline = plans(), plans(**plain, n_candidates=1)
    alike = {f"{name}, best of 4": value for name, value in plans(**plain).items()}
    passed = all(measured[name] <= baseline[name] / 2 for name in ("crossings", "gap"))
    return Measured(measured, baseline | alike, passed)


SYSTEM = System(
    name="composition",
    what="Plans through a maze of three chunks, refined by what the policy reconstructs, beside plain composition.",
    bar="wall crossings and gaps between chunks at most half of plain composition's",
    measure=measure,
)
