"""The project's own component names, and the only way that a configuration becomes an object.

A bundle is somebody else's file. It may name one of these components and give it plain values; it can never name
code to import, so loading one executes nothing that came with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from action_diffusion.errors import unknown
from action_diffusion.policy.diffusion.process import Diffusion, Flow
from action_diffusion.policy.model.encoder import ObservationEncoder
from action_diffusion.policy.model.estimator import PlanarPose
from action_diffusion.policy.model.features import Magnified, PlanarObject, SinCos
from action_diffusion.policy.model.frames import PlanarObject as PlanarObjectFrame
from action_diffusion.policy.model.frames import Position
from action_diffusion.policy.model.unet import ConditionalUnet1d
from action_diffusion.policy.reading import refuse_targets

COMPONENTS: dict[str, dict[str, Callable[..., Any]]] = {
    "encoder": {"observation": ObservationEncoder},
    "denoiser": {"unet1d": ConditionalUnet1d},
    "estimator": {"planar_pose": PlanarPose},
    "process": {"diffusion": Diffusion, "flow": Flow},
    "features": {"sin_cos": SinCos, "magnified": Magnified, "planar_object": PlanarObject},
    "action_frame": {"planar_object": PlanarObjectFrame, "position": Position},
}


def build(kind: str, config: Mapping[str, Any], **parts: Any) -> Any:
    """Build component `config["name"]` of `kind` from the other values of `config` and the given parts.

    Raises `InputError` for an unknown name or option, suggesting the close ones.
    """
    options = dict(config)
    refuse_targets(options, kind)
    name = options.pop("name", None)
    if name not in COMPONENTS[kind]:
        raise unknown(f"{kind}.name", str(name), COMPONENTS[kind])
    component = COMPONENTS[kind][name]
    accepted = set(inspect.signature(component).parameters)
    for option in options:
        if option not in accepted or option in parts:
            raise unknown(f"option of {kind} {name}", option, accepted - set(parts))
    return component(**options, **parts)
