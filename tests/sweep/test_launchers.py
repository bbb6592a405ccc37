"""Hydra's launchers and sweepers, each with the engine that it is for: submitit, a stand-in for Slurm, Ray, optuna."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

SHORT = "train.max_steps=2"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """The stand-in on the PATH; the folder with what is known of its jobs."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    commands, place = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    place.mkdir()
    program = (Path(__file__).resolve().parent / "slurm.py").read_text()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (commands / name).write_text(f"#!{sys.executable}\n{program}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(place))
    return place


@pytest.mark.slow
def test_submitit_s_local_executor(sweep):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert sweep("seed=0,91", SHORT, "launcher=submitit_local") == 1
    assert sweep.starts() == {"seed-0": 1, "seed-91": 1}
    assert len(list(sweep.folder.glob("hydra/.submitit/*/*_result.pkl"))) == 2
    assert "the loss is not finite" in (sweep.folder / "report.html").read_text()


def test_submitit_s_debug_executor(sweep, monkeypatch):
    plugin = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    monkeypatch.setattr(plugin.LocalLauncher, "_EXECUTOR", "debug")
    assert sweep("seed=0,1", SHORT, "launcher=submitit_local") == 0
    assert sweep.starts() == {"seed-0": 1, "seed-1": 1}


def test_slurm_an_array_of_jobs_and_their_options(sweep, slurm):
    words = [
        "seed=0,91,1",
        SHORT,
        "launcher=submitit",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.mem_gb=8",
    ]
    assert sweep(*words) == 1
    assert sweep.starts() == {"seed-0": 1, "seed-91": 1, "seed-1": 1}
    script = next(slurm.glob("*_0.sh")).read_text()
    for option in ("--array=0-2%3", "--partition=gpu", "--mem=8GB"):
        assert f"#SBATCH {option}" in script
    assert sweep(*words) == 1  # the failed one alone
    assert len(list(slurm.glob("*.json"))) == 4


@pytest.mark.slow
def test_slurm_a_job_that_is_preempted_goes_back_into_the_queue_and_goes_on(sweep, slurm):
    def preempt() -> None:
        while not list(sweep.folder.glob("runs/seed-93-*/waits")):
            time.sleep(0.05)
        subprocess.run(["scancel", "1000_0", "--signal", "SIGUSR2"], check=True)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    assert sweep("seed=93,0", SHORT, "launcher=submitit") == 0
    thread.join()
    run = sweep.run("seed-93")
    assert (run / "saved").exists()
    assert "resume=true" in (run / "log.txt").read_text().splitlines()[-1]
    assert sweep.starts() == {"seed-93": 2, "seed-0": 1}


@pytest.mark.slow
def test_slurm_ctrl_c_cancels_the_jobs(sweep, slurm):
    assert sweep.interrupted("seed-93", "seed=93,0", SHORT, "launcher=submitit") == 130
    outcome = sweep.run("seed-93") / "run.json"
    while not outcome.exists():
        time.sleep(0.1)
    assert json.loads(outcome.read_text())["reason"] == "killed by SIGTERM"


@pytest.mark.slow
def test_slurm_a_job_that_is_lost_is_told_and_the_others_are_waited_for(sweep, slurm, capsys):
    def lose() -> None:
        while not list(sweep.folder.glob("runs/seed-93-*/waits")):
            time.sleep(0.05)
        (slurm / "1000_0.state").write_text("NODE_FAIL")
        subprocess.run(["scancel", "1000_0", "--signal", "SIGKILL"], check=True)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    assert sweep("seed=93,0", SHORT, "launcher=submitit") == 1
    thread.join()
    assert "launcher=submitit: Job 1000_0" in capsys.readouterr().err
    runs = {run["settings"]["seed"]: run for run in json.loads((sweep.folder / "summary.json").read_text())["runs"]}
    assert runs["0"]["state"] == "finished"
    assert runs["93"]["state"] != "finished"


@pytest.mark.slow
def test_ray(sweep, capsys):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    pytest.importorskip("ray")
    assert sweep("seed=0,91", SHORT, "launcher=ray", "hydra.launcher.ray.init.num_cpus=2") == 1
    assert sweep.starts() == {"seed-0": 1, "seed-91": 1}
    assert "the loss is not finite" in (sweep.folder / "report.html").read_text()
    capsys.readouterr()
    words = ["launcher=ray", "hydra.launcher.ray.init.address=127.0.0.1:1"]
    assert sweep("seed=0,1", SHORT, *words) == 2
    assert "error: launcher=ray: " in capsys.readouterr().err


@pytest.mark.slow
def test_optuna_chooses_the_better_values_and_again_nothing_is_started(sweep, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    words = ["train.lr=tag(log,interval(1e-5,1e-3))", "seed=91,0", SHORT, "sweeper=optuna"]
    assert sweep(*words, "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=1") in (0, 1)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep.folder}/hydra/study.db")
    assert len(study.trials) == 4
    finished = [trial for trial in study.trials if trial.value is not None]
    assert 0 < len(finished) < 4  # of seed=91 there is no result
    runs = json.loads((sweep.folder / "summary.json").read_text())["runs"]
    assert runs[0]["mean_score"] == pytest.approx(study.best_value)
    starts = sweep.starts()
    assert sum(starts.values()) == 4
    capsys.readouterr()
    sweep(*words, f"hydra.sweeper.n_trials={len(finished)}")
    assert sweep.starts() == starts
    assert f"0 runs to do, {len(finished)} finished already" in capsys.readouterr().err
    sweep(*words, f"hydra.sweeper.n_trials={len(finished) + 1}")
    assert sum(sweep.starts().values()) == 5


@pytest.mark.slow
def test_optuna_where_every_run_fails_says_so(sweep, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["sweeper=optuna", "train.lr=interval(1e-5,1e-3)", "seed=91", SHORT, "hydra.sweeper.n_trials=2"]
    assert sweep(*words) == 1
    runs = json.loads((sweep.folder / "summary.json").read_text())["runs"]
    assert [run["reason"] for run in runs] == ["the loss is not finite"] * 2
    assert "sweeper=optuna: " in capsys.readouterr().err


def test_optuna_the_ends_of_a_range_are_checked_before_any_run_starts(sweep, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["sweeper=optuna", "train.lr=interval(-1,1)", "seed=0,1"]
    assert sweep(*words) == 2
    assert "train.lr=-1" in capsys.readouterr().err
    for word, message in (("seed=0", "nothing to choose"), ("hydra.sweeper.n_trials=0", "from 1 to 1,000")):
        assert sweep("sweeper=optuna", *([word, "train.lr=1e-3,1e-4"][:: 1 if "n_trials" in word else 2])) == 2
        assert message in capsys.readouterr().err
    assert sweep.starts() == {}
