"""The one evaluation: how well a policy does, how far that number can be trusted, and what it looked like.

With a simulator it is rollouts from fixed starts, the same at the end of training and by itself. Without one
it is the error of sampled chunks on episodes that were not trained on, and no success rate is made up.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress, TaskID

from action_diffusion import envs
from action_diffusion.envs.base import Env
from action_diffusion.envs.rollout import Episode, Policy, replay, rollout
from action_diffusion.envs.video import write_video
from action_diffusion.envs.workers import Workers
from action_diffusion.errors import InputError
from action_diffusion.policy.reading import versions
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.text.words import Words
from action_diffusion.statistics import bootstrap_interval, wilson_interval
from action_diffusion.training.evaluation.offline import evaluate_offline
from action_diffusion.training.evaluation.report import Clip, read_metrics, write_report
from action_diffusion.training.evaluation.results import (
    compare,
    plain,
    ranks,
    read_results,
    showing,
    summarise_seeds,
    write_results,
)

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy

SCORE_DEFINITION = "The score of an episode is its maximum reward, in [0, 1]; success is a score that reaches 1."

VIDEO_RATE = 10.0  # pictures per second, or fewer where the control rate is lower: drawing takes most of the time
BATCH, BATCH_APART = 25, 8
"""Rows of a policy call where the configuration does not say: few where the simulators, not the policy, take long."""


def evaluate_policy(
    policy: DiffusionPolicy | OnnxPolicy,
    *,
    settings: Mapping[str, Any],
    output_dir: Path,
    metrics_file: Path | None,
    instruction: str | None = None,
    text_model: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate` of a policy in the simulator that its bundle names; `options`: n_episodes, seed, n_envs,
    workers, …

    instruction, text_model: of a policy that is told in words what to do, see `Words`.
    """
    env = policy.spec.env
    if env is None:
        raise InputError(f"{policy.spec.task} has no simulator to evaluate in")
    words = Words.of(policy.spec, instruction, text_model)
    settings = {**settings, "instruction": instruction or words.only} if words.texts else settings
    apart = env["name"] in envs.IN_PROCESSES
    if options["policy_batch"] is None:
        options["policy_batch"] = BATCH_APART if apart else BATCH
    options["n_envs"], options["workers"] = envs.spread(
        env["name"], options["n_envs"], options["workers"], batch=options["policy_batch"]
    )
    return evaluate(
        policy=policy,
        env_name=policy.spec.task,
        env=env,
        make_env=functools.partial(envs.make, **env, words=words),
        demonstrations=policy.spec.demonstrations,
        keys=list(policy.spec.observations),
        settings=settings,
        output_dir=output_dir,
        metrics_file=metrics_file,
        **options,
    )


def evaluate(
    *,
    policy: Policy,
    env_name: str,
    env: Mapping[str, Any] | None = None,
    make_env: Callable[[], Env],
    keys: Sequence[str],
    n_episodes: int = 50,
    seed: int = 100_000,
    n_envs: int = 10,
    policy_batch: int = 10,
    workers: Workers = None,
    demonstrations: str = "",
    n_videos: int = 4,
    output_dir: str | Path,
    settings: Mapping[str, Any],
    metrics_file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Roll the policy out from `n_episodes` starts, the seeds from `seed` upward, and write what came of it.

    Writes into `output_dir`: results.json (what is returned), report.html, and videos/seed_<seed>.mp4 of the best, the
    worst and some episodes between. Scores depend neither on `n_envs` nor on `workers` (see
    `envs.rollout`).

    Args:
        env_name: what results.json calls the task. env: the simulator's name and settings, for it.
        keys: the observations that the policy wants. demonstrations: what it learnt from, for the report.
        workers: see `rollout`; a simulator that is lost is reported with its seed, and started again.
        settings: plain data for the report and results.json; the arguments here that shape scores are added.
        metrics_file: a `metrics.jsonl`, for learning curves. progress: takes the bars; None: one is shown on stderr.

    Raises:
        InputError: for bad numbers, settings that are not plain data, unreadable metrics, actions that are NaN or do
            not fit the simulator (naming the seed), or a disk that does not take the files.
    """
    folder, sizes = Path(output_dir), {"n_envs": n_envs, "policy_batch": policy_batch}
    _check_counts(n_episodes=(n_episodes, 1), n_videos=(n_videos, 0))
    steps = {"n_obs_steps": policy.spec.n_obs_steps, "n_action_steps": policy.spec.n_action_steps}
    settings = plain({**settings, **steps, "seed": seed, **sizes})
    metrics = read_metrics(Path(metrics_file)) if metrics_file is not None else []
    seeds, began = list(range(seed, seed + n_episodes)), time.perf_counter()
    failures: list[dict[str, Any]] = []
    with showing(progress) as bars:
        episodes = rollout(
            policy=policy,
            make_env=make_env,
            seeds=seeds,
            keys=keys,
            workers=workers,
            progress=_score_so_far(bars, n_episodes),
            on_lost=_note(failures),
            **sizes,
        )
        about = {"task": env_name, "env": None if env is None else dict(env), "demonstrations": demonstrations}
        found = _summary([episode.score for episode in episodes]) | {"seeds": seeds, "simulator_failures": failures}
        made = {"settings": settings, "versions": versions(), "seconds": time.perf_counter() - began}
        results = about | found | made | {"score_definition": SCORE_DEFINITION}
        write_results(folder / "results.json", results)
        clips = _film(make_env, _choose(episodes, n_videos), folder / "videos", bars)
    write_report(folder / "report.html", results=results, metrics=metrics, clips=clips)
    return results


def _check_counts(**counts: tuple[int, int]) -> None:
    """counts: each value, and the least that it may be."""
    for name, (value, least) in counts.items():
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")


def _note(failures: list[dict[str, Any]]) -> Callable[[int, str], None]:
    """What says that a simulator was lost, now and in the results."""

    def on_lost(seed: int, reason: str) -> None:
        failures.append({"seed": seed, "reason": reason})
        warnings.warn(f"seed {seed}: {reason}; the simulator is started again", stacklevel=2)

    return on_lost


def _score_so_far(bars: Progress, n_episodes: int) -> Callable[[float, Sequence[float]], None]:
    task = bars.add_task(f"evaluate 0/{n_episodes}", total=1.0)

    def update(share: float, scores: Sequence[float]) -> None:
        mean = f", mean score {np.mean(scores):.3f}" if scores else ""
        bars.update(task, completed=share, description=f"evaluate {len(scores)}/{n_episodes}{mean}")

    return update


def _summary(scores: Sequence[float]) -> dict[str, Any]:
    successes = sum(score >= 1 for score in scores)
    return {
        "n_episodes": len(scores),
        "mean_score": float(np.mean(scores)),
        "success_rate": successes / len(scores),
        "success_interval": list(wilson_interval(successes, len(scores))),
        "mean_interval": list(bootstrap_interval(scores)),
        "scores": list(scores),
    }


def _choose(episodes: Sequence[Episode], count: int) -> list[tuple[str, Episode]]:
    ranked = sorted(
        (episode for episode in episodes if episode.n_steps), key=lambda episode: episode.score, reverse=True
    )
    return [(label, ranked[rank]) for label, rank in ranks(len(ranked), count, first="Best", last="Worst")]


def _film(
    make_env: Callable[[], Env], chosen: Sequence[tuple[str, Episode]], folder: Path, bars: Progress
) -> list[Clip]:
    """Videos of episodes, from their recorded actions; those of an earlier evaluation are removed."""
    for old in folder.glob("seed_*.mp4"):
        old.unlink()
    clips: list[Clip] = []
    if not chosen:
        return clips
    env = make_env()
    every = max(1, round(env.control_rate / VIDEO_RATE))
    task = bars.add_task("videos", total=sum(episode.n_steps // every + 1 for _, episode in chosen))
    try:
        for label, episode in chosen:
            path, last = folder / f"seed_{episode.seed}.mp4", deque[np.ndarray](maxlen=1)
            frames = _counted(replay(env=env, episode=episode, every=every), bars, task, last)
            try:
                write_video(path, frames, fps=env.control_rate / every)
            except RuntimeError as error:  # a simulator that does not repeat itself: no video beats a wrong one
                warnings.warn(f"no video of seed {episode.seed}: {error}", stacklevel=2)
                continue
            clips.append(Clip(label, episode.seed, episode.score, path, last[0]))
    finally:
        env.close()
    return clips


def _counted(
    frames: Iterable[np.ndarray], bars: Progress, task: TaskID, last: deque[np.ndarray]
) -> Iterator[np.ndarray]:
    for frame in frames:
        last.append(frame)
        yield frame
        bars.advance(task)


__all__ = ["compare", "evaluate", "evaluate_offline", "evaluate_policy", "read_results", "summarise_seeds"]
