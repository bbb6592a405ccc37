"""`action-diffusion evaluate`: bundles in, results and reports out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from action_diffusion.datasets.batches.sources import names
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options import Evaluate
from action_diffusion.policy.inference import OPTIONS
from action_diffusion.policy.opening import load
from action_diffusion.policy.reading import acting, data_for, read_config, read_spec, trained_on
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.training.evaluation.comparison import write_comparison, write_seed_summary
from action_diffusion.training.evaluation.results import check_new, compare, summarise_seeds, write_results
from action_diffusion.training.evaluation.rollouts import evaluate_policy

if TYPE_CHECKING:  # torch, which the simulators do without
    from action_diffusion.training.evaluation.held_out import ComparedWindows


def run(config: Evaluate) -> Iterator[tuple[dict[str, Any], Path]]:
    """Evaluate what `configs/evaluate.yaml` asks for; yields (results, folder) of each bundle, then of the summary.

    Raises `InputError` for bundles that cannot be loaded or do not belong to the same task, and for an output folder
    that holds an evaluation.
    """
    paths = [Path(path) for path in config.paths]
    if not paths:
        raise InputError("bundle=[] names no bundle")
    stamp = f"evaluation-{datetime.now():%Y%m%d-%H%M%S}"
    root = Path(config.output_dir) if config.output_dir else paths[0].parent / stamp
    check_new(root)
    several, other = len(paths) > 1, None if config.compare is None else Path(config.compare)
    asked = _windows(config, paths if other is None else [*paths, other])
    results = []
    for number, path in enumerate(paths):
        folder = root / f"bundle_{number}" if several else root
        results.append(_evaluate_one(config, path, folder, asked))
        yield results[-1], folder
    if several:
        summary = summarise_seeds(results)
        names = [str(path) for path in paths]
        if asked is not None:
            pairs = zip(names[1:], results[1:], strict=True)
            summary["differences"] = [compare(one, results[0], (name, names[0])) for name, one in pairs]
        write_results(root / "summary.json", summary)
        write_seed_summary(root / "report.html", names=names, results=results, summary=summary)
        yield _headlines(summary), root
    if other is not None:
        theirs = _evaluate_one(config, other, root / "compare", asked)
        yield theirs, root / "compare"
        names, folder = [str(paths[0]), str(other)], root / "comparison"
        difference = compare(results[0], theirs, names)
        write_results(folder / "results.json", difference)
        write_comparison(folder / "report.html", names=names, results=(results[0], theirs), found=difference)
        yield difference, folder


@dataclass(frozen=True)
class _Asked:
    """A task without a simulator: the windows that all bundles are asked about, and where they are from."""

    data: str
    buffer: ReplayBuffer
    chosen: ComparedWindows


def _windows(config: Evaluate, paths: Sequence[Path]) -> _Asked | None:
    """None for tasks with a simulator. Without `data` the episodes are those of the first bundle's training."""
    specs = [read_spec(path) for path in paths]
    if specs[0].env is not None:
        return None
    from action_diffusion.training.evaluation.held_out import choose
    from action_diffusion.training.run import open_data

    trained = trained_on(read_config(paths[0]), paths[0])
    data = names(data_for(trained, paths[0], config.data))
    buffer = open_data({**trained, "data": data})
    own = data if config.data is None else None
    return _Asked(" and ".join(data), buffer, choose(buffer, list(zip(paths, specs, strict=True)), own_data=own))


def _evaluate_one(config: Evaluate, path: Path, folder: Path, asked: _Asked | None) -> dict[str, Any]:
    faster: dict[str, Any] = {name: getattr(config, name) for name in OPTIONS}
    sampler = vars(config.sampler)
    extensions = acting(path, config.extensions)
    given = {"intents": vars(config.intents)}
    policy = load(path, str(config.device), sampler=sampler, extensions=extensions, given=given, **faster)
    metrics = path.parent / "metrics.jsonl"
    where: dict[str, Any] = {"output_dir": folder, "metrics_file": metrics if metrics.exists() else None}
    settings = {"bundle": str(path), "sampler": read_config(path)["policy"]["sampler"], **faster}
    if isinstance(policy, OnnxPolicy):
        settings["runtime"] = policy.runtime
    if extensions:
        settings["extensions"] = extensions
    if intents := {name: value for name, value in vars(config.intents).items() if value is not None}:
        settings["intents"] = intents
    settings["sampler"] |= {key: value for key, value in sampler.items() if value is not None}
    if asked is not None and not isinstance(policy, OnnxPolicy):
        from action_diffusion.training.data import prepare
        from action_diffusion.training.evaluation.held_out import evaluate_held_out

        dataset = trained_on(read_config(path), path)["dataset"]
        data = prepare(
            asked.buffer,
            policy.spec,
            device=policy.device,
            val_fraction=0.0,
            seed=0,
            memory_gb=dataset["memory_gb"],
            images=dataset.get("images", "auto"),
            text_model=config.text_model,
        )
        return evaluate_held_out(policy, data.train, asked.chosen, settings={**settings, "data": asked.data}, **where)
    return evaluate_policy(
        policy,
        settings=settings,
        n_episodes=config.n_episodes,
        seed=config.seed,
        n_envs=config.n_envs,
        policy_batch=config.policy_batch,
        workers=config.workers,
        n_videos=config.n_videos,
        instruction=config.instruction,
        text_model=config.text_model,
        **where,
    )


def _headlines(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary over training seeds, flat for printing."""
    flat: dict[str, Any] = {"task": summary["task"], "n_episodes": summary["n_episodes"]}
    for name in ("mean_score", "success_rate", "action_error_relative"):
        if name in summary:
            flat[name] = [summary[name]["mean"], summary[name]["sd"]]
    verdicts = [one["verdict"] for one in summary.get("differences", ())]
    return flat | ({"verdict": " ".join(verdicts)} if verdicts else {})
