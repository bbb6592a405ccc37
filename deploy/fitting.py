"""Whether a policy fits a robot, as far as a bundle says it without its network, and a driver without hardware.

What is refused here is refused in a second; `robot.robots.check_fit` looks at the robot that has started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.protocols import Group, make_arm
from action_diffusion.deploy.robot.cell import arm_setup, camera_setups, check_cameras, read_cell
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.registry import ARMS


def check_spec(config: Deploy, spec: PolicySpec) -> None:
    """Raises `InputError` where the actions of `spec` are no commands of the arm, or the cell lacks a camera.

    An arm that is named by its class is made for it, and not started.
    """
    if config.robot not in ARMS and ":" not in config.robot:
        return
    if config.robot == "sim_arm":
        from action_diffusion.deploy.sim.panda import check_task

        check_task(spec.env, absolute=bool((spec.env or {}).get("absolute")))
    driver: Any = ARMS.load(config.robot) if config.robot in ARMS else None
    rate = getattr(driver, "control_rate", spec.control_rate)
    if rate != spec.control_rate:
        raise InputError(
            f"bundle={config.bundle}: the bundle's actions are meant for {spec.control_rate:g} Hz, the robot takes "
            f"commands at {rate:g} Hz"
        )
    if hasattr(driver, "command"):  # of all of its kind
        groups: tuple[Group, ...] = driver.command
    else:
        groups = _in_cell(config, read_cell(config.hardware), spec)
    try:
        CommandLayout(groups).groups_of(spec.action.shape[0])
    except InputError as error:
        raise InputError(f"bundle={config.bundle} does not fit robot={config.robot}: {error}") from None


def _in_cell(config: Deploy, cell: Mapping[str, Any], spec: PolicySpec) -> tuple[Group, ...]:
    """The groups of a command of the arm, as the file sets it up."""
    check_cameras(spec.cameras, camera_setups(cell), config.hardware)
    setup = arm_setup(config.robot, cell, dry_run=config.dry_run)
    return make_arm(config.robot, **setup.settings).command
