"""The `action-diffusion` command: subcommands, help that teaches, and one line with exit code 2 for bad input."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from action_diffusion import __version__, memory
from action_diffusion.commands import preflight
from action_diffusion.errors import InputError, unknown

MAIN_HELP = """\
action-diffusion: demonstrations in, a diffusion policy that works on a real arm out.

  action-diffusion train                                   train and evaluate on PushT; 10 minutes at most on 2 cores
  action-diffusion finetune bundle=outputs/…/bundle        better than its demonstrations, by trying in simulation
  action-diffusion evaluate bundle=outputs/…/bundle        success rate with its interval, videos, a report
  action-diffusion collect task=pusht_state agent=expert episodes=20 output=demos.zarr
  action-diffusion deploy bundle=outputs/…/bundle          run a bundle in real time
  action-diffusion serve bundle=outputs/…/bundle           think for robots on other machines
  action-diffusion sweep train seed=0,1,2            many runs, here or on a cluster, and one page about them
  action-diffusion fit --help                              guards, caches, limits: what acts while chunks are made
  action-diffusion data doctor demos.zarr                  what is wrong with demonstrations; inspect, view, edit
  action-diffusion data convert in=PATH out=PATH           LeRobot, UMI, robomimic, Zarr, folders: there and back
  action-diffusion bundle import in=PATH out=DIR           other projects' policies: in, and out again
  action-diffusion info                                    what runs on this machine, and why

Each takes name=value options; `action-diffusion train --help` explains them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0, 2 for bad input, 75 where another host is gone, 130
    after Ctrl-C."""
    # OpenMP's threads wait by spinning. With another program on the machine each then waits for a thread that the
    # other keeps from running, and training takes five times as long. Without any spin, a core falls asleep between
    # two operations, and an evaluation takes twice as long: benchmarks/results/history.md.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    memory.keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        from action_diffusion.commands.help import fitted

        print(fitted(MAIN_HELP))
        return 0
    if words[0] == "--version":
        print(f"action-diffusion {__version__}")
        return 0
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 141  # 128 + SIGPIPE, as other programs end
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


def _run(words: Sequence[str]) -> int:
    """The subcommand `words[0]`, with its options behind it; its exit code."""
    if words[0] == "data":  # has subcommands with options of their own
        from action_diffusion.commands.data import run

        return run(words[1:])
    if words[0] == "bundle":
        from action_diffusion.commands.bundle import run

        return run(words[1:])
    if words[0] == "fit":
        from action_diffusion.commands.fit import run

        return run(words[1:])
    if words[0] == "sweep":
        from action_diffusion.commands import sweep

        return sweep.run(*_split(words[1:]))
    if words[0] == "info":
        from action_diffusion.commands.info import run

        return run(words[1:])
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], [*COMMANDS, "bundle", "data", "fit", "info", "sweep"])
    overrides, config_dir = _split(words[1:])
    if overrides is None:
        from action_diffusion.commands.help import fitted, text

        print(fitted(text(words[0])))
        return 0
    return COMMANDS[words[0]](overrides, config_dir)


def _reader_gone() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`. From then on it goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes what is left there
    return True


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


def _train(overrides: list[str], config_dir: str | None) -> int:
    # The configuration is read before torch is imported: a misspelt option is refused in half a second.
    from action_diffusion.training.resuming import configured

    config = configured(overrides, config_dir)
    preflight.train(config)
    if "RANK" in os.environ:  # of a peer that is gone, torch says more than we do, line by line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from action_diffusion.training.hosts import HostLost
    from action_diffusion.training.run import train
    from action_diffusion.training.signals import Interrupted

    try:
        results = train(config)
    except HostLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return HostLost.EXIT_CODE
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


def _finetune(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.options.configuration import settings

    config = settings("finetune", overrides, config_dir)
    preflight.finetune(config)
    from action_diffusion.training.reward.finetune import finetune
    from action_diffusion.training.signals import Interrupted

    try:
        results = finetune(config)
    except Interrupted as stop:
        print(
            f"interrupted: saved at step {stop.step}. Go on with the same words, and output_dir={config.output_dir} "
            "resume=true",
            file=sys.stderr,
        )
        return 130
    if results:
        print_results(results, f"{config.output_dir}/evaluation/comparison")
    return 0


def _evaluate(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.options.configuration import settings

    config = settings("evaluate", overrides, config_dir)
    preflight.evaluate(config)
    if config.robot is not None:
        from action_diffusion.deploy.trials import session

        return session.run(config)
    from action_diffusion.training.evaluation.command import run

    several = len(config.paths) > 1 or config.compare is not None
    for results, folder in run(config):
        settings_of = results.get("settings")
        if several and isinstance(settings_of, dict):
            print(f"bundle: {settings_of['bundle']}")
        print_results(results, folder)
    return 0


def _collect(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.options.configuration import settings

    config = settings("collect", overrides, config_dir)
    preflight.collect(config)
    modules = {"teleop": "deploy.teleop.collecting", "corrections": "deploy.collect.corrections"}
    expert = "envs.collect" if config.robot is None else "deploy.collect.expert"
    module = importlib.import_module(f"action_diffusion.{modules.get(config.agent, expert)}")
    for name, value in module.run(config).items():
        print(f"{name}: {value}")
    return 0


def _deploy(overrides: list[str], config_dir: str | None) -> int:
    from action_diffusion.options.configuration import settings

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
    from action_diffusion.options.configuration import settings

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
        print(f"{name}: {_rounded(baseline['action_error_relative'])}; {baseline.get('verdict', '')}")
    if "verdict" in results:
        print(results["verdict"])
    print(f"report: {folder}/report.html")


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 4)
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


COMMANDS: dict[str, Callable[[list[str], str | None], int]] = {
    "train": _train,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "collect": _collect,
    "deploy": _deploy,
    "serve": _serve,
}
