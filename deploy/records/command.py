"""`action-diffusion deploy replay=DIR`: what a recorded run commanded, and what it would have, on the same inputs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from action_diffusion import choice
from action_diffusion.deploy.loop.prediction import Guidance
from action_diffusion.deploy.records.reader import open_record
from action_diffusion.deploy.records.replay import Replayed, replay
from action_diffusion.deploy.serve.policies import DeployedPolicy, open_policy
from action_diffusion.errors import InputError, unknown
from action_diffusion.files import atomic_path
from action_diffusion.options import AnySampler, Deploy
from action_diffusion.policy.action_queue import ActionQueue
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

NAME = "replay.jsonl"
FASTER = ("precision", "compile", "cuda_graph")
OTHER = ("scheduling", "execution_horizon", "rtc", "sampler", "extensions", *FASTER)
"""What may be other than it was. Further options, of which the same holds: none."""
OPTIONS = ("replay", "bundle", "device", "output_dir", *OTHER)


def run(config: Deploy, given: Collection[str]) -> int:
    """Replay the record that `config` names; `given`: the names that were given on the command line.

    Returns 0, or 1 where nothing is other than it was, and commands differ all the same. Raises `InputError` for what
    is no record, for options without a meaning here, for a policy that does not fit, and for a folder that holds a
    replay.
    """
    sections = {name.partition(".")[0] for name in given}
    for name in sections:
        if name not in OPTIONS:
            raise unknown("option", name, OPTIONS, "deploy replay=…")
    if config.output_dir and (Path(config.output_dir) / NAME).exists():
        raise InputError(f"{config.output_dir} already holds a replay: give another output_dir")
    attrs, episodes = open_record(Path(config.replay or ""))
    was = {"extensions": [], **attrs["config"]}  # which older records do not keep
    now = asdict(config)
    settings = {name: now[name] if name in sections else was[name] for name in OTHER}
    for name in ("rtc", "sampler"):
        settings[name] = was[name] | {key: now[name][key] for key in now[name] if f"{name}.{key}" in given}
    other = any(settings[name] != was[name] for name in OTHER)
    policy = _policy(config, settings, attrs)
    queue = ActionQueue(
        settings["scheduling"],
        n_obs_steps=attrs["n_obs_steps"],
        execution_horizon=settings["execution_horizon"] or attrs["n_action_steps"],
    )
    guidance, replayed = Guidance(**settings["rtc"]), []
    for recorded in episodes:
        parts: dict[str, Any] = {"queue": queue, "guidance": guidance, "policy": policy, "other": other}
        replayed.append(replay(recorded, attrs=attrs, **parts))
    _print(replayed, other=other, own=policy is not None, was=was)
    if config.output_dir:
        _write(Path(config.output_dir), replayed)
    return int(not other and any(len(episode.differing) for episode in replayed))


def _policy(config: Deploy, settings: Mapping[str, Any], attrs: Mapping[str, Any]) -> DeployedPolicy | None:
    if config.bundle is None:
        return None
    if attrs["config"].get("threads"):
        torch.set_num_threads(attrs["config"]["threads"])
    choice.table().take(attrs["config"].get("ways") or {})
    kept = {name: settings[name] for name in ("extensions", *FASTER)}
    policy = open_policy(replace(config, sampler=AnySampler(**settings["sampler"]), **kept))
    if isinstance(policy, OnnxPolicy) and attrs["config"].get("threads"):
        policy.use(attrs["config"]["threads"])
    policy_keys, keys = list(policy.spec.observations), list(attrs["observations"])
    if policy_keys != keys or policy.spec.n_obs_steps != attrs["n_obs_steps"]:
        raise InputError(f"bundle={config.bundle} looks at {', '.join(policy_keys)}; the record has {', '.join(keys)}")
    return policy


def _print(replayed: list[Replayed], *, other: bool, own: bool, was: Mapping[str, Any]) -> None:
    source = "chunks of the policy" if own else "recorded chunks"
    table = Table("seed", "steps", "other commands", "from step", "largest distance", title=f"replayed with {source}")
    for episode in replayed:
        steps = episode.differing
        first = str(steps[0]) if len(steps) else "–"
        distance = f"{episode.distance:.4g}" if len(steps) else "–"
        table.add_row(str(episode.recorded.seed), str(len(episode.commands)), str(len(steps)), first, distance)
    Console().print(table)
    if not any(len(episode.differing) for episode in replayed):
        print("every command is the recorded one, bit for bit")
    elif other:
        print("with these settings other commands would have been sent, from what the robot saw then")
    else:
        print(f"other commands from the same inputs: {_reason(was) if own else 'this is another version'}")


def _reason(was: Mapping[str, Any]) -> str:
    """Why a policy may say something else than in the record, as far as the record knows."""
    then, now = was.get("machine") or {}, choice.machine()
    if was.get("server"):
        return "a server made the chunks, with kernels, threads and extensions that the record does not know"
    if not then:
        return "the record does not say on which machine and with which kernels its chunks were made"
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if changed:
        return f"another machine rounds in another way (other than then: {', '.join(changed)})"
    return "the machine is the same: another bundle or device?"


def _write(folder: Path, replayed: list[Replayed]) -> None:
    """replay.jsonl: a line a step, with what was commanded and what would have been; null where the robot held."""
    with atomic_path(folder / NAME) as temporary, temporary.open("w", encoding="utf-8") as file:
        for episode in replayed:
            for record, was in zip(episode.records, episode.before, strict=True):
                before = None if was[0] != was[0] else was.tolist()
                action = None if record.held else record.action
                row = {"seed": record.seed, "step": record.step, "action": action, "recorded": before}
                file.write(json.dumps(row | {"jump": record.jump, "delay": record.delay}) + "\n")
