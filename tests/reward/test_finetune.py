"""`action-diffusion finetune` from its words to a bundle."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion.cli import main
from action_diffusion.options.configuration import settings
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.best_of import BestOf
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.training.reward.finetune import FinetuneRun
from action_diffusion.training.reward.methods.idql import Idql

SHORT = (
    *("device=cpu", "trials.n_envs=4", "watch.n_episodes=2", "evaluation.n_episodes=2", "evaluation.n_videos=0"),
    *("method=dsrl_sac", "method.warmup=8", "method.hidden=[16]", "method.batch_size=16"),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    policy = tiny_policy(demonstrations())
    path = tmp_path_factory.mktemp("finetune") / "bundle"
    config = {"policy": TINY | {"encoder": {"name": "observation"}}}
    bundles.save(path, policy, config, golden_obs={"state": np.full((2, 5), 100, np.float32)})
    return path


def test_what_learns_from_trials_is_not_fitted(bundle, capsys):
    assert main(["fit", "steering", f"bundle={bundle}"]) == 2
    assert "finetune method=dsrl" in capsys.readouterr().err


def weights(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_stops_goes_on_and_ends_as_a_bundle(bundle, tmp_path, capsys):
    words = ["finetune", f"bundle={bundle}", f"output_dir={tmp_path / 'run'}", "checkpoint_every=32", *SHORT]
    assert main([*words, "budget.env_steps=64", "watch.every=32"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/progress.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [0, 32, 64]
    assert main([*words, "budget.env_steps=96", "watch.every=32"]) == 2
    assert "already holds a run: give resume=true" in capsys.readouterr().err
    assert main([*words, "budget.env_steps=96", "watch.every=32", "resume=true"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/progress.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [0, 32, 64, 96]
    assert "critic_loss" in rows[-1]
    assert (tmp_path / "run/evaluation/comparison/report.html").exists()
    assert (tmp_path / "run/curves.png").exists()
    assert weights(tmp_path / "run/bundle") == weights(bundle)
    bundles.load(tmp_path / "run/bundle", verify=True)


def test_a_bundle_says_which_of_its_extensions_act(bundle, tmp_path):
    words = ["finetune", f"bundle={bundle}", f"output_dir={tmp_path}", "budget.env_steps=64", "watch.every=64", *SHORT]
    assert main([*words, "method=idql", "method.n=2", "evaluation.n_episodes=0"]) == 0
    fitted = bundles.load(tmp_path / "bundle")
    names = json.dumps(bundles.read_config(tmp_path / "bundle").get("extensions"))
    if names != "null":  # the best may be what it began with
        assert isinstance(fitted.extensions[0], BestOf)
    assert bundles.load(tmp_path / "bundle", extensions=[]).extensions == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=ppo2"], "method 'ppo2'"),
        (["method.clip=-1"], "method.clip=-1"),
        (["method.n=4"], "unknown option 'n' in method"),
        (["budget.env_steps=0"], "budget.env_steps=0 must be at least 1"),
        (["trials.gamma=1"], "trials.gamma=1 must be below 1"),
        (["trials.reward=points"], "choose from both, success, dense"),
        (["resume=true"], "needs output_dir"),
        (["resume=true", "output_dir=nowhere"], "holds no run to go on with"),
    ],
)
def test_bad_words_are_one_line(bundle, words, said, capsys):
    assert main(["finetune", f"bundle={bundle}", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_map_ends_as_an_extension_of_the_same_weights(bundle, tmp_path):
    words = ["finetune", f"bundle={bundle}", f"output_dir={tmp_path / 'run'}", *SHORT, "budget.env_steps=96"]
    words += ["watch.every=32", "method=fisher", "method.noise=0.9", "method.optimizer=adamo"]
    assert main([*words, "evaluation.n_episodes=0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/progress.jsonl").read_text().splitlines()]
    assert "price" in rows[-1]
    assert weights(tmp_path / "run/bundle") == weights(bundle)


def test_fmq_says_what_it_needs(bundle, tmp_path, capsys):
    words = ["finetune", f"bundle={bundle}", f"output_dir={tmp_path / 'run'}", *SHORT, "method=fmq"]
    assert main(words) == 2
    assert "method=fmq trains a policy that goes from noise to a chunk in one step" in capsys.readouterr().err


def test_a_run_that_was_killed_goes_on_with_whole_lines(bundle, tmp_path):
    folder = tmp_path / "run"
    words = [
        "finetune",
        f"bundle={bundle}",
        f"output_dir={folder}",
        *SHORT,
        "evaluation.n_episodes=0",
        "watch.every=32",
    ]
    assert main([*words, "budget.env_steps=32"]) == 0
    with (folder / "progress.jsonl").open("a") as file:
        file.write('{"env_steps": 64, "success": 0.0, "score": 0.0, "minutes": 1.0}\n{"env_steps": 9')
    assert main([*words, "budget.env_steps=64", "resume=true"]) == 0
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [0, 32, 64]


def test_new_weights_leave_what_acted_with_the_old_ones(bundle, tmp_path):
    """Fitted extensions belong to weights: neither their files nor their names come along with others."""
    fitted = {"best_of": Fitted({"n": 1, "drawn": 0, "octaves": 0, "hidden": [4], "members": 1}, {})}
    bundles.derive(bundle, tmp_path / "chosen", fitted=fitted)
    assert bundles.read_config(tmp_path / "chosen")["extensions"] == ["best_of"]
    state = bundles.load(bundle).state_dict()
    bundles.derive(tmp_path / "chosen", tmp_path / "trained", fitted={}, weights=state)
    assert bundles.load(tmp_path / "trained", verify=True).extensions == []


def test_no_start_is_tried_twice_or_evaluated_on(bundle, tmp_path):
    options = ["trials.seed=10", "watch.seed=12", "watch.n_episodes=2", "evaluation.seed=15", "evaluation.n_episodes=1"]
    config = settings("finetune", [f"bundle={bundle}", *options])
    policy = bundles.load(bundle)
    run = FinetuneRun(config, policy, Idql(policy), tmp_path, {})
    assert list(itertools.islice(run._starts(), 4)) == [10, 11, 14, 16]
    assert next(run._starts()) == 17, "another iterator goes on"
