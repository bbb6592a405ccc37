"""Cheap mistakes, found before torch is imported: what is not there, and what cannot fit.

Each command has a function of its name here, which takes its configuration and raises `InputError`, or returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from action_diffusion.deploy.serve.access import is_loopback, read_token, require_token
from action_diffusion.errors import InputError, unknown
from action_diffusion.hub import is_reference
from action_diffusion.options import Collect, Deploy, Evaluate, Serve
from action_diffusion.options.extensions import check_intending
from action_diffusion.options.finetune import Finetune
from action_diffusion.options.policy import check_crop
from action_diffusion.policy.action_queue import SCHEDULINGS
from action_diffusion.policy.reading import (
    acting,
    check_sampler,
    data_for,
    read_config,
    read_spec,
    require,
    trained_on,
)
from action_diffusion.policy.runtime.onnx_file import is_onnx
from action_diffusion.policy.spec import env_words
from action_diffusion.policy.text.words import check_told
from action_diffusion.registry import ARMS, ENVS, ROBOTS

if TYPE_CHECKING:
    from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer


def train(config: Mapping[str, Any]) -> None:
    """The data, its columns and rate, the crop of its images, weights to start from, a run that is there already."""
    from action_diffusion.training.resuming import check_new

    check_new(config)
    _check_workers(config["workers"])
    if config["init"] is not None:
        require(Path(config["init"]).expanduser())
        read_spec(Path(config["init"]).expanduser())
    objective = config["policy"]["objective"]
    name = objective.get("name")
    if name in ("consistency", "distillation") and objective.get("teacher") is None:
        raise InputError(f"objective={name} learns from a policy: policy.objective.teacher=outputs/…/bundle")
    if objective.get("teacher") is not None:
        require(Path(objective["teacher"]).expanduser())
        read_spec(Path(objective["teacher"]).expanduser())
    encoder = config["policy"]["encoder"]
    weights = encoder.get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise InputError(f"policy.encoder.weights={weights}: no such file")
    _check_dropped(config["drop"] or (), config["policy"])
    _check_data(config)


def finetune(config: Finetune) -> None:
    """The bundle, its simulator, and a run that is there already."""
    path = Path(config.bundle)
    require(path)
    spec = read_spec(path)
    read_config(path)
    check_sampler(path, vars(config.sampler))
    _check_workers(config.workers)
    if spec.env is None:
        raise InputError(f"{path}: its task, {spec.task}, has no simulator to try things in")
    check_told([spec], config.instruction, config.text_model, asks=spec.env["name"] in ENVS.own)
    if config.resume and config.output_dir is None:
        raise InputError("resume=true needs output_dir=DIR, the folder of the run to go on with")
    if config.output_dir is not None:
        there = (Path(config.output_dir) / "checkpoint").is_dir()
        if there and not config.resume:
            raise InputError(
                f"{config.output_dir} already holds a run: give resume=true to go on with it, or another output_dir"
            )
        if config.resume and not (Path(config.output_dir) / "checkpoint").is_dir():
            raise InputError(f"{config.output_dir} holds no run to go on with")


def evaluate(config: Evaluate) -> None:
    """The bundles, what there is to hold them against, and an evaluation that is there already."""
    if not config.paths:
        raise InputError("bundle=[] names no bundle")
    if config.robot is not None:
        _check_trials(config)
        return
    from action_diffusion.training.evaluation.results import check_new

    _check_workers(config.workers)
    if config.output_dir is not None:
        check_new(Path(config.output_dir))
    bundles = [Path(path) for path in config.paths]
    compare = [] if config.compare is None else [Path(config.compare)]
    for path in (*bundles, *compare):
        if read_spec(path).env is None and is_onnx(path):
            raise InputError(f"{path}: its task has no simulator, and an ONNX file not the episodes that were held out")
        _check_bundle(config, path)
    simulated = [path for path in (*bundles, *compare) if read_spec(path).env is not None]
    others = [path for path in (*bundles, *compare) if path not in simulated]
    if simulated and others:
        raise InputError(f"{simulated[0]} is for a task with a simulator, {others[0]} is not: they do not compare")
    specs = [read_spec(path) for path in (*bundles, *compare)]
    own = any(spec.env is not None and spec.env["name"] in ENVS.own for spec in specs)
    check_told(specs, config.instruction, config.text_model, asks=own)
    tasks = {path: env_words(env) for path in simulated if (env := read_spec(path).env) is not None}
    for path, words in tasks.items():
        if words != tasks[simulated[0]]:
            raise InputError(f"{simulated[0]} is for {tasks[simulated[0]]}, {path} for {words}: they do not compare")
    _check_held_out(config.data, [*bundles, *compare])
    trained = [trained_on(read_config(path), path) for path in others]
    if trained and config.data is None:
        _check_held_out(data_for(trained[0], others[0], None), others)


def _check_bundle(config: Evaluate, path: Path) -> None:
    read_spec(path)
    read_config(path)
    check_intending(config.intents, acting(path, config.extensions))
    check_sampler(path, vars(config.sampler))


def _check_trials(config: Evaluate) -> None:
    """The bundles, the robot, that all fit, a page for whoever marks, and the plan of trials that are there already."""
    from action_diffusion.deploy.fitting import check_spec
    from action_diffusion.deploy.trials.plan import check_together, planned

    for path in config.paths:
        _check_bundle(config, Path(path))
    options = config.deployment(config.paths[0])
    _check_exists("hardware", config.hardware)
    _check_page(options)
    if config.scheduling not in SCHEDULINGS:
        raise unknown("scheduling", config.scheduling, SCHEDULINGS)
    _check_robot(options.robot, config.hardware)
    if config.page is False and _in_cell(options.robot):
        raise InputError("page=false: somebody has to mark the runs of a real robot, on the page")
    check_together({path: read_spec(Path(path)) for path in config.paths})
    check_told([read_spec(Path(path)) for path in config.paths], config.instruction, config.text_model)
    for path in config.paths:
        check_spec(config.deployment(path), read_spec(Path(path)))
    planned(config, None if config.output_dir is None else Path(config.output_dir))


def deploy(config: Deploy) -> None:
    """The bundle, the robot, that they fit, the scheduling, files that are named, and a log that is there already."""
    spec = None
    if config.bundle:
        spec = read_spec(Path(config.bundle))
        read_config(Path(config.bundle))
        check_intending(config.intents, acting(Path(config.bundle), config.extensions))
        check_sampler(Path(config.bundle), vars(config.sampler))
        if config.scheduling == "rtc" and is_onnx(config.bundle):
            raise InputError(
                f"scheduling=rtc: chunks of {config.bundle}, an ONNX file, cannot continue running ones: choose sync, "
                "naive or ensemble, or give it the bundle"
            )
    _check_exists("hardware", config.hardware)
    _check_exists("replay", config.replay)
    _check_page(config)
    if config.replay is not None:
        return
    if not (config.bundle or config.server or config.calibrate):
        raise InputError("bundle is required: action-diffusion deploy bundle=…, or server=ws://HOST:PORT")
    if config.scheduling not in SCHEDULINGS:
        raise unknown("scheduling", config.scheduling, SCHEDULINGS)
    _check_robot(config.robot, config.hardware)
    if config.calibrate:
        return
    if config.output_dir is not None:
        from action_diffusion.deploy.records.run_log import check_new

        check_new(Path(config.output_dir))
    if spec is not None:
        from action_diffusion.deploy.fitting import check_spec

        check_spec(config, spec)
        check_told([spec], config.instruction, config.text_model)


def serve(config: Serve) -> None:
    """The token and the bundles."""
    bundles = [Path(path) for path in config.named.values()]
    require_token(config.host, read_token(config.token_file), option="host", files="token_file")
    specs = [read_spec(bundle) for bundle in bundles]
    check_told(specs, config.instruction, config.text_model, asks=False)
    for bundle in bundles:
        read_config(bundle)
        check_intending(config.intents, acting(bundle, config.extensions))
        check_sampler(bundle, vars(config.sampler))


def collect(config: Collect) -> None:
    """The bundle that episodes begin with, and files that are named."""
    if config.visited_by is not None:
        require(Path(config.visited_by).expanduser())
    _check_workers(config.workers)
    _check_exists("hardware", config.hardware)
    _check_page(config)
    if config.robot is not None and config.agent != "expert":  # which knows one robot
        _check_robot(config.robot, config.hardware)


def _check_workers(workers: int | str | None) -> None:
    """Of a Ray cluster: that Ray is installed, and something listens where the head node is said to be."""
    if isinstance(workers, str):
        from action_diffusion.envs.actors import check

        check(workers)


def _check_robot(name: str, hardware: str | None) -> None:
    """That there is one of this name, and a file of a real one."""
    if name not in ROBOTS and name not in ARMS and ":" not in name:
        raise unknown("robot", name, ROBOTS)
    if _in_cell(name):
        from action_diffusion.deploy.robot.cell import read_cell

        read_cell(hardware)


def _in_cell(name: str) -> bool:
    """Whether it is an arm of that name, in a cell that a file describes."""
    return name not in ROBOTS or ROBOTS[name] == ROBOTS["ur"]


def _check_page(config: Deploy | Collect) -> None:
    """A page that other machines reach has a token."""
    host = config.page_host
    if config.page is not False and not is_loopback(host):
        require_token(host, read_token(config.page_token_file), option="page_host", files="page_token_file")


def _check_exists(name: str, path: str | None) -> None:
    if path is None or is_reference(path) or Path(path).expanduser().exists():
        return
    from action_diffusion.datasets.storage.objects import is_url  # and Zarr, only where it is needed

    if not is_url(path):
        raise InputError(f"{name}={path}: no such file or folder")


def _check_data(config: Mapping[str, Any]) -> None:
    """Of what training reads: named columns, that buffers go together, that crops are no larger than images."""
    from action_diffusion.datasets.batches.mixing import check_weights, parts_of
    from action_diffusion.datasets.batches.sources import HUMAN, look_at, names
    from action_diffusion.training import columns

    data, task, drop = config["data"], config["task"], config["drop"]
    check_weights(config["dataset"]["weights"], data)
    if data == HUMAN:
        return  # it may have to be downloaded
    cache_dir = config["dataset"]["cache_dir"]
    buffers = [look_at(name, cache_dir=cache_dir and Path(cache_dir)) for name in names(data)]
    gain = columns.gain_source(config)
    buffer = columns.together(buffers, task, drop, gain)
    columns.check_action(buffer, columns.action_source(task))
    columns.check_rate(buffer, task["control_rate"])
    parts_of(buffer, config["dataset"], names(data))
    drawn = {key for one in buffers for key in columns.drawn(task, drop, one)}
    seen = columns.observed(task, drop, buffer, gain)
    if any(options.get("kind") == "text" for options in seen.values()):
        _check_words(config, buffer)
    for key, options in seen.items():
        if options.get("kind") == "text":
            continue
        source = options.get("source") or key
        if source not in buffer.keys and source not in drawn:
            raise unknown(f"key of the buffer for observation {key!r}", source, buffer.keys, buffer.name)
        shape = tuple(buffer[source].shape[1:]) if source in buffer.keys else ()
        if len(shape) == 3 and shape[-1] == 3:
            encoder = config["policy"]["encoder"]
            check_crop(key, encoder.get("resize") or shape[:2], encoder.get("crop"), encoder.get("crop_at"))


def _check_words(config: Mapping[str, Any], buffer: ReplayBuffer) -> None:
    """That every episode says in words what was to be done, and somebody will when the policy is tried."""
    from action_diffusion.datasets.storage.tasks import row_tasks

    sentences, _ = row_tasks(buffer)
    env, evaluation = config["task"].get("env"), config["evaluation"]
    tried = env and (evaluation["n_episodes"] or config["train"]["rollout_every"])
    if tried and env["name"] in ENVS.own and len(sentences) > 1 and evaluation["instruction"] is None:
        raise InputError(
            f"the policy will be told one of {len(sentences)} tasks, and {env['name']} does not say which to evaluate: "
            f"give evaluation.instruction=…, such as {sentences[0]!r}"
        )


def _check_dropped(drop: Sequence[str], policy: Mapping[str, Any]) -> None:
    """That no part of the policy is made for what it is not to see."""
    frame = policy.get("action_frame") or {}
    named = [frame.get(option) or () for option in ("observation", "position", "rotation")]
    framed = {key.partition("@")[0] for keys in named for key in ([keys] if isinstance(keys, str) else keys)}
    features = [key for key, options in (policy.get("features") or {}).items() if options is not None]
    for name in drop:
        for part in ["features"] * (name in features) + ["action_frame"] * (name in framed):
            raise InputError(f"drop=[{name}]: policy.{part} is made from it; give policy.{part}=null, or keep {name}")


def _check_held_out(data: Any, bundles: Sequence[Path]) -> None:
    """Of what predictions are held against: that it is there, and has what the policies observe, at their rates."""
    from action_diffusion.datasets.batches.sources import HUMAN, NAMES, look_at, names
    from action_diffusion.datasets.storage.tasks import row_tasks
    from action_diffusion.training import columns

    for name in names(data or []):
        if name == HUMAN:
            continue  # it may have to be downloaded
        if name not in NAMES:
            _check_exists("data", name)
        buffer = look_at(name)
        for path in bundles:
            spec = read_spec(path)
            if spec.env is not None:
                continue
            looked_at = (spec.observations | spec.estimates).items()
            seen = {key: value.source or key for key, value in looked_at if value.text is None}
            if spec.texts:
                row_tasks(buffer)
            for key, source in (seen | {"action": spec.action.source}).items():
                if source not in buffer.keys:
                    raise unknown(f"key of the buffer for {key!r} of {path}", source, buffer.keys, buffer.name)
            columns.check_rate(buffer, spec.control_rate, f"{path}'s control_rate")
