"""`evaluate` with several bundles: the pages and files that compare them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from web_pages import HOSTILE, Page

from action_diffusion.cli import main
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.training.evaluation.comparison import write_comparison, write_seed_summary
from action_diffusion.training.evaluation.results import compare, summarise_seeds


def measured(scores: list[float]) -> dict:
    return {
        "task": HOSTILE,
        "n_episodes": len(scores),
        "mean_score": float(np.mean(scores)),
        "mean_interval": [0.25, 0.75],
        "success_rate": float(np.mean(np.array(scores) >= 1)),
        "scores": scores,
        "seeds": list(range(len(scores))),
    }


def test_a_comparison_shows_every_start_and_what_the_interval_covers(tmp_path):
    first, second = measured([1.0, 0.9, 0.5]), measured([0.9, 0.95, 0.5])
    found = compare(first, second, ("ours", HOSTILE))
    write_comparison(tmp_path / "report.html", names=("ours", HOSTILE), results=(first, second), found=found)
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert f"{found['mean_difference']:+.3f}" in page.text
    assert "1 · 1 · 1" in page.text
    assert page.text.index("-0.0500") < page.text.index("+0.0000") < page.text.index("+0.1000")  # worst first
    assert "not training" in page.text
    assert f"ours minus {HOSTILE}: " in page.text
    assert found["verdict"] in page.text


def test_a_summary_of_seeds_shows_each_training_and_the_spread(tmp_path):
    results = [measured([1.0, 0.8]), measured([0.6, 0.8])]
    summary = summarise_seeds(results)
    write_seed_summary(tmp_path / "report.html", names=["a", HOSTILE], results=results, summary=summary)
    page = Page(tmp_path / "report.html")
    assert "± 0.141 over trainings, 0.700 to 0.900" in page.text
    assert "0.9000" in page.text
    assert "script" not in page.tags


def test_results_without_a_simulator_do_not_compare():
    with pytest.raises(InputError, match="arm has no simulator"):
        compare({"task": "arm", "action_error": 1.0}, {"task": "arm", "action_error": 1.0})


@pytest.mark.slow
def test_the_command_compares_and_summarises(make_policy, tiny_config, tmp_path, capsys):
    for name in ("a", "b"):
        policy = make_policy()
        weights = {key: value * (1.0 if name == "a" else 0.5) for key, value in policy.state_dict().items()}
        golden = {"state": np.full((2, 5), 100, np.float32)}
        bundles.save(tmp_path / name, policy, {"policy": tiny_config}, weights=weights, golden_obs=golden)
    out = tmp_path / "out"
    words = [f"bundle=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"compare={tmp_path / 'b'}", f"output_dir={out}"]
    assert main(["evaluate", *words, "n_episodes=2", "n_envs=2", "policy_batch=2", "n_videos=0"]) == 0
    one, other, same = (
        json.loads((out / name / "results.json").read_text()) for name in ("bundle_0", "bundle_1", "compare")
    )
    assert other["scores"] == same["scores"]
    difference = json.loads((out / "comparison" / "results.json").read_text())
    assert difference["mean_difference"] == pytest.approx(np.mean(one["scores"]) - np.mean(other["scores"]))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean_score"]["mean"] == pytest.approx((one["mean_score"] + other["mean_score"]) / 2)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("bundle: ")] == [
        f"bundle: {tmp_path / name}" for name in ("a", "b", "b")
    ]
    for folder in (out, out / "comparison"):
        assert f"report: {folder}/report.html" in printed
        Page(folder / "report.html")
