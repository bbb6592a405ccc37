"""Who else is there in a run: the recorder, and the operator with a page. The arm is safe without either.

A robot in the loop's own process has no shared memory to look into, and so nobody looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from action_diffusion import __version__
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.ipc.rings import Moment
from action_diffusion.deploy.loop.events import NoSubscriber, Subscriber
from action_diffusion.deploy.loop.operator import MOST_VALUES, NoOperator, Operator, PageOperator
from action_diffusion.deploy.loop.trial_operator import TrialOperator
from action_diffusion.deploy.page.link import PageLink, page_port
from action_diffusion.deploy.page.view import AboutRun
from action_diffusion.deploy.records.reader import plain_limits
from action_diffusion.deploy.records.stream import RECORD, RunStream
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import Robot
from action_diffusion.deploy.teleop.takeover import DeviceTeleoperator, teleoperator
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.policy.text.words import Words

_KEPT = (
    *("robot", "seed", "n_episodes", "scheduling", "delay", "execution_horizon", "rtc", "sampler"),
    *(
        "device",
        "precision",
        "compile",
        "cuda_graph",
        "simulated",
        "safety",
        "dry_run",
        "guard",
        "extensions",
        "intents",
        "server",
    ),
    *("threads", "ways", "machine"),
)
"""Of the configuration, what the record keeps; the last are what the last bits of a chunk depend on."""


class Subscribers:
    """Starts them; `subscriber` and `operator` are for the loop.

    Args:
        config: `configs/deploy.yaml`: page, page_host, page_token_file, wait, teleop, record and what that keeps.
        limits: of the loop's gate.
        output_dir: where the record goes.
        computing: torch's threads and the kernels' ways so far, on which the last bits of a chunk depend.
        trials: the page is blinded, and a person starts and marks every run (`TrialOperator`).
        say: takes a line for whoever started the run.

    Raises:
        InputError: for a page that is asked for and cannot be, and for a record that is there already.
    """

    def __init__(
        self,
        config: Deploy,
        robot: Robot,
        spec: PolicySpec,
        *,
        limits: Limits,
        output_dir: Path,
        computing: Callable[[], Mapping[str, object]] = dict,
        trials: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.subscriber: Subscriber = NoSubscriber()
        self.operator: Operator = NoOperator()
        self._page: PageLink | None = None
        self._teleoperator: DeviceTeleoperator | None = None
        self._recording: RunStream | None = None
        self._say = say
        processes = robot.processes
        if processes is None:
            return
        self._emergency = Moment(processes.folder / "emergency")
        port = page_port(config.page, say)
        asks = "takeover" if config.guard.action == "takeover" else None
        for name, value in (("wait", config.wait), ("teleop", config.teleop), ("guard.action", asks)):
            if value and port is None:
                raise InputError(f"{name}={str(value).lower()} waits for somebody at the page: page=true")
        if not config.record and port is None:
            return
        output = output_dir / RECORD if config.record else None

        def described() -> dict[str, object]:
            return {**_attrs({**asdict(config), **computing()}, robot, spec, limits), "trials": trials}

        attrs = described()
        self._described = described
        self.subscriber = self._recording = RunStream(processes.folder, spec, output=output, attrs=attrs)
        try:
            if port is not None:
                self._teleoperator = teleoperator(config, processes, limits)
                about = _about(processes, spec, limits, config)
                self._open(config, processes, {**about, "trials": trials}, port)
        except BaseException:
            self.close()
            raise

    def _open(self, config: Deploy, robot: ProcessRobot, about: AboutRun, port: int) -> None:
        module = "action_diffusion.deploy.page.process"
        self._page = PageLink(
            module,
            robot.folder,
            host=config.page_host,
            token_file=config.page_token_file,
            port=port,
            about=about,
            stops=True,
        )
        if about["trials"]:
            self.operator = TrialOperator(robot.folder, idle=lambda: self._idle(robot), say=self._say)
        else:
            waits, teleoperator = config.wait, self._teleoperator
            self.operator = PageOperator(robot.folder, waits=waits, teleoperator=teleoperator, say=self._say)
        self._say(f"the operator's page: {self._page.url}")
        if not (config.wait or about["trials"]):
            self._say("it begins at once; wait=true waits for Start on the page")

    def _idle(self, robot: ProcessRobot) -> bool:
        """Whether there is a page for the person who is waited for."""
        robot.arm.renew()
        return self._page is not None and self._page.alive

    @property
    def stopped(self) -> bool:
        """Whether the emergency stop is set."""
        return self._page is not None and self._emergency.t > 0

    def between(self) -> None:
        """Between two episodes: after an emergency stop, wait until it is cleared, and for a start after that.

        Raises `InputError` where nobody is there who could clear it.
        """
        if self._page is None or not self.stopped:
            return
        assert isinstance(self.operator, PageOperator)
        self._say("emergency stop: clear it on the page, then press Start")
        while self.stopped:
            if not self._page.alive:
                raise InputError("the emergency stop is set, and the page where it could be cleared is gone")
            time.sleep(0.05)
        self.operator.let_next_wait()

    def close(self) -> None:
        """The run is over: wait until the record is complete."""
        if self._page is not None:
            self._page.end()
        if self._teleoperator is not None:
            self._teleoperator.close()
        if self._recording is not None:
            self._recording.close(self._described())


def _about(robot: ProcessRobot, spec: PolicySpec, limits: Limits, config: Deploy) -> AboutRun:
    """What the page is told at its start."""
    parts = robot.layout.groups_of(len(limits.low))
    names = [name if size == 1 else f"{name}[{index}]" for name, size, _ in parts for index in range(size)]
    return {
        "task": spec.task,
        "control_rate": spec.control_rate,
        "n_obs_steps": spec.n_obs_steps,
        "cameras": list(robot.cameras),
        "dimensions": names,
        "units": [unit for _, size, unit in parts for _ in range(size)],
        "low": limits.low.tolist(),
        "high": limits.high.tolist(),
        "plane": robot.plane,
        "teleop": config.teleop,
        "trials": False,
        "parts": [] if config.server else _parts(robot, len(limits.low)),
    }


def _parts(robot: ProcessRobot, size: int) -> list[list[int]]:
    """See `AboutRun`; none where there are too many for a person to point at."""
    found, first = list[list[int]](), 0
    for group, (_, width, _) in zip(robot.layout.groups, robot.layout.groups_of(size), strict=True):
        columns = list(range(first, first + width))
        found += [columns] if group.kind == "rotation" else [[column] for column in columns]
        first += width
    return found if size <= MOST_VALUES else []


def _said(config: Mapping[str, Any], spec: PolicySpec) -> str:
    """What is to be done, in words, where the policy is told; else the name of its task."""
    return Words.of(spec, config["instruction"], config["text_model"]).said() if spec.texts else spec.task


def _attrs(config: Mapping[str, object], robot: Robot, spec: PolicySpec, limits: Limits) -> dict[str, object]:
    """What a replay has to know."""
    return {
        "kind": "deployment",
        "format": 1,
        "version": __version__,
        "task": _said(config, spec),
        "observations": {key: value.unit for key, value in spec.observations.items()},
        "control_rate": spec.control_rate,
        "n_obs_steps": spec.n_obs_steps,
        "horizon": spec.horizon,
        "n_action_steps": spec.n_action_steps,
        "lookahead": robot.lookahead,
        "limits": plain_limits(limits),
        "config": {key: config.get(key) for key in _KEPT},
    }
