"""`action-diffusion evaluate`: bundles in, results and reports out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.inference import OPTIONS
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import trained_on
from action_diffusion.training.data import prepare
from action_diffusion.training.evaluation.comparison import write_comparison, write_seed_summary
from action_diffusion.training.evaluation.results import compare, summarise_seeds, write_results
from action_diffusion.training.evaluation.rollouts import evaluate_policy
from action_diffusion.training.run import open_data
from action_diffusion.training.validation import evaluate_held_out


def run(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Evaluate what `configs/evaluate.yaml` asks for; yields (results, folder) of each bundle, then of the summary.

    Raises `InputError` for bundles that cannot be loaded or do not belong to the same task.
    """
    given = config["bundle"]
    paths = [Path(str(path)) for path in (given if isinstance(given, list) else [given])]
    if not paths:
        raise InputError("bundle=[] names no bundle")
    stamp = f"evaluation-{datetime.now():%Y%m%d-%H%M%S}"
    root = Path(config["output_dir"]) if config["output_dir"] else paths[0].parent / stamp
    several = len(paths) > 1
    results = []
    for number, path in enumerate(paths):
        folder = root / f"bundle_{number}" if several else root
        results.append(_evaluate_one(config, path, folder))
        yield results[-1], folder
    if several:
        summary = summarise_seeds(results)
        write_results(root / "summary.json", summary)
        write_seed_summary(root / "report.html", names=[str(path) for path in paths], results=results, summary=summary)
        yield _headlines(summary), root
    if config["compare"] is not None:
        other = _evaluate_one(config, Path(config["compare"]), root / "compare")
        yield other, root / "compare"
        difference, folder = compare(results[0], other), root / "comparison"
        write_results(folder / "results.json", difference)
        names = (str(paths[0]), str(config["compare"]))
        write_comparison(folder / "report.html", names=names, results=(results[0], other), found=difference)
        yield difference, folder


def _evaluate_one(config: Mapping[str, Any], path: Path, folder: Path) -> dict[str, Any]:
    faster = {name: config[name] for name in OPTIONS}
    policy = bundles.load(path, config["device"], sampler=config["sampler"], **faster)
    metrics = path.parent / "metrics.jsonl"
    where: dict[str, Any] = {"output_dir": folder, "metrics_file": metrics if metrics.exists() else None}
    settings = {"bundle": str(path), "sampler": bundles.read_config(path)["policy"]["sampler"], **faster}
    settings["sampler"] |= {key: value for key, value in config["sampler"].items() if value is not None}
    if policy.spec.env is None:
        return _held_out(config, policy, path, settings, where)
    options = {name: config[name] for name in ("n_episodes", "seed", "n_envs", "policy_batch", "n_videos")}
    return evaluate_policy(policy, settings=settings, **options, **where)


def _held_out(
    config: Mapping[str, Any], policy: DiffusionPolicy, path: Path, settings: dict[str, Any], where: dict[str, Any]
) -> dict[str, Any]:
    """A task without a simulator: the episodes that training held out, or all of another buffer."""
    trained = trained_on(bundles.read_config(path), path)
    own = config["data"] is None
    data_config = {**trained, "data": trained["data"] if own else config["data"]}
    data = prepare(
        open_data(data_config),
        policy.spec,
        device=policy.device,
        val_fraction=trained["dataset"]["val_fraction"] if own else 0.0,
        seed=trained["seed"],
        subset=trained["dataset"].get("subset") if own else None,
        memory_gb=trained["dataset"]["memory_gb"],
    )
    source = data.held_out if own else data.train
    if source is None:
        raise InputError(f"{path}: training held out no episode; give data=PATH, demonstrations to compare with")
    return evaluate_held_out(policy, source, settings={**settings, "data": str(data_config["data"])}, **where)


def _headlines(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary over training seeds, flat for printing."""
    flat: dict[str, Any] = {"task": summary["task"], "n_episodes": summary["n_episodes"]}
    for name in ("mean_score", "success_rate"):
        flat[name] = [summary[name]["mean"], summary[name]["sd"]]
    return flat
