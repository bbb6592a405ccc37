"""Parts by name: the package's own, those of installed packages, and those of a file that the user names.

    configuration: encoder.name=mine ─▶ ENCODERS.load("mine") ─▶ the class, called with the other values

Names come from three places, in this order: this package; files given by `plugins=` (imported because the user named
them, in this process and in those that it starts); installed packages, by an entry point of the group
`action_diffusion.<registry>`. A bundle names parts and never code: where a name is missing, loading says which package
had it. docs/extending.md shows a part of each kind.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from action_diffusion.errors import InputError, unknown

PLUGINS = "ACTION_DIFFUSION_PLUGINS"
"""Variable of the environment: the files of `plugins=`, separated as in PATH, for the processes that a run starts."""

T = TypeVar("T")


class Origin(NamedTuple):
    """Where a part comes from: the name and version of an installed package, or a file and no version."""

    name: str
    version: str


class Registry(Mapping[str, Any]):
    """Names → "module:attribute", or the part itself where it was registered by a plugin.

    Args:
        kind: what one of them is, for messages ("encoder").
        group: entry points of installed packages are looked for in `action_diffusion.<group>`.
        own: this package's.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, str]) -> None:
        self.kind, self.group, self.own = kind, f"action_diffusion.{group}", dict(own)
        self._given: dict[str, tuple[Any, Origin]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator for a plugin's class or function: `@ENCODERS.register("mine")`.

        Raises `InputError` for a name that this package has, or that another plugin has taken.
        """

        def add(part: T) -> T:
            origin = _origin(part)
            if name in self.own or self._given.get(name, (None, origin))[1] != origin:
                raise InputError(f"{origin.name}: the name {name!r} ({self.kind}) is taken: choose another one")
            self._given[name] = part, origin
            return part

        return add

    def load(self, name: str, what: str | None = None) -> Any:
        """The part called `name`, imported now. `what`: the option that named it, for the message.

        Raises `InputError` for a name that nobody has, suggesting close ones, and for a part that cannot be imported.
        """
        if name not in self:
            raise unknown(what or self.kind, str(name), self)
        found = self[name]
        if not isinstance(found, str):
            return found
        try:
            return imported(found)
        except (ImportError, AttributeError) as error:
            if name in self.own:
                raise
            raise InputError(f"{self.kind} {name!r} of {self.origin(name)[0]}: {error}") from error

    def origin(self, name: str) -> Origin:
        """Who has the part called `name`; ("action-diffusion", …) for this package's own."""
        if name in self.own:
            return Origin("action-diffusion", metadata.version("action-diffusion"))
        if name in self._given:
            return self._given[name][1]
        package = self._installed()[name].dist
        return Origin(package.name, package.version) if package is not None else Origin("an unknown package", "")

    def __getitem__(self, name: str) -> Any:
        if name in self.own:
            return self.own[name]
        load_plugins()
        return self._given[name][0] if name in self._given else self._installed()[name].value

    def __contains__(self, name: object) -> bool:
        if name in self.own:
            return True
        load_plugins()
        return name in self._given or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        yield from dict.fromkeys([*self.own, *self._given, *self._installed()])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _installed(self) -> dict[str, metadata.EntryPoint]:
        return {point.name: point for point in _entry_points(self.group) if point.name not in self.own}


def imported(place: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_arguments(part: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    """`InputError` for keywords that `part` does not take, or lacks. where: what is made, for the message."""
    parameters = inspect.signature(part).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for name in given:
        if name not in [parameter.name for parameter in parameters]:
            raise unknown(f"option of {where}", name, [parameter.name for parameter in parameters])
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in given:
            raise InputError(f"{where} needs {parameter.name}=…")


def use_plugins(files: str | list[str] | None) -> None:
    """Import the files that `plugins=` names, now and in every process that is started from here.

    Raises `InputError` for a file that is not there, is no Python, or fails.
    """
    if not files:
        return
    named = [Path(file).expanduser().resolve() for file in ([files] if isinstance(files, str) else files)]
    for file in named:
        if not _is_python(file):
            raise InputError(f"plugins={str(file)[:400]}: no such Python file")
    known = [Path(file) for file in os.environ.get(PLUGINS, "").split(os.pathsep) if file]
    os.environ[PLUGINS] = os.pathsep.join(map(str, dict.fromkeys([*known, *named])))
    load_plugins()


def _is_python(file: Path) -> bool:
    try:
        return file.suffix == ".py" and file.is_file()
    except OSError:  # of a name that is too long
        return False


def load_plugins() -> None:
    """Import each file of the variable `PLUGINS` once in this process."""
    for file in filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)):
        name = _module_name(Path(file))
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except InputError:
            del sys.modules[name]
            raise
        except Exception as error:
            del sys.modules[name]
            raise InputError(f"plugins={file}: {type(error).__name__}: {error}") from error


def _module_name(file: Path) -> str:
    """The same in every process, so that what a plugin makes can be pickled."""
    return f"action_diffusion_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def _origin(part: Any) -> Origin:
    module = sys.modules.get(getattr(part, "__module__", ""))
    file = getattr(module, "__file__", None)
    return Origin(Path(file).name if file else "an interactive session", "")


@cache
def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))


_POLICY, _DEPLOY = "action_diffusion.policy.model", "action_diffusion.deploy"

ENCODERS = Registry("encoder", "encoders", {"observation": f"{_POLICY}.encoders.encoder:ObservationEncoder"})
DENOISERS = Registry(
    "denoiser",
    "denoisers",
    {
        "dit": f"{_POLICY}.denoisers.dit:DiffusionTransformer",
        "transformer": f"{_POLICY}.denoisers.transformer:TransformerDenoiser",
        "unet1d": f"{_POLICY}.denoisers.unet:ConditionalUnet1d",
    },
)
TEXT_ENCODERS = Registry(
    "text encoder",
    "text_encoders",
    {
        "clip": "action_diffusion.policy.text.encoders:ClipEncoder",
        "minilm": "action_diffusion.policy.text.encoders:MiniLm",
        "task_id": "action_diffusion.policy.text.encoders:TaskId",
    },
)
ESTIMATORS = Registry("estimator", "estimators", {"planar_pose": f"{_POLICY}.estimator:PlanarPose"})
OBJECTIVES = Registry(
    "objective",
    "objectives",
    {
        "consistency": "action_diffusion.policy.objectives.consistency:Consistency",
        "denoising": "action_diffusion.policy.objectives.objective:Denoising",
        "diffusion_ql": "action_diffusion.policy.offline.diffusion_ql:DiffusionQl",
        "distillation": "action_diffusion.policy.objectives.distillation:Distillation",
        "flow_map": "action_diffusion.policy.objectives.flow_maps:FlowMap",
        "mean_flow": "action_diffusion.policy.objectives.flow_maps:MeanFlow",
        "mip": "action_diffusion.policy.objectives.objective:TwoRegressions",
        "shortcut": "action_diffusion.policy.objectives.flow_maps:Shortcut",
        "sobolev": "action_diffusion.policy.objectives.sobolev:Sobolev",
    },
)
EXTENSIONS = Registry(
    "extension",
    "extensions",
    {
        "best_of": "action_diffusion.policy.extensions.best_of:BestOf",
        "cache": "action_diffusion.policy.extensions.cache:Cache",
        "constraint": "action_diffusion.policy.extensions.constraint:Constraint",
        "guard": "action_diffusion.policy.extensions.guard:Guard",
        "intents": "action_diffusion.policy.extensions.intents:Intents",
        "steering": "action_diffusion.policy.extensions.steering:Steering",
        "tokens": "action_diffusion.policy.extensions.tokens:Tokens",
        "transport": "action_diffusion.policy.extensions.transport:Transport",
    },
)
METHODS = Registry(
    "method",
    "methods",
    {
        "dppo": "action_diffusion.training.reward.methods.dppo:Dppo",
        "dsrl": "action_diffusion.training.reward.methods.dsrl:Dsrl",
        "dsrl_sac": "action_diffusion.training.reward.methods.dsrl_sac:DsrlSac",
        "fisher": "action_diffusion.training.reward.methods.fisher:Fisher",
        "fmq": "action_diffusion.training.reward.methods.fmq:Fmq",
        "idql": "action_diffusion.training.reward.methods.idql:Idql",
    },
)
PROCESSES = Registry(
    "process",
    "processes",
    {
        "diffusion": "action_diffusion.policy.diffusion.process:Diffusion",
        "flow": "action_diffusion.policy.diffusion.process:Flow",
        "masked": "action_diffusion.policy.diffusion.masked:Masked",
        "mip": "action_diffusion.policy.diffusion.process:Mip",
    },
)
FEATURES = Registry(
    "feature",
    "features",
    {
        "sin_cos": f"{_POLICY}.features:SinCos",
        "magnified": f"{_POLICY}.features:Magnified",
        "planar_object": f"{_POLICY}.features:PlanarObject",
    },
)
ACTION_FRAMES = Registry(
    "action frame",
    "action_frames",
    {
        "planar_object": f"{_POLICY}.frames:PlanarObjectFrame",
        "pose": f"{_POLICY}.poses:Pose",
        "position": f"{_POLICY}.frames:Position",
    },
)
ENVS = Registry(
    "environment",
    "envs",
    {
        "gymnasium": "action_diffusion.envs.gymnasium.simulator:GymnasiumEnv",
        "pusht": "action_diffusion.envs.pusht.simulator:PushT",
        **{
            task: f"action_diffusion.envs.robosuite.tasks:{task}"
            for task in ("lift", "can", "square", "transport", "tool_hang")
        },
    },
)
ARMS = Registry(
    "arm",
    "arms",
    {
        "ideal": f"{_DEPLOY}.sim.pusht:IdealArm",
        "sim_pusht": f"{_DEPLOY}.sim.pusht:PushTArm",
        "sim_arm": f"{_DEPLOY}.sim.panda:PandaArm",
        "ur": f"{_DEPLOY}.drivers.ur:UrArm",
        "franka": f"{_DEPLOY}.drivers.franka:FrankaArm",
        "lerobot": f"{_DEPLOY}.drivers.lerobot:LeRobotArm",
    },
)
CAMERAS = Registry(
    "camera",
    "cameras",
    {
        "sim_pusht": f"{_DEPLOY}.sim.pusht:PushTCamera",
        "sim_arm": f"{_DEPLOY}.sim.panda:PandaCamera",
        "usb": f"{_DEPLOY}.drivers.usb:UsbCamera",
        "realsense": f"{_DEPLOY}.drivers.realsense:RealSenseCamera",
        "lerobot": f"{_DEPLOY}.drivers.lerobot_camera:LeRobotCamera",
    },
)
DEVICES = Registry(
    "device",
    "devices",
    {
        "browser": f"{_DEPLOY}.teleop.page.board:Browser",
        "keyboard": f"{_DEPLOY}.teleop.devices.terminal:Terminal",
        "gamepad": f"{_DEPLOY}.teleop.devices.gamepad:Gamepad",
        "spacemouse": f"{_DEPLOY}.teleop.devices.spacemouse:SpaceMouse",
        "leader": f"{_DEPLOY}.teleop.devices.leader:Leader",
        "script": f"{_DEPLOY}.teleop.devices.script:Script",
    },
)
ROBOTS = Registry(
    "robot",
    "robots",
    {
        "sim_pusht": f"{_DEPLOY}.sim.robots:sim_pusht",
        "sim_arm": f"{_DEPLOY}.sim.robots:sim_arm",
        **dict.fromkeys(("ur", "franka", "lerobot"), f"{_DEPLOY}.robot.cell:robot"),
    },
)
POLICY_FORMATS = Registry(
    "policy format",
    "policy_formats",
    {
        "diffusion_policy": "action_diffusion.policy.interchange.diffusion_policy:DIFFUSION_POLICY",
        "lerobot": "action_diffusion.policy.interchange.lerobot:LEROBOT",
        "onnx": "action_diffusion.policy.interchange.onnx:ONNX",
    },
)
FORMATS = Registry(
    "format",
    "formats",
    {
        "zarr": "action_diffusion.datasets.formats.zarr_buffer:ZARR",
        "zarr2": "action_diffusion.datasets.formats.zarr_buffer:ZARR2",
        "umi": "action_diffusion.datasets.formats.zarr_buffer:UMI",
        "robomimic": "action_diffusion.datasets.formats.robomimic:ROBOMIMIC",
        "aloha": "action_diffusion.datasets.formats.aloha:ALOHA",
        "lerobot": "action_diffusion.datasets.formats.lerobot.reader:LEROBOT",
        "lerobot21": "action_diffusion.datasets.formats.lerobot.reader:LEROBOT21",
        "folder": "action_diffusion.datasets.formats.folder.format:FOLDER",
        "mcap": "action_diffusion.datasets.formats.mcap.format:MCAP",
    },
)
AUGMENTATIONS = Registry("augmentation", "augmentations", {"noise": f"{_POLICY}.encoders.augment:Noise"})

POLICY_PARTS: Mapping[str, Registry] = {
    "encoder": ENCODERS,
    "denoiser": DENOISERS,
    "estimator": ESTIMATORS,
    "process": PROCESSES,
    "objective": OBJECTIVES,
    "features": FEATURES,
    "action_frame": ACTION_FRAMES,
}
"""By the sections of `policy.*` that name them."""


def required(
    policy: Mapping[str, Any], env: Mapping[str, Any] | None, text_encoders: Iterable[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Parts of somebody else's that a bundle needs: "encoder mine" → the package and its version, or the file.

    policy: the section of a configuration. env, text_encoders: of a specification.
    """
    named: list[tuple[Registry, Any]] = [] if env is None else [(ENVS, env)]
    named += [(TEXT_ENCODERS, encoder) for encoder in text_encoders]
    for section, registry in POLICY_PARTS.items():
        chosen = policy.get(section) or {}
        named += [(registry, part) for part in (chosen.values() if section == "features" else [chosen]) if part]
    found = {}
    for registry, part in named:
        if (name := part.get("name")) in registry and name not in registry.own:
            found[f"{registry.kind} {name}"] = " ".join(registry.origin(name)).strip()
    return found


def check_required(requires: Mapping[str, str], where: str) -> None:
    """`InputError` naming the package or the file, where a part that a bundle needs is not here. Imports nothing."""
    registries = {registry.kind: registry for registry in (ENVS, TEXT_ENCODERS, *POLICY_PARTS.values())}
    for part, origin in requires.items():
        kind, _, name = part.rpartition(" ")
        if kind not in registries or name not in registries[kind]:
            package = origin.partition(" ")[0]
            how = f"give plugins={package}" if package.endswith(".py") else f"install it: pip install {package}"
            raise InputError(f"{where}: needs the {part!r} of {origin}, which is not here: {how}")
