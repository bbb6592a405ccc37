"""Kill simulators' workers again and again while a policy is evaluated: the scores must be those of a quiet run.

    python -m benchmarks.robustness.workers bundle=DIR [n=200] [workers=4] [every=5] [n_envs=25] [seed=0]

Runs n episodes in one process, then in `workers` (a number of processes, or `ray` on this machine) of which one, at
random, gets SIGKILL every `every` seconds. Prints how long both took, and the kills. Exit code: 0, 1 where a score
differs in its last bit, 2 for bad input.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from action_diffusion import envs
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.policy.opening import load
from benchmarks.command import command, options, positive, whole
from benchmarks.robustness.kills import children


@contextmanager
def killing(every: float, seed: int = 0) -> Iterator[list[int]]:
    """SIGKILL to one of this process's workers every so many seconds; yields the list of those that got it."""
    random, killed, over = np.random.default_rng(seed), list[int](), threading.Event()

    def kill() -> None:
        while not over.wait(every):
            there = _workers(os.getpid())
            if there:
                pid = int(random.choice(there))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _workers(pid: int) -> list[int]:
    """Spawned processes of `pid`, and Ray actors below it, that are simulators' workers."""
    found = []
    for child in children(pid):
        with suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_text()
            if "raylet" in words.split("\0")[0]:
                found += _workers(child)
            elif words.startswith("ray::Worker") or "spawn_main" in words:
                found.append(child)
    return found


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"bundle": "", "n": "200", "workers": "4", "every": "5", "n_envs": "25", "seed": "0"})
    if not given["bundle"]:
        raise InputError("bundle=DIR: which policy?")
    policy = load(Path(given["bundle"]), "cpu", precision="fp32")
    if policy.spec.env is None:
        raise InputError(f"{given['bundle']}: its task has no simulator")
    workers: envs.Workers = "ray" if given["workers"] == "ray" else whole("workers", given["workers"])
    n, every = whole("n", given["n"]), positive("every", given["every"])
    lost: list[int] = []
    run = functools.partial(
        rollout,
        policy=policy,
        make_env=functools.partial(envs.make, **policy.spec.env),
        seeds=range(100_000, 100_000 + n),
        keys=list(policy.spec.observations),
        n_envs=whole("n_envs", given["n_envs"]),
        policy_batch=25,
        on_lost=lambda start, _: lost.append(start),
    )
    began = time.perf_counter()
    quiet = run()
    print(f"one process: {n} episodes in {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    with killing(every, whole("seed", given["seed"], least=0)) as killed:
        found = run(workers=workers)
    took = time.perf_counter() - began
    differ = [one.seed for one, other in zip(quiet, found, strict=True) if one.score != other.score]
    print(f"workers={workers}: {n} episodes in {took:.0f} s, {len(killed)} workers killed at {len(set(lost))} starts")
    print(f"scores that differ: {len(differ)}{f', of the starts {differ}' if differ else ''}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
