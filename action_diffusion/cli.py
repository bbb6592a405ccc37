"""The `action-diffusion` command: subcommands, help that teaches, and one line with exit code 2 for bad input."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from action_diffusion import __version__, memory
from action_diffusion.commands import preflight
from action_diffusion.errors import InputError, unknown

MAIN_HELP = """\
action-diffusion: demonstrations in, a diffusion policy that works on a real arm out.

  action-diffusion train                                   train and evaluate on PushT; 10 minutes at most on 2 cores
  action-diffusion evaluate bundle=outputs/…/bundle        success rate with its interval, videos, a report
  action-diffusion collect task=pusht_state agent=expert episodes=20 output=demos.zarr
  action-diffusion deploy bundle=outputs/…/bundle          run a bundle in real time
  action-diffusion serve bundle=outputs/…/bundle           think for robots on other machines
  action-diffusion data doctor demos.zarr                  what is wrong with demonstrations; inspect, view, edit
  action-diffusion data convert in=PATH out=PATH           LeRobot, UMI, robomimic, Zarr, folders: there and back
  action-diffusion info                                    what runs on this machine, and why

Each takes name=value options; `action-diffusion train --help` explains them.
"""

TRAIN_HELP = """\
action-diffusion train [name=value …]     from demonstrations to a policy bundle, evaluated

  action-diffusion train                                            PushT from states, embedded demonstrations
  action-diffusion train task=pusht_image                           the same from camera images
  action-diffusion train data=pusht_human train.max_minutes=8       demonstrations by people (downloaded once)
  action-diffusion train task=custom data=my_robot.zarr             your own robot: keys and cameras from the buffer
  action-diffusion train task=custom data=lerobot_folder            LeRobot, HDF5, CSV and MP4 the same way
  action-diffusion train task=custom data=[demos.zarr,more.zarr]    several together
  action-diffusion train output_dir=runs/a resume=true              go on with a run that was stopped

Options
  task=…                        {tasks}
  encoder=…                     {encoders}
  denoiser=…                    {denoisers}
  scheduler=…                   {schedulers}
  data=PATH|NAME|[…,…]          a replay buffer (Zarr), LeRobot folder, HDF5 or folder of CSV files; pusht_expert,
                                pusht_human; several are trained on together
  drop=[NAME,…]                 observations that are not learnt from
  output_dir=DIR                where bundle/, metrics.jsonl, checkpoints/ and evaluation/ go
  seed=0  device=auto|cpu|cuda|cuda:N  init=DIR/bundle
  resume=true                   goes on with the run in output_dir, with its own configuration and statistics
  train.max_minutes=M | train.max_steps=N | train.max_epochs=E      the budget
  train.batch_size=B  train.lr=…  train.mixed_precision=no|bf16|fp16|auto  train.num_processes=2
  train.checkpoint_every=N  train.validate_every=N  train.rollout_every=N
  evaluation.n_episodes=50      0 turns the final evaluation off
  dataset.memory_gb=G           memory for the data; what does not fit is read from disk
  dataset.max_episodes=N        train on the first N only, at least 1;  dataset.val_windows=128  at least 1
  task.horizon=16               steps of a chunk, 1 to 1024;  task.n_obs_steps=2  task.n_action_steps=8
  task.control_rate=10          Hz
  policy.normalizer.default=minmax|gaussian|identity
  policy.sampler.num_inference_steps=N  policy.sampler.clip=x0|x|null
  policy.…                      any option of a component, such as policy.denoiser.channels=[48,96,192]
  --config-dir DIR              a folder with your own task/*.yaml, used as task=NAME
"""

EVALUATE_HELP = """\
action-diffusion evaluate bundle=DIR [name=value …]     how good is a policy, with intervals, videos and a report

  action-diffusion evaluate bundle=outputs/a/bundle n_episodes=50
  action-diffusion evaluate bundle=A/bundle compare=B/bundle         paired, on the same starts
  action-diffusion evaluate bundle=[A/bundle,B/bundle,C/bundle]      several training seeds, summarised

Options
  n_episodes=50  seed=100000    the starts: seed, seed + 1, …
  n_envs=null                   environments that run at once (scores do not depend on it)
  output_dir=DIR                where results.json, report.html and videos/ go
  sampler.scheduler=…  sampler.num_inference_steps=…    sample differently, within the trained family
  precision=fp32|fp16|bf16  compile=true  cuda_graph=true    denoise faster
  n_videos=6  policy_batch=null  device=auto|cpu|cuda  data=PATH (tasks without a simulator)
"""

COLLECT_HELP = """\
action-diffusion collect output=PATH [name=value …]     demonstrations into a replay buffer

  action-diffusion collect task=pusht_state agent=expert episodes=20 output=demos.zarr
  action-diffusion collect task=lift_image agent=expert robot=sim_arm episodes=40 output=arm.zarr    in real time
  action-diffusion collect task=pusht_state agent=teleop output=mine.zarr              you drive, in a browser
  action-diffusion collect task=lift_state agent=teleop device=gamepad output=lift.zarr
  action-diffusion collect agent=teleop robot=lerobot hardware=cell.yaml device=leader task=custom output=arm.zarr
  action-diffusion collect agent=corrections from=DIR/record.zarr output=more.zarr     what a person mended in deploy

Options
  episodes=20  seed=0           starts from seed upward; the expert's failures are discarded and counted
  min_score=0.98                what counts as a failure of the expert
  visited_by=DIR/bundle         episodes begin where this policy gets to, to show it the way back

Options of agent=teleop: docs/teleoperation.md
  device=browser|keyboard|gamepad|spacemouse|leader|script      what you drive with
  speed=1  clutch=false  countdown=3  max_seconds=120
  script=FILE|-                 device=script: a line of numbers a step, or start, keep, discard, undo
  robot=ur|franka|lerobot|sim_pusht  hardware=cell.yaml  dry_run=true      a robot instead of the task's simulator
  page=true|PORT|false          the page beside other devices; page_host=…  page_token_file=PATH
  video=true                    images as video
  output=DIR.zarr               goes on where it exists: episodes are kept one by one, and a kill loses none

Options of agent=corrections
  from=DIR                      a deployment's record, or the folder that it is in
  min_steps=5                   shorter corrections are left out
"""

DEPLOY_HELP = """\
action-diffusion deploy bundle=DIR|server=URL [name=value …]     run a bundle in real time

  action-diffusion deploy bundle=outputs/a/bundle robot=sim_pusht
  action-diffusion deploy server=ws://HOST:8000 scheduling=rtc        another machine thinks: action-diffusion serve
  action-diffusion deploy replay=DIR [bundle=…] [scheduling=…]        a recorded run once more, offline: docs/deploy.md
  action-diffusion deploy calibrate=true robot=ur hardware=cell.yaml [bundle=DIR]   how late cameras, arm, policy are

Options
  server_timeout=5              seconds; where no answer comes the robot holds, and the loop connects again
  token_file=PATH               the server's token; otherwise the environment's ACTION_DIFFUSION_TOKEN
  robot=sim_pusht|sim_arm       PushT, or a Panda, in real time, in processes of their own: docs/deploy.md
  robot=ur|franka|lerobot|module:Class  hardware=cell.yaml  dry_run=true     a real arm, its cameras: docs/bringup.md
  limits=…  obstacles=…         of the arm, beside its vendor's
  simulated.latency=0  simulated.camera.rate=20  …      how slow and unreliable a simulated robot is
  n_episodes=1  seed=100000     the starts: seed, seed + 1, …
  output_dir=DIR                where log.jsonl (a line a step), record.zarr and latency.json go
  calibration.number=0  calibration.distance=D     what moves slowly, and how far: docs/bringup.md
  page=true|PORT|false          the operator's page, on this machine; by default where the extra [page] is installed
  page_host=…  page_token_file=PATH     let other machines in, with a token
  wait=true                     episodes begin when somebody presses Start on the page
  teleop=keyboard|gamepad|spacemouse|leader     what commands after Take over: docs/teleoperation.md
  record=false                  no record.zarr
  safety.margin=0.1             how far a command may leave what was demonstrated, as a share of its range
  sampler.scheduler=…  sampler.num_inference_steps=…    sample differently, within the trained family
  precision=fp32|fp16|bf16  compile=true  cuda_graph=true    denoise faster
  device=auto|cpu|cuda
"""

SERVE_HELP = """\
action-diffusion serve bundle=DIR [name=value …]     a policy server: this machine thinks, the robot's machine moves

  action-diffusion serve bundle=outputs/a/bundle                                     for clients on this machine
  action-diffusion serve bundle=outputs/a/bundle host=0.0.0.0 token_file=~/token   for others too

Clients: WebsocketClientPolicy of openpi-client, whose api_key is the token, and `action-diffusion deploy` (its option
server). GET /healthz answers OK. Needs the extra [serve]; docs/server.md has the protocol.

Options
  host=127.0.0.1  port=8000     any host but this machine needs a token; port=0 takes one that is free
  token_file=PATH               where it is; otherwise the environment's ACTION_DIFFUSION_TOKEN
  max_connections=16            each is an episode of its own, with its own history of observations
  max_message_mb=16             larger messages end a connection
  remember=true                 false where clients ask once a chunk (openpi's ActionChunkBroker): docs/server.md
  seed=null                     a number: every episode draws the noise of this start, so that runs repeat
  sampler.scheduler=…  sampler.num_inference_steps=…    sample differently, within the trained family
  precision=fp32|fp16|bf16  compile=true  cuda_graph=true    denoise faster
  device=auto|cpu|cuda
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    # OpenMP's threads wait by spinning. With another program on the machine each then waits for a thread that the
    # other keeps from running, and training takes five times as long. Without any spin, a core falls asleep between
    # two operations, and an evaluation takes twice as long: benchmarks/results/history.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    memory.keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(MAIN_HELP)
        return 0
    if words[0] == "--version":
        print(f"action-diffusion {__version__}")
        return 0
    try:
        if words[0] == "data":  # has subcommands with options of their own
            from action_diffusion.commands.data import run

            return run(words[1:])
        if words[0] == "info":
            from action_diffusion.commands.info import run

            return run(words[1:])
        if words[0] not in COMMANDS:
            raise unknown("command", words[0], [*COMMANDS, "data", "info"])
        command, help_text = COMMANDS[words[0]]
        overrides, config_dir = _split(words[1:])
        if overrides is None:
            print(_fill(help_text))
            return 0
        return command(overrides, config_dir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory: {error or 'it is all taken'}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _split(words: Sequence[str]) -> tuple[list[str] | None, str | None]:
    """(overrides, --config-dir); overrides None when help is asked for."""
    overrides: list[str] = []
    config_dir = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return None, None
        if word == "--config-dir":
            if not rest:
                raise InputError("--config-dir needs a folder")
            config_dir = rest.pop(0)
        elif word.startswith("--config-dir="):
            config_dir = word.partition("=")[2]
        elif word.startswith("-"):
            raise InputError(f"unknown option {word}: options are written name=value, beside --help and --config-dir")
        else:
            overrides.append(word)
    return overrides, config_dir


def _fill(text: str) -> str:
    from action_diffusion.configuration import choices

    for group in ("task", "encoder", "denoiser", "scheduler"):
        text = text.replace(f"{{{group}s}}", ", ".join(choices(group)))
    return text


def _train(overrides: list[str], config_dir: str | None) -> int:
    # The configuration is read before torch is imported: a misspelt option is refused in half a second.
    from action_diffusion.training.resuming import configured

    config = configured(overrides, config_dir)
    preflight.train(config)
    from action_diffusion.training.run import train
    from action_diffusion.training.trainer import Interrupted

    try:
        results = train(config)
    except Interrupted as stop:
        print(
            f"interrupted: saved at step {stop.step}. Go on with: action-diffusion train "
            f"output_dir={config['output_dir']} resume=true",
            file=sys.stderr,
        )
        return 130
    if results:
        print_results(results, f"{config['output_dir']}/evaluation")
    return 0


def _evaluate(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.configuration import load

    config = load("evaluate", overrides, config_dir)
    preflight.evaluate(config)
    from action_diffusion.training.evaluation.command import run

    for results, folder in run(config):
        print_results(results, folder)
    return 0


def _collect(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.configuration import settings

    config = settings("collect", overrides, config_dir)
    preflight.collect(config)
    modules = {"teleop": "deploy.teleop.collecting", "corrections": "deploy.collect.corrections"}
    expert = "envs.collect" if config.robot is None else "deploy.collect.expert"
    module = importlib.import_module(f"action_diffusion.{modules.get(config.agent, expert)}")
    for name, value in module.run(config).items():
        print(f"{name}: {value}")
    return 0


def _deploy(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.configuration import settings

    config = settings("deploy", overrides, config_dir)
    preflight.deploy(config)
    if config.calibrate:
        from action_diffusion.deploy.calibrate import command as calibrate_command

        return calibrate_command.run(config)
    if config.replay is not None:
        from action_diffusion.deploy.records import command as replay_command

        return replay_command.run(config, {word.partition("=")[0] for word in overrides})
    from action_diffusion.deploy.run import run

    return run(config)


def _serve(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.configuration import settings

    config = settings("serve", overrides, config_dir)
    preflight.serve(config)
    from action_diffusion.deploy.serve.command import run

    return run(config)


def print_results(results: dict[str, object], folder: object) -> None:
    """The headline numbers of an evaluation, and where the rest is."""
    for name in ("task", "n_episodes", "origin", "mean_score", "mean_interval", "success_rate", "success_interval"):
        if name in results:
            print(f"{name}: {_rounded(results[name])}")
    for name, value in results.items():
        if name.startswith(("action_", "error_")) or name.endswith("_difference"):
            print(f"{name}: {_rounded(value)}")
    baselines = results.get("baselines")
    for name, baseline in baselines.items() if isinstance(baselines, dict) else ():
        print(f"{name}: {_rounded(baseline['action_error_relative'])}. {baseline.get('verdict', '')}")
    if "verdict" in results:
        print(results["verdict"])
    print(f"report: {folder}/report.html")


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


COMMANDS: dict[str, tuple[Callable[[list[str], str | None], int], str]] = {
    "train": (_train, TRAIN_HELP),
    "evaluate": (_evaluate, EVALUATE_HELP),
    "collect": (_collect, COLLECT_HELP),
    "deploy": (_deploy, DEPLOY_HELP),
    "serve": (_serve, SERVE_HELP),
}
