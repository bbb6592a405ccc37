"""Pictures of MuJoCo scenes on machines without a screen, through EGL (a GPU's, or Mesa's in software) or OSMesa.

Which of them works is found out by trying, in a child process, because a driver that fails can take the process with
it, and because PyOpenGL settles on one platform when it is first imported. It is tried when the first picture is asked
for: a run without images needs no OpenGL.

Making what OpenGL draws with (textures and meshes on its side) takes 0.7 s, a picture 0.01 s. So it is made once in a
process for all simulators that show the same scene, and kept over their episodes:

    simulator 1 ─ scene ─┐
    simulator 2 ─ scene ─┴─ context of Lift        simulator 3 ─ scene ─── context of PickPlaceCan
"""

from __future__ import annotations

import atexit
import importlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.errors import InputError

BACKENDS = ("egl", "osmesa")
TRIAL = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 100)
"""
TRIAL_SECONDS = 60
MAX_GEOMS = 2000  # in a scene; the largest, TwoArmTransport, has 163


def choose() -> None:
    """Set `MUJOCO_GL` to what works here, for this process and its children, unless it is set.

    Raises `InputError` where neither EGL nor OSMesa works.
    """
    if "MUJOCO_GL" in os.environ or platform.system() != "Linux":
        return
    working = next((name for name in BACKENDS if _works(name)), None)
    if working is None:
        raise _unavailable("neither EGL nor OSMesa works")
    os.environ["MUJOCO_GL"] = working


def _works(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend}
    try:
        trial = subprocess.run(
            [sys.executable, "-c", TRIAL], env=environment, capture_output=True, timeout=TRIAL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return trial.returncode == 0


class RenderSettings(NamedTuple):
    """What decides how a picture looks beside the scene; the fast choice differs by 0.5/255 on average.

    Attributes:
        reflections: whether shiny materials mirror the scene (twice the time).
        samples: of multisampling, 0 for none (4: half as much time again).
    """

    reflections: bool = False
    samples: int = 0


@dataclass
class _Context:
    gl: Any
    drawing: Any
    size: int

    def free(self) -> None:
        self.gl.make_current()
        self.drawing.free()
        self.gl.free()


_contexts: dict[tuple[Any, ...], _Context] = {}


def _free_all() -> None:
    while _contexts:
        _contexts.popitem()[1].free()


class Renderer:
    """Takes pictures of one model after the other (a simulator's, which is another after every reset)."""

    def __init__(self, settings: RenderSettings) -> None:
        self._settings = settings
        self._mujoco: Any = importlib.import_module("mujoco")
        self._model: Any = None
        self._scene: Any = None

    def picture(self, model: Any, data: Any, camera: int, size: int) -> np.ndarray:
        """What camera number `camera` sees: uint8 [size, size, 3], the top row first.

        model, data: MuJoCo's `MjModel` and `MjData`, of which positions are current.
        Raises `InputError` where OpenGL does not work.
        """
        pixels = np.empty((size, size, 3), np.uint8)
        self._read(model, data, camera, size, pixels, None)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's first row is the lowest

    def seen(self, model: Any, data: Any, camera: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The `picture`, and how far away all that it shows is, along the camera's axis: float32 [size, size] in m; 0
        where there is nothing."""
        pixels, buffer = np.empty((size, size, 3), np.uint8), np.empty((size, size), np.float32)
        self._read(model, data, camera, size, pixels, buffer)
        near, far = (model.stat.extent * plane for plane in (model.vis.map.znear, model.vis.map.zfar))
        metres = near / (1 - buffer.astype(np.float64) * (1 - near / far))  # OpenGL's is one of 1 / distance
        metres[buffer >= 1] = 0
        return np.ascontiguousarray(pixels[::-1]), metres[::-1].astype(np.float32)

    def depth(self, model: Any, data: Any, camera: int, size: int) -> np.ndarray:
        """How far away what camera number `camera` sees is, along its axis: uint16 [size, size] in mm, the top row
        first; 0 where there is nothing, or where it is farther than 65.535 m. Arguments are those of `picture`."""
        mm = np.round(1000 * self.seen(model, data, camera, size)[1])
        return np.where(mm <= np.iinfo(np.uint16).max, mm, 0).astype(np.uint16)

    def _read(
        self, model: Any, data: Any, camera: int, size: int, pixels: np.ndarray | None, depth: np.ndarray | None
    ) -> None:
        """Draw, and fill `pixels` or `depth`, or both."""
        mj = self._mujoco
        if model is not self._model:
            self._model, self._scene = model, mj.MjvScene(model, maxgeom=MAX_GEOMS)
            self._scene.flags[mj.mjtRndFlag.mjRND_REFLECTION] = self._settings.reflections
        context = _context(mj, model, self._settings.samples, size)
        context.gl.make_current()  # another simulator's may be current
        view = mj.MjvCamera()
        view.type, view.fixedcamid = mj.mjtCamera.mjCAMERA_FIXED, camera
        options = mj.MjvOption()
        options.geomgroup[0] = 0  # collision shapes
        everything = mj.mjtCatBit.mjCAT_ALL
        mj.mjv_updateScene(model, data, options, mj.MjvPerturb(), view, everything, self._scene)
        viewport = mj.MjrRect(0, 0, size, size)
        mj.mjr_render(viewport, self._scene, context.drawing)
        mj.mjr_readPixels(pixels, depth, viewport, context.drawing)


def _context(mj: Any, model: Any, samples: int, size: int) -> _Context:
    """The context that shows `model`: the same for models of the same assets, whatever the sizes of their objects."""
    assets = (model.names, model.tex_adr, model.mesh_vertadr, model.mat_texid, model.mat_texrepeat)
    key = (samples, *(np.asarray(asset).tobytes() for asset in assets[1:]), model.names)
    if key not in _contexts:
        _contexts[key] = _made(mj, model, samples, size)
    context = _contexts[key]
    if size > context.size:
        context.gl.make_current()
        mj.mjr_resizeOffscreen(size, size, context.drawing)
        context.size = size
    return context


def _made(mj: Any, model: Any, samples: int, size: int) -> _Context:
    choose()
    backend = os.environ.get("MUJOCO_GL", "")
    model.vis.quality.offsamples = samples
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    try:
        # mujoco.GLContext is what MUJOCO_GL said when mujoco was imported, which may be long ago.
        module = importlib.import_module(f"mujoco.{backend}") if backend in BACKENDS else mj
        gl = module.GLContext(size, size)
        gl.make_current()
        drawing = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_100)
    except Exception as error:  # whatever the driver, its Python binding or the loader raises
        raise _unavailable(f"MUJOCO_GL={backend} does not work") from error
    mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, drawing)
    if not _contexts:
        atexit.register(_free_all)  # runs before what mujoco has registered
    return _Context(gl, drawing, size)


def _unavailable(why: str) -> InputError:
    return InputError(
        f"images need OpenGL, and {why} here: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri (EGL), "
        "or libosmesa6 (OSMesa)"
    )
