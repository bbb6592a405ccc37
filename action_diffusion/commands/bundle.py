"""`action-diffusion bundle …`: policies, looked at, brought from other projects and given to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from action_diffusion.commands import subcommands
from action_diffusion.commands.subcommands import Subcommand
from action_diffusion.errors import InputError
from action_diffusion.options.bundle import BundleExport, BundleImport, BundleInspect, BundlePull, BundlePush

BUNDLE_HELP = """\
action-diffusion bundle SUBCOMMAND [name=value …]     policies: look at them, bring them, give them

  action-diffusion bundle inspect PATH                         what a policy sees, does, and was trained on
  action-diffusion bundle import in=PATH out=DIR               another project's policy, as a bundle
  action-diffusion bundle export in=DIR out=PATH format=NAME   a bundle, for another project
  action-diffusion bundle push DIR to=hf://user/name           to the Hugging Face Hub, with a model card
  action-diffusion bundle pull hf://user/name out=DIR          from there

`--help` after a subcommand explains it. docs/interchange.md says what comes over, and what does not.
"""

INSPECT_HELP = """\
action-diffusion bundle inspect PATH     what a policy sees, does, and was trained on

  action-diffusion bundle inspect outputs/a/bundle

PATH is a bundle, an ONNX file of `bundle export`, or a policy that `bundle import` takes.
"""

IMPORT_HELP = """\
action-diffusion bundle import in=PATH out=DIR     another project's policy, as a bundle

  action-diffusion bundle import in=pretrained_model out=outputs/pusht/bundle rate=10

rate=HZ is needed where the policy does not say at what rate its actions are meant to be executed. sampler={…} or
sampler.NAME=VALUE samples it otherwise than it is there: sampler.timestep_spacing=trailing.

keys={THEIRS: OURS, …} renames observations, to what a robot or a simulator calls them, and env={name: …} says which
simulator it acts in: keys={state: agent_pos} env={name: pusht}.

What `in` holds is told from its content. Nothing in it is executed. What has no counterpart here is named.
"""

EXPORT_HELP = """\
action-diffusion bundle export in=DIR out=PATH format=NAME     a bundle, for another project

  action-diffusion bundle export in=outputs/a/bundle out=pretrained_model format=lerobot
  action-diffusion bundle export in=outputs/a/bundle out=policy.onnx format=onnx opset=18

format=onnx: the whole chunk in one file, which serve, deploy and evaluate take without torch. opset=18 to 23.

sampler={…} or sampler.NAME=VALUE samples it otherwise than the bundle says: sampler.timestep_spacing=leading.
"""


PUSH_HELP = """\
action-diffusion bundle push DIR to=hf://user/name     a bundle to the Hugging Face Hub, with a model card

  action-diffusion bundle push outputs/a/bundle to=hf://user/name private=false

A repository that is not there is made, for its owner alone unless private=false. The card says what the policy sees and
does, and how it did by the results.json beside the bundle. message="…" is that of the commit. Log in before
(hf auth login), or set HF_TOKEN.
"""

PULL_HELP = """\
action-diffusion bundle pull hf://user/name out=DIR     a policy from the Hugging Face Hub

  action-diffusion bundle pull hf://user/name@v2 out=outputs/theirs/bundle

PATH is hf://user/name[@revision][/folder]. Only files of a policy are taken: no code, no pickles. Commands that take a
bundle take hf://… as well, and keep what they fetched.
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
        return _described(read_spec(path), read_config(path)) | _stored(path)
    form = detected(path)
    assert form.read is not None  # `detected` leaves out the others
    foreign = form.read(path)
    return {"format": form.name} | _described(foreign.spec, foreign.config) | _said(foreign.said)


def _import(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.options.policy import with_sampler
    from action_diffusion.policy.interchange.contract import renamed, saved
    from action_diffusion.policy.interchange.formats import detected

    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    if output.exists():
        raise InputError(f"out={output} is there already: give another name")
    form = detected(source)
    assert form.read is not None
    foreign = _timed(form.read(source), options.get("rate"), source)
    foreign = renamed(foreign, {key: str(name) for key, name in options.get("keys", {}).items()})
    if "env" in options:
        foreign = foreign._replace(spec=replace(foreign.spec, env=options["env"]))
    try:
        policy = with_sampler(foreign.config["policy"], vars(options["sampler"]))
        foreign = foreign._replace(config={**foreign.config, "policy": policy})
        saved(foreign, output)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return {"format": form.name, "bundle": output} | _described(foreign.spec, foreign.config) | _said(foreign.said)


def _push(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion import hub
    from action_diffusion.policy.interchange.card import card
    from action_diffusion.policy.reading import read_config, read_spec

    bundle, to = Path(options["path"]).expanduser(), hub.parse(options["to"])
    spec, config = read_spec(bundle), read_config(bundle)
    names = [file.relative_to(bundle).as_posix() for file in sorted(bundle.rglob("*")) if file.is_file()]
    files: dict[str, Path | bytes] = {name: bundle / name for name in names if hub.POLICY.names.fullmatch(name)}
    files["README.md"] = card(bundle, to.repo, spec, _described(spec, config)).encode()
    pushed = hub.push(options["to"], hub.POLICY, files, private=options["private"], message=options["message"])
    return {"pushed": pushed, "files": ", ".join(files)}


def _pull(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion import hub
    from action_diffusion.policy.interchange.formats import is_bundle
    from action_diffusion.policy.reading import read_config, read_spec

    output = Path(options["out"]).expanduser()
    if output.exists():
        raise InputError(f"out={output} is there already: give another name")
    pulled = hub.pull(options["path"], hub.POLICY, output)
    described = _described(read_spec(output), read_config(output)) if is_bundle(output) else {}
    return {"pulled": pulled, "folder": output} | described


def _timed(foreign: Any, rate: float | None, source: Path) -> Any:
    """With the rate that was asked for, or the policy's own. Raises `InputError` where neither is there."""
    from action_diffusion.policy.interchange.contract import UNKNOWN_RATE

    rate = rate or foreign.spec.control_rate
    if rate == UNKNOWN_RATE:
        raise InputError(f"{source} does not say at what rate its actions are meant to be executed: rate=HZ")
    return foreign._replace(spec=replace(foreign.spec, control_rate=float(rate)))


def _export(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.policy.interchange.formats import writable
    from action_diffusion.policy.reading import read_config, read_spec

    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    read_spec(source)
    config, form = read_config(source), writable(options["format"])
    if output.exists():
        raise InputError(f"out={output} is there already: give another name")
    from action_diffusion.options.policy import with_sampler
    from action_diffusion.policy import bundle as bundles

    assert form.write is not None  # `writable` leaves out the others
    sampler = vars(options["sampler"])
    policy = bundles.load(source, extensions=(), sampler=sampler)
    config["policy"] = with_sampler(config["policy"], sampler)
    return form.write(policy, config, output, options)


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
        "control_rate": f"{spec.control_rate:g} Hz" if spec.control_rate else "not said",
        "parts": ", ".join(f"{part}={name}" for part, name in named.items() if name),
        "sampler": ", ".join(f"{key}={value}" for key, value in (policy.get("sampler") or {}).items()),
        "demonstrations": config.get("data") or spec.demonstrations or "not said",
        "extensions": ", ".join(config.get("extensions") or ()) or "none",
    }


def _stored(path: Path) -> dict[str, str]:
    """The extensions that were fitted to the bundle at `path`, whether they act or not."""
    names = sorted(file.stem for file in (path / "extensions").glob("*.safetensors"))
    return {"fitted": f"{', '.join(names)} (extensions=[NAME] switches one on)"} if names else {}


def _said(said: Sequence[str]) -> dict[str, str]:
    return {"note" if i == 0 else f"note {i + 1}": line for i, line in enumerate(said)}


SUBCOMMANDS = {
    "inspect": Subcommand(_inspect, INSPECT_HELP, BundleInspect, ("path",)),
    "import": Subcommand(_import, IMPORT_HELP, BundleImport),
    "push": Subcommand(_push, PUSH_HELP, BundlePush, ("path",)),
    "pull": Subcommand(_pull, PULL_HELP, BundlePull, ("path",)),
    "export": Subcommand(_export, EXPORT_HELP, BundleExport),
}
