"""A sweep from end to end, whose runs are a stand-in's: what is run, what is kept, what is refused, what is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from action_diffusion.cli import main
from action_diffusion.files import writer_lock
from action_diffusion.policy.reading import versions
from action_diffusion.training.sweep import grid, job

SHORT = "train.max_steps=2"


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_four_runs_one_page_and_again_nothing_is_started(sweep, capsys):
    assert sweep("seed=0,1", "policy.objective.loss=l1,mse", SHORT) == 0
    each_once = {f"loss-{loss}_seed-{seed}": 1 for seed in (0, 1) for loss in ("l1", "mse")}
    assert sweep.starts() == each_once
    found = summary(sweep.folder)
    assert [run["settings"]["policy.objective.loss"] for run in found["runs"]] == ["mse", "mse", "l1", "l1"]
    assert [run["state"] for run in found["runs"]] == ["finished"] * 4
    page = (sweep.folder / "report.html").read_text()
    for words in ("best mean score 0.655", "Paired differences from the best", "Training loss", "runs/loss-l1_seed-0-"):
        assert words in page
    out, err = capsys.readouterr()
    assert f"report: {sweep.folder}/report.html" in out
    assert "4 runs to do, 0 finished already" in err
    assert re.search(r"loss-mse_seed-1-\w+: finished in 0.0 minutes, score 0.660", err)

    (sweep.folder / "report.html").unlink()
    assert sweep("policy.objective.loss=l1,mse", SHORT, "seed=0,1") == 0  # in whatever order
    assert sweep.starts() == each_once
    assert "best mean score 0.655" in (sweep.folder / "report.html").read_text()
    assert "0 runs to do, 4 finished already" in capsys.readouterr().err


def test_more_values_are_added_to_what_is_there(sweep):
    assert sweep("seed=0", "seed=1") == 2
    assert sweep("seed=0,1", SHORT) == 0
    assert sweep("seed=range(1,3)", SHORT) == 0
    assert sweep.starts() == {"seed-0": 1, "seed-1": 1, "seed-2": 1}
    assert len(summary(sweep.folder)["runs"]) == 3


def test_a_run_whose_bundle_or_evaluation_was_removed_is_not_finished(sweep):
    assert sweep("seed=0,1,2", SHORT) == 0
    (sweep.run("seed-1") / "bundle").rmdir()
    (sweep.run("seed-2") / "evaluation" / "results.json").unlink()
    assert sweep("seed=0,1,2", SHORT) == 0
    assert sweep.starts() == {"seed-0": 1, "seed-1": 2, "seed-2": 2}


def test_an_evaluation_that_was_stopped_begins_anew(sweep, first_bundle):
    words = [f"bundle={first_bundle}", "n_episodes=2,3"]
    assert sweep(*words, command="evaluate") == 0
    run = sweep.run("n_episodes-3")
    for name in ("results.json", "run.json"):
        (run / name).unlink()
    (run / "bundle_0").mkdir()
    assert sweep(*words, command="evaluate") == 0
    assert sweep.starts() == {"n_episodes-2": 1, "n_episodes-3": 2}
    assert not (run / "bundle_0").exists()
    assert [group["runs"] for group in summary(sweep.folder)["groups"]] != []


def test_trials_on_a_robot_are_no_sweep(sweep, first_bundle, capsys):
    words = [f"bundles={first_bundle}", "robot=sim_pusht", "trials=2,3"]
    assert sweep(*words, command="evaluate") == 2
    assert "trials on a robot are no sweep" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_go_on(sweep, capsys):
    assert sweep("seed=91,92,0", SHORT) == 1
    runs = {run["settings"]["seed"]: run for run in summary(sweep.folder)["runs"]}
    assert (runs["91"]["state"], runs["91"]["reason"]) == ("failed", "the loss is not finite")
    assert runs["92"]["reason"] == "killed by SIGKILL, too little memory maybe"
    assert runs["0"]["state"] == "finished"
    page = (sweep.folder / "report.html").read_text()
    assert "seed=91 failed: the loss is not finite" in page
    capsys.readouterr()
    assert sweep("seed=91,92,0", SHORT) == 1
    assert "2 runs to do, 1 finished already" in capsys.readouterr().err
    assert sweep("seed=0,1", SHORT) == 0  # those that are asked for now
    assert len(summary(sweep.folder)["runs"]) == 4


def test_a_machine_with_other_versions_does_no_run(sweep, monkeypatch):
    there = versions() | {"torch": "1.0.0"}
    monkeypatch.setattr(job, "versions", lambda: there)  # what a job finds where it runs
    assert sweep("seed=0", SHORT) == 1
    (run,) = summary(sweep.folder)["runs"]
    assert f"has torch 1.0.0, where the sweep was started it is {versions()['torch']}" in run["reason"]
    assert sweep.starts() == {}


def test_ctrl_c_saves_the_run_keeps_what_is_finished_and_the_next_time_goes_on(sweep, capsys):
    assert sweep.interrupted("seed-93", "seed=0,93,1", SHORT) == 130
    stopped = sweep.run("seed-93")
    assert (stopped / "saved").exists()
    states = {run["settings"]["seed"]: run["state"] for run in summary(sweep.folder)["runs"]}
    assert states == {"0": "finished", "93": "interrupted", "1": "not started"}
    assert "seed=93 interrupted" in (sweep.folder / "report.html").read_text()
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"

    assert sweep("seed=0,93,1", SHORT) == 0
    assert sweep.starts() == {"seed-0": 1, "seed-93": 2, "seed-1": 1}
    assert "resume=true" in (stopped / "log.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0,-1"], r"seed=-1 must not be negative \(of seed=-1\); no run was started"),
        (["policy.objective.loss=l1,l3", "seed=0,1"], "policy.objective.loss=l3.*loss=l3 seed=0"),
        (["train.lrr=1,2"], "unknown option 'train.lrr': did you mean train.lr"),
        (["denoiser=unet_small,unet_smal"], "unknown denoiser 'unet_smal'"),
        (["data=nowhere.zarr,elsewhere.zarr"], "nowhere.zarr"),
        (["train.lr=1e-3,0.001"], "lr=0.001 and lr=0.001 are the same|given twice"),
        (["seed=0,0"], "0 is given twice"),
        (["seed=0,1", "seed=2"], "seed= is given twice: write its values with commas"),
        (["seed=range(0,1000000000000)"], "more than 1,000 runs"),
        (["seed=range(0,40)", "task.horizon=range(8,48)"], "more than 1,000 runs"),
        (["seed=range(3,3)"], "no value is in it"),
        (["seed=range(0,3,0)"], "cannot be read"),
        (["train.lr=interval(1e-4,1e-3)"], "ranges are for sweeper=optuna"),
        (["seed=0,1", "resume=true"], "resume= of single runs is the sweep's own"),
        (["seed=0,1", "launcher=loca"], "unknown launcher 'loca': did you mean local"),
        (["seed=0,1", "sweeper=ax"], "unknown sweeper 'ax': choose from grid, optuna"),
        (["seed=0,1", "launcher="], "launcher= is empty"),
        (["seed=0,1", "hydra.run.dir=x"], "unknown option of Hydra 'hydra.run.dir'"),
        (["seed=0,1", "hydra.launcher.timeout_mi=5"], "timeout_mi"),
        (["seed=0,1", "hydra.sweeper.max_batch_size=often"], "max_batch_size"),
        (["seed=0,(", SHORT], "cannot be read"),
        (["seed"], "not of the form name=value"),
    ],
)
def test_bad_input_is_one_line_and_no_run_is_started(sweep, capsys, words, message):
    assert sweep(*words) == 2
    err = capsys.readouterr().err.splitlines()
    assert re.search(message, err[-1]), err
    assert err[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in err) == 1
    assert sweep.starts() == {}


def test_what_cannot_be_swept_is_refused(capsys):
    assert main(["sweep", "serve", "port=1,2"]) == 2
    assert "unknown command to sweep 'serve': choose from evaluate, finetune, train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("output_dir=$HOME", r"output_dir=.*\$HOME: give a path without \$"),
        ("output_dir=", "output_dir= is empty"),
        ("--config-dir=nowhere", "--config-dir=.*nowhere: no such folder"),
    ],
)
def test_bad_folders_are_refused(word, message, capsys):
    assert main(["sweep", "train", "seed=0,1", word]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_another_sweep_s_folder_is_refused(sweep, capsys):
    assert sweep("seed=0", SHORT) == 0
    for words in (["seed=0,1", "train.max_steps=3"], ["train.lr=1e-3,1e-4", SHORT]):
        assert sweep(*words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "holds another sweep (train" in said
    for text in ("{", "[]", '{"command": 1, "shared": 2, "swept": [3]}'):
        (sweep.folder / "sweep.json").write_text(text)
        assert sweep("seed=0,1", SHORT) == 2
        assert "give another output_dir" in capsys.readouterr().err
    sweep.folder = sweep.folder.parent / "else"
    sweep.folder.mkdir()
    (sweep.folder / "thesis.tex").touch()
    assert sweep("seed=0,1", SHORT) == 2
    assert "holds something else than a sweep" in capsys.readouterr().err
    assert [path.name for path in sweep.folder.iterdir()] == ["thesis.tex"]


def test_ctrl_c_while_a_run_starts_is_passed_on_to_it(sweep, monkeypatch):
    start = subprocess.Popen

    def slowly(*words, **options):
        process = start(*words, **options)
        deadline = time.monotonic() + 20
        while not list(sweep.folder.glob("runs/*/waits")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", slowly)
    assert sweep("seed=93", SHORT) == 130
    assert list(sweep.folder.glob("runs/*/saved"))


def test_two_at_once_in_one_folder_are_refused(sweep, capsys):
    assert sweep("seed=0,1", SHORT) == 0
    with writer_lock(sweep.folder):
        assert sweep("seed=0,1", SHORT) == 2
    assert "is being written by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "extra"),
    [
        ("launcher=submitit", "sweep-submitit"),
        ("launcher=submitit_local", "sweep-submitit"),
        ("launcher=ray", "sweep-ray"),
        ("sweeper=optuna", "sweep-optuna"),
    ],
)
def test_what_is_not_installed_says_what_to_install(sweep, capsys, monkeypatch, option, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sweep("seed=0,1", option) == 2
    assert f"{option} is not installed: pip install 'action-diffusion[{extra}]'" in capsys.readouterr().err
    assert not sweep.folder.exists()


def test_without_slurm_that_is_said(sweep, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    assert sweep("seed=0,1", "launcher=submitit") == 2
    assert "launcher=submitit needs Slurm's sbatch" in capsys.readouterr().err


def test_the_same_words_have_the_same_folder(sweep, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["seed=0", "train.lr=1e-3,1e-4", SHORT], ["train.lr=1e-3,1e-4", SHORT, "seed=0"]):
        assert main(["sweep", "train", *words]) == 0
    (folder,) = tmp_path.glob("outputs/sweep-train-*")
    assert capsys.readouterr().err.count("2 runs to do") == 1
    assert len(list(folder.glob("runs/*/bundle"))) == 2


def test_a_run_s_name_says_what_is_its_own_and_depends_on_all_of_its_configuration():
    names = []
    for shared in (SHORT, "train.max_steps=3"):
        sweep = grid.read("train", ["policy.objective.loss=l1,mse", "drop=[state],null", shared], None)
        names += [sweep.run(settings)[0].name for settings in list(sweep.combinations())[1:2]]
    assert [name.rpartition("-")[0] for name in names] == ["drop-null_loss-l1"] * 2
    assert names[0] != names[1]


def test_commas_part_paths_and_quotes_keep_them():
    sweep = grid.read("evaluate", ["bundle=/runs/a=1/bundle,'/runs/b,2/bundle'", "n_episodes=3"], None)
    assert list(sweep.combinations()) == [{"bundle": "'/runs/a=1/bundle'"}, {"bundle": "'/runs/b,2/bundle'"}]
    assert sweep.words({"bundle": "'/runs/b,2/bundle'"}) == ["n_episodes=3", "bundle='/runs/b,2/bundle'"]


def test_help_teaches(capsys):
    for words in (["sweep"], ["sweep", "--help"], ["sweep", "train", "--help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert out.startswith("action-diffusion sweep COMMAND")
        assert max(map(len, out.splitlines())) <= 120
        assert "launcher=local" in out
