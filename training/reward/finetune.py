"""`action-diffusion finetune`: a policy is tried, learns from what came of it, and ends as a bundle like any other.

DIR/progress.jsonl    evaluations and losses by control steps, DIR/curves.png draws them
DIR/checkpoint/       what goes on with resume=true
DIR/bundle/           the best so far, by evaluations on starts that are not learnt from
DIR/evaluation/       at the end: of the bundle beside the one that it began with, on other starts again, paired

A bundle that nothing was better than stays as it was, with the sampler that it had.
"""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from action_diffusion import envs
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options import Evaluate
from action_diffusion.options.finetune import Finetune
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import read_config
from action_diffusion.policy.text.words import Words
from action_diffusion.progress import progress
from action_diffusion.registry import EXTENSIONS, METHODS
from action_diffusion.training.evaluation.command import run as evaluate
from action_diffusion.training.reward import checkpoint
from action_diffusion.training.reward.curves import draw
from action_diffusion.training.reward.experience import Experience, Reward
from action_diffusion.training.reward.method import Method
from action_diffusion.training.signals import Interrupted, stop_signals

console = Console(stderr=True, highlight=False, soft_wrap=True)
AT_ONCE, BATCH, BATCH_APART = 16, 25, 8
RECENT = 100
"""Trials whose success is shown."""
UNREWARDED = 200
"""Trials after which a reward that never changed is an error."""


def finetune(config: Finetune) -> dict[str, Any]:
    """Improve a bundle in its simulator; returns the comparison with what it began as, {} without one.

    Raises `InputError`, `FloatingPointError` where learning diverges (the best bundle stays), and `Interrupted` after
    saving on Ctrl-C.
    """
    source, folder = Path(config.bundle), _output_dir(config)
    torch.manual_seed(config.seed)
    sampler = _sampler(config, source)
    policy = bundles.load(source, str(config.device), precision="fp32", sampler=sampler, extensions=())
    if policy.spec.env is None:
        raise InputError(f"{source}: {policy.spec.task} has no simulator to try things in")
    options = {name: value for name, value in config.method.items() if name != "name"}
    method: Method = METHODS.load(config.method["name"])(policy, seed=config.seed, **options)
    run = FinetuneRun(config, policy, method, folder, sampler)
    run.learn()
    console.print(f"the best is in {folder / 'bundle'}: {run.words()}")
    if not config.evaluation.n_episodes:
        return {}
    _set_aside(folder / "evaluation")
    asked = Evaluate(bundle=str(folder / "bundle"), compare=str(source), output_dir=str(folder / "evaluation"))
    for name in ("n_episodes", "seed", "n_videos"):
        setattr(asked, name, getattr(config.evaluation, name))
    asked.device, asked.workers = config.device, config.workers
    asked.instruction, asked.text_model = config.instruction, config.text_model
    *_, (results, _) = evaluate(asked)
    return results


class FinetuneRun:
    """One run of `finetune`: its parts, and how far it is."""

    def __init__(
        self, config: Finetune, policy: DiffusionPolicy, method: Method, folder: Path, sampler: Mapping[str, Any]
    ) -> None:
        assert policy.spec.env is not None
        self.config, self.policy, self.method, self.folder, self.sampler = config, policy, method, folder, sampler
        self.env = policy.spec.env["name"]
        words = Words.of(policy.spec, config.instruction, config.text_model)
        self.make_env = functools.partial(envs.make, **policy.spec.env, words=words)
        self.keys = list(policy.spec.observations)
        self.steps, self.episodes, self.seconds, self.next_start = 0, 0, 0.0, config.trials.seed
        self.best: tuple[float, float] = (-1.0, -1.0)
        self.first: tuple[float, float] | None = None
        self.recent: deque[bool] = deque(maxlen=RECENT)
        self.numbers: dict[str, float] = {}
        self.log = folder / "progress.jsonl"
        if config.resume:
            self._resume()
        else:
            self.log.unlink(missing_ok=True)  # of a run that was ended before its first checkpoint

    def learn(self) -> None:
        """Until the budget is spent. Raises `Interrupted` after saving, on Ctrl-C."""
        config, budget = self.config, self.config.budget.env_steps
        trials = config.trials
        n_envs, workers = envs.spread(self.env, trials.n_envs or AT_ONCE, config.workers, batch=AT_ONCE)
        experience = Experience(
            make_env=self.make_env,
            spec=self.policy.spec,
            keys=self.keys,
            seeds=self._starts(),
            n_envs=n_envs,
            reward=Reward(trials.reward, trials.gamma),
            workers=workers,
            on_lost=_tell,
        )
        began = time.monotonic() - self.seconds
        rewards: set[float] = set()
        try:
            with stop_signals() as stopped, progress("control steps", budget) as advance:
                advance(self.steps)
                if self.first is None:
                    self.first = self._evaluate()
                    self._save()
                while self.steps < budget:
                    turn = experience.turn(self.method.act)
                    self.numbers = self.method.learn(turn.rows) or self.numbers
                    before, self.steps = self.steps, self.steps + turn.steps
                    self.episodes += len(turn.episodes)
                    self.recent.extend(episode.score >= 1.0 for episode in turn.episodes)
                    if len(rewards) < 2:
                        rewards |= {float(value) for episode in turn.episodes for value in episode.rewards}
                        self._check(rewards)
                    advance(min(turn.steps, budget - before))
                    self.seconds = time.monotonic() - began
                    done = self.steps >= budget
                    if done or _passed(before, self.steps, config.watch.every):
                        self._evaluate()
                    if done or stopped() or _passed(before, self.steps, config.checkpoint_every):
                        self._save()
                    if stopped() and not done:
                        raise Interrupted(self.steps)
        finally:
            experience.close()

    def _starts(self) -> Iterator[int]:
        """From `trials.seed` on, none twice, and none that anything is evaluated on."""
        config = self.config
        apart = [(part.seed, part.seed + part.n_episodes) for part in (config.watch, config.evaluation)]
        while True:
            self.next_start += 1
            if not any(first < self.next_start <= end for first, end in apart):
                yield self.next_start - 1

    def _check(self, rewards: set[float]) -> None:
        if self.episodes >= UNREWARDED and len(rewards) < 2:
            raise InputError(
                f"{self.episodes} trials earned the reward {rewards.pop():g} at every step: there is nothing to learn "
                "from; begin with a policy that reaches the goal now and then, or take trials.reward=dense"
            )

    def _evaluate(self) -> tuple[float, float]:
        """On starts apart from those that are learnt from; the best is kept as DIR/bundle. At first: of what it began
        with, as that is."""
        watch, source, policy = self.config.watch, Path(self.config.bundle), self.policy
        changes: dict[str, Any] = {}
        if self.steps:
            fitted = self.method.fitted()
            policy.extensions = [EXTENSIONS.load(name)(policy, one) for name, one in fitted.items()]
            weights = policy.state_dict() if self.method.trains_policy else None
            changes = {"sampler": self.sampler, "fitted": fitted, "weights": weights}
        else:
            policy = bundles.load(source, self.policy.device, precision="fp32")
        batch = BATCH_APART if self.env in envs.IN_PROCESSES else BATCH
        n_envs, workers = envs.spread(self.env, None, self.config.workers, batch=batch)
        try:
            episodes = rollout(
                policy=policy,
                make_env=self.make_env,
                seeds=list(range(watch.seed, watch.seed + watch.n_episodes)),
                keys=self.keys,
                n_envs=n_envs,
                policy_batch=batch,
                workers=workers,
                on_lost=_tell,
            )
        finally:
            self.policy.extensions = []
        scores = np.array([episode.score for episode in episodes])
        found = float((scores >= 1.0).mean()), float(scores.mean())
        if found > self.best:
            self.best = found
            bundles.derive(source, self.folder / "bundle", **changes)
        self._log(success=found[0], score=found[1])
        return found

    def _log(self, **found: float) -> None:
        tried = {"tried": float(np.mean(self.recent))} if self.recent else {}
        row = {"env_steps": self.steps, "minutes": round(self.seconds / 60, 3), **found, **tried, **self.numbers}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        draw(self.log, self.folder / "curves.png")
        console.print(f"{self.steps:>9,} steps: success {found['success']:.2f}, score {found['score']:.3f}")

    def words(self) -> str:
        """How the best is beside what it began as."""
        assert self.first is not None
        return (
            f"success {self.best[0]:.2f} on {self.config.watch.n_episodes} starts from {self.config.watch.seed}, "
            f"{self.first[0]:.2f} before"
        )

    def _save(self) -> None:
        state = {
            "steps": self.steps,
            "episodes": self.episodes,
            "seconds": self.seconds,
            "next_start": self.next_start,
            "best": list(self.best),
            "first": list(self.first or ()),
        }
        checkpoint.save(self.folder / "checkpoint", self.method, state)

    def _resume(self) -> None:
        state = checkpoint.load(self.folder / "checkpoint", self.method)
        self.steps, self.episodes, self.seconds = int(state["steps"]), int(state["episodes"]), float(state["seconds"])
        self.best, self.first, self.next_start = tuple(state["best"]), tuple(state["first"]), int(state["next_start"])
        self.log.touch()  # what came after the checkpoint comes again; a kill may have cut the last line
        known = [line for line in self.log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in known if json.loads(line)["env_steps"] <= self.steps]
        with atomic_path(self.log) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))
        console.print(f"going on from {self.steps:,} steps")


def _tell(start: int, reason: str) -> None:
    console.print(f"start {start}: {reason}; it begins again")


def _set_aside(evaluation: Path) -> None:
    """Of a run that went on, the evaluation of what it was before."""
    if evaluation.exists():
        evaluation.rename(evaluation.with_name(f"{evaluation.name}-before-{datetime.now():%Y%m%d-%H%M%S}"))


def _passed(before: int, now: int, every: int) -> bool:
    return before // every < now // every


def _sampler(config: Finetune, source: Path) -> dict[str, Any]:
    """What replaces values of the bundle's sampler: for a method that needs it, one that draws nothing in its steps."""
    given = {name: value for name, value in vars(config.sampler).items() if value is not None}
    own = read_config(source)["policy"]["sampler"]
    scheduler = given.get("scheduler", own["scheduler"])
    if METHODS.load(config.method["name"]).deterministic and scheduler in ("ddpm", "ddim"):
        given = {"scheduler": "ddim", **given, "eta": given.get("eta", 0.0)}
        if scheduler == "ddpm" or own.get("eta"):
            console.print(f"the sampler is ddim with eta={given['eta']:g}, so that noise alone says what a chunk is")
    return given


def _output_dir(config: Finetune) -> Path:
    """The run's folder; an existing run there is never overwritten."""
    name = f"finetune-{config.method['name']}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.output_dir) if config.output_dir else Path(config.bundle).parent / name
    config.output_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "finetune.json") as partial:
        partial.write_text(json.dumps(asdict(config), indent=1, default=str))
    return folder
