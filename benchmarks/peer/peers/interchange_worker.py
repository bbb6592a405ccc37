"""lerobot's side of what policies become on the way: it makes them, loads folders, and says what it would do.

    python interchange_worker.py ORDERS.json

Orders are done one after the other: {"make": FOLDER, "settings": {…}} writes a policy with random weights and its
statistics; {"predict": FOLDER, "inputs": FILE, "outputs": FILE} loads one and writes its chunk for observations [To, …]
in the data's units, pictures uint8 [To, H, W, 3], and noise [1, H, A].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"


def make(folder: Path, settings: dict[str, Any]) -> None:
    """settings: state, environment, action (numbers of values), cameras (names), size, modes, stripped (whether the
    statistics of pictures are left out), and options of `DiffusionConfig`."""
    torch.manual_seed(settings.get("seed", 0))
    features = {STATE: PolicyFeature(FeatureType.STATE, (settings["state"],))}
    for name in settings.get("cameras", ()):
        features[name] = PolicyFeature(FeatureType.VISUAL, (3, *settings["size"]))
    if settings.get("environment"):
        features[ENVIRONMENT] = PolicyFeature(FeatureType.ENV, (settings["environment"],))
    modes = {
        "VISUAL": "MEAN_STD",
        "STATE": "MIN_MAX",
        "ENV": "MIN_MAX",
        "ACTION": "MIN_MAX",
        **settings.get("modes", {}),
    }
    options = {
        "pretrained_backbone_weights": None,
        "device": "cpu",
        "push_to_hub": False,
        **settings.get("options", {}),
    }
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    config = DiffusionConfig(
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (settings["action"],))},
        normalization_mapping={key: NormalizationMode(mode) for key, mode in modes.items()},
        **options,
    )
    policy = DiffusionPolicy(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 1:  # biases and scales, so that two in each other's place would show
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in policy.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    policy.save_pretrained(folder)
    statistics = {}
    for name, feature in {**features, ACTION: config.output_features[ACTION]}.items():
        n = feature.shape[0]
        shape = (n, 1, 1) if feature.type is FeatureType.VISUAL else (n,)
        low, spread = torch.rand(shape) - 0.5, 0.2 + torch.rand(shape)
        if feature.type is FeatureType.VISUAL:
            low = 0.3 * torch.rand(shape)
        else:
            spread[-1] = 0.0 if settings.get("constant") else spread[-1]
        statistics[name] = {"min": low, "max": low + spread, "mean": low + spread / 2, "std": spread / 4}
    for processor in make_pre_post_processors(config, dataset_stats=statistics):
        processor.save_pretrained(folder)


@torch.no_grad()
def predict(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The chunk [Ta, A] in the data's units; what DDPM draws begins at torch's seed 0."""
    config = PreTrainedConfig.from_pretrained(str(folder))
    policy = DiffusionPolicy.from_pretrained(str(folder), config=config).eval()
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    noise = inputs.pop("noise")
    batch = {}
    for name, value in inputs.items():
        if value.dtype == torch.uint8:
            value = value.permute(0, 3, 1, 2).float() / 255
        batch[name] = value.unsqueeze(0)
    batch = before(batch)
    if config.image_features:
        batch["observation.images"] = torch.stack([batch[name] for name in config.image_features], dim=-4)
    torch.manual_seed(0)
    chunk: Tensor = after(policy.diffusion.generate_actions(batch, noise=noise))
    return chunk.squeeze(0)


def main(orders: list[dict[str, Any]]) -> None:
    for order in orders:
        if "make" in order:
            make(Path(order["make"]), order["settings"])
        else:
            chunk = predict(Path(order["predict"]), load_file(order["inputs"]))
            save_file({"action": chunk.contiguous()}, order["outputs"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
