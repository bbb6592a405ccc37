"""Relative actions of robosuite's OSC_POSE as absolute ones: the goals that the controller set itself.

    states[t] ─▶ simulator ─▶ controller ◀─ action[t] (relative)
                                  │ goal: position, rotation in the world's frame
                                  ▼
                  absolute_action[t] = [x y z | 6D rotation | gripper]      of each arm, 10 values

A relative action means another goal from every state, so the recorded states say what was meant. The new column stands
beside the old ones, and is tried: absolute actions executed one after the other from an episode's first state should
end where the recording did. How far they stay from it on the way is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.robomimic.attributes import attributes, demo_names
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

COLUMN = "absolute_action"


def add_absolute(source: str | Path, output: str | Path) -> dict[str, Any]:
    """The buffer at `source` with a column `absolute_action` float32 [N, 10 per arm], written to `output`.

    Returns the numbers to report: how many episodes succeed when the absolute actions are replayed, how many the
    recording says succeed (None without rewards), and the drift of the hands on the way (m, mean and largest).

    Raises `InputError` for a buffer that does not say its simulator or has no states, actions that are not relative
    ones of OSC_POSE, and an output that exists.
    """
    buffer, output = ReplayBuffer.open(source), Path(output).expanduser()
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    env_args = buffer.attrs.get("env_args")
    if not isinstance(env_args, Mapping):
        raise InputError(f"{buffer.name} does not say what simulator it is from: it has no attrs['env_args']")
    for key in ("states", "action"):
        if key not in buffer:
            raise InputError(f"{buffer.name} has no column {key}, which absolute actions are made from")
    models = {place: values.get("model_file") for place, values in attributes(buffer)}
    names = [f"data/{name}" for name in demo_names(buffer)]
    relative, replays = _simulators(env_args)
    columns = {key: buffer[key][:] for key in buffer.keys}
    converted, drifts, successes = [], [], 0
    try:
        with progress("converting the actions", buffer.n_steps) as advance:
            for index, name in enumerate(names):
                episode = buffer.episode(index)
                actions = _convert(relative, episode["states"], episode["action"], models.get(name))
                drift, success = _replay(replays, episode["states"], actions, models.get(name))
                converted.append(actions)
                drifts.append(drift)
                successes += success
                advance(len(actions))
    finally:
        relative.close()
        replays.close()
    columns[COLUMN] = np.concatenate(converted).astype(np.float32)
    ReplayBuffer.from_arrays(columns, buffer.episode_ends, buffer.attrs).save(output)
    every = np.concatenate(drifts)
    return {
        "output": str(output),
        "episodes": buffer.n_episodes,
        "steps": buffer.n_steps,
        "recorded_successes": _recorded_successes(buffer),
        "replayed_successes": successes,
        "drift_mean_m": round(float(every.mean()), 6),
        "drift_largest_m": round(float(every.max()), 6),
    }


def _simulators(env_args: Mapping[str, Any]) -> tuple[Any, Any]:
    """The simulator with the recorded controllers, and the same told absolute poses."""
    from action_diffusion.envs.robosuite.tasks import Manipulation

    relative, absolute = (Manipulation(env_args=env_args, absolute=told, max_steps=10**9) for told in (False, True))
    return relative, absolute


def _convert(env: Any, states: np.ndarray, actions: np.ndarray, model: str | None) -> np.ndarray:
    """float64 [T, 10 per arm]."""
    if actions.shape[1:] != env.action_shape:
        raise InputError(
            f"actions have {actions.shape[1:]} values, the simulator's controllers take {env.action_shape}"
        )
    rows = []
    for step, (state, action) in enumerate(zip(states, actions, strict=True)):
        env.restore(state, model if step == 0 else None)
        rows.append(env.absolute_action(action))
    return np.stack(rows)


def _replay(env: Any, states: np.ndarray, actions: np.ndarray, model: str | None) -> tuple[np.ndarray, bool]:
    """Distances [T - 1] (m) of the hands from where they were recorded, the farther of two, and whether it succeeds."""
    recorded = []
    for step, state in enumerate(states):
        env.restore(state, model if step == 0 else None)
        recorded.append(_hands(env))
    env.restore(states[0])
    reached, success = [], False
    for action in actions:
        reward, _ = env.step(action)
        success = success or reward >= 1
        reached.append(_hands(env))
    offset = np.stack(recorded[1:]) - np.stack(reached[:-1])
    return np.linalg.norm(offset, axis=-1).max(axis=-1), success


def _hands(env: Any) -> np.ndarray:
    """Positions [arms, 3], m."""
    keys = [f"robot{index}_eef_pos" for index in range(env.n_robots)]
    return np.stack(list(env.observe(keys).values()))


def _recorded_successes(buffer: ReplayBuffer) -> int | None:
    if "reward" not in buffer:
        return None
    return sum(bool(np.max(episode["reward"]) >= 1) for episode in buffer.episodes())
