"""robosuite's Panda in real time: its simulator, its arm and its cameras as processes of their own (see `world`).

    arm's process, 125 Hz     simulator, 100 Hz                   camera's process (each), 20 Hz
    PandaArm.send ─ targets ─▶ PandaWorld: OSC_POSE, MuJoCo ─┬─ world: MuJoCo's positions, … ─▶ PandaCamera.read
    PandaArm.read ◀── world: position, rotation, … ──────────┘└ scene.mjb, sizes ───────────▶   its own model

The tasks are those of `envs.manipulation`, its actions absolute poses. A camera has the whole model in its own process,
so that rendering, which takes ten times as long as a step, delays neither the world nor the other camera.
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.deploy.ipc.processes import serve
from action_diffusion.deploy.ipc.rings import Record, RingReader, RingWriter
from action_diffusion.deploy.sim.world import SimulatedArm, SimulatedCamera, SimulatedWorld, keep_time
from action_diffusion.envs.robosuite.headless import Renderer, RenderSettings
from action_diffusion.errors import InputError

RATE = 100.0
SCENE, SIZES = "scene.mjb", "sizes"
TASKS = ("lift", "can", "square")
"""Those with one arm and an expert."""
POINTING_DOWN = (np.pi / np.sqrt(2), np.pi / np.sqrt(2), 0.0)
"""The hand's rotation vector when an episode begins, but for a few degrees; limits of its rotation count from it."""
_EACH = 1 / np.sqrt(3)
LIMITS = Limits(
    low=np.array([-0.5, -0.6, 0.79, *[-1.7] * 3, -2.0]),
    high=np.array([0.5, 0.6, 1.5, *[1.7] * 3, 2.0]),
    max_step=np.array([*[np.inf] * 6, 4.0]),
    velocity=np.array([*[1.7 * _EACH] * 3, *[2.5 * _EACH] * 3, np.inf]),
    acceleration=np.array([*[13.0 * _EACH] * 3, *[25.0 * _EACH] * 3, np.inf]),
    jerk=np.array([*[6500.0 * _EACH] * 3, *[12500.0 * _EACH] * 3, np.inf]),
)
"""Above the table (m), within 98° of pointing down; velocity, acceleration and jerk are Franka's for Cartesian motion,
shared out among three axes (https://frankaemika.github.io/docs/control_parameters.html, of the Panda)."""


class PandaWorld(SimulatedWorld):
    """The simulator. env: keywords of `envs.manipulation`'s simulators, and its `name`."""

    rate = RATE

    def __init__(self, folder: Path, *, env: Mapping[str, Any], latency: float = 0.0) -> None:
        from action_diffusion.envs import recorded
        from action_diffusion.envs.robosuite import tasks

        task = recorded.task_of(env["name"], env.get("env_args"))
        self.env_args = recorded.complete(task, env.get("env_args"))
        self.max_steps = env.get("max_steps") or task.steps
        quick = copy.deepcopy(self.env_args)
        quick["env_kwargs"]["control_freq"] = RATE
        self._env = tasks.Manipulation(env_args=quick, absolute=True, max_steps=10**9)
        self._gripper_every = round(RATE / self.env_args["env_kwargs"]["control_freq"])
        self._keys = [*self._env.recorded, tasks.WRENCH]
        self._env.reset(0)
        model = self._env.compiled
        importlib.import_module("mujoco").mj_saveModel(model, str(folder / SCENE))
        self._sizes = RingWriter(folder / SIZES, fields={"sizes": ("f8", model.geom_size.shape)}, n_slots=4)
        self._begin()
        shapes = {key: np.shape(value) for key, value in self.values().items()}
        super().__init__(folder, fields={key: ("f8", shape) for key, shape in shapes.items()}, latency=latency)

    @property
    def cameras(self) -> list[str]:
        return [f"{name}_{kind}" for kind in ("image", "depth") for name in self._env.cameras]

    def reset(self, seed: int) -> None:
        self._env.reset(seed)
        self._begin()

    def _begin(self) -> None:
        """Tell the cameras how large objects are, which is another size in every episode, and all that changes."""
        self._scene = self._sizes.append(time.monotonic(), {"sizes": self._env.compiled.geom_size})
        self._gripper, self._steps, self._success = 0.0, 0, False
        self._held: np.ndarray | None = None

    def advance(self, target: np.ndarray | None) -> tuple[float, bool]:
        """Once successful, an episode stays so."""
        if target is None:
            self._held = self._env.hands()[0] if self._held is None else self._held
            target = np.append(self._held, self._gripper)
        else:
            self._held, self._gripper = None, float(target[6])
        # A gripper's command moves it by one step each time it is given: as often here as in the task's own simulator.
        moves = self._steps % self._gripper_every == 0
        self._steps += 1
        reward, _ = self._env.follow(np.append(target[:6], self._gripper * moves))
        self._success = self._success or reward >= 1.0
        return float(self._success), self._success

    def values(self) -> Mapping[str, np.ndarray | int]:
        seen, (hand,) = self._env.observe(self._keys), self._env.hands()
        pose = {"position": hand[:3], "rotation": hand[3:], "gripper": np.array([self._gripper])}
        return {**pose, **seen, "scene": self._scene}


def run(*, folder: Path, name: str, env: Mapping[str, Any], latency: float = 0.0) -> None:
    """The simulator's process. Says what its task is: the values that `simulated.sim_arm` needs."""
    world = PandaWorld(folder, env=env, latency=latency)
    kwargs = world.env_args["env_kwargs"]
    said = {"control_rate": kwargs["control_freq"], "image_size": kwargs["camera_heights"], "cameras": world.cameras}
    keep_time(world, folder, name, {**said, "max_steps": world.max_steps, "env_args": world.env_args})


class PandaArm(SimulatedArm):
    """Commands are poses of the hand in the world's frame, and the gripper: below 0 opens, above 0 closes.

    State is that, and the observations of the task under robomimic's names. `world`: the folder of the run's shared
    memory, in which the simulator is.
    """

    rate = 125.0
    size = 7
    command: tuple[Group, ...] = (
        Group(name="position", size=3, kind="linear", unit="m", at_stop="present"),
        Group(name="rotation", size=3, kind="rotation", unit="rad", at_stop="present", reference=POINTING_DOWN),
        Group(name="gripper", size=1, kind="hold", at_stop="present"),
    )

    def __init__(self, *, world: str) -> None:
        super().__init__(world=world)
        self.limits: Limits | None = LIMITS
        fields = RingReader(self._folder / "world").fields
        more = [Group(name=key, size=shape[0], kind="linear") for key, (_, shape) in fields.items() if shape]
        named = {group.name for group in self.command}
        self.state = (*self.command, *(group for group in more if group.name not in named))

    def state_of(self, record: Record) -> ArmState:
        return ArmState(record.t, {group.name: record.values[group.name] for group in self.state})


class PandaCamera(SimulatedCamera):
    """One of the task's cameras. camera: its name. render: see `RenderSettings`. depth: it measures how far things
    are, uint16 in mm, and shows no colours."""

    def __init__(
        self,
        *,
        world: str,
        camera: str,
        image_size: int,
        render: Mapping[str, Any],
        depth: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(world=world, image_size=image_size, **settings)
        self._camera, self._render, self._depth = camera, dict(render), depth
        self.shape = self.shape[:2] if depth else self.shape

    def prepare(self) -> None:
        self._mujoco = importlib.import_module("mujoco")
        self._renderer, self._scene = Renderer(RenderSettings(**self._render)), -1
        self._model = self._mujoco.MjModel.from_binary_path(str(self._folder / SCENE))
        self._data = self._mujoco.MjData(self._model)
        self._sizes = RingReader(self._folder / SIZES)

    def drawn(self, record: Record) -> np.ndarray:
        """Raises `TimeoutError` for a scene that is over by now."""
        mujoco, model, data = self._mujoco, self._model, self._data
        scene = int(record.values["scene"])
        if scene != self._scene:
            sizes = self._sizes.read(scene)
            if sizes is None:
                raise TimeoutError("no frame: the scene is over")
            model.geom_size[:], self._scene = sizes.values["sizes"], scene
        data.qpos[:] = record.values["states"][1 : 1 + model.nq]
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, data)
        draw = self._renderer.depth if self._depth else self._renderer.picture
        return draw(model, data, model.camera(self._camera).id, self.shape[0])


def check_task(env: Mapping[str, Any] | None, absolute: bool) -> Mapping[str, Any]:
    """The settings of a task's simulator. Raises `InputError` where `robot=sim_arm` cannot do that task."""
    if env is None or env.get("name") not in TASKS:
        known = ", ".join(TASKS)
        raise InputError(f"robot=sim_arm does {known}; this is {'no simulated task' if env is None else env['name']}")
    if not absolute:
        raise InputError("robot=sim_arm takes absolute poses: train with task.env.absolute=true, docs/robomimic.md")
    return env


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
