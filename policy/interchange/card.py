"""The model card (README.md) of a bundle on the Hub: what the policy sees and does, and how it was evaluated.

An evaluation is the results.json that `evaluate` or `train` wrote: in the bundle, beside it, or in `evaluation` there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.policy.spec import PolicySpec
from action_diffusion.schema import shown

PLACES = ("results.json", "../results.json", "../evaluation/results.json")
HEAD = """\
---
library_name: action-diffusion
pipeline_tag: robotics
tags: [robotics, diffusion-policy, imitation-learning]
---
"""


def card(bundle: Path, name: str, spec: PolicySpec, described: Mapping[str, str]) -> str:
    """Markdown. name: of the repository. described: what `bundle inspect` says."""
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in described.items()]
    parts = [
        HEAD,
        f"# {name.rpartition('/')[2]}",
        f"A diffusion policy{f' for {_cell(spec.task)}' if spec.task else ''}, made with action-diffusion.",
        "\n".join(["| | |", "|---|---|", *rows]),
        f"```\naction-diffusion evaluate bundle=hf://{name}\naction-diffusion bundle inspect hf://{name}\n```",
        _evaluation(bundle),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(text: object) -> str:
    """Text that stays within its cell, and is no markup."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _evaluation(bundle: Path) -> str:
    found = _results(bundle)
    if found is None:
        return "## Evaluation\n\nNone lies beside the bundle."
    file, results = found
    lines = [_line(label, results.get(key), results.get(interval)) for label, key, interval in MEASURES]
    lines = [line for line in lines if line]
    words = [f"{results['n_episodes']} episodes" if isinstance(results.get("n_episodes"), int) else ""]
    words += [shown(results["task"]) if isinstance(results.get("task"), str) else ""]
    about = ", ".join(_cell(word) for word in words if word) or "no episodes said"
    table = ["| measure | value | 95 % interval |", "|---|---|---|", *lines] if lines else [f"{file} says no measures."]
    return f"## Evaluation\n\n{about}:\n\n" + "\n".join(table)


MEASURES = (
    ("success rate", "success_rate", "success_interval"),
    ("mean score", "mean_score", "mean_interval"),
    ("error of predicted actions, of the action's range", "action_error_relative", "action_error_relative_interval"),
)


def _line(label: str, value: Any, interval: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    ends = interval if isinstance(interval, list) and len(interval) == 2 else []
    between = " to ".join(f"{end:.3g}" for end in ends if isinstance(end, int | float))
    return f"| {label} | {value:.3g} | {between or 'none'} |"


def _of_another(results: Mapping[str, Any], bundle: Path) -> bool:
    """Whether they are of another bundle, which is there as well."""
    settings = results.get("settings")
    named = settings.get("bundle") if isinstance(settings, dict) else None
    return isinstance(named, str) and Path(named).is_dir() and Path(named).resolve() != bundle.resolve()


def _results(bundle: Path) -> tuple[str, dict[str, Any]] | None:
    for place in PLACES:
        try:
            results = json.loads((bundle / place).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(results, dict) and not _of_another(results, bundle):
            return place, results
    return None
