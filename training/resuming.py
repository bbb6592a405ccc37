"""What was asked for, kept with the run, so that `output_dir=DIR resume=true` is all that resuming takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from action_diffusion.configuration import BUDGETS
from action_diffusion.errors import InputError


def recall(overrides: Sequence[str], config_dir: str | None) -> tuple[list[str], str | None]:
    """On resume=true, the words that the run in output_dir was started with, then those given now."""
    given = dict(word.partition("=")[::2] for word in overrides)
    if given.get("resume", "").lower() != "true" or "output_dir" not in given:
        return list(overrides), config_dir
    file = Path(given["output_dir"]) / "command.json"
    if not file.exists():
        return list(overrides), config_dir
    try:
        earlier = json.loads(file.read_text())
        words, folder = [str(word) for word in earlier["overrides"]], earlier["config_dir"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): give all options again, into another output_dir") from None
    if any(key in BUDGETS for key in given):  # the budget given now replaces the earlier one
        words = [word for word in words if word.partition("=")[0] not in BUDGETS]
    return [word for word in words if word.partition("=")[0] not in given] + list(overrides), config_dir or folder


def remember(config: dict[str, Any], overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Settle the output folder of a run, and write down what it was started with unless a run is there."""
    task = config["task"]["name"]
    if config["output_dir"] is None and not config["resume"]:
        config = config | {"output_dir": f"outputs/{task}-{datetime.now():%Y%m%d-%H%M%S}"}
    if config["output_dir"] is not None:
        file = Path(config["output_dir"]) / "command.json"
        if not (file.parent / "metrics.jsonl").exists():  # an attempt that failed does not count
            file.parent.mkdir(parents=True, exist_ok=True)
            words = [word for word in overrides if word.partition("=")[0] not in ("output_dir", "resume")]
            file.write_text(json.dumps({"overrides": words, "config_dir": config_dir}, indent=1) + "\n")
    return config
