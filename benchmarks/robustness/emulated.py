"""Random faults of the hardware, while an emulated SO-101 and an emulated UR5e are driven by their vendors' own code.

    python -m benchmarks.robustness.emulated [so101=700] [ur=300] [seed=0] [json=FILE]

An arm's process (`ArmLink`) goes to random places as fast as its limits allow, and meanwhile, at random, a fault of a
kind that is drawn happens. After it the arm goes on, or the process says why it ends, and a new one is started; one
start in eight has a fault too. Every command is checked where it arrives at the motors or the controller, before any
damage: inside the limits, no further from the one before (after a start: from where the arm is) than its velocity
limit allows in the time between them. For the UR only with a program under the watchdog; ur_rtde may send a single
one again over a new connection, after which the process has to end.

`lerobot` has to be importable: PYTHONPATH=FOLDER, see tests/drivers/test_lerobot.py. Exit code: 0; 1 where a command
was outside, something hung, or an arm went on that should not have; 2 for bad input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.drivers.lerobot import LeRobotArm
from action_diffusion.deploy.drivers.ur import UrArm
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.deploy.sim import feetech, ur
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from benchmarks.command import command, options, whole

SETTLES = 8.0
"""Seconds within which an arm has to say that it ended, to close, and to stand still; more is a hang.

A library that waits for a controller does so for 3 s, and the loop gives a process 6 s to end.
"""
HERE = "benchmarks.robustness.emulated"
AT_START = 1 / 8
TRIES = 5
"""Starts without a fault that a busy computer may cost, one after the other."""


@dataclass
class FaultCounts:
    """What happened. faults: by kind, of them went_on and ended; reasons: of ends; wrong: what must not be."""

    faults: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    refused_to_start: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    commands: int = 0
    slowest: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.wrong


class Emulated(ABC):
    """An arm, its faults, and what its commands have to keep to; all in the command's units.

    Attributes:
        kinds: weights of the faults.
        fatal: kinds after which the arm must not go on.
        gentle: kinds after which it must.
        limits, rate, setup: of the arm's process.
        slack: what a command's resolution adds to a step.
    """

    kinds: Mapping[str, float]
    fatal: frozenset[str]
    gentle: frozenset[str]
    limits: Mapping[str, list[float]]
    rate: float
    slack: float
    setup: ArmSetup

    def __init__(self) -> None:
        self.found, self.segments = FaultCounts(), Segments()
        self._last: tuple[float, np.ndarray] | None = None

    def checked(self, now: float, values: np.ndarray, present: np.ndarray) -> None:
        """A command that has arrived, and where the arm is."""
        low, high, velocity = (np.array(self.limits[name]) for name in ("low", "high", "velocity"))
        self.found.commands += 1
        if ((values < low - self.slack) | (values > high + self.slack)).any():
            self.found.wrong.append(f"{now:.3f}: {values.round(4).tolist()} is outside of the limits")
        then, before = self._last or (now, present)
        step, seconds = np.abs(values - before), max(1 / self.rate, now - then)
        if (step > velocity * seconds * 1.001 + self.slack * (3 if self._last is None else 1)).any():
            self.found.wrong.append(f"{now:.3f}: a step by {step.round(4).tolist()} in {seconds:.4f} s")
        self._last = now, values

    @abstractmethod
    def fault(self, kind: str, random: np.random.Generator) -> None:
        """Let it happen, now or to what comes next."""

    @abstractmethod
    def still(self) -> bool:
        """Whether the arm stands."""

    def mend(self) -> None:
        """All is well again, and the arm stands inside of its limits; a new process may be started."""
        self._last = None


def _refuse(*_: object) -> None:
    raise PermissionError


class _Shared:
    """A driver without real-time priority: libraries spin while they wait, and who answers is on these cores too."""

    def connect(self) -> None:
        os.sched_setscheduler = os.setpriority = _refuse  # type: ignore[assignment]
        super().connect()  # type: ignore[misc]


class SharedLeRobot(_Shared, LeRobotArm):
    """lerobot's arm, beside its emulator."""


class SharedUr(_Shared, UrArm):
    """A UR, beside its emulator."""


class So101(Emulated):
    """On Feetech's bus, by lerobot. Damages cost an answer; a cable that stays out or a motor that is gone ends it."""

    kinds = {"lost": 30, "wrong": 30, "late": 15, "out for 0.2 s": 20, "out for 1 s": 3, "missing": 2}  # noqa: RUF012
    fatal = frozenset(("out for 1 s", "missing"))
    gentle = frozenset(("lost", "wrong", "late"))
    rate = 50.0
    slack = 360 / 4095 + 1e-9

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._motors = feetech.so101()
        self.bus = feetech.Bus(self._motors, told=self._told)
        feetech.files(folder, self.bus)
        self.limits = {"low": [-60, -60, -60, -60, -90, 5], "high": [60, 60, 60, 60, 90, 95], "velocity": [90.0] * 6}
        self.limits |= {"acceleration": [400.0] * 6, "jerk": [8000.0] * 6}
        where = {"port": self.bus.port, "id": "so101", "calibration_dir": str(folder)}
        arm = {"type": "so101_follower", "config": where, "rate": self.rate, "watchdog": "it is emulated"}
        self.setup = ArmSetup(driver=f"{HERE}:SharedLeRobot", settings=arm, limits=self.limits)
        self._goals: dict[int, int] = {}

    def _units(self, steps: Mapping[int, float]) -> np.ndarray:
        """Degrees and, of the gripper, percent, as lerobot has them."""
        table = feetech.calibration(self._motors)
        body = [
            (steps[i] - (of["range_min"] + of["range_max"]) / 2) * 360 / 4095
            for i, of in zip(range(1, 6), table.values(), strict=False)
        ]
        of = table["gripper"]
        return np.array([*body, 100 * (steps[6] - of["range_min"]) / (of["range_max"] - of["range_min"])])

    def _told(self, now: float, goals: dict[int, int]) -> None:
        present = {number: motor.position for number, motor in self._motors.items()}
        self.checked(now, self._units(present | goals), self._units(present))

    def fault(self, kind: str, random: np.random.Generator) -> None:
        if kind == "missing":
            self.bus.missing = {int(random.integers(1, 7))}
        elif kind.startswith("out"):
            self.bus.damage("out", seconds=0.2 if "0.2" in kind else 1.0)
        else:
            self.bus.damage(kind, seconds=0.08, there=bool(random.integers(2)))

    def still(self) -> bool:
        return all(abs(motor.velocity) < 1 for motor in self._motors.values())

    def mend(self) -> None:
        super().mend()
        self.bus.missing = set()
        time.sleep(1.0)  # a cable that is out comes back


class Ur(Emulated):
    """On RTDE, by ur_rtde. TCP mends what is lost or damaged on the way; what is left makes a controller stop."""

    kinds = {"frozen for 0.03 s": 60, "out for 0.02 s": 60, "out for 0.2 s": 20}  # noqa: RUF012
    kinds |= {"frozen for 0.3 s": 6, "all connections reset": 6, "its connection reset": 6}
    kinds |= {"program ended": 6, "protective stop": 5, "emergency stop": 5}
    fatal = frozenset(kinds) - {"frozen for 0.03 s", "out for 0.02 s"}
    gentle = frozenset(())
    rate = 125.0
    slack = 1e-6

    def __init__(self, host: str) -> None:
        super().__init__()
        self.controller, self._unwatched = ur.Controller(host, told=self._told), 0
        self.limits = {"low": [-1.5, -2.4, 0.5, -2.6, -1.9, -1.5], "high": [1.5, -0.6, 2.4, -0.6, -1.2, 1.5]}
        self.limits |= {"velocity": [1.5] * 6, "acceleration": [8.0] * 6, "jerk": [160.0] * 6}
        arm = {"host": host, "model": "ur5e", "rate": self.rate}
        self.setup = ArmSetup(driver=f"{HERE}:SharedUr", settings=arm, limits=self.limits)

    def _told(self, now: float, _kind: str, values: list[float]) -> None:
        self.checked(now, np.array(values), self.controller.joints)
        self._unwatched = 0 if self.controller.watched or self.controller.ended else self._unwatched + 1
        if self._unwatched > 1:
            self.found.wrong.append(f"{now:.3f}: {self._unwatched} setpoints for a program without a watchdog")

    def fault(self, kind: str, random: np.random.Generator) -> None:
        seconds = float(kind.split()[2]) if " for " in kind else 0.0
        if kind.startswith("frozen"):
            self.controller.freeze(seconds)
        elif kind.startswith("out"):
            self.controller.unplug(seconds)
        elif kind.endswith("reset"):
            self.controller.drop(writers=kind.startswith("its"))
        elif kind == "program ended":
            self.controller.halt()
        else:
            self.controller.protect(ur.EMERGENCY if kind.startswith("emergency") else ur.PROTECTIVE)

    def still(self) -> bool:
        return not self.controller.moving

    def mend(self) -> None:
        super().mend()
        self.controller.protect(0)
        time.sleep(0.4)
        # The controller's own stop knows nothing of our limits: somebody moves the arm inside, as its process asks for.
        self.controller.joints = np.clip(self.controller.joints, self.limits["low"], self.limits["high"])


def run(arm: Emulated, n: int, seed: int) -> FaultCounts:
    """`n` faults, one after the other."""
    random, found = np.random.default_rng(seed), arm.found
    kinds, weights = list(arm.kinds), np.array(list(arm.kinds.values()), dtype=np.float64)
    link: ArmLink | None = None
    refused = 0
    while (done := sum(found.faults.values())) < n:
        kind = str(random.choice(kinds, p=weights / weights.sum()))
        if link is None:
            arm.mend()
            at_start = bool(random.random() < AT_START)
            link, why = _started(arm, kind if at_start else None, random)
            if at_start:
                found.faults[kind] += 1
                if link is not None and (said := _outcome(link, SETTLES / 4)) is not None:
                    _ended(arm, link, f"{kind} at the start")
                    link, why = None, said
                (found.went_on if link is not None else found.refused_to_start)[kind] += 1
                if link is None:
                    found.reasons[why] += 1
            refused = 0 if link is not None or at_start else refused + 1
            if refused == TRIES:
                found.wrong.append(f"it does not start: {why}")
                return found
            continue
        goal = random.uniform(arm.limits["low"], arm.limits["high"])
        link.follow(np.array([time.monotonic() + random.uniform(0.3, 1.0)]), goal[None])
        time.sleep(float(random.uniform(0.05, 0.15)))
        arm.fault(kind, random)
        found.faults[kind] += 1
        usual = 0.45 if kind.startswith("out") else 0.15
        events = _outcome(link, SETTLES if kind in arm.fatal else usual)
        if events is None:
            found.went_on[kind] += 1
            if kind in arm.fatal:
                found.wrong.append(f"it went on after: {kind}")
        else:
            found.ended[kind] += 1
            found.reasons[events] += 1
            if kind in arm.gentle:
                found.wrong.append(f"it ended after: {kind}: {events}")
            _ended(arm, link, kind)
            link = None
        if done % 100 == 99:
            print(f"{type(arm).__name__}: {done + 1} faults, {len(found.wrong)} wrong", flush=True)
    if link is not None:
        _ended(arm, link, "the end")
    return found


def _started(arm: Emulated, kind: str | None, random: np.random.Generator) -> tuple[ArmLink | None, str]:
    """A process that is ready, with a fault on its way; None, and why not, where it refuses."""
    arm.segments.remove()
    arm.segments = Segments()
    late = threading.Timer(float(random.uniform(0.0, 2.0)), arm.fault, (kind, random)) if kind else None
    if late is not None:
        late.start()
    try:
        link = ArmLink(folder=arm.segments.path, setup=arm.setup)
        try:
            link.begin()
        except InputError as error:
            _ended(arm, link, f"{kind} at the start")
            return None, _short(str(error))
        return link, ""
    except InputError as error:
        arm.segments.remove()
        return None, _short(str(error))
    finally:
        if late is not None:
            late.join()


def _outcome(link: ArmLink, seconds: float) -> str | None:
    """None where the arm goes on for so long, and what its process says where it ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if link.phase is Phase.BROKEN:
            return _short("; ".join(link.events()[-1:]) or "its process has ended")
        link.renew()
        time.sleep(0.005)
    link.events()
    return None


def _ended(arm: Emulated, link: ArmLink, kind: str) -> None:
    """Close it, and see that it closes and stands."""
    began = time.monotonic()
    link.close()
    arm.segments.remove()
    while not arm.still() and time.monotonic() < began + SETTLES:
        time.sleep(0.01)
    took = time.monotonic() - began
    arm.found.slowest = max(arm.found.slowest, took)
    if took >= SETTLES:
        arm.found.wrong.append(f"{kind}: it took {took:.1f} s to end and to stand")


def _short(said: str) -> str:
    """Without numbers, so that equal reasons count together."""
    return "".join("#" if letter.isdigit() else letter for letter in said)[:100]


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"so101": "700", "ur": "300", "seed": "0", "json": ""})
    numbers = {name: whole(name, given[name], least=0) for name in ("so101", "ur", "seed")}
    began, results = time.monotonic(), dict[str, FaultCounts]()
    with tempfile.TemporaryDirectory() as folder:
        if numbers["so101"]:
            results["so101"] = run(So101(Path(folder)), numbers["so101"], numbers["seed"])
        if numbers["ur"]:
            results["ur"] = run(Ur("127.0.7.1"), numbers["ur"], numbers["seed"])
    report: dict[str, Any] = {name: vars(found) for name, found in results.items()}
    report |= {"seconds": round(time.monotonic() - began, 1), "passed": all(found.passed for found in results.values())}
    print(json.dumps(report, indent=1))
    if given["json"]:
        with atomic_path(Path(given["json"])) as temporary:
            temporary.write_text(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
