"""`action-diffusion bundle …`: policies, looked at, brought from other projects and given to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion.commands import subcommands
from action_diffusion.commands.subcommands import Subcommand
from action_diffusion.errors import InputError
from action_diffusion.options.bundle import BundleExport, BundleImport, BundleInspect

BUNDLE_HELP = """\
action-diffusion bundle SUBCOMMAND [name=value …]     policies: look at them, bring them, give them

  action-diffusion bundle inspect PATH                         what a policy sees, does, and was trained on
  action-diffusion bundle import in=PATH out=DIR               another project's policy, as a bundle
  action-diffusion bundle export in=DIR out=PATH format=NAME   a bundle, for another project

`--help` after a subcommand explains it. docs/interchange.md says what comes over, and what does not.
"""

INSPECT_HELP = """\
action-diffusion bundle inspect PATH     what a policy sees, does, and was trained on

  action-diffusion bundle inspect outputs/a/bundle

PATH is a bundle, an ONNX file of `bundle export`, or a policy that `bundle import` takes.
"""

IMPORT_HELP = """\
action-diffusion bundle import in=PATH out=DIR     another project's policy, as a bundle

  action-diffusion bundle import in=pretrained_model out=outputs/pusht/bundle

What `in` holds is told from its content. Nothing in it is executed. What has no counterpart here is named.
"""

EXPORT_HELP = """\
action-diffusion bundle export in=DIR out=PATH format=NAME     a bundle, for another project

  action-diffusion bundle export in=outputs/a/bundle out=pretrained_model format=lerobot
  action-diffusion bundle export in=outputs/a/bundle out=policy.onnx format=onnx opset=18

format=onnx: the whole chunk in one file, which serve, deploy and evaluate take without torch.
"""


def run(words: Sequence[str]) -> int:
    """`action-diffusion bundle` with the words after it; returns the exit code. Raises `InputError` for bad ones."""
    return subcommands.run("bundle", SUBCOMMANDS, BUNDLE_HELP, words)


def _inspect(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.policy.interchange.formats import detected, is_bundle
    from action_diffusion.policy.reading import read_config, read_spec
    from action_diffusion.policy.runtime.onnx_file import is_onnx

    path = Path(options["path"]).expanduser()
    if is_bundle(path) or is_onnx(path):
        return _described(read_spec(path), read_config(path))
    form = detected(path)
    assert form.read is not None  # `detected` leaves out the others
    foreign = form.read(path)
    return {"format": form.name} | _described(foreign.spec, foreign.config) | _said(foreign.said)


def _import(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.policy.interchange.contract import saved
    from action_diffusion.policy.interchange.formats import detected

    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    if output.exists():
        raise InputError(f"out={output} is there already: give another name")
    form = detected(source)
    assert form.read is not None
    foreign = form.read(source)
    try:
        saved(foreign, output)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return {"format": form.name, "bundle": output} | _described(foreign.spec, foreign.config) | _said(foreign.said)


def _export(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.policy.interchange.formats import writable
    from action_diffusion.policy.reading import read_config, read_spec

    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    read_spec(source)
    config, form = read_config(source), writable(options["format"])
    if output.exists():
        raise InputError(f"out={output} is there already: give another name")
    from action_diffusion.policy import bundle as bundles

    assert form.write is not None  # `writable` leaves out the others
    return form.write(bundles.load(source, extensions=()), config, output, options)


def _described(spec: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What people ask first of a policy, in words."""
    policy = config.get("policy") or {}
    observations = [
        f"{key} {list(value.shape)} {value.kind}{f', {value.unit}' if value.unit else ''}"
        for key, value in spec.observations.items()
    ]
    named = {part: options.get("name") for part, options in policy.items() if isinstance(options, dict)}
    return {
        "observations": "; ".join(observations),
        "action": f"{list(spec.action.shape)}{f', {spec.action.unit}' if spec.action.unit else ''}",
        "steps": f"{spec.n_obs_steps} seen, {spec.horizon} predicted, {spec.n_action_steps} executed",
        "control_rate": f"{spec.control_rate:g} Hz",
        "parts": ", ".join(f"{part}={name}" for part, name in named.items() if name),
        "sampler": ", ".join(f"{key}={value}" for key, value in (policy.get("sampler") or {}).items()),
        "demonstrations": config.get("data") or spec.demonstrations or "not said",
        "extensions": ", ".join(config.get("extensions") or ()) or "none",
    }


def _said(said: Sequence[str]) -> dict[str, str]:
    return {"note" if i == 0 else f"note {i + 1}": line for i, line in enumerate(said)}


SUBCOMMANDS = {
    "inspect": Subcommand(_inspect, INSPECT_HELP, BundleInspect, ("path",)),
    "import": Subcommand(_import, IMPORT_HELP, BundleImport),
    "export": Subcommand(_export, EXPORT_HELP, BundleExport),
}
