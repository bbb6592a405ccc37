"""Workers that are Ray actors, on as many machines as the cluster has: `workers=ray`, `workers=ray://HOST:PORT`.

Ray places them, a CPU each, and spreads them over the nodes. Here is only what a lab must be able to rely on: a head
node that is not there, and a node with other versions, are one line each, nobody else's terminal is written to, and a
cluster that is started for one run listens on this machine alone and ends with it.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from action_diffusion.envs.workers import Died, Host, Message
from action_diffusion.errors import InputError
from action_diffusion.registry import PLUGINS

PROBE_SECONDS = 5
"""How long a head node's port may take to answer."""
CLIENT_PORT = 10001
ENVIRONMENT = (PLUGINS, "MUJOCO_GL", "PYOPENGL_PLATFORM")
"""Variables that workers on other machines need as they are here."""
COMPARED = ("action-diffusion", "ray", "numpy", "gymnasium", "gym-pusht", "pymunk", "robosuite", "mujoco")
"""Packages that must be the same on all machines, or scores would not be."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "3",
    "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "3",
}


class Worker:
    """The actor."""

    def __init__(self, make: Callable[[], Any], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._host = Host(make)

    def about(self) -> tuple[str, dict[str, str]]:
        """The machine's name, and what is installed there."""
        return socket.gethostname(), versions()

    def work(self, message: Message) -> list[Any]:
        return self._host.work(message)


def versions() -> dict[str, str]:
    """Of what simulators depend on, "" for what is not installed."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in COMPARED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


class Actors:
    """A `workers.Crew` of at most n Ray actors, one a CPU of the cluster."""

    def __init__(self, make: Callable[[], Any], n: int, address: str) -> None:
        self._ray = connect(address)
        self.n = min(n, cpus(address))
        self._address, self._own = address, versions()
        self._class = self._ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self._arguments = self._ray.put(make), environment
        self._actors: dict[int, Any] = {}
        self._answers: dict[int, Any] = {}

    def start(self, worker: int) -> None:
        self._end(worker)
        actor = self._actors[worker] = self._class.remote(*self._arguments)
        self._answers[worker] = actor.about.remote()

    def send(self, worker: int, message: Message) -> None:
        self._answers[worker] = self._actors[worker].work.remote(message)

    def ready(self, workers: Collection[int], seconds: float) -> list[int]:
        of = {self._answers[worker]: worker for worker in workers}
        try:
            self._ray.wait(list(of), num_returns=1, timeout=None if seconds == math.inf else seconds)
            done, _ = self._ray.wait(list(of), num_returns=len(of), timeout=0)
        except ConnectionError as error:
            raise InputError(
                f"workers={self._address}: the connection to the head node is lost: {_line(error)}"
            ) from None
        return sorted(of[answer] for answer in done)

    def receive(self, worker: int) -> list[Any]:
        try:
            answer = self._ray.get(self._answers.pop(worker))
        except ConnectionError as error:
            raise InputError(
                f"workers={self._address}: the connection to the head node is lost: {_line(error)}"
            ) from None
        except self._ray.exceptions.RayError as error:
            if "ModuleNotFoundError" in str(error):
                raise InputError(
                    f"workers={self._address}: on a node, {_line(error)}: install action-diffusion "
                    f"{self._own['action-diffusion']} where Ray runs, on every node"
                ) from None
            raise Died(f"the simulator's Ray actor died ({type(error).__name__})") from None
        if isinstance(answer, list):
            return answer
        host, theirs = answer
        for name, own in self._own.items():
            if theirs.get(name) != own:
                raise InputError(
                    f"workers={self._address}: {host} has {name} {theirs.get(name) or '(none)'}, this machine "
                    f"{own or '(none)'}: all need the same"
                )
        return []

    def close(self) -> None:
        for worker in list(self._actors):
            self._end(worker)

    def _end(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None and self._ray.is_initialized():
            self._ray.kill(actor)


def cpus(address: str) -> int:
    """Of all nodes of the cluster. Raises `InputError`."""
    found = int(connect(address).cluster_resources().get("CPU", 0))
    if found < 1:
        raise InputError(f"workers={address}: the Ray cluster has no CPU: add a node to it")
    return found


def check(address: str) -> None:
    """Raises `InputError` where Ray is not installed, or nothing listens at the head node. Imports no Ray."""
    if find_spec("ray") is None:
        raise InputError(f"workers={address} needs Ray: pip install 'action-diffusion[ray]'")
    where = _where(address)
    if where is not None:
        _probe(address, where)


def connect(address: str) -> Any:
    """Ray, connected to the cluster of `address`; once a process.

    Raises `InputError`: within 5 s where nothing listens, within 15 s where something does that is no Ray, within a
    minute where Ray fails there.

    "ray": the cluster that $RAY_ADDRESS names, or that `ray start` made on this machine, else one for this run alone.
    """
    check(address)
    where = _where(address)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    if where is None and "ray" not in sys.modules:  # which reads them when it is imported
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # "no cluster": it then listens on the loopback only
        if "RAY_AUTH_MODE" not in os.environ:  # other users of this machine cannot give it work
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray = import_module("ray")
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if where is None:
        quiet |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ray.init(where or "local", **quiet)
            except ConnectionAbortedError:  # now and then a head node's server for one client dies as it starts
                ray.init(where or "local", **quiet)
    except Exception as error:  # of many kinds, all of which mean that there is no cluster
        token = "; a cluster with tokens needs RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here" if where else ""
        raise InputError(
            f"workers={address}: Ray does not answer at {where or 'this machine'}: {_line(error)}{token}"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's prints a trace of the stack
    # What it prints of workers that die is said here, in one line each.
    private: Any = import_module("ray._private.worker")
    if hasattr(private, "print_to_stdstream"):
        private.print_to_stdstream = lambda *_, **__: None
    return ray


def _where(address: str) -> str | None:
    """The cluster's address; None for one that is yet to be started."""
    if "://" in address:
        return address
    named = os.environ.get("RAY_ADDRESS", "")
    if named and named not in ("auto", "local"):
        return named
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    try:
        here = "" if named == "local" else file.read_text().strip()
        if here:
            _probe(address, here)
        return here or None
    except (OSError, InputError):  # none, or one that has ended
        return None


def _probe(address: str, where: str) -> None:
    host, _, port = where.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        host, port = f"{host}{port}", str(CLIENT_PORT)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = "nothing within 5 s" if isinstance(error, TimeoutError) else str(error)
        raise InputError(
            f"workers={address}: no Ray head node answers at {host}:{port} ({why}); on it: ray start --head"
        ) from None


def _line(error: BaseException) -> str:
    """Its last line: before it there is a traceback of Ray's, of another machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
