"""A checkpoint of diffusion_policy as a policy of ours.

    latest.ckpt ─▶ `unpickling.TorchFile` ─▶ cfg          ─▶ `theirs.TheirPolicy` ─▶ observations, parts and options
                                            state_dicts  ─▶ of the EMA where there is one: weights, and the normaliser

A chunk begins there as here, at the first step that is observed, and is executed from the last one on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.bundle import versions
from action_diffusion.policy.interchange.contract import Foreign, PolicyFormat
from action_diffusion.policy.interchange.diffusion_policy import theirs, weights
from action_diffusion.policy.interchange.diffusion_policy.encoders import ENCODER, Encoder, encoder_of
from action_diffusion.policy.interchange.diffusion_policy.normalizer import NORMALIZER, statistics
from action_diffusion.policy.interchange.diffusion_policy.simulators import simulator_of
from action_diffusion.policy.interchange.unpickling import PICKLE, ZIP, StoredTensor, TorchFile
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.schema import check, shown

MOST_COPIES = 4
"""How many times the size of the file its weights may take: some of them are listed twice."""
SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}


def holds(path: Path) -> bool:
    """Whether it begins like a file of `torch.save`, or another pickle."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(ZIP)).startswith((ZIP, PICKLE))


def read(path: Path) -> Foreign:
    """Raises `InputError` for a file of something else, and for a part or an option that there is not here."""
    file = TorchFile(path)
    try:
        return _foreign(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _foreign(file: TorchFile) -> Foreign:
    content = file.content
    if not isinstance(content, dict) or not {"cfg", "state_dicts"} <= content.keys():
        raise InputError("a file of torch.save without cfg and state_dicts: no checkpoint of diffusion_policy")
    config = theirs.plain(content["cfg"])
    options = theirs.policy_options(config)
    network = theirs.network_options(options)
    _refuse(options, network)
    observed = _observed(options)
    which, state = _state(file, content["state_dicts"])
    simulator = simulator_of(config, observed.keys)
    normalizer = {key: statistics(state, key, size) for key, size in observed.sizes.items()}
    encoder = encoder_of(options, state, observed.keys)
    sampling = _sampling(options)
    denoiser, denoised = _denoiser(network, state, encoder, options.n_obs_steps)
    spec = PolicySpec(
        observations=observed.keys,
        action=ActionSpec(shape=(observed.sizes["action"],)),
        n_obs_steps=options.n_obs_steps,
        horizon=options.horizon,
        n_action_steps=options.n_action_steps,
        control_rate=simulator.control_rate,
        task=simulator.task,
        env=simulator.env,
        demonstrations=simulator.demonstrations,
        normalizer=normalizer,
        versions=versions(),
    )
    policy = {
        "normalizer": {"default": "minmax"},
        "encoder": encoder.options,
        "denoiser": denoiser,
        "process": sampling.process,
        "sampler": sampling.sampler,
        "objective": {"name": "denoising", "loss": "mse"},
    }
    average = "" if which == "ema_model" else ", as there is no EMA of them"
    said = f"weights of {which}{average}; the optimizer, and where training was, stay behind"
    notes = (said, *simulator.said, *sampling.said, *encoder.said)
    checked = PolicySpec.from_json(spec.to_json(), "cfg")  # of the sizes that a bundle may say
    return Foreign(checked, {"policy": policy}, {**encoder.weights, **denoised}, notes)


class _Observed(NamedTuple):
    """keys: the observations, in order. sizes: of the states among them, and of the action."""

    keys: dict[str, ObservationSpec]
    sizes: dict[str, int]


def _observed(options: theirs.TheirPolicy) -> _Observed:
    if isinstance(options, theirs.Lowdim):
        keys = {"obs": ObservationSpec(shape=(options.obs_dim,), source="obs")}
        return _Observed(keys, {"obs": options.obs_dim, "action": options.action_dim})
    assert isinstance(options, theirs.Image)
    keys, sizes = {}, {}
    for key, value in (*options.shape_meta.obs.items(), ("action", options.shape_meta.action)):
        if value.type == "rgb" and len(value.shape) == 3 and value.shape[0] == 3 and key != "action":
            shape = (*value.shape[1:], 3)
            keys[key] = ObservationSpec(shape=shape, dtype="uint8", unit="0-255", kind="image", source=key)
        elif value.type == "low_dim" and len(value.shape) == 1:
            keys[key] = ObservationSpec(shape=(value.shape[0],), source=key)
            sizes[key] = value.shape[0]
        else:
            raise InputError(
                f"cfg.policy.shape_meta: {key} is {value.type} of shape {value.shape}, expected an image [3, height, "
                "width] or one size"
            )
    del keys["action"]
    return _Observed(keys, sizes)


def _refuse(options: theirs.TheirPolicy, network: theirs.Unet | theirs.Transformer) -> None:
    """`InputError` for what would be another policy here."""
    refused = {
        "obs_as_local_cond": (True, "observations beside each step of a chunk"),
        "obs_as_global_cond": (False, "observations that are filled into the chunk"),
        "obs_as_cond": (False, "observations that are filled into the chunk"),
        "pred_action_steps_only": (True, "chunks that begin at the last observation"),
        "oa_step_convention": (False, "chunks that are executed from one step later on"),
        "time_as_cond": (False, "a transformer without a decoder"),
    }
    for name, (value, why) in refused.items():
        if getattr(options, name, getattr(network, name, None)) is value:
            raise InputError(f"cfg.policy: {name}={str(value).lower()}, {why}, has no counterpart here")


def _state(file: TorchFile, states: Any) -> tuple[str, dict[str, Tensor]]:
    """Which of the networks, and its numbers by name; without those that nothing here looks at."""
    which = next((name for name in ("ema_model", "model") if isinstance(states, dict) and name in states), None)
    if which is None or not isinstance(states[which], dict):
        raise InputError("state_dicts has neither ema_model nor model")
    wanted, left = {}, MOST_COPIES * file.path.stat().st_size
    for name, value in states[which].items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise InputError(f"state_dicts.{which}: {shown(name)} is no tensor")
        if weights.UNUSED.fullmatch(name):
            continue
        left -= value.storage.count * value.storage.dtype.itemsize
        if left < 0:
            raise InputError(f"state_dicts.{which} has more numbers than the file")
        wanted[name] = value
    tensors = {name: value.float() for name, value in file.tensors(wanted)}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"state_dicts.{which}: {shown(name)} holds NaN or infinite values")
    return which, tensors


class _Sampling(NamedTuple):
    sampler: dict[str, Any]
    process: dict[str, Any]
    said: tuple[str, ...]


def _sampling(options: theirs.TheirPolicy) -> _Sampling:
    """Sampler and process of their scheduler, and what there is to say."""
    where = "cfg.policy.noise_scheduler"
    name, section = theirs.targeted(options.noise_scheduler, where)
    if name not in SCHEDULERS:
        raise InputError(f"{where} is a {shown(name)}, expected one of {', '.join(SCHEDULERS)}")
    scheduler: theirs.Scheduler = check(section, theirs.Scheduler, where)
    n_training = scheduler.num_train_timesteps
    n_steps = n_training if options.num_inference_steps is None else options.num_inference_steps
    sampler = {
        "num_inference_steps": n_steps,
        "clip": "x0" if scheduler.clip_sample else None,
        "clip_range": scheduler.clip_sample_range,
        "clip_to": "unit",
        "timestep_spacing": scheduler.timestep_spacing,
        "steps_offset": scheduler.steps_offset,
    }
    said: tuple[str, ...] = ()
    sampler["scheduler"] = SCHEDULERS[name]
    if name == "DDPMScheduler":
        sampler |= {"variance_type": scheduler.variance_type}
        if n_steps < n_training:
            said = (
                f"{n_steps} of {n_training} DDPM steps: as newer diffusers; 0.11 took each as if it were one of all",
            )
    else:
        sampler |= {
            "eta": options.eta,
            "set_alpha_to_one": scheduler.set_alpha_to_one,
            "use_clipped_model_output": options.use_clipped_model_output,
        }
    process = {
        "name": "diffusion",
        "prediction": scheduler.prediction_type,
        "num_train_timesteps": n_training,
        "beta_schedule": scheduler.beta_schedule,
        "beta_start": scheduler.beta_start,
        "beta_end": scheduler.beta_end,
    }
    return _Sampling(sampler, process, said)


def _denoiser(
    network: theirs.Unet | theirs.Transformer, state: Mapping[str, Tensor], encoder: Encoder, n_obs_steps: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its options and its weights."""
    own = {name: value for name, value in state.items() if not name.startswith((NORMALIZER, ENCODER))}
    if isinstance(network, theirs.Unet):
        if network.n_groups != 8:
            raise InputError(
                f"cfg.policy: n_groups={network.n_groups}: their last block has 8 groups whatever this says, and here "
                "all have as many: expected 8"
            )
        options: dict[str, Any] = {
            "name": "unet1d",
            "channels": network.down_dims,
            "kernel_size": network.kernel_size,
            "n_groups": network.n_groups,
            "time_dim": network.diffusion_step_embed_dim,
            "activation": "mish",
        }
        return options, weights.unet(own, encoder.columns(n_obs_steps))
    if network.n_cond_layers:
        raise InputError(
            f"cfg.policy: n_cond_layers={network.n_cond_layers}: observations do not attend to each other here, "
            "expected 0, as in all of their configurations"
        )
    options = {
        "name": "transformer",
        "width": network.n_emb,
        "layers": network.n_layer,
        "heads": network.n_head,
        "causal": network.causal_attn,
        "dropout": network.p_drop_attn,
    }
    return options, weights.transformer(own, encoder.columns(1))


DIFFUSION_POLICY = PolicyFormat("diffusion_policy", holds, read)
