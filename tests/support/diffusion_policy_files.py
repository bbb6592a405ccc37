"""Checkpoints in the layout of diffusion_policy, made of torch's and torchvision's layers, and what they predict.

What is predicted is computed here from the checkpoint's numbers by torch, torchvision and diffusers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torchvision
from omegaconf import OmegaConf
from torch import Tensor, nn

State = dict[str, Tensor]
ACTION, HORIZON, SEEN = 3, 8, 2
PACKAGE = "diffusion_policy.policy."
DDPM = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
    "num_train_timesteps": 20,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
DDIM = {key: value for key, value in DDPM.items() if key != "variance_type"} | {
    "_target_": "diffusers.schedulers.scheduling_ddim.DDIMScheduler",
    "num_train_timesteps": 100,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
STEPS = {"horizon": HORIZON, "n_action_steps": 4, "n_obs_steps": SEEN}


@dataclass
class Checkpoint:
    """What one holds, and how its policy turns observations into a chunk.

    embed: observations key → [B, To, …], normalised and images in [-1, 1] → [B, To, D]. denoise: chunk, time and
    embedding → what the network says.
    """

    cfg: dict[str, Any]
    state: State
    embed: Callable[[dict[str, Tensor]], Tensor]
    denoise: Callable[[Tensor, int, Tensor], Tensor]

    def save(self, path: Path, **states: Any) -> Path:
        """As their workspaces do; states: others than the EMA."""
        other = {name: torch.zeros_like(value) for name, value in self.state.items()}
        payload = {
            "cfg": OmegaConf.create(self.cfg),
            "state_dicts": states or {"model": other, "ema_model": self.state, "optimizer": {"param_groups": []}},
            "pickles": {"epoch": b"\x80\x04K\x03.", "global_step": b"\x80\x04K\x07."},
        }
        torch.save(payload, path)
        return path

    def observations(self, batch: int = 2) -> dict[str, np.ndarray]:
        """Key → [B, To, …], in the data's units."""
        random, found = np.random.default_rng(0), {}
        for key, shape in self._shapes().items():
            if len(shape) == 3:
                found[key] = random.integers(0, 256, (batch, SEEN, *shape[1:], 3), dtype=np.uint8)
            else:
                found[key] = random.uniform(-1, 3, (batch, SEEN, *shape)).astype(np.float32)
        return found

    def _shapes(self) -> dict[str, Sequence[int]]:
        policy = self.cfg["policy"]
        meta = policy.get("shape_meta")
        return {"obs": [policy["obs_dim"]]} if meta is None else {k: v["shape"] for k, v in meta["obs"].items()}

    @torch.no_grad()
    def predict(self, observations: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
        """Chunks [B, H, A] in the data's units; all noise is drawn one after the other."""
        normal = {}
        for key, value in observations.items():
            values = torch.from_numpy(value).float()
            values = values.movedim(-1, 2) / 255 if value.dtype == np.uint8 else values
            normal[key] = values * self._number(key, "scale") + self._number(key, "offset")
        embedded = self.embed(normal)
        options = dict(self.cfg["policy"]["noise_scheduler"])
        scheduler = getattr(diffusers, options.pop("_target_").rpartition(".")[2])(**options)
        scheduler.set_timesteps(self.cfg["policy"]["num_inference_steps"])
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(embedded), HORIZON, ACTION, generator=generator)
        for time in scheduler.timesteps:
            x = scheduler.step(self.denoise(x, int(time), embedded), time, x, generator=generator).prev_sample
        return ((x - self._number("action", "offset")) / self._number("action", "scale")).numpy()

    def _number(self, key: str, name: str) -> Tensor:
        return self.state[f"normalizer.params_dict.{key}.{name}"]


def field_of_normalizer(state: State, key: str, low: Sequence[float], high: Sequence[float]) -> None:
    """From [low, high] to [-1, 1]; what never changes to 0."""
    least, most = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
    still = most - least < 1e-4
    scale = 2 / torch.where(still, 2.0, most - least)
    offset = torch.where(still, -least, -1 - scale * least)
    start = f"normalizer.params_dict.{key}."
    numbers = {"scale": scale, "offset": offset, "min": least, "max": most, "mean": (least + most) / 2, "std": most}
    for name, value in numbers.items():
        state[start + (name if name in ("scale", "offset") else f"input_stats.{name}")] = value


def normalizer(state: State, shapes: Mapping[str, Sequence[int]]) -> None:
    for key, shape in shapes.items():
        size = 1 if len(shape) == 3 else shape[0]
        field_of_normalizer(
            state, key, [0.0 if len(shape) == 3 else -1.0] * size, [1.0 if len(shape) == 3 else 2.5] * size
        )
    field_of_normalizer(state, "action", [-3.0, 5.0, 0.5], [4.0, 9.0, 0.5])  # the last one never changed


def filled(net: nn.Module, start: str, seed: int) -> State:
    """The state of a network whose weights, norms and statistics all do something, with names that begin so."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if value.is_floating_point():
            spread = 0.2 if value.ndim == 1 else 1.5 / math.sqrt(value[0].numel())
            around = 1.0 if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")) else 0.0
            value.data = (around + spread * torch.randn(value.shape, generator=generator)).clamp(min=-1e3)
            if name.endswith("running_var"):
                value.data.abs_()
    return {f"{start}{name}": value.clone() for name, value in net.state_dict().items()}


def unet_layers(channels: Sequence[int], condition: int, time_dim: int, *, scales: bool) -> nn.ModuleDict:
    """The layers of their U-Net in a tree that gives their names; `unet` walks it."""

    def block(n_in: int, n_out: int) -> nn.ModuleDict:
        convs = [
            nn.ModuleDict(
                {"block": nn.Sequential(nn.Conv1d(n, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.Mish())}
            )
            for n in (n_in, n_out)
        ]
        film = nn.Sequential(nn.Mish(), nn.Linear(time_dim + condition, n_out * (2 if scales else 1)))
        parts = {"blocks": nn.ModuleList(convs), "cond_encoder": film}
        return nn.ModuleDict(parts | ({"residual_conv": nn.Conv1d(n_in, n_out, 1)} if n_in != n_out else {}))

    def resized(layer: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"conv": layer})

    last, pairs = channels[-1], list(zip([ACTION, *channels[:-1]], channels, strict=True))
    down = [
        nn.ModuleList([block(a, b), block(b, b), *([resized(nn.Conv1d(b, b, 3, 2, 1))] if i < len(pairs) - 1 else [])])
        for i, (a, b) in enumerate(pairs)
    ]
    up = [
        nn.ModuleList([block(2 * b, a), block(a, a), resized(nn.ConvTranspose1d(a, a, 4, 2, 1))])
        for a, b in reversed(pairs[1:])
    ]
    first = channels[0]
    out = nn.ModuleDict(
        {"block": nn.Sequential(nn.Conv1d(first, first, 3, padding=1), nn.GroupNorm(8, first), nn.Mish())}
    )
    time = nn.Sequential(nn.Identity(), nn.Linear(time_dim, 4 * time_dim), nn.Mish(), nn.Linear(4 * time_dim, time_dim))
    return nn.ModuleDict(
        {
            "mid_modules": nn.ModuleList([block(last, last), block(last, last)]),
            "diffusion_step_encoder": time,
            "up_modules": nn.ModuleList(up),
            "down_modules": nn.ModuleList(down),
            "final_conv": nn.ModuleList([out, nn.Conv1d(first, ACTION, 1)]),
        }
    )


def sinusoidal(time: int, size: int) -> Tensor:
    """[1, size]."""
    angles = time * torch.exp(-torch.arange(size // 2) * math.log(10000) / (size // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()])[None]


def unet(layers: Any, x: Tensor, time: int, embedded: Tensor) -> Tensor:
    """What the U-Net says of x [B, H, A]."""
    size = layers["diffusion_step_encoder"][1].in_features
    told = layers["diffusion_step_encoder"](sinusoidal(time, size)).expand(len(x), -1)
    told = torch.cat([told, embedded.flatten(1)], dim=1)

    def residual(parts: Any, h: Tensor) -> Tensor:
        first = parts["blocks"][0]["block"](h)
        film = parts["cond_encoder"](told)[..., None]
        if film.shape[1] > first.shape[1]:
            scale, film = film.chunk(2, dim=1)
            first = scale * first
        shortcut = parts["residual_conv"](h) if "residual_conv" in parts else h
        second: Tensor = parts["blocks"][1]["block"](first + film)
        return second + shortcut

    h, kept = x.mT, []
    for first, second, *halve in layers["down_modules"]:
        kept.append(residual(second, residual(first, h)))
        h = halve[0]["conv"](kept[-1]) if halve else kept[-1]
    for parts in layers["mid_modules"]:
        h = residual(parts, h)
    for first, second, double in layers["up_modules"]:
        h = double["conv"](residual(second, residual(first, torch.cat([h, kept.pop()], dim=1))))
    out, last = layers["final_conv"]
    said: Tensor = last(out["block"](h))
    return said.mT


def transformer_layers(step: int, width: int, layers: int, heads: int) -> nn.ModuleDict:
    layer = nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
    positions = {"pos_emb": nn.Embedding(HORIZON, width), "cond_pos_emb": nn.Embedding(1 + SEEN, width)}
    return nn.ModuleDict(
        {
            **positions,
            "input_emb": nn.Linear(ACTION, width),
            "cond_obs_emb": nn.Linear(step, width),
            "encoder": mlp,
            "decoder": nn.TransformerDecoder(layer, layers),
            "ln_f": nn.LayerNorm(width),
            "head": nn.Linear(width, ACTION),
        }
    ).eval()


def transformer(layers: Any, x: Tensor, time: int, embedded: Tensor, *, causal: bool) -> Tensor:
    told = sinusoidal(time, layers["ln_f"].weight.numel()).expand(len(x), 1, -1)
    tokens = torch.cat([told, layers["cond_obs_emb"](embedded)], dim=1) + layers["cond_pos_emb"].weight
    steps, places = torch.arange(HORIZON)[:, None], torch.arange(1 + SEEN)
    masks: dict[str, Any] = {}
    if causal:
        masks = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(HORIZON),
            "memory_mask": torch.zeros(HORIZON, 1 + SEEN).masked_fill(steps < places - 1, -math.inf),
        }
    h = layers["decoder"](layers["input_emb"](x) + layers["pos_emb"].weight, layers["encoder"](tokens), **masks)
    said: Tensor = layers["head"](layers["ln_f"](h))
    return said


def resnet(*, grouped: bool) -> nn.Module:
    norm = (lambda n: nn.GroupNorm(n // 16, n)) if grouped else None
    net: nn.Module = torchvision.models.resnet18(norm_layer=norm)
    net.fc = nn.Identity()
    return net.eval()


def _unet(options: dict[str, Any], condition: int, scheduler: Mapping[str, Any], steps: int, seed: int) -> Any:
    """A checkpoint's `denoise`, its state and its policy's options."""
    layers = unet_layers((16, 24), condition, 16, scales=options["cond_predict_scale"])
    state = filled(layers, "model.", seed)
    policy = {**STEPS, "noise_scheduler": dict(scheduler), "num_inference_steps": steps}
    return (lambda x, time, embedded: unet(layers, x, time, embedded)), state, policy


def unet_lowdim(
    *, scheduler: Mapping[str, Any] = DDPM, steps: int = 20, scales: bool = True, seed: int = 0
) -> Checkpoint:
    network = {"down_dims": [16, 24], "kernel_size": 3, "n_groups": 8, "diffusion_step_embed_dim": 16}
    network |= {"cond_predict_scale": scales}
    denoise, state, policy = _unet(network, 5 * SEEN, scheduler, steps, seed)
    model = {"_target_": "diffusion_policy.model.diffusion.conditional_unet1d.ConditionalUnet1D", **network}
    model |= {"input_dim": ACTION, "local_cond_dim": None, "global_cond_dim": 5 * SEEN}
    policy |= {"_target_": f"{PACKAGE}diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy", "model": model}
    policy |= {"obs_dim": 5, "action_dim": ACTION, "obs_as_global_cond": True, "obs_as_local_cond": False}
    policy |= {"oa_step_convention": True, "pred_action_steps_only": False}
    return _checkpoint(policy, state, {"obs": [5]}, lambda normal: normal["obs"], denoise, "pusht_lowdim")


def transformer_lowdim(*, causal: bool = True, seed: int = 0) -> Checkpoint:
    layers = transformer_layers(5, 16, 2, 2)
    policy = {**STEPS, "noise_scheduler": dict(DDPM), "num_inference_steps": 20, "obs_dim": 5, "action_dim": ACTION}
    network = {"n_layer": 2, "n_head": 2, "n_emb": 16, "p_drop_emb": 0.0, "p_drop_attn": 0.1, "causal_attn": causal}
    network |= {"time_as_cond": True, "obs_as_cond": True, "n_cond_layers": 0, "input_dim": ACTION, "horizon": HORIZON}
    model = {
        "_target_": "diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion",
        **network,
    }
    policy |= {"_target_": f"{PACKAGE}diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy"}
    policy |= {"model": model, "obs_as_cond": True, "pred_action_steps_only": False}
    state = _transformer_state(layers, seed)

    def denoise(x: Tensor, time: int, embedded: Tensor) -> Tensor:
        return transformer(layers, x, time, embedded, causal=causal)

    return _checkpoint(policy, state, {"obs": [5]}, lambda normal: normal["obs"], denoise, "blockpush_lowdim_seed")


def _transformer_state(layers: nn.Module, seed: int) -> State:
    state = filled(layers, "model.", seed)
    for name in ("pos_emb", "cond_pos_emb"):
        state[f"model.{name}"] = state.pop(f"model.{name}.weight")[None]
    state["model.mask"] = torch.zeros(HORIZON, HORIZON)
    return state


SHAPES = {"b_image": [3, 40, 47], "z_pos": [2], "a_image": [3, 40, 47], "a_pos": [3]}
CROP = (33, 40)
CORNER = (round(7 / 2), round(7 / 2))


def _meta() -> dict[str, Any]:
    obs = {key: {"shape": shape, **({"type": "rgb"} if len(shape) == 3 else {})} for key, shape in SHAPES.items()}
    return {"obs": obs, "action": {"shape": [ACTION]}}


def _cut(images: Tensor) -> Tensor:
    top, left = CORNER
    return images[..., top : top + CROP[0], left : left + CROP[1]]


def unet_hybrid(*, grouped: bool = True, seed: int = 0) -> Checkpoint:
    """robomimic's encoder: parts of an embedding in the order of shape_meta."""
    network = {"down_dims": [16, 24], "kernel_size": 3, "n_groups": 8, "diffusion_step_embed_dim": 16}
    network |= {"cond_predict_scale": True}
    embed, encoder = _robomimic(grouped, seed)
    denoise, state, policy = _unet(network, SEEN * (2 * 7 + 5), DDIM, 8, seed)
    policy |= {"_target_": f"{PACKAGE}diffusion_unet_hybrid_image_policy.DiffusionUnetHybridImagePolicy", **network}
    policy |= {"shape_meta": _meta(), "crop_shape": list(CROP), "obs_encoder_group_norm": grouped}
    policy |= {"eval_fixed_crop": True, "obs_as_global_cond": True}
    return _checkpoint(policy, state | encoder, SHAPES, embed, denoise, "custom_image")


def transformer_hybrid(*, seed: int = 0) -> Checkpoint:
    layers = transformer_layers(2 * 7 + 5, 16, 2, 2)
    embed, encoder = _robomimic(True, seed)
    policy = {**STEPS, "noise_scheduler": dict(DDPM), "num_inference_steps": 20, "shape_meta": _meta()}
    policy |= {"_target_": f"{PACKAGE}diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy"}
    policy |= {"crop_shape": list(CROP), "obs_encoder_group_norm": True, "eval_fixed_crop": True, "obs_as_cond": True}
    policy |= {"n_layer": 2, "n_head": 2, "n_emb": 16, "p_drop_emb": 0.0, "p_drop_attn": 0.3, "causal_attn": True}
    policy |= {"time_as_cond": True, "n_cond_layers": 0}

    def denoise(x: Tensor, time: int, embedded: Tensor) -> Tensor:
        return transformer(layers, x, time, embedded, causal=True)

    state = _transformer_state(layers, seed) | encoder
    return _checkpoint(policy, state, SHAPES, embed, denoise, "custom_image")


def _robomimic(grouped: bool, seed: int) -> tuple[Callable[[dict[str, Tensor]], Tensor], State]:
    state, nets = State(), {}
    rows, columns = -(-CROP[0] // 32), -(-CROP[1] // 32)
    y, x = (grid.flatten() for grid in torch.meshgrid(_axis(rows), _axis(columns), indexing="ij"))
    for i, key in enumerate(key for key, shape in SHAPES.items() if len(shape) == 3):
        trunk = nn.Sequential(*list(resnet(grouped=grouped).children())[:-2]).eval()
        pool, linear, start = nn.Conv2d(512, 5, 1), nn.Linear(10, 7), f"obs_encoder.obs_nets.{key}."
        for net, name in ((trunk, "nets.0.nets."), (pool, "nets.1.nets."), (linear, "nets.3.")):
            state |= filled(net, start + name, seed + i + 1)
        state |= {f"{start}nets.1.pos_x": x[None], f"{start}nets.1.pos_y": y[None]}
        state[f"{start}nets.1.temperature"] = torch.tensor([0.8])
        state[f"{start}pool.nets.weight"] = pool.weight.detach()  # robomimic 0.3 names it twice
        nets[key] = trunk, pool, linear

    def seen(key: str, value: Tensor) -> Any:
        if key not in nets:
            return value
        trunk, pool, linear = nets[key]
        weights = (pool(trunk(_cut(value.flatten(0, 1)))).flatten(2) / 0.8).softmax(dim=2)
        places = torch.stack([(weights * x).sum(2), (weights * y).sum(2)], dim=2)
        return linear(places.flatten(1)).relu().unflatten(0, value.shape[:2])

    return (lambda normal: torch.cat([seen(key, normal[key]) for key in SHAPES], dim=-1)), state


def _axis(n: int) -> Tensor:
    return torch.linspace(-1, 1, n)


def unet_image(*, seed: int = 0) -> Checkpoint:
    """One ResNet with BatchNorm for all cameras, ImageNet's pixels, frames resized; parts by kind and alphabet."""
    network = {"down_dims": [16, 24], "kernel_size": 3, "n_groups": 8, "diffusion_step_embed_dim": 16}
    network |= {"cond_predict_scale": True}
    net = resnet(grouped=False)
    resize, size = torchvision.transforms.Resize((48, 56)), 512
    pixels = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    def embed(normal: dict[str, Tensor]) -> Tensor:
        images = [
            net(pixels(resize(normal[key].flatten(0, 1)))).unflatten(0, normal[key].shape[:2])
            for key in ("a_image", "b_image")
        ]
        return torch.cat([*images, normal["a_pos"], normal["z_pos"]], dim=-1)

    denoise, state, policy = _unet(network, SEEN * (2 * size + 5), DDIM, 8, seed)
    encoder: dict[str, Any] = {"_target_": "diffusion_policy.model.vision.multi_image_obs_encoder.MultiImageObsEncoder"}
    model = {"_target_": "diffusion_policy.model.vision.model_getter.get_resnet", "name": "resnet18", "weights": None}
    encoder |= {"shape_meta": _meta(), "rgb_model": model, "resize_shape": [48, 56], "crop_shape": [30, 40]}
    encoder |= {"random_crop": False, "use_group_norm": False, "share_rgb_model": True, "imagenet_norm": True}
    policy |= {"_target_": f"{PACKAGE}diffusion_unet_image_policy.DiffusionUnetImagePolicy", **network}
    policy |= {"shape_meta": _meta(), "obs_encoder": encoder, "obs_as_global_cond": True}
    state |= filled(net, "obs_encoder.key_model_map.rgb.", seed + 1)
    return _checkpoint(policy, state, SHAPES, embed, denoise, "custom_image")


def _checkpoint(
    policy: dict[str, Any],
    state: State,
    shapes: Mapping[str, Sequence[int]],
    embed: Callable[[dict[str, Tensor]], Tensor],
    denoise: Callable[[Tensor, int, Tensor], Tensor],
    task: str,
) -> Checkpoint:
    normalizer(state, shapes)
    state |= {"_dummy_variable": torch.zeros(0), "mask_generator._dummy_variable": torch.zeros(0)}
    runner = {"_target_": "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner", "fps": 10}
    tasks = {"name": task, "env_runner": runner, "dataset": {"zarr_path": "data/demos.zarr"}}
    return Checkpoint({"policy": policy, "task": tasks, "training": {"seed": 42}}, state, embed, denoise)
