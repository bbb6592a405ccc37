"""What a run began with, kept with it, so that `output_dir=DIR resume=true` is all that resuming takes.

DIR/config.yaml     the whole resolved configuration, which later versions of the defaults do not change
DIR/command.json    the words that were typed, for a run that ended before it wrote the first
DIR/data.json       how much data there was, and its hash
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options.configuration import BUDGETS, GROUPS, from_hub, load, override
from action_diffusion.policy.reading import read_config, read_yaml

_OF_THE_MACHINE = ("num_processes", "host_timeout", "compile", "cuda_graph", "tensorboard", "wandb", "wandb_project")
"""Options of `train` that a bundle's training does not hand on."""


def configured(overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """The configuration of `train`. On resume=true it is the one that the run in output_dir began with, and over it
    what is given now; a run that wrote none is composed from its words and those given now. With init=BUNDLE and no
    parts (task=, denoiser=, …) given, it is the bundle's task, policy and training, and over them what is given.
    """
    given = dict(word.partition("=")[::2] for word in overrides)
    folder = Path(given.get("output_dir", "").strip("'\""))
    resumes = given.get("resume", "").lower() == "true" and "output_dir" in given
    if resumes and (folder / "config.yaml").is_file():
        return _began_with(folder, overrides)
    words, config_dir = _recall(folder, overrides, config_dir) if resumes else (list(overrides), config_dir)
    return _remember(composed(words, config_dir), words, config_dir)


def check_new(config: Mapping[str, Any]) -> None:
    """Raises `InputError` where output_dir holds a run that would be overwritten."""
    folder = config["output_dir"]
    if folder and not config["resume"] and (Path(folder) / "metrics.jsonl").exists():
        raise InputError(f"{folder} already holds a run: give resume=true to go on with it, or another output_dir")


def fingerprint(buffer: ReplayBuffer, keys: Iterable[str]) -> dict[str, Any]:
    """How much data there is, and its hash. keys: of the columns that are hashed, which need not be images."""
    digest = hashlib.sha256(np.ascontiguousarray(buffer.episode_ends, "<i8").tobytes())
    for key in sorted(set(keys)):
        digest.update(np.ascontiguousarray(buffer[key][:]).tobytes())
    return {"episodes": buffer.n_episodes, "steps": buffer.n_steps, "sha256": digest.hexdigest()}


def changed_data(folder: Path, buffer: ReplayBuffer, keys: Iterable[str]) -> str | None:
    """What is other in `buffer`, by its `fingerprint`, than when the run in `folder` began, in one line; None at its
    beginning."""
    now = fingerprint(buffer, keys)
    file = folder / "data.json"
    if not file.is_file():
        with atomic_path(file) as partial:
            partial.write_text(json.dumps(now, indent=1) + "\n")
    before = _read_json(file)
    if before == now:
        return None
    was, are = (f"{data.get('episodes')} episodes, {data.get('steps')} steps" for data in (before, now))
    return f"the data changed since this run began: {was}, now {are}; its normaliser statistics stay as they were"


def _began_with(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    file = folder / "config.yaml"
    stored = read_yaml(file)
    # What is in no older file has the value that it has by default; of parts, their own.
    defaults = {key: value for key, value in load("train", []).items() if key not in ("policy", "task", "train")}
    whole = {**defaults, **stored}
    for section in ("dataset", "evaluation"):
        if isinstance(whole[section], dict):
            whole[section] = {**defaults[section], **whole[section]}
    command = folder / "command.json"
    earlier = _words(command)[0] if command.is_file() else []
    words = [word for word in overrides if not (word in earlier and word.partition("=")[0] in GROUPS["train"])]
    return override("train", whole, words, str(file))


def composed(words: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """From the package's files, or what a bundle that is gone on from says."""
    given = dict(word.partition("=")[::2] for word in words)
    init = given.get("init", "null").strip("'\"")
    if init == "null" or given.keys() & set(GROUPS["train"]):
        return load("train", words, config_dir)
    path = Path(from_hub("train", {"init": init})["init"]).expanduser()
    words = [f"init='{path}'" if word.startswith("init=") else word for word in words]
    bundle = read_config(path)
    if not all(isinstance(bundle.get(section), dict) for section in ("task", "policy", "train")):
        return load("train", words, config_dir)  # one that was not trained here
    whole = load("train", [])
    for section in ("task", "policy"):
        whole[section] = bundle[section]
    whole["train"] = bundle["train"] | {name: whole["train"][name] for name in _OF_THE_MACHINE}
    whole |= {name: bundle[name] for name in ("data", "drop") if name in bundle}
    # Its weights are all there is to begin with: no other file that it names is read.
    for part, option in (("encoder", "weights"), ("objective", "teacher")):
        if isinstance(whole["policy"].get(part), dict) and option in whole["policy"][part]:
            whole["policy"][part] |= {option: None}
    return override("train", whole, words, str(path / "config.yaml"))


def _recall(folder: Path, overrides: Sequence[str], config_dir: str | None) -> tuple[list[str], str | None]:
    """The words that the run in `folder` was started with, then those given now."""
    file = folder / "command.json"
    if not file.exists():
        return list(overrides), config_dir
    words, before = _words(file)
    given = {word.partition("=")[0] for word in overrides}
    if given & set(BUDGETS):  # the budget given now replaces the earlier one
        words = [word for word in words if word.partition("=")[0] not in BUDGETS]
    return [word for word in words if word.partition("=")[0] not in given] + list(overrides), config_dir or before


def _words(file: Path) -> tuple[list[str], str | None]:
    earlier = _read_json(file)
    words, folder = earlier.get("overrides"), earlier.get("config_dir")
    if not isinstance(words, list) or not isinstance(folder, str | None):
        raise InputError(f"{file} cannot be read: give all options again, into another output_dir")
    return [str(word) for word in words], folder


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}): give all options again, into another output_dir") from None
    if not isinstance(data, dict):
        raise InputError(f"{file} cannot be read: give all options again, into another output_dir")
    return data


def _remember(config: dict[str, Any], overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Settle the output folder of a run, and write down what it was started with unless a run is there."""
    task = config["task"]["name"]
    if config["output_dir"] is None and "RANK" in os.environ:
        raise InputError("several processes that were started apart need output_dir=DIR: all the same")
    if config["output_dir"] is None and not config["resume"]:
        config = config | {"output_dir": f"outputs/{task}-{datetime.now():%Y%m%d-%H%M%S}"}
    if config["output_dir"] is not None and os.environ.get("RANK", "0") == "0":
        file = Path(config["output_dir"]) / "command.json"
        if not (file.parent / "metrics.jsonl").exists():  # an attempt that failed does not count
            file.parent.mkdir(parents=True, exist_ok=True)
            words = [word for word in overrides if word.partition("=")[0] not in ("output_dir", "resume")]
            with atomic_path(file) as partial:
                partial.write_text(json.dumps({"overrides": words, "config_dir": config_dir}, indent=1) + "\n")
    return config
