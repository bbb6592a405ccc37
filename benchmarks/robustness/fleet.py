"""Many robots on policy servers: how late their answers come, and how soon they are served again when a server dies.

    python -m benchmarks.robustness.fleet [bundle=DIR] [clients=64] [rate=2] [seconds=30] [copies=2] [robots=16]

Load: `action-diffusion serve` in a process of its own, asked for whole histories, as `RemotePolicy` sends them, by one
client and then by `clients`, `rate` times a second each, at moments of their own. How late an answer is counts from
when it was due to be asked for. Bar: 99 % come within 50 ms more than 99 % of the one client's, and none is lost.

Failover: two servers behind haproxy, and `robots` times `RemotePolicy`, which ask twice a second each, and again after
a control step of 0.1 s where there was no answer. One server gets SIGKILL. Bar: each is answered within a second.

Without bundle=, a small PushT policy from states, which is trained first (two minutes). robots=0: without the second
part, which needs `apt-get install haproxy`. output=FILE.json takes what was measured. Exit code: 0, 1 where a bar is
not reached, 2 for bad input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.deploy.serve import wire
from action_diffusion.deploy.serve.client import RemotePolicy
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy import noise
from action_diffusion.policy.reading import read_spec
from action_diffusion.policy.spec import PolicySpec
from benchmarks.command import command, options, positive, whole

DEFAULTS = {"bundle": "", "clients": "64", "rate": "2", "seconds": "30", "copies": "2", "robots": "16", "output": ""}
WITHIN_MS, WITHIN_SECONDS = 50.0, 1.0
ROBOT_RATE, CONTROL_STEP = 2.0, 0.1
"""Of robots when a server dies: questions a second, and seconds until they ask again where there was no answer."""
PROXY = """\
global
    maxconn 4000
defaults
    mode http
    timeout connect 1s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
    retries 3
    option redispatch 1
frontend robots
    bind 0.0.0.0:8000
    default_backend servers
backend servers
    balance leastconn
    option httpchk GET /readyz
    default-server check inter 500ms fall 2 rise 1
    server a 127.0.0.1:8001
    server b 127.0.0.1:8002
"""
"""Of haproxy, with which a client that connects again is given to the server that lives; docs/fleet.md shows it."""


@contextmanager
def serving(bundle: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`action-diffusion serve` on this machine: its process, and its port."""
    run = [sys.executable, "-m", "action_diffusion", "serve", f"bundle={bundle}", "port=0", "device=cpu", *words]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next((found for line in process.stdout if (found := re.search(r"ws://\S+?:(\d+)", line))), None)
        if said is None:
            raise InputError(f"the server of {bundle} did not start")
        yield process, int(said[1])
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def proxied(ports: Sequence[int]) -> Iterator[int]:
    """haproxy before two servers at `ports`; gives its own port."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        raise InputError("haproxy is not installed: apt-get install haproxy, or robots=0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    text = PROXY.replace("0.0.0.0:8000", f"127.0.0.1:{own}")
    for before, port in zip((8001, 8002), ports, strict=True):
        text = text.replace(f"127.0.0.1:{before}", f"127.0.0.1:{port}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "haproxy.cfg").write_text(text)
        process = subprocess.Popen([program, "-db", "-f", f"{folder}/haproxy.cfg"], stderr=subprocess.DEVNULL)
        try:
            _wait_for(own)
            yield own
        finally:
            process.terminate()
            process.wait()


def _wait_for(port: int) -> None:
    """Until somebody listens."""
    end = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > end:
            raise InputError("haproxy did not start")
        time.sleep(0.05)


# Load.


def question(spec: PolicySpec, seed: int) -> bytes:
    """A history with its noise and generator, as `RemotePolicy` sends it, of zeros."""
    drawing, steps = generators(seed)
    obs = {key: np.zeros((spec.n_obs_steps, *value.shape), value.dtype) for key, value in spec.observations.items()}
    chunk = noise.draw((1, *spec.noise_shape), drawing)[0]
    return wire.pack({**obs, wire.EXTRA: {"history": True, "noise": chunk, "generator": noise.state_of(steps)}})


async def client(url: str, asked: bytes, due: np.ndarray, late: list[float]) -> None:
    """Ask at the moments `due` [n] of the event loop's clock; adds the seconds that each answer took."""
    now = asyncio.get_running_loop().time
    connect = wire.require("websockets.asyncio.client").connect
    async with connect(url, compression=None, max_size=None, proxy=None) as connection:
        await connection.recv()
        for moment in due:
            await asyncio.sleep(moment - now())
            await connection.send(asked)
            answer = await connection.recv()
            if isinstance(answer, bytes):
                late.append(now() - moment)


async def load(url: str, spec: PolicySpec, clients: int, rate: float, seconds: float) -> np.ndarray:
    """Milliseconds of all answers."""
    late: list[float] = []
    begin = asyncio.get_running_loop().time() + 1.0  # all are connected by then
    phases = np.random.default_rng(0).uniform(0, 1 / rate, clients)
    due = begin + phases[:, None] + np.arange(round(seconds * rate))[None] / rate
    tasks = [client(url, question(spec, seed), row, late) for seed, row in enumerate(due)]
    await asyncio.gather(*tasks, return_exceptions=True)
    return 1e3 * np.array(late)


def measure_load(bundle: Path, clients: int, rate: float, seconds: float, copies: int) -> dict[str, Any]:
    spec = read_spec(bundle)
    rows: dict[str, Any] = {
        "clients": clients,
        "rate": rate,
        "copies": copies,
        "load_average": round(os.getloadavg()[0], 1),
    }
    with serving(bundle, f"max_connections={clients}", f"copies={copies}") as (_, port):
        for name, count in (("alone", 1), ("together", clients)):
            took = asyncio.run(load(f"ws://127.0.0.1:{port}", spec, count, rate, seconds))
            lost = count * round(seconds * rate) - len(took)
            median, p99 = np.percentile(took, [50, 99]) if len(took) else (np.inf, np.inf)
            rows[name] = {"answers": len(took), "lost": lost, "median_ms": round(median, 1), "p99_ms": round(p99, 1)}
    above = rows["together"]["p99_ms"] - rows["alone"]["p99_ms"]
    passed = above <= WITHIN_MS and not rows["alone"]["lost"] and not rows["together"]["lost"]
    return {**rows, "p99_above_ms": round(above, 1), "passed": bool(passed)}


# Failover.


@dataclass
class FleetRobot:
    """Asks a server by `RemotePolicy`, in a thread of its own. answers: (when it asked, when it was answered)."""

    remote: RemotePolicy
    rate: float
    phase: float
    answers: list[tuple[float, float]] = field(default_factory=list)
    unanswered: int = 0

    def run(self, over: threading.Event) -> None:
        spec, (drawing, steps) = self.remote.spec, generators(0)
        obs = {key: np.zeros((spec.n_obs_steps, *value.shape), value.dtype) for key, value in spec.observations.items()}
        pause = self.phase
        while not over.wait(pause):
            asked = time.monotonic()
            try:
                self.remote.predict(obs, noise_generator=drawing, generator=steps)
            except Unavailable:
                self.unanswered, pause = self.unanswered + 1, CONTROL_STEP
            else:
                self.answers.append((asked, time.monotonic()))
                pause = max(0.0, 1 / self.rate - (time.monotonic() - asked))

    def outage(self, killed: float) -> float:
        """Seconds from `killed` until a question that was asked after it was answered."""
        return min((answered - killed for asked, answered in self.answers if asked >= killed), default=float("inf"))


def measure_failover(bundle: Path, robots: int, *, settle: float = 3.0) -> dict[str, Any]:
    """settle: seconds before one of two servers is killed, and after."""
    lost: list[str] = []
    with ExitStack() as stack:
        words = [f"max_connections={robots}"]
        (first, one), (_, two) = (stack.enter_context(serving(bundle, *words)) for _ in range(2))
        url = f"ws://127.0.0.1:{stack.enter_context(proxied((one, two)))}"
        phases = np.random.default_rng(0).uniform(0, 1 / ROBOT_RATE, robots)
        fleet = [FleetRobot(RemotePolicy(url, timeout=5.0, say=lost.append), ROBOT_RATE, phase) for phase in phases]
        over = threading.Event()
        threads = [threading.Thread(target=robot.run, args=(over,)) for robot in fleet]
        try:
            for thread in threads:
                thread.start()
            time.sleep(settle)
            killed = time.monotonic()
            first.send_signal(signal.SIGKILL)
            time.sleep(settle)
        finally:
            over.set()
            for thread in threads:
                thread.join()
            for robot in fleet:
                robot.remote.close()
    outages = [robot.outage(killed) for robot in fleet]
    return {
        "robots": robots,
        "on_the_killed_server": sum(line.startswith("lost") for line in lost),
        "unanswered": sum(robot.unanswered for robot in fleet),
        "served_again_seconds": {"median": round(float(np.median(outages)), 3), "worst": round(max(outages), 3)},
        "passed": max(outages) <= WITHIN_SECONDS,
    }


@command
def main(words: Sequence[str]) -> int:
    given = options(words, DEFAULTS)
    clients, robots = whole("clients", given["clients"]), whole("robots", given["robots"], least=0)
    rate, seconds = positive("rate", given["rate"]), positive("seconds", given["seconds"])
    if given["bundle"]:
        bundle = Path(given["bundle"])
    else:
        from benchmarks.rows.policies import pusht

        bundle = pusht(0)
    read_spec(bundle)
    rows = {"load": measure_load(bundle, clients, rate, seconds, whole("copies", given["copies"]))}
    load = rows["load"]
    for name in ("alone", "together"):
        row = load[name]
        print(
            f"{name}: {row['answers']} answers, {row['lost']} lost, {row['median_ms']} ms median, {row['p99_ms']} 99 %"
        )
    print(f"{clients} clients at {rate:g} Hz: 99 % within {load['p99_above_ms']} ms more than one (bar: {WITHIN_MS:g})")
    if robots:
        rows["failover"] = measure_failover(bundle, robots)
        row = rows["failover"]
        again = row["served_again_seconds"]
        print(
            f"one of two servers killed under {robots} robots, {row['on_the_killed_server']} on it, "
            f"{row['unanswered']} questions not answered: served again after {again['median']} s median, "
            f"{again['worst']} s worst (bar: {WITHIN_SECONDS:g})"
        )
    if given["output"]:
        with atomic_path(Path(given["output"])) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
