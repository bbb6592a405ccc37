"""`action-diffusion train`: from a configuration to a trained and evaluated policy.

data ─▶ specification and statistics ─▶ policy ─▶ Trainer ─▶ DIR/bundle ─▶ DIR/evaluation
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import numpy as np
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console
from rich.markup import escape
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from action_diffusion.datasets.batches import sources
from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.datasets.batches.mixing import parts_of
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.options import Train, TrainSettings, plain
from action_diffusion.options.policy import DiffusionQlOptions
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.build import build_policy, check_statistics, fit_normalizer
from action_diffusion.policy.kernels import winograd
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec, TextSpec
from action_diffusion.policy.text.words import Words
from action_diffusion.schema import shown
from action_diffusion.training import checkpoints, columns, episodes, hosts, resuming
from action_diffusion.training.data import (
    StepBatches,
    TrainingData,
    describe,
    held_out_indices,
    learnt_from,
    prepare,
)
from action_diffusion.training.evaluation.held_out import choose, evaluate_held_out
from action_diffusion.training.evaluation.rollouts import evaluate_policy
from action_diffusion.training.metrics import MetricsLog
from action_diffusion.training.progress import spoken
from action_diffusion.training.trainer import Trainer
from action_diffusion.training.validation import Rollouts, Validation

_LOOKED_AT = 1024
"""Windows."""
_MARGIN, _NOTED = 0.1, 0.01
"""Of half the range that is normalised to; the share of actions beyond it that is worth a line."""
_PATIENCE = timedelta(days=7)
"""That processes have with each other: one may be measuring rollouts. Who is gone is noticed by `hosts`."""
console = Console(stderr=True, highlight=False, soft_wrap=True)


def train(config: Mapping[str, Any] | Train) -> dict[str, Any]:
    """Train, write the bundle and evaluate it. Returns the results of the evaluation ({} without one).

    `config`: plain data of `configs/train.yaml`, or the same typed. Raises `InputError`, or `Interrupted` after saving
    on Ctrl-C.
    """
    config = plain(config) if isinstance(config, Train) else config
    settings = TrainSettings(**config["train"])
    place = hosts.Place.of_environment()
    if place is None:
        output_dir = _output_dir(config)
        if settings.num_processes > 1 and "RANK" not in os.environ:
            return _spawn(dict(config, output_dir=str(output_dir)), settings.num_processes)
        return _train(config, settings, output_dir)
    resuming.check_new(config)
    others = hosts.Hosts(place, timeout=settings.host_timeout)
    others.join(config, bundles.versions() | {"accelerate": accelerate.__version__})
    with others.watching():
        return _train(config, settings, _output_dir(config, writes=place.rank == 0), others)


def _train(
    config: Mapping[str, Any], settings: TrainSettings, output_dir: Path, others: hosts.Hosts | None = None
) -> dict[str, Any]:
    """`train` in one process, or one of several."""
    accelerator = _accelerator(config, settings)
    say = console.print if accelerator.is_main_process else (lambda *_, **__: None)

    buffer = open_data(config)
    spec, data = _load(config, buffer, accelerator.device)
    newest = checkpoints.checkpoint_folders(output_dir)[-1:] if config["resume"] else []
    states = [value.source or key for key, value in spec.states.items() if value.text is None]
    states.append(spec.action.source)
    if others is not None:
        others.agree("data", resuming.fingerprint(buffer, states) | {"columns": sorted(states)})
        others.agree("checkpoints", {f"the newest in output_dir={output_dir}": newest[0].name if newest else None})
    if accelerator.is_main_process:
        changed = resuming.changed_data(output_dir, buffer, states)
        if newest and changed:
            say(changed)
    spec, policy = _policy(config, spec, data, newest[0] if newest else None)
    if policy.objective.rewarded:
        policy.to(accelerator.device).learn_from_rewards()
    if config["init"] is not None and not newest and (line := _beyond(policy, data)):
        say(f"{line} that {config['init']} was trained on")
    settings = _fit_batch(settings, len(data.train), accelerator.num_processes, say)
    say(
        f"[bold]{spec.task}[/]: {buffer.n_episodes} episodes, {buffer.n_steps:,} steps, {len(data.train):,} windows "
        f"from {data.train.mode}; {sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters on "
        f"{accelerator.device}\nwriting to {output_dir}"
    )
    if accelerator.device.type == "cpu" and winograd.library() is None:
        say("no C compiler was at hand at installation: training takes longer than it could (action-diffusion info)")
    say("\n".join(map(escape, [*learnt_from(spec, buffer), *data.table()])), soft_wrap=True)
    earlier = newest[0] / "bundle" if newest else _path(config["init"])
    known = episodes.record(buffer, spec, data, earlier)
    trainer = _trainer(config, settings, policy, data, known, accelerator, output_dir)
    if newest:
        otherwise = trainer.resume(newest[0])
        said = f"going on from step {trainer.progress.step} ({newest[0].name})"
        say(said if otherwise is None else f"{said}, {otherwise}")
    done = trainer.run()
    if accelerator.is_main_process:
        trainer.write_bundle(output_dir / "bundle", trainer.ema_state())
        say(f"{done.step:,} steps in {spoken(done.seconds)}; bundle in {output_dir / 'bundle'}")
        if (measured := _measured_steps(config["task"]["name"])) > done.step:
            say(f"this task's own settings train for {measured:,} steps: train.max_steps={measured}")
        if trainer.metrics is not None:
            trainer.metrics.close()
    main = accelerator.is_main_process
    accelerator.wait_for_everyone()
    if others is not None:
        others.leave()
    accelerator.end_training()  # the others are free while this one evaluates
    return final_evaluation(config, output_dir, buffer, data) if main else {}


def open_data(config: Mapping[str, Any]) -> ReplayBuffer:
    """The replay buffer that `data=` names, or all of them as one; images that only a simulator can give are rendered
    once."""
    task, drop = config["task"], config.get("drop")
    cache_dir = _path(config["dataset"]["cache_dir"])
    kept = {option: config["dataset"][option] for option in ("images", "cache_gb") if option in config["dataset"]}
    say = sources.tell if os.environ.get("RANK", "0") == "0" else (lambda _: None)  # one of the processes does
    buffers = []
    for name in sources.names(config["data"]):
        buffer = sources.open_data(name, cache_dir=cache_dir, say=say, **kept)
        for key in columns.drawn(task, drop, buffer):
            from action_diffusion.envs.pusht.simulator import render_states

            buffer = sources.with_images(buffer, render_states, key=key, cache_dir=cache_dir)
        buffers.append(buffer)
    learnt = columns.learnt_rewards(config)
    if learnt is not None:
        buffers = [columns.with_rewards(buffer, task, learnt) for buffer in buffers]
    return columns.together(buffers, task, drop, columns.gain_source(config), columns.reward_columns(learnt))


def final_evaluation(
    config: Mapping[str, Any], output_dir: Path, buffer: ReplayBuffer, data: TrainingData
) -> dict[str, Any]:
    """Evaluate DIR/bundle: in the task's simulator, or else on held-out episodes."""
    options = dict(config["evaluation"])
    if not options["n_episodes"]:
        return {}
    policy = bundles.load(output_dir / "bundle", _device(config), precision="fp32")  # as `evaluate` does
    where: dict[str, Any] = {
        "output_dir": output_dir / "evaluation",
        "metrics_file": output_dir / "metrics.jsonl",
    }
    data_names = " and ".join(sources.names(config["data"]))
    settings = {"data": data_names, "train": config["train"], "sampler": config["policy"]["sampler"]}
    if policy.spec.env is not None:
        options |= {"workers": config.get("workers"), "text_model": config.get("text_model")}
        return evaluate_policy(policy, settings=settings, **options, **where)
    if data.held_out is None:
        console.print("one episode only, none held out: no evaluation")
        return {}
    chosen = choose(buffer, [(output_dir / "bundle", policy.spec)], own_data=sources.names(config["data"]))
    return evaluate_held_out(policy, data.train, chosen, settings=settings, **where)


def _measured_steps(task: str) -> int:
    """How long the task's own settings train, where it ships and its steps were chosen for it; else 0."""
    from action_diffusion.options.configuration import choices, load

    if task == "custom" or task not in choices("task"):
        return 0
    return load("train", [f"task={task}", "data=x"])["train"]["max_steps"] or 0


def _output_dir(config: Mapping[str, Any], *, writes: bool = True) -> Path:
    """The run's folder; an existing run there is never overwritten. writes: whether this process does, there."""
    given = config["output_dir"]
    task = config["task"]["name"]
    path = Path(given) if given else Path("outputs") / f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
    if config["resume"] and not given:
        raise InputError("resume=true needs output_dir=DIR, the folder of the run to go on with")
    if not writes:
        return path
    resuming.check_new({**config, "output_dir": path})
    path.mkdir(parents=True, exist_ok=True)
    checkpoints.clean(path)
    return path


def _accelerator(config: Mapping[str, Any], settings: TrainSettings) -> Accelerator:
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    device = _device(config)
    precision = settings.mixed_precision
    if precision == "auto":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if device.type == "cuda" or fast else "no"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("train.mixed_precision=fp16 needs a GPU: use bf16 or no on the CPU")
    if "RANK" in os.environ:
        hosts.tell_accelerate(device)
    try:
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except RuntimeError as error:
        if "RANK" not in os.environ:
            raise
        raise InputError(f"the processes cannot be connected: {str(error).splitlines()[0]}") from None


def _device(config: Mapping[str, Any]) -> torch.device:
    return bundles.resolve_device(config["device"])


def _load(config: Mapping[str, Any], buffer: ReplayBuffer, device: torch.device) -> tuple[PolicySpec, TrainingData]:
    dataset = config["dataset"]
    gain = columns.gain_source(config)
    learnt = columns.learnt_rewards(config)
    text_model = config.get("text_model")
    spec = describe(config["task"], buffer, bundles.versions(), config.get("drop"), gain, text_model)
    spec.buffer_columns.update(columns.reward_columns(learnt))
    data = prepare(
        buffer,
        spec,
        device=device,
        val_fraction=dataset["val_fraction"],
        seed=config["seed"],
        max_episodes=dataset["max_episodes"],
        subset=dataset["subset"],
        parts=parts_of(buffer, dataset, sources.names(config["data"])),
        memory_gb=dataset["memory_gb"],
        images=dataset.get("images", "auto"),
        cache_dir=_path(dataset["cache_dir"]),
        gain=gain,
        rewards={} if learnt is None else _rewards(learnt),
        text_model=text_model,
    )
    if learnt is not None and (earned := data.train.rewards()).min() == earned.max():
        raise InputError(
            f"{buffer.name}: {learnt.reward or columns.REWARD!r} counts {earned[0]:g} in every row "
            f"(policy.objective.counted={learnt.counted}): there is nothing to learn from"
        )
    return spec, data


def _rewards(learnt: DiffusionQlOptions) -> dict[str, Any]:
    """How a `BatchSource` is told of them."""
    return {
        "reward_key": learnt.reward or columns.REWARD,
        "gamma": learnt.gamma,
        "counted": learnt.counted,
        "terminal_key": learnt.terminal,
    }


def _encoder(text: TextSpec) -> str:
    return f"{shown(text.encoder)} ({text.version})"


_Turned = TypeVar("_Turned", ActionSpec, ObservationSpec)


def _turned(ours: _Turned, theirs: _Turned) -> _Turned:
    """With rotations about the references that `theirs` has, where it has the same."""
    known = {(one.first, one.representation): one for one in theirs.rotations}
    return replace(ours, rotations=tuple(known.get((one.first, one.representation), one) for one in ours.rotations))


def _policy(
    config: Mapping[str, Any], spec: PolicySpec, data: TrainingData, checkpoint: Path | None
) -> tuple[PolicySpec, DiffusionPolicy]:
    """A new policy, or one with the weights and the statistics of `checkpoint` or of `init`."""
    torch.manual_seed(config["seed"])
    taught = config["policy"]["objective"].get("teacher")
    init = config["init"] or taught
    if init is None and checkpoint is None:
        statistics = fit_normalizer(
            config["policy"], spec, data.statistics_rows, data.chunks, data.statistics_weights, data.history
        )
        spec = replace(spec, normalizer=statistics)
        return spec, build_policy(config["policy"], spec)
    path = Path(init) if checkpoint is None else checkpoint / "bundle"
    option = "init" if config["init"] else "policy.objective.teacher"
    what_is_it = f"{option}={path}" if checkpoint is None else f"the run cannot go on from {checkpoint}"
    theirs = bundles.read_spec(path)
    for ours, other, what in (
        (
            [(k, v.kind, v.shape) for k, v in spec.observations.items()],
            [(k, v.kind, v.shape) for k, v in theirs.observations.items()],
            "observations",
        ),
        (spec.action.shape, theirs.action.shape, "action"),
    ):
        if ours != other:
            raise InputError(f"{what_is_it}: its {what} {other} differ from those of this run, {ours}")
    for key, text in spec.texts.items():
        if (before := theirs.texts[key]) != replace(text, sentences=before.sentences):
            raise InputError(
                f"{what_is_it}: its words are told by {_encoder(before)}, those of this run by {_encoder(text)}: "
                f"give task.observations.{key}.encoder as the bundle's spec.json has it"
            )
    # The weights mean what they mean only together with the statistics that they were trained with.
    spec = replace(
        spec,
        normalizer=theirs.normalizer,
        observations={key: _turned(value, theirs.observations[key]) for key, value in spec.observations.items()},
        action=_turned(spec.action, theirs.action),
    )
    policy = build_policy(config["policy"], spec)
    try:
        check_statistics(policy)
    except InputError as error:
        raise InputError(f"{what_is_it}: {error}") from None
    bundles.load_weights(policy, path, new=("denoiser.span_",) if checkpoint is None and taught else ())
    if taught:
        policy.learn_from(bundles.load(Path(taught), data.train.device))
    return spec, policy


def _beyond(policy: DiffusionPolicy, data: TrainingData) -> str | None:
    """How many of the actions lie where no chunk can be, with statistics that are those of other data; None: hardly
    any."""
    if policy.sampler.clip is None:
        return None
    rows = data.train.windows.rows(held_out_indices(data.train, _LOOKED_AT))
    seen = {key: data.train.windowed(key, rows[:, : policy.spec.n_obs_steps]) for key in policy.spec.states}
    obs = {key: value.to(policy.device) for key, value in seen.items()}
    action = policy.normalize_action(data.train.windowed("action", rows).to(policy.device), obs).cpu()
    low, high = policy.sampler.bounds or (-policy.sampler.clip_range, policy.sampler.clip_range)
    share = float(((action < low - _MARGIN) | (action > high + _MARGIN)).any(-1).float().mean())
    if share < _NOTED:
        return None
    return (
        f"{100 * share:.0f} % of the actions are beyond what the policy can do, as its statistics stay and "
        "policy.sampler.clip keeps chunks within them (null lets them out): they are unlike those"
    )


def _fit_batch(settings: TrainSettings, windows: int, processes: int, say: Any) -> TrainSettings:
    most = windows // processes
    if settings.batch_size <= most:
        return settings
    if most < 1:
        raise InputError(f"{windows} training windows are too few for {processes} processes")
    say(f"batch size {most} instead of {settings.batch_size}: there are only {windows} training windows")
    return replace(settings, batch_size=most)


def _trainer(
    config: Mapping[str, Any],
    settings: TrainSettings,
    policy: DiffusionPolicy,
    data: TrainingData,
    known: episodes.Known | None,
    accelerator: Accelerator,
    output_dir: Path,
) -> Trainer:
    main, spec = accelerator.is_main_process, policy.spec
    metrics = None
    if main:
        plain = {**config, "output_dir": str(output_dir)}
        with atomic_path(output_dir / "config.yaml") as partial:  # what resuming goes on with
            partial.write_text(yaml.safe_dump(plain, sort_keys=False))
        project = settings.wandb_project if settings.wandb else None
        metrics = MetricsLog(output_dir, tensorboard=settings.tensorboard, wandb=project, run_name=output_dir.name)
    reference = data.held_out if data.held_out is not None else data.train
    validation = Validation(
        policy, reference, count=config["dataset"]["val_windows"], parts=_validated(data, reference)
    )
    rollouts = None
    if spec.env is not None and settings.rollout_every:
        words = Words.of(spec, config["evaluation"].get("instruction"), config.get("text_model"))
        rollouts = Rollouts(
            policy, env=spec.env, n_episodes=settings.rollout_episodes, words=words, workers=config.get("workers")
        )
    first = reference.gather(validation.indices[0][:1]).obs
    golden = {key: first[key][0].cpu().numpy() for key in spec.observations}
    return Trainer(
        policy=policy,
        source=StepBatches(
            data.train,
            seed=config["seed"],
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            crop=getattr(policy.encoder, "early_crop", None),
            draws=data.draws(config["seed"]),
        ),
        settings=settings,
        accelerator=accelerator,
        output_dir=output_dir,
        seed=config["seed"],
        metrics=metrics,
        write_bundle=lambda path, weights: bundles.save(
            path, policy, config, weights=weights, golden_obs=golden, episodes=known and known._asdict()
        ),
        validate=validation if settings.validate_every else None,
        rollout=rollouts,
    )


def _validated(data: TrainingData, reference: BatchSource) -> dict[str, tuple[np.ndarray, float]]:
    """Of parts that have weights: the windows of each in `reference`, if there are any, and its share."""
    if data.parts.weights is None:
        return {}
    of_window, found = data.part_of_windows(reference), {}
    for part, (name, share) in enumerate(zip(data.parts.names, data.shares(), strict=True)):
        own = np.flatnonzero(of_window == part)
        if len(own):
            found[name] = own, float(share)
    return found


def _spawn(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """Run `processes` copies that train together (gloo on the CPU, NCCL on GPUs)."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failures: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it says what it ends
    try:
        spawn(_process, args=(config, processes, port, failures), nprocs=processes)
    except ProcessExitedException as error:
        if failures.empty() and error.signal_name is not None:
            raise hosts.HostLost(
                f"process {error.error_index} was killed ({error.signal_name}). Go on from the last checkpoint with "
                "the same command and resume=true"
            ) from None
        if failures.empty():
            raise
        kind, message = failures.get()
        raise (InputError if kind == "InputError" else FloatingPointError)(message) from None
    results = Path(config["output_dir"]) / "evaluation" / "results.json"
    return yaml.safe_load(results.read_text()) if results.exists() else {}


def _process(rank: int, config: dict[str, Any], processes: int, port: int, failures: Any) -> None:
    """One of the processes. What a user can mend it says by `failures`, once, and not by a traceback of its own."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if _device(config).type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    try:
        _train(config, TrainSettings(**config["train"]), Path(config["output_dir"]))
    except (InputError, FloatingPointError) as error:
        failures.put((type(error).__name__, str(error)))
        sys.exit(2)


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)
