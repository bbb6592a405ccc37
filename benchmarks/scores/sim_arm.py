"""An image policy, end to end on an arm in real time: recorded, trained, deployed, and beside `evaluate`.

    python -m benchmarks.scores.sim_arm [episodes=40] [minutes=25] [n_episodes=20] [task=lift_image] [scheduling=rtc]
                                 [steps=…] [max_steps=…] [sampling=…] [output_dir=sim_arm]

    record     the scripted expert drives `sim_arm` through `Robot` and two cameras      output_dir/demos.zarr
    train      on absolute poses, for so many minutes (or optimiser steps)               output_dir/train
    deploy     n_episodes starts in real time, with real-time chunking                   output_dir/deploy
    evaluate   the same starts, by the same simulator in step with the policy            output_dir/evaluate

What is there already is not made again, so that a recording and a training may be done when the machine has time for
them (n_episodes=0 ends after the training). sampling: denoising steps of a chunk. max_steps: of an episode.

The table, and output_dir/results.json, say how often each succeeds, how many deadlines `deploy` missed, how late its
chunks were, how long the simulator stood still where it should have moved, and what each process used of a core. Exit
code: 0, or that of what failed; 2 for bad input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from action_diffusion.cli import main as action_diffusion
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from benchmarks.command import command, options, positive, whole

DEFAULTS = {
    **{"episodes": "40", "minutes": "25", "n_episodes": "20", "seed": "100000", "output_dir": "sim_arm"},
    **{"task": "lift_image", "scheduling": "rtc", "steps": "", "max_steps": "", "sampling": ""},
}
_LOOK = 0.5


class Shares(threading.Thread):
    """What each process of a run uses of a core: this one, and its children by their names; looks twice a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._first: dict[str, tuple[float, float]] = {}
        self.found: dict[str, float] = {}

    def run(self) -> None:
        while not self._over.wait(_LOOK):
            now = float(Path("/proc/uptime").read_text().split()[0])
            for name, used in _processor_seconds(os.getpid()).items():
                began, before = self._first.setdefault(name, (now, used))
                if now > began:
                    self.found[name] = round((used - before) / (now - began), 3)

    def end(self) -> dict[str, float]:
        self._over.set()
        self.join()
        return self.found


def _processor_seconds(parent: int) -> dict[str, float]:
    """Of the process `parent` (called policy) and its children, by the third word that they were started with."""
    seconds, tick = {}, os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            numbers = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        own = int(folder.name) == parent
        if own or (int(numbers[1]) == parent and len(words) > 4):
            seconds["policy" if own else words[4].decode()] = (int(numbers[11]) + int(numbers[12])) / tick
    return seconds


def _done(words: Sequence[str]) -> None:
    """Run a command of `action-diffusion`. Raises `SystemExit` with its exit code where that is not 0."""
    print("$ action-diffusion", " ".join(words), flush=True)
    code = action_diffusion(words)
    if code:
        raise SystemExit(code)


def record(folder: Path, *, task: str, episodes: int) -> None:
    """demos.zarr, unless it is there."""
    data = folder / "demos.zarr"
    if not data.exists():
        _done(["collect", f"task={task}", "robot=sim_arm", "agent=expert", f"episodes={episodes}", f"output={data}"])


def train(folder: Path, *, task: str, budget: str, max_steps: str) -> None:
    """train/bundle, unless it is there; a training that was cut off goes on."""
    run = folder / "train"
    if not (run / "bundle").exists():
        words = [f"task={task}", f"data={folder / 'demos.zarr'}", f"output_dir={run}", "task.env.absolute=true"]
        resume = [f"resume={str((run / 'metrics.jsonl').exists()).lower()}"]
        words += [f"task.env.max_steps={max_steps or 'null'}", budget]
        _done(["train", *words, "evaluation.n_episodes=0", "train.rollout_every=0", *resume])


def deploy(folder: Path, *, scheduling: str, n_episodes: int, seed: int, sampling: Sequence[str]) -> dict[str, Any]:
    """Real time; what came of it."""
    shares = Shares()
    shares.start()
    words = [f"bundle={folder / 'train' / 'bundle'}", "robot=sim_arm", f"scheduling={scheduling}", "page=false"]
    words += [f"n_episodes={n_episodes}", f"seed={seed}", f"output_dir={folder / 'deploy'}"]
    _done(["deploy", *words, *sampling])
    used = shares.end()
    lines = (folder / "deploy" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rewards: dict[int, float] = {}
    for row in map(json.loads, lines):
        rewards[row["seed"]] = max(rewards.get(row["seed"], 0.0), row["reward"] or 0.0)
    latency = json.loads((folder / "deploy" / "latency.json").read_text(encoding="utf-8"))
    return {"scores": {str(seed): score for seed, score in rewards.items()}, "latency": latency, "cores": used}


def evaluate(folder: Path, *, n_episodes: int, seed: int, sampling: Sequence[str]) -> dict[str, Any]:
    """results.json of `evaluate`."""
    words = [f"bundle={folder / 'train' / 'bundle'}", f"n_episodes={n_episodes}", f"seed={seed}", "n_videos=0"]
    _done(["evaluate", *words, f"output_dir={folder / 'evaluate'}", *sampling])
    found: dict[str, Any] = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
    return found


def report(folder: Path, deployed: dict[str, Any], evaluated: dict[str, Any]) -> None:
    """The table, and results.json."""
    from action_diffusion.statistics import wilson_interval

    latency, scores = deployed["latency"], list(deployed["scores"].values())
    successes = sum(score >= 1 for score in scores)
    rate, interval = successes / len(scores), wilson_interval(successes, len(scores))
    table = Table("", "success", "95 %", title=f"{len(scores)} starts")
    for name, share, (low, high) in (
        ("deploy, real time", rate, interval),
        ("evaluate, in step", evaluated["success_rate"], evaluated["success_interval"]),
    ):
        table.add_row(name, f"{share:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(table)
    print(f"deadline misses: {latency['deadline_misses']} beside {latency['steps']} commands")
    print(f"holds: {latency['holds']}, interventions: {latency['interventions']}")
    print(f"inference (ms): {latency['inference_ms']}, delay (control steps): {latency['delay_steps']}")
    print(f"the simulator stood still for {latency['simulator_lost_s']:.2f} s where it should have moved")
    print("of a core: " + ", ".join(f"{name} {share:.2f}" for name, share in deployed["cores"].items()))
    summary = {"deploy": {"success_rate": rate, "success_interval": interval, **deployed}, "evaluate": evaluated}
    with atomic_path(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, DEFAULTS)
    folder, seed = Path(given["output_dir"]), whole("seed", given["seed"], least=0)
    n_episodes = whole("n_episodes", given["n_episodes"], least=0)
    budget = f"train.max_minutes={positive('minutes', given['minutes'])}"
    if given["steps"]:
        budget = f"train.max_steps={whole('steps', given['steps'])}"
    if given["max_steps"]:
        whole("max_steps", given["max_steps"])
    sampling = []
    if given["sampling"]:
        sampling = [f"sampler.num_inference_steps={whole('sampling', given['sampling'])}"]
    if (folder / "deploy").exists() and n_episodes:
        raise InputError(f"{folder / 'deploy'} is there already: move it away to deploy once more")
    try:
        record(folder, task=given["task"], episodes=whole("episodes", given["episodes"]))
        train(folder, task=given["task"], budget=budget, max_steps=given["max_steps"])
        if n_episodes:
            starts: dict[str, Any] = {"n_episodes": n_episodes, "seed": seed, "sampling": sampling}
            deployed = deploy(folder, scheduling=given["scheduling"], **starts)
            report(folder, deployed, evaluate(folder, **starts))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
