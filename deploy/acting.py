"""A policy that acts on a robot: opened, checked against it and warmed up, with its queue and its gate."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.loop.clock import Clock, MonotonicClock
from action_diffusion.deploy.loop.episode import run_episode
from action_diffusion.deploy.loop.events import Outcome, StepRecord, Subscriber
from action_diffusion.deploy.loop.gate import Gate, demonstrated
from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.deploy.loop.operator import Operator
from action_diffusion.deploy.loop.prediction import Guidance, PolicyElsewhere, rehearse
from action_diffusion.deploy.robot import robots
from action_diffusion.deploy.robot.robots import Robot
from action_diffusion.deploy.robot.told import ToldRobot
from action_diffusion.deploy.serve.policies import DeployedPolicy, open_policy
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy
from action_diffusion.policy.action_queue import ActionQueue, check_room
from action_diffusion.policy.extensions.watch import LEVEL
from action_diffusion.policy.history import History
from action_diffusion.policy.inference import choose_threads
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.policy.text.words import Words


class EpisodeRunner:
    """Opens the policy that `config` asks for; `meet` comes before the first `episode`.

    Attributes:
        threads: of torch, with which the policy is the fastest here; None for one elsewhere.
        limits: of the gate, once the robot is known.

    Raises:
        InputError: for a bundle that cannot be loaded, for a scheduling that its chunks are too short for, and where
            nobody says what it is to do.
    """

    limits: Limits

    def __init__(self, config: Deploy) -> None:
        self.policy: DeployedPolicy = open_policy(config)
        self.threads = None if isinstance(self.policy, PolicyElsewhere) else choose_threads(self.policy)
        self._config, self._guidance = config, Guidance(**vars(config.rtc))
        self._queue = _queue(config, self.policy.spec)
        self._told = Words.of(self.policy.spec, config.instruction, config.text_model).vectors()

    def meet(self, robot: Robot) -> None:
        """The robot is there: what a policy may command, and its first prediction, which also allocates memory and
        picks kernels, and is to be behind us before the robot moves.

        Raises `InputError` where they do not fit, and where something is to be done about alarms and nobody guards.
        """
        spec, guard = self.policy.spec, self._config.guard.action
        robots.check_fit(robot, spec)
        self.limits = demonstrated(spec.normalizer["action"], self._config.safety.margin).within(robot.limits)
        queue = self._queue
        try:
            said = rehearse(self.policy, self._guidance, queue.execution_horizon if queue.scheduling == "rtc" else None)
        except Unavailable as error:
            raise InputError(str(error)) from None
        if guard != "warn" and LEVEL not in said.notes:
            where = "action-diffusion serve" if isinstance(self.policy, PolicyElsewhere) else "deploy"
            raise InputError(f"guard.action={guard} needs a guard: give {where} extensions=[guard]")

    def episode(
        self,
        robot: Robot,
        *,
        seed: int,
        log: Callable[[StepRecord], None],
        operator: Operator,
        subscriber: Subscriber,
        clock: Clock | None = None,
        keys: Collection[str] | None = None,
    ) -> Outcome:
        """Run one, see `run_episode`. clock: real time where none is given; on another the loop thinks by itself.

        keys: what is observed, where that is more than this policy looks at.
        """
        config, spec = self._config, self.policy.spec
        if self.threads is not None and not isinstance(self.policy, OnnxPolicy):
            import torch

            if self.threads != torch.get_num_threads():  # setting them forgets kernels
                torch.set_num_threads(self.threads)
        waits = config.scheduling == "sync" and not isinstance(self.policy, PolicyElsewhere)
        return run_episode(
            policy=self.policy,
            robot=cast(Robot, ToldRobot(robot, self._told)) if self._told else robot,
            history=History(spec.n_obs_steps, list(spec.observations)),
            queue=self._queue,
            gate=Gate(limits=self.limits),
            guidance=self._guidance,
            guard=config.guard.action,
            clock=clock or MonotonicClock(),
            beside=clock is None and not waits,
            log=log,
            seed=seed,
            keys=list(keys or spec.observations),
            delay=config.delay or 0,
            operator=operator,
            subscriber=subscriber,
        )

    def close(self) -> None:
        """Let go of a policy elsewhere."""
        if isinstance(self.policy, PolicyElsewhere):
            self.policy.close()


def ways(policy: DeployedPolicy) -> dict[str, Any]:
    """The kernels that torch took for it, and on what machine; ONNX Runtime does not say."""
    if isinstance(policy, OnnxPolicy):
        return {}
    from action_diffusion import choice

    return {"ways": choice.table().taken, "machine": choice.machine()}


def _queue(config: Deploy, spec: PolicySpec) -> ActionQueue:
    """The queue that is asked for. Raises `InputError` where the policy's chunks are too short for it."""
    name, n_obs_steps, s = config.scheduling, spec.n_obs_steps, config.execution_horizon or spec.n_action_steps
    queue = ActionQueue(name, n_obs_steps=n_obs_steps, execution_horizon=s)
    delay = config.delay or 0
    check_room(name, horizon=spec.horizon, n_obs_steps=n_obs_steps, execution_horizon=s, delay=delay)
    return queue
