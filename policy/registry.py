"""The only way that a configuration becomes an object: by names that this package or a plugin registered.

A bundle is somebody else's file. It may name one of these components and give it plain values; it can never name
code to import, so loading one executes nothing that came with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from action_diffusion.errors import unknown
from action_diffusion.policy.reading import refuse_targets
from action_diffusion.registry import POLICY_PARTS


def build(kind: str, config: Mapping[str, Any], **parts: Any) -> Any:
    """Build component `config["name"]` of `kind` from the other values of `config` and the given parts.

    Raises `InputError` for an unknown name or option, suggesting the close ones.
    """
    options = dict(config)
    refuse_targets(options, kind)
    accepted = parameters(kind, config)
    name = options.pop("name", None)
    for option in options:
        if option not in accepted or option in parts:
            raise unknown(f"option of {kind} {name}", option, accepted - set(parts))
    return _component(kind, config)(**options, **parts)


def parameters(kind: str, config: Mapping[str, Any]) -> set[str]:
    """The names of what component `config["name"]` of `kind` is made from. Raises `InputError` for an unknown name."""
    return set(inspect.signature(_component(kind, config)).parameters)


def _component(kind: str, config: Mapping[str, Any]) -> Any:
    return POLICY_PARTS[kind].load(str(config.get("name")), f"{kind}.name")
