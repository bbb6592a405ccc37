"""Kill or halt what an arm depends on, at random moments, and measure when its controlled stop begins.

    python -m benchmarks.robustness.kills [n=100] [bundle=DIR] [seed=0]

Each time a loop runs PushT in real time: a scripted one with a camera, or, with `bundle`, `action-diffusion deploy`.
At a random moment the loop, or its camera, gets SIGKILL (it dies) or SIGSTOP (it hangs), in turn; with `bundle` also
the recorder, the operator's page and the policy server, which must not stop the arm within a second (it holds where
chunks are missing), and the record must open after all of them. Exit code: 0, 1 where a stop began later than 100 ms
after that, where the arm stopped before it or for nothing, or where a record does not open, 2 for bad input.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.arm.link import OVER
from action_diffusion.deploy.ipc.channels import text
from action_diffusion.deploy.ipc.rings import Record, RingReader, shared_folder
from action_diffusion.deploy.records.stream import RECORD
from action_diffusion.errors import InputError
from benchmarks.command import command, options, whole

WITHIN = 0.1
MODULES = {"camera": "cameras.process", "recorder": "records.recorder", "page": "page.process"}
HARMLESS = ("recorder", "page", "server")
"""Whoever else has these dies or hangs, and nothing happens: seconds are then 0."""
SIGNALS = {"kill": signal.SIGKILL, "halt": signal.SIGSTOP}


@dataclass(frozen=True)
class Kill:
    """Who got what, the seconds until the stop began (None: it did not), and the reason that the arm's process gave."""

    who: str
    what: str
    seconds: float | None
    why: str

    @property
    def good(self) -> bool:
        return self.seconds is not None and 0 <= self.seconds <= WITHIN


def drive() -> None:
    """The scripted loop: seeded targets at 10 Hz and a picture each, for ever. It runs in a process of its own."""
    from action_diffusion.deploy.loop.clock import MonotonicClock, Pacer
    from action_diffusion.deploy.robot.robots import RobotTask, make
    from action_diffusion.options import configuration

    task = RobotTask(env={"name": "pusht"}, cameras=("image",))
    robot = make("sim_pusht", task, configuration.settings("deploy", []))
    random, clock = np.random.default_rng(0), MonotonicClock()
    robot.begin(100000)
    pacer = Pacer(clock=clock, rate=robot.control_rate)
    target = robot.observe(["agent_pos"], clock.now()).values["agent_pos"].astype(np.float64)
    while True:
        tick, _ = pacer.wait()
        robot.observe(["agent_pos", "image"], tick)
        target = np.clip(target + random.uniform(-60, 60, 2), 50, 460)
        robot.command([target], tick)


def trial(who: str, what: str, *, wait: float, bundle: str | None = None) -> Kill:
    """Start a loop, let it run for `wait` seconds, do `what` ("kill", "halt") to `who`.

    who: "loop", one of `MODULES`, or "server", which then computes the chunks.
    """
    with ExitStack() as stack:
        server = stack.enter_context(_server(bundle)) if who == "server" and bundle else None
        loop, output = stack.enter_context(_loop(bundle, server.url if server else None))
        folder = _folder(loop)
        events, setpoints = RingReader(folder / "events"), RingReader(folder / "setpoints")
        _until(lambda: (record := setpoints.latest()) is not None and record.values["phase"] == 1, 60)
        if bundle:  # before the first commit there is nothing to open
            _until((output / RECORD / "meta" / "episode_ends" / "c").exists, 10)
        time.sleep(wait)
        before = events.last(10)
        if before:
            return Kill(who, what, None, f"before anything was done: {text(before[0].values['why'])}")
        pid = server.pid if server else loop.pid if who == "loop" else child_of(loop.pid, MODULES[who])
        moment = time.monotonic()
        os.kill(pid, SIGNALS[what])
        try:
            _until(lambda: bool(_stops(events)), 1 if who in HARMLESS else 2)
            seconds, why = _result(who, moment, _stops(events))
            unopened = _unopened(output) if bundle else None
            return Kill(who, what, seconds if unopened is None else None, unopened or why)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # one that is halted would outlive its parent


def _result(who: str, moment: float, stops: Sequence[Record]) -> tuple[float | None, str]:
    """`Trial.seconds` and `Trial.why`."""
    if not stops:
        return (0.0 if who in HARMLESS else None), "the arm went on"
    why = text(stops[0].values["why"])
    return (None, f"the arm stopped: {why}") if who in HARMLESS else (stops[0].t - moment, why)


def _stops(events: RingReader) -> list[Record]:
    """What stopped the arm, but for ends of episodes."""
    said = [event for event in events.last(10) if text(event.values["kind"]) == "stop"]
    return [event for event in said if text(event.values["why"]) != OVER]


def _unopened(output: Path) -> str | None:
    """Why the record does not open, three seconds after the deed at the latest."""
    deadline = time.monotonic() + 3
    while True:
        try:
            ReplayBuffer.open(output / RECORD)
            return None
        except InputError as error:
            if time.monotonic() > deadline:
                return f"the record does not open: {error}"
        time.sleep(0.1)


class _Server(NamedTuple):
    pid: int
    url: str


@contextmanager
def _server(bundle: str) -> Iterator[_Server]:
    """`action-diffusion serve` once it answers; afterwards it is gone."""
    words = [sys.executable, "-m", "action_diffusion", "serve", f"bundle={bundle}", "port=0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        found = (re.search(r"at (ws://\S+:\d+)", line) for line in server.stdout)
        url = next((match[1] for match in found if match), None)
        if url is None:
            raise InputError("the server did not start: run action-diffusion serve with the bundle to see why")
        yield _Server(server.pid, url)
    finally:
        server.kill()
        server.wait()


@contextmanager
def _loop(bundle: str | None, url: str | None = None) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A loop under way, and its output folder; afterwards nothing of it is left."""
    words = [sys.executable, "-c", "from benchmarks.robustness.kills import drive; drive()"]
    with tempfile.TemporaryDirectory() as folder:
        if bundle is not None:
            options = ["robot=sim_pusht", "n_episodes=1000", f"output_dir={folder}/out"]
            policy = f"server={url}" if url else f"bundle={bundle}"
            words = [sys.executable, "-m", "action_diffusion", "deploy", policy, *options]
        root = str(Path(__file__).resolve().parents[2])
        quiet = subprocess.DEVNULL
        loop = subprocess.Popen(words, cwd=root, stdout=quiet, stderr=quiet)
        try:
            yield loop, Path(folder) / "out"
        finally:
            started = children(loop.pid)
            loop.kill()  # whatever it started ends when it is gone
            loop.wait()
            _until(lambda: not any(Path(f"/proc/{child}").exists() for child in started), 10)


def _folder(loop: subprocess.Popen[bytes]) -> Path:
    """The shared memory of a loop, once its arm is ready."""
    pattern = f"action-diffusion-{loop.pid}-*/arm.json"
    _until(lambda: bool(list(shared_folder().glob(pattern))) or loop.poll() is not None, 60)
    found = list(shared_folder().glob(pattern))
    if not found:
        raise InputError("the loop did not start: run action-diffusion deploy with the bundle to see why")
    return found[0].parent


def child_of(pid: int, module: str) -> int:
    """The child of `pid` that runs `module`."""
    for child in children(pid):
        if module in Path(f"/proc/{child}/cmdline").read_text():
            return child
    raise InputError(f"the loop has no {module}: a policy that sees no images has no camera to kill")


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are there."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            children += [int(child) for child in path.read_text().split()]
    return children


def _until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"n": "100", "bundle": "", "seed": "0"})
    n, random = whole("n", given["n"]), np.random.default_rng(whole("seed", given["seed"], least=0))
    bundle, trials = str(Path(given["bundle"]).resolve()) if given["bundle"] else None, []
    kinds = [(who, what) for who in ("loop", *(HARMLESS if bundle else ("camera",))) for what in SIGNALS]
    for number in range(n):
        trials.append(trial(*kinds[number % len(kinds)], wait=random.uniform(0.2, 2.0), bundle=bundle))
        last = trials[-1]
        took = "no stop" if last.seconds is None else f"{1e3 * last.seconds:.0f} ms"
        print(f"{number + 1}: {last.what} the {last.who}: {took} ({last.why})", flush=True)
    seconds = [1e3 * entry.seconds for entry in trials if entry.seconds is not None and entry.who not in HARMLESS]
    if seconds:
        print(f"ms until the stop began: median {np.median(seconds):.0f}, largest {max(seconds):.0f}")
    bad = sum(not entry.good for entry in trials)
    print(f"{len(trials) - bad} of {len(trials)} within {1e3 * WITHIN:.0f} ms")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
