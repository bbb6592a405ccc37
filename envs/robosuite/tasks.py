"""robomimic's five manipulation tasks on robosuite: the simulators that its files were recorded in.

A simulator is built from the metadata of the data that a policy learnt from (robomimic's `env_args`), whichever version
of robosuite wrote it, or from defaults (Panda, OSC_POSE, 20 Hz). What differs from using robosuite plainly:

- `observe` computes what it is asked for, and `step` nothing: robosuite renders every camera in every step.
- What is observed belongs to the state that is there, as where a file's observations were made from its states.
  robosuite's own are those of one physics step (2 ms) before.
- The score is success, 0 or 1.

Actions of one arm, and of two one after the other (TwoArmTransport):

    relative   [dx dy dz | rx ry rz | gripper]         in [-1, 1]: of 0.05 m and 0.5 rad
    absolute   [x y z | 6D rotation | gripper]         m, world frame; rotation: `datasets.rotations`
    gripper    below 0 opens, above 0 closes
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.datasets.images.points import orbited, pinhole
from action_diffusion.envs import recorded
from action_diffusion.envs.robosuite.headless import Renderer, RenderSettings
from action_diffusion.envs.robosuite.points import PointCloud, View
from action_diffusion.errors import InputError, unknown
from action_diffusion.rotations import axis_angle_to_6d, matrix_to_6d, six_d_to_axis_angle, six_d_to_matrix

PER_ARM = 10  # values of an absolute action
WRENCH = "robot0_wrench"
RECORDED = ("eef_pos", "eef_quat", "gripper_qpos", "gripper_qvel", "joint_pos", "joint_vel")


class Manipulation:
    """One episode at a time of one of `recorded.TASKS`.

    Observations are float32 under robomimic's names: `object`, `robot0_eef_pos` (m), `robot0_eef_quat` (x, y, z, w),
    `robot0_gripper_qpos` (m), `robot0_joint_pos` (rad), … and `<camera>_image`, uint8 [size, size, 3]. Not robomimic's
    are `<camera>_depth`, uint16 [size, size] (mm, see `headless.Renderer.depth`), `points`, float32 [n, 3 or 6] (see
    `points.PointCloud`), and `robot0_wrench`, what the first hand's sensor feels in its own frame: force (N) and torque
    (Nm).

    Source: robosuite (Zhu et al. 2020), robomimic (Mandlekar et al. 2021).
    """

    def __init__(
        self,
        *,
        task: str | None = None,
        env_args: Mapping[str, Any] | None = None,
        absolute: bool = False,
        max_steps: int | None = None,
        points: Mapping[str, Any] | None = None,
        turned: Mapping[str, float] | None = None,
        panned: Mapping[str, float] | None = None,
    ) -> None:
        """task: a name in `recorded.TASKS`; `env_args`, metadata as `recorded.complete` gives or a file holds, says it
        too. absolute: whether actions are. points: options of `points.PointCloud`. turned: cameras that stand
        elsewhere, by degrees about the world's vertical axis, which in Lift goes through the middle of the table.
        panned: cameras that look elsewhere, by degrees about the vertical through themselves.

        Raises `InputError` for a task, robot, controller or setting that does not exist, and without robosuite.
        """
        self._task = recorded.task_of(task, env_args)
        self.max_steps = self._task.steps if max_steps is None else max_steps
        self.env_args = recorded.complete(self._task, env_args)
        self._absolute = absolute
        self._sim = recorded.make(self.env_args, absolute=absolute)
        self._sizes: dict[str, str] = {}
        self._sim.set_xml_processor(lambda scene: recorded.resized(scene, self._sizes, self._task.env_name))
        # Each physics step would compute all observations, and drop them: a tenth of the time.
        refresh = self._sim._update_observables
        self._sim._update_observables = lambda force=False: refresh(force=True) if force else None
        for key in self._sim.observation_names:
            if "joint_pos" in key or "eef_vel" in key:  # robomimic stores these too
                self._sim.modify_observable(key, "active", True)
        self.control_rate = float(self._sim.control_freq)
        n_arms = sum(len(robot.arms) for robot in self._sim.robots)
        self.action_shape: tuple[int, ...] = (PER_ARM * n_arms if absolute else int(self._sim.action_dim),)
        self._renderer = Renderer(RenderSettings(**self.env_args["render"]))
        self._cloud = PointCloud(**(points or {}))
        self._moved = [(name, degrees, False) for name, degrees in (turned or {}).items()]
        self._moved += [(name, degrees, True) for name, degrees in (panned or {}).items()]
        self._turn_cameras()
        self._lags = self.env_args["object_layout"] == "1.5"
        self._found: dict[str, np.ndarray] = {}
        self._steps = 0

    @property
    def n_robots(self) -> int:
        return len(self._sim.robots)

    def episode_metadata(self) -> dict[str, str]:
        """The scene of this episode, under robomimic's name for it."""
        return {"model_file": self.model()}

    @property
    def recorded(self) -> tuple[str, ...]:
        """The low-dimensional observations that robomimic's files hold, and its `states`."""
        robots = [f"robot{index}_{name}" for index in range(self.n_robots) for name in RECORDED]
        return ("states", "object", *robots)

    def metadata(self) -> dict[str, Any]:
        """robomimic's `env_args`: what it takes to build this simulator again."""
        return {"env_args": self.env_args}

    def reset(self, seed: int) -> None:
        """Begin the episode of `seed`, from 0 to 2**32 - 1: what robosuite gives after `numpy.random.seed(seed)`."""
        if not 0 <= seed < 2**32:
            raise InputError(f"{self._task.env_name} seeds run from 0 to {2**32 - 1}, got {seed}")
        self._restart(seed, {})

    def _restart(self, seed: int, sizes: dict[str, str]) -> None:
        self._sizes = sizes
        before = np.random.get_state()
        try:
            np.random.seed(seed)
            self._sim.reset()
        finally:
            np.random.set_state(before)
        self._turn_cameras()
        self._begin()

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Execute `action` for one control period. Returns 1 for success, else 0, and done.

        Done when successful or `max_steps` are over. Raises `InputError` for an action of another shape, or not finite.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_shape or not np.isfinite(action).all():
            raise InputError(
                f"an action of {self._task.env_name} is {self.action_shape[0]} finite numbers, got {action!r}"
            )
        return self._advance(_goals(action) if self._absolute else action)

    def follow(self, goals: np.ndarray) -> tuple[float, bool]:
        """`step` where actions are absolute, of positions, axes times angles and grippers, float64 [7 per arm]."""
        if not self._absolute:
            raise InputError(f"{self._task.env_name} was made for relative actions: it follows no poses")
        return self._advance(goals)

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self._sim.step(action)
        self._steps += 1
        success = bool(self._sim._check_success())
        if self._lags:
            self._look()
        return float(success), success or self._steps >= self.max_steps

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The observations named by `keys`; `states` is `state()`.

        Raises `InputError` for others, and for images without OpenGL.
        """
        cameras = {f"{name}_{kind}": (name, kind) for name in self.cameras for kind in ("image", "depth")}
        if not self._lags:
            self._look()
            self._look()  # robosuite computes where the hand sees the object before it computes where that is
        size = self.env_args["env_kwargs"]["camera_heights"]
        values: dict[str, np.ndarray] = {}
        for key in keys:
            if key == "states":
                values[key] = self.state()
            elif key in cameras:
                values[key] = self._picture(*cameras[key], size)
            elif key == "points":
                self._refresh()
                values[key] = self._cloud.points(
                    [self._view(name, size) for name in self._seen_by(self._cloud.cameras)]
                )
            elif key == WRENCH:
                values[key] = self._wrench().astype(np.float32)
            elif key in self._found:
                values[key] = self._found[key].astype(np.float32)
            else:
                known = ["states", "points", *self._found, WRENCH, *cameras]
                raise unknown(f"observation of {self._task.env_name}", key, known)
        return values

    def _look(self) -> None:
        """Compute all low-dimensional observations of the state that is there."""
        self._refresh()
        found = self._sim._get_observations(force_update=True)
        robots = {key: value for key, value in found.items() if key.startswith("robot") and not key.endswith("-state")}
        self._found = {"object": recorded.object_vector(found, self.env_args), **robots}

    def render(self, size: int = 256) -> np.ndarray:
        """The scene for people, uint8 [size, size, 3]. Raises `InputError` without OpenGL."""
        self._refresh()
        return self._picture(self._task.camera, "image", size)

    def state(self) -> np.ndarray:
        """MuJoCo's time, positions and velocities, float64 [S]: a row of robomimic's `states`."""
        return np.asarray(self._sim.sim.get_state().flatten(), dtype=np.float64)

    def model(self) -> str:
        """The scene, MJCF: what robomimic keeps as a demo's `model_file`."""
        return recorded.resized(self._sim.model.get_xml(), self._sizes, self._task.env_name)

    def restore(self, state: np.ndarray, model: str | None = None) -> None:
        """Begin an episode at a recorded `state` [S].

        model: the MJCF that it was recorded with (a demo's `model_file`), for the sizes of its objects; without it
        they stay. The rest of the scene is this version's own: names and files of robots changed from 1.4 to 1.5.

        Raises `InputError` for a state of another length, and for a model without this task's objects.
        """
        if model is not None:
            self._restart(0, recorded.object_sizes(model, self._task.env_name))
        simulation = self._sim.sim
        expected = 1 + simulation.model.nq + simulation.model.nv
        if np.shape(state) != (expected,):
            raise InputError(f"a state of {self._task.env_name} has {expected} values, got {list(np.shape(state))}")
        simulation.reset()
        simulation.set_state_from_flattened(np.asarray(state, dtype=np.float64))
        simulation.forward()
        self._begin()

    def _begin(self) -> None:
        """Forget what was before, so that an episode depends on nothing but its first state."""
        data = self._sim.sim.data
        for robot in self._sim.robots:
            for arm in robot.arms:
                controller = robot.part_controllers[arm]
                controller.update_initial_joints(data.qpos[controller.qpos_index])
                robot.gripper[arm].current_action = np.zeros(robot.gripper[arm].dof)
        data.qacc_warmstart[:] = 0
        self._steps = 0
        if self._lags:
            self._look()

    def absolute_action(self, action: np.ndarray) -> np.ndarray:
        """What the relative `action` asks for in the state that is there: the absolute one, float64 [10 per arm].

        That is the goal that OSC_POSE sets itself. Raises `InputError` where the controller is another or takes
        absolute actions already.
        """
        self._refresh()
        parts, end = [], 0
        for robot in self._sim.robots:
            for arm in robot.arms:
                controller = robot.part_controllers[arm]
                if controller.name != "OSC_POSE" or controller.input_type != "delta":
                    raise InputError(f"{self._task.env_name} is not controlled by relative actions of OSC_POSE")
                start, end = end, end + controller.control_dim + robot.gripper[arm].dof
                parts += [*self._goal(controller, action[start : start + 6]), action[end - 1 : end]]
        return np.concatenate(parts)

    def hands(self) -> np.ndarray:
        """Where the controllers' hands are in terms of `follow`: positions and axes times angles, float64 [arms, 6]."""
        self._refresh()
        data, poses = self._sim.sim.data, []
        for robot in self._sim.robots:
            for site in (robot.part_controllers[arm].ref_name for arm in robot.arms):
                turn = Rotation.from_matrix(data.get_site_xmat(site)).as_rotvec()
                poses.append(np.concatenate([data.get_site_xpos(site), turn]))
        return np.stack(poses)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self._sim.sim.model.camera_names)

    @property
    def compiled(self) -> Any:
        """The scene of this episode, MuJoCo's `MjModel`."""
        return self._sim.sim.model._model

    def _goal(self, controller: Any, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] and 6D rotation [6] that OSC_POSE goes to when told `action` [6]."""
        data = self._sim.sim.data
        shift, turn = np.split(controller.scale_action(np.asarray(action, dtype=np.float64)), 2)
        base = data.get_site_xmat(f"{controller.naming_prefix}{controller.part_name}_center")
        axes = base if controller.input_ref_frame == "base" else np.eye(3)
        rotation = axes @ six_d_to_matrix(axis_angle_to_6d(turn)) @ axes.T @ data.get_site_xmat(controller.ref_name)
        return data.get_site_xpos(controller.ref_name) + axes @ shift, matrix_to_6d(rotation)

    def close(self) -> None:
        """Release the simulator."""
        self._sim.close()

    def _picture(self, camera: str, kind: str, size: int) -> np.ndarray:
        model, data = self._sim.sim.model, self._sim.sim.data
        draw = self._renderer.depth if kind == "depth" else self._renderer.picture
        return draw(model._model, data._data, model.camera_name2id(camera), size)

    def _wrench(self) -> np.ndarray:
        robot = self._sim.robots[0]
        arm = robot.arms[0]
        return np.concatenate([robot.ee_force[arm], robot.ee_torque[arm]])

    def _view(self, camera: str, size: int) -> View:
        model, data = self._sim.sim.model, self._sim.sim.data
        pixels, metres = self._renderer.seen(model._model, data._data, model.camera_name2id(camera), size)
        pose = np.eye(4)
        pose[:3, :3] = data.get_camera_xmat(camera) @ np.diag([1.0, -1.0, -1.0])  # MuJoCo's look along -z, y up
        pose[:3, 3] = data.get_camera_xpos(camera)
        return View(pixels, metres, pinhole((size, size), model._model.cam_fovy[model.camera_name2id(camera)]), pose)

    def _turn_cameras(self) -> None:
        """Put the cameras that are `turned` or `panned` where they stand."""
        model = self._sim.sim.model
        self._seen_by(camera for camera, _, _ in self._moved)
        for camera, degrees, on_the_spot in self._moved:
            index = model.camera_name2id(camera)
            if model._model.cam_bodyid[index] != 0:
                raise InputError(f"turned, panned: {camera} is fixed to a part that moves, not to the world")
            pose = np.eye(4)
            pose[:3, :3] = Rotation.from_quat(np.roll(model._model.cam_quat[index], -1)).as_matrix()
            pose[:3, 3] = model._model.cam_pos[index]
            pose = orbited(pose, degrees, pose[:2, 3] if on_the_spot else (0.0, 0.0))
            model._model.cam_pos[index] = pose[:3, 3]
            model._model.cam_quat[index] = np.roll(Rotation.from_matrix(pose[:3, :3]).as_quat(), 1)

    def _seen_by(self, cameras: Iterable[str]) -> list[str]:
        """The cameras, which must be there."""
        for camera in cameras:
            if camera not in self.cameras:
                raise unknown(f"camera of {self._task.env_name}", camera, self.cameras)
        return list(cameras)

    def _refresh(self) -> None:
        """Put bodies where the positions of their joints say. What comes next does not depend on it."""
        import mujoco

        model, data = self._sim.sim.model._model, self._sim.sim.data._data
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, data)


def _goals(action: np.ndarray) -> np.ndarray:
    """An absolute action [10 per arm] as the controllers take it: position, axis times angle, gripper [7 per arm]."""
    arms = action.reshape(-1, PER_ARM)
    return np.concatenate([arms[:, :3], six_d_to_axis_angle(arms[:, 3:9]), arms[:, 9:]], axis=1).ravel()


lift = functools.partial(Manipulation, task="lift")
can = functools.partial(Manipulation, task="can")
square = functools.partial(Manipulation, task="square")
transport = functools.partial(Manipulation, task="transport")
tool_hang = functools.partial(Manipulation, task="tool_hang")
