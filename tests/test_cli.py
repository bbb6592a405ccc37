"""The command line: help that can be typed, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from action_diffusion import __version__, cli
from action_diffusion.commands.data import SUBCOMMANDS
from action_diffusion.options import configuration
from action_diffusion.policy import bundle as bundles

REQUIRED = {
    "evaluate": ["bundle=x"],
    "collect": ["output=x"],
    "deploy": ["bundle=x"],
    "finetune": ["bundle=x"],
    "serve": ["bundle=x"],
    "train": [],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Everything runs in an empty folder: what a command leaves behind shows."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bundle(policy, tiny_config) -> str:
    policy.spec = replace(policy.spec, env={"name": "pusht", "max_steps": 3})
    bundles.save("run/bundle", policy, {"policy": tiny_config})
    return "run/bundle"


@pytest.fixture
def refused(capsys):
    """`refused("train", "seed=x")`: the only line on stderr, after exit code 2 and nothing on stdout."""

    def run(*words: str) -> str:
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
        return err.removeprefix("error: ").rstrip("\n")

    return run


# Help.


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_first_help_names_every_command(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^  action-diffusion {command}\b", out, re.MULTILINE)
    assert "--help" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["n_episodes=3", "--help"]])
def test_help_of_a_command_says_what_to_type(command, words, capsys):
    assert cli.main([command, *words]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"action-diffusion {command} ")
    assert re.search(rf"^  action-diffusion {command}\b", out, re.MULTILINE), "an example to copy"
    assert "Options" in out
    assert max(map(len, out.splitlines())) <= 120
    assert not re.search(r"\{\w+s\}", out), "a placeholder"
    assert err == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_in_a_help_text_exists(command, capsys):
    cli.main([command, "--help"])
    named = set(re.findall(r"(?<![\w.-])([a-z_][a-z_.]*)=", capsys.readouterr().out)) - {"name"}
    config = configuration.load(command, REQUIRED[command])
    known = {path for path, _ in configuration._items(config)} | set(configuration.GROUPS.get(command, ()))
    assert named - known == set()
    assert len(named) >= 4


def test_help_of_train_lists_what_ships(capsys):
    cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for group in ("task", "encoder", "denoiser", "scheduler", "objective"):
        assert ", ".join(configuration.choices(group)) in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"action-diffusion {__version__}\n"


# Words that are wrong.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown command 'trian': did you mean train?"),
        (
            "fly",
            "unknown command 'fly': choose from bundle, collect, data, deploy, evaluate, finetune, fit, info, serve, "
            "sweep, train",
        ),
        ("train --resume", "unknown option --resume: options are written name=value"),
        ("train task", "'task' is not of the form name=value; see: action-diffusion train --help"),
        ("train =3", "'=3' is not of the form name=value"),
        ("train task=pusht_stat", "unknown task 'pusht_stat': did you mean pusht_state"),
        ("train encoder=vit", "unknown encoder 'vit': choose from "),
        ("train scheduler=ddpmm", "unknown scheduler 'ddpmm': did you mean ddpm or ddim?"),
        ("train train.lrr=3", "unknown option 'train.lrr': did you mean train.lr"),
        ("train lr=3", "unknown option 'lr': choose from train.lr"),
        ("train output=x", "unknown option 'output': did you mean output_dir?"),
        ("train policy.encodr.crop=3", "unknown option 'policy.encodr.crop': did you mean policy.encoder"),
        ("train +train.lr=3", "'+train.lr=3': write train.lr=value, without +"),
        ("train ~data=3", "'~data=3': write data=value, without ~"),
        ("train --config-dir", "--config-dir needs a folder"),
        ("train --config-dir=nowhere", "--config-dir=nowhere: no such folder"),
        ("train task=custom", "data is required: give data=…"),
        ("train resume=true", "resume=true needs output_dir=DIR"),
        ("train train.max_steps=0", "train.max_steps=0 must be above 0"),
        ("train train.max_steps=1 data=nowhere.zarr", "nowhere.zarr: no such file or folder"),
        ("evaluate", "bundle is required: action-diffusion evaluate bundle=…"),
        ("evaluate bundle=", "bundle= is empty: give bundle=PATH"),
        ("evaluate bundle=[]", "bundle=[] names no bundle"),
        ("evaluate bundle=nowhere", "no bundle at nowhere: expected a folder with model.safetensors, config.yaml"),
        ("evaluate bundle=x n_env=3", "unknown option 'n_env': did you mean n_envs?"),
        ("evaluate bundle=x yaw=1", "unknown option 'yaw': choose from bundle, "),
        ("evaluate bundle=x sampler=null", "sampler is a section: give its values one by one, such as sampler."),
        ("collect", "output is required: action-diffusion collect output=…"),
        ("collect output=x.zarr agent=exprt", "unknown agent 'exprt': did you mean expert?"),
        ("collect output=x.zarr task=custom", "task=custom has no simulator to collect in"),
        ("deploy", "bundle is required: action-diffusion deploy bundle=…"),
        ("deploy", "or server=ws://HOST:PORT"),
        ("deploy server=http://x", "server=http://x: write ws://HOST:PORT"),
        ("deploy bundle=nowhere", "no bundle at nowhere"),
        ("serve", "bundle is required: action-diffusion serve bundle=…"),
        ("serve bundle=nowhere", "no bundle at nowhere"),
        ("serve bundle=x port=99999", "port=99999 must be a whole number from 0 to 65535"),
        ("serve bundle=x token_file=nowhere", "token_file=nowhere cannot be read: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, refused):
    assert message in refused(*words.split())


# Bundles that are wrong.


@pytest.mark.parametrize("command", ["evaluate", "deploy"])
def test_a_run_s_folder_is_not_its_bundle(command, bundle, refused):
    assert "lacks model.safetensors, config.yaml, spec.json; did you mean run/bundle?" in refused(command, "bundle=run")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "deploy"])
def test_a_device_that_is_not_there(command, bundle, refused):
    message = refused(command, f"bundle={bundle}", "device=cuda:99")
    assert message.startswith("device=cuda:99 is not there")
    assert "choose from cpu" in message


@pytest.mark.parametrize("command", ["evaluate", "deploy"])
def test_a_bundle_from_another_version(command, bundle, refused):
    file = Path(bundle) / "spec.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    assert refused(command, f"bundle={bundle}") == f"{file}: bundle format 99, this version reads format 1"


@pytest.mark.parametrize("command", ["evaluate", "deploy"])
def test_a_bundle_cannot_name_code(command, bundle, refused, folder):
    file = Path(bundle) / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["policy"]["denoiser"] = {"_target_": "os.system", "command": f"touch {folder / 'executed'}"}
    file.write_text(yaml.safe_dump(config))
    assert refused(command, f"bundle={bundle}").startswith(f"{file}: _target_ (os.system) is not allowed")
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("command", ["evaluate", "deploy"])
def test_a_scheduler_of_another_family(command, bundle, refused):
    message = refused(command, f"bundle={bundle}", "sampler.scheduler=flow")
    assert "flow" in message
    assert "diffusion" in message


def test_an_unknown_robot(bundle, refused):
    message = refused("deploy", f"bundle={bundle}", "robot=sim_push", "output_dir=x")
    assert message == "unknown robot 'sim_push': did you mean sim_pusht?"
    assert not Path("x").exists()


# Folders.


def test_a_run_is_never_overwritten(refused):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 10}\n')
    message = refused("train", "output_dir=run", "train.max_steps=1")
    assert message == "run already holds a run: give resume=true to go on with it, or another output_dir"
    assert Path("run/metrics.jsonl").read_text() == '{"step": 10}\n'


def test_a_folder_that_cannot_be_made(refused):
    Path("file").write_text("")
    assert refused("train", "output_dir=file/run", "train.max_steps=1") == "file/run: Not a directory"


# What goes well, and what ends otherwise.


def test_evaluate_prints_the_headline_numbers(bundle, capsys):
    options = ["n_episodes=2", "n_videos=0", "output_dir=out", "device=cpu"]
    assert cli.main(["evaluate", f"bundle={bundle}", *options]) == 0
    out = capsys.readouterr().out
    for line in (
        "task: pusht_state",
        "n_episodes: 2",
        "mean_score: ",
        "success_interval: [",
        "report: out/report.html",
    ):
        assert line in out
    assert json.loads(Path("out/results.json").read_text())["n_episodes"] == 2


@pytest.mark.slow
def test_deploy_runs_in_real_time(bundle, capsys):
    assert cli.main(["deploy", f"bundle={bundle}", "output_dir=out", "device=cpu"]) == 0
    assert "seed 100000: 3 steps, score " in capsys.readouterr().out
    assert len(Path("out/log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FloatingPointError("the loss is NaN at step 7"), 1, "error: the loss is NaN at step 7\n"),
        (PermissionError(13, "Permission denied", "/locked"), 2, "error: /locked: Permission denied\n"),
    ],
)
def test_other_ends_have_their_own_codes(error, code, line, monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*_: object) -> int:
        raise OSError("no file is named")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(OSError, match="no file is named"):
        cli.main(["train"])


@pytest.mark.slow
def test_the_installed_command_works_from_another_folder(folder):
    command = Path(sys.executable).with_name("action-diffusion")
    run = subprocess.run([command, "train", "task=pusht_stat"], capture_output=True, text=True, cwd=folder, timeout=120)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: unknown task 'pusht_stat': did you mean pusht_state")
    assert run.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_nobody_reading_is_no_error(tmp_path: Path) -> None:
    """As after `| head`: what is printed goes nowhere, and nothing is raised."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "action_diffusion", "train", "--help"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "words", ["", *cli.COMMANDS, "fit", "info", "sweep", "data", *(f"data {name}" for name in SUBCOMMANDS)]
)
def test_help_fits_into_eighty_columns(words, monkeypatch, capsys):
    assert cli.main([*words.split(), "--help"]) == 0
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*words.split(), "--help"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.split() == wide.split()
