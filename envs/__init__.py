"""Simulators behind one protocol, scripted experts, vectorised rollouts and video.

A simulator is imported when it is first made, so that nobody pays for the ones that they do not use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from action_diffusion.envs.base import Env
from action_diffusion.envs.joined import JoinedObservations
from action_diffusion.envs.told import ToldEnv
from action_diffusion.envs.workers import Workers, count
from action_diffusion.policy.text.words import Words
from action_diffusion.registry import ENVS, check_arguments

ROBOSUITE = {"lift", "can", "square", "transport", "tool_hang"}
IN_PROCESSES = ROBOSUITE | {"gymnasium"}
"""Simulators whose steps take long enough to be worth a process each (`envs.workers`)."""


def spread(name: str, n_envs: int | None, workers: Workers, *, batch: int) -> tuple[int, Workers]:
    """How many simulators of `name` are held at once, and where: what was asked for, and else what is worth it.

    batch: rows of a policy call, which fewer simulators would leave empty; more where there are more workers. Without
    `workers`, those that are worth a process each get two a core: more would wait for each other, each with 0.4 GB.
    """
    if workers is not None:
        return n_envs or max(batch, count(workers)), workers
    if name not in IN_PROCESSES:
        return n_envs or batch, None
    n = min(n_envs or batch, 2 * (os.cpu_count() or 1))
    return n, n


def make(
    name: str, *, joined: Mapping[str, Sequence[str]] | None = None, words: Words | None = None, **settings: Any
) -> Env:
    """The simulator registered under `name`, built with `settings` (its constructor's keywords).

    joined: further observations, see `JoinedObservations`. words: of a policy that is told what to do, see `ToldEnv`.
    Raises `InputError` for a name that is not registered, and for settings that a simulator of somebody else's does
    not have.
    """
    part = ENVS.load(name)
    if name not in ENVS.own:
        check_arguments(part, settings, f"environment {name}")
    env = cast(Env, part(**settings))
    env = cast(Env, JoinedObservations(env, joined)) if joined else env
    return cast(Env, ToldEnv(env, words)) if words is not None and words.texts else env


__all__ = ["IN_PROCESSES", "ROBOSUITE", "Env", "Workers", "make", "spread"]
