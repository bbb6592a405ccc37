"""Leader arms: anything that lerobot reads through its `Teleoperator` classes (SO-100, SO-101, Koch, OMX leaders, …).

A leader shows places: the follower is commanded where the leader is, joint by joint, no faster than its limits allow.
So at the beginning it comes to the leader by itself; bring the leader near it before you press Start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from action_diffusion.deploy.drivers.lerobot import INSTALL, SIX, answered, configuration, opened
from action_diffusion.deploy.drivers.vendor import attempt, library, numbers, one_line
from action_diffusion.deploy.teleop.devices.device import Signals
from action_diffusion.errors import InputError


class Leader:
    """See `device.Device`.

    Args:
        type: lerobot's name: "so101_leader", "koch_leader", …
        config: what its configuration takes: {port: /dev/ttyACM1, id: my_leader, …}.
        plugin: the package that brings the type, where it is not lerobot's own; "": lerobot_teleoperator_TYPE.
        motors: names as in lerobot's actions, without ".pos", in the order of the follower's commands.
    """

    help = "the leader arm drives; Enter start, k keep, Backspace discard, u undo in the terminal"

    def __init__(self, *, type: str, config: Mapping[str, Any], plugin: str = "", motors: Sequence[str] = SIX) -> None:
        self._type, self._config, self._motors = type, dict(config), [f"{name}.pos" for name in motors]
        self._plugin = plugin
        self._leader: Any = None

    def connect(self) -> None:
        library_ = library("lerobot.teleoperators", "lerobot", INSTALL)
        try:
            settings = configuration(library_, library_.TeleoperatorConfig, self._type, self._config, self._plugin)
            leader = library_.make_teleoperator_from_config(settings)
            missing = [name for name in self._motors if name not in leader.action_features]
            if missing:
                raise InputError(f"it has no {', '.join(missing)}; it has {', '.join(leader.action_features)}")
            self._leader = leader
            opened(leader, lambda: leader.connect(calibrate=False))
            if not leader.is_calibrated:
                raise InputError(f"it is not calibrated: lerobot-calibrate --teleop.type={self._type} …")
            self.poll()
        except Exception as error:
            hint = f"; install {INSTALL}" if isinstance(error, ImportError) else ""
            raise InputError(f"lerobot's {self._type}: {one_line(error)}{hint}") from error

    def poll(self) -> Signals:
        """Raises `InputError` where the leader does not answer, or says what is no number."""
        try:
            said, _ = answered(self._leader, self._leader.get_action)
            values = [float(said[name]) for name in self._motors]
            return Signals(target=numbers(values, len(values), "lerobot's positions"))
        except Exception as error:
            raise InputError(f"lerobot's {self._type}: {one_line(error)}") from error

    def close(self) -> None:
        leader, self._leader = self._leader, None
        if leader is not None:
            attempt(leader.disconnect)
