"""The formats of policies by name, and which of them a path holds."""

from __future__ import annotations

from pathlib import Path

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.interchange.contract import PolicyFormat
from action_diffusion.policy.reading import FILES
from action_diffusion.registry import POLICY_FORMATS


def named(name: str) -> PolicyFormat:
    """The format with this name, whose library is imported now."""
    found: PolicyFormat = POLICY_FORMATS.load(name)
    return found


def writable(name: str) -> PolicyFormat:
    """The format that is asked for to be written. Raises `InputError` for one that is only read."""
    if name not in POLICY_FORMATS or named(name).write is None:
        raise unknown("format", name, [known for known in POLICY_FORMATS if named(known).write is not None])
    return named(name)


def detected(path: Path) -> PolicyFormat:
    """The format of the policy at `path`, told from its content. Raises `InputError` where there is none known."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if is_bundle(path):
        raise InputError(f"{path} is a bundle of ours already")
    for name in POLICY_FORMATS:
        if (found := named(name)).read is not None and found.holds(path):
            return found
    known = ", ".join(name for name in POLICY_FORMATS if named(name).read is not None)
    raise InputError(f"{path}: no policy that is known here: neither a bundle ({', '.join(FILES)}), nor one of {known}")


def is_bundle(path: Path) -> bool:
    """Whether a bundle of ours, or most of one, lies at `path`."""
    return path.is_dir() and any((path / name).is_file() for name in ("spec.json",))
