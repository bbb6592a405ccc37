"""Processes on several hosts that train together: they meet, make sure that they are alike, and notice who is gone.

Whoever starts them (torchrun, accelerate launch, srun) says by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT who is
who. All speak by torch's store, which process 0 (or torchrun on its host) keeps; gradients go by gloo or NCCL. There a
process waits for days, as another may be slow, and a network that is gone tells nobody. So each of them beats:

    store   beat/0 += 1 every second     process 0 watches all beats, the others that of process 0
            ended  who, why              is said by whoever ends early, and read with every beat
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from action_diffusion.errors import InputError
from action_diffusion.training.signals import Interrupted

JOINING = 60.0
"""Seconds that a process waits for the others at the start."""
_BEAT, _GOODBYE = 1.0, 5.0
"""Seconds: between beats; for what the others are told before this process ends, or tell."""
_OWN = ("output_dir", "data", "text_model", "plugins", "dataset.cache_dir", "dataset.memory_gb")
"""Options that may differ between hosts: where things lie there. Data are compared by what they hold."""
_SHOWN = 3


class HostLost(RuntimeError):
    """A process that trained with this one is gone. One line."""

    EXIT_CODE = 75
    """That of the command: a failure that passes, EX_TEMPFAIL of sysexits.h."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, and where process 0 is met."""

    rank: int
    world: int
    address: str
    port: int

    @classmethod
    def of_environment(cls) -> Place | None:
        """As the launcher says; None where it starts one process, or there is none. Raises `InputError`."""
        if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
            raise InputError(
                "accelerate launch started this process without RANK, as it does with --cpu: give --multi_gpu in its "
                "place (device=cpu computes on the CPU all the same), or use torchrun"
            )
        if "RANK" not in os.environ or _number("WORLD_SIZE", 1) == 1:
            return None
        place = cls(
            _number("RANK"), _number("WORLD_SIZE", 1), os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
        )
        if not place.address:
            raise InputError("MASTER_ADDR is not set: it names the host of process 0 (RANK=0)")
        if not 0 <= place.rank < place.world:
            raise InputError(f"RANK={place.rank} is none of WORLD_SIZE={place.world} processes: 0 to {place.world - 1}")
        if not 0 < place.port < 65536:
            raise InputError(f"MASTER_PORT={place.port} is no port: 1 to 65535")
        return place


def _number(name: str, least: int = 0) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"{name}={text!r} must be a whole number from {least}: torchrun, accelerate launch or the script set RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


class Hosts:
    """The processes that train together, as this one sees them.

    timeout: seconds after which one that is not heard of is gone.
    """

    def __init__(self, place: Place, *, timeout: float, joining: float = JOINING) -> None:
        self.place, self.timeout, self._joining = place, timeout, joining
        self._name = f"process {place.rank} on {platform.node()}"
        self._names = {0: f"process 0 at {place.address}:{place.port}"}
        self._store = self._connected()
        watched = range(1, place.world) if place.rank == 0 else [0]
        self._watched = {rank: f"beat/{rank}" for rank in watched}
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        self._beats: dict[int, bytes] = {}
        self._broken = False
        self._ended: dict[str, Any] | None = None
        self._stopped, self._explaining = threading.Event(), False

    def _connected(self) -> Store:
        place, own = self.place, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            store = TCPStore(
                place.address,
                place.port,
                place.world,
                own and place.rank == 0,
                timeout=timedelta(seconds=self._joining),
                wait_for_workers=False,
                multi_tenant=True,  # torch's own group is told by the same one
            )
        except RuntimeError as error:
            doing = "cannot be opened here" if own and place.rank == 0 else f"was not reached in {self._joining:g} s"
            raise InputError(
                f"{self._names[0]} {doing} ({_first_line(error)}): check MASTER_ADDR and MASTER_PORT, that it runs, "
                "and the network between the hosts"
            ) from None
        return PrefixStore(f"hosts/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    # -- at the start -----------------------------------------------------------------------------------------

    def agree(self, what: str, facts: Mapping[str, Any], *, limit: float | None = None) -> None:
        """All processes say `facts`; raises `InputError` in each of them where they differ, or one says none in time.

        limit: seconds; None: as long as all are there.
        """
        rank, world, began = self.place.rank, self.place.world, time.monotonic()
        self._store.set(f"{what}/{rank}", json.dumps({"": self._name} | dict(facts), default=str))
        keys = {other: f"{what}/{other}" for other in range(world)}
        while missing := [other for other, key in keys.items() if not self._store.check([key])]:
            if limit is not None and time.monotonic() - began > limit:
                raise InputError(
                    f"process {', '.join(map(str, missing))} of {world} did not come in {limit:g} s: it was not "
                    "started, cannot reach this one, or has said why on its own host"
                )
            time.sleep(0.05)
        said = [json.loads(value) for value in self._store.multi_get(list(keys.values()))]
        self._names = {other: one.pop("") for other, one in enumerate(said)}
        self._store.add(f"{what}/read", 1)
        if rank == 0:  # it may keep the store
            self._until(lambda: self._store.add(f"{what}/read", 0) == world)
        for other, one in enumerate(said):
            if one != said[0]:
                raise InputError(
                    f"{what} of the hosts differ: {_difference(said[0], one, self._names[0], self._names[other])}"
                )

    def join(self, config: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Meet the others and compare versions and configurations. Raises `InputError`."""
        self._store.add(f"beat/{self.place.rank}", 1)
        self.agree("versions", versions, limit=self._joining)
        self.agree("options", {key: value for key, value in _flat(config) if key not in _OWN}, limit=self._joining)
        self._heard = dict.fromkeys(self._watched, time.monotonic())
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True).start()

    # -- while training ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Says to the others why this process ends, and turns what happens when another is gone into one line.

        Raises `HostLost`, or the `InputError` of another process. Where this process waits in a call that does not
        return, it ends there and then, with the same line and exit code.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and (other := self._explained()):
                raise other from None
            if not isinstance(error, Interrupted):  # all are, at the same step
                self._say_ended(error)
            raise
        finally:
            self._stopped.set()

    def leave(self) -> None:
        """No longer watch the others, nor be watched: all have done their part."""
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT):
            try:
                self._store.add(f"beat/{self.place.rank}", 1)
                beats = self._store.multi_get(list(self._watched.values()))
                if self._ended is None and self._store.check(["ended"]):
                    self._ended = json.loads(self._store.get("ended"))
                    self._store.add("ended/read", 1)
            except RuntimeError:
                self._broken = True
                return
            for rank, beat in zip(self._watched, beats, strict=True):
                if self._beats.get(rank) != beat:
                    self._beats[rank], self._heard[rank] = beat, time.monotonic()

    def _guard(self) -> None:
        """Ends a process that hangs in a call when another is gone; one that does not says so itself, and sooner."""
        while not self._stopped.wait(_BEAT / 2):
            known = self._verdict(self.timeout)
            if known is None or self._explaining or self._stopped.wait(2 * _BEAT) or self._explaining:
                continue
            print(f"error: {known}", file=sys.stderr, flush=True)
            os._exit(2 if isinstance(known, InputError) else HostLost.EXIT_CODE)

    def _verdict(self, patience: float) -> InputError | HostLost | None:
        """What is known of another process that is gone."""
        if self._ended is not None:
            kind = InputError if self._ended["input"] else HostLost
            return kind(f"{self._ended['who']} ended: {self._ended['why']}")
        now = time.monotonic()
        silent = [rank for rank, heard in self._heard.items() if now - heard > patience]
        if not silent and not self._broken:
            return None
        names = ", ".join(self._names[rank] for rank in silent or [0])
        return HostLost(
            f"{names} is gone: it was killed, or its host or the network failed. Go on from the last checkpoint "
            "with the same command and resume=true"
        )

    def _explained(self) -> InputError | HostLost | None:
        """Of an error in a call that several processes take part in: whether another one is gone."""
        began, self._explaining = time.monotonic(), True
        while time.monotonic() - began < _GOODBYE:
            if (known := self._verdict(3 * _BEAT)) is not None:
                return known
            time.sleep(_BEAT / 10)
        return None

    def _say_ended(self, error: Exception) -> None:
        why = _first_line(error) if isinstance(error, InputError | FloatingPointError) else type(error).__name__
        told = {"who": self._name, "why": why, "input": isinstance(error, InputError)}
        with contextlib.suppress(RuntimeError):
            if not self._store.check(["ended"]):
                self._store.set("ended", json.dumps(told))
            self._until(lambda: self._store.add("ended/read", 0) >= self.place.world - 1)

    def _until(self, done: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not done() and time.monotonic() - began < _GOODBYE:
            time.sleep(0.05)


def _flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], of_a: str, of_b: str) -> str:
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    shown = [f"{key} is {a.get(key)} for {of_a}, {b.get(key)} for {of_b}" for key in keys[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def tell_accelerate(device: torch.device) -> None:
    """What it looks for in the environment, where the launcher does not say it."""
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    os.environ["ACCELERATE_USE_CPU"] = "true" if device.type == "cpu" else "false"
