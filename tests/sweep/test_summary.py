"""Groups, intervals and differences of a sweep against results whose answer is known; the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.statistics import paired_interval, t_interval
from action_diffusion.training.sweep import page, summary
from action_diffusion.training.sweep.grid import SweepRun, read

STARTS = list(range(100, 110))


def put(
    root: Path, name: str, settings: dict[str, str], scores: np.ndarray | None, *, seeds=STARTS, **more
) -> SweepRun:
    """A finished run with these scores; without, one that failed."""
    folder = root / "runs" / name
    (folder / "evaluation").mkdir(parents=True)
    outcome = {"state": "failed", "reason": "<b>no</b> luck", "seconds": 60.0, "settings": settings}
    if scores is not None:
        values = [float(score) for score in scores]
        found = {"task": "t", "env": None, "scores": values, "seeds": list(seeds), "mean_score": float(np.mean(values))}
        found |= {"mean_interval": [0.1, 0.9], "success_rate": 0.5, "success_interval": [0.2, 0.8], **more}
        (folder / "evaluation/results.json").write_text(json.dumps(found))
        outcome |= {"state": "finished", "reason": None, "made": ["evaluation/results.json"]}
    (folder / "run.json").write_text(json.dumps(outcome))
    return SweepRun(settings, name)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def found(root: Path, words: list[str] | None = None):
    sweep = read("train", words or ["seed=0,1,2", "train.lr=1,2"], None)
    runs = summary.look(root, sweep, [])
    groups = summary.grouped(runs, seeded=True)
    return sweep, runs, groups


def test_groups_have_intervals_over_starts_and_over_seeds_best_first(tmp_path, random):
    start = random.uniform(0.2, 0.6, 10)
    by_lr = {"1": [start + 0.01 * seed for seed in range(3)], "2": [start + 0.3 + 0.02 * seed for seed in range(3)]}
    for lr, all_scores in by_lr.items():
        for seed, scores in enumerate(all_scores):
            put(tmp_path, f"{lr}{seed}", {"train.lr": lr, "seed": str(seed)}, scores)
    _, runs, groups = found(tmp_path)
    assert [run.name for run in runs] == ["22", "21", "20", "12", "11", "10"]
    assert [group.settings for group in groups] == [{"train.lr": "2"}, {"train.lr": "1"}]
    means = [float(np.mean(scores)) for scores in by_lr["2"]]
    assert groups[0].measured.mean == pytest.approx(np.mean(means))
    assert groups[0].over_seeds == pytest.approx(t_interval(means))
    assert groups[0].over_starts == pytest.approx(paired_interval(np.mean(by_lr["2"], axis=0), np.zeros(10)))

    (difference,) = summary.differences(groups)
    assert difference["difference"] == pytest.approx(-0.31)
    assert difference["over_starts"] == pytest.approx((-0.31, -0.31))  # each start, as hard for both
    assert difference["over_seeds"] == pytest.approx(t_interval([-0.30, -0.31, -0.32]))
    assert difference["apart"] == "yes"


def test_seeds_may_say_otherwise_than_starts(tmp_path):
    """One seed each, or seeds that disagree: these very policies differ, the settings may not."""
    scores = np.linspace(0.2, 0.8, 10)
    put(tmp_path, "a0", {"train.lr": "1", "seed": "0"}, scores)
    put(tmp_path, "b0", {"train.lr": "2", "seed": "0"}, scores + 0.19)
    assert summary.differences(found(tmp_path)[2])[0]["over_seeds"] is None
    assert summary.differences(found(tmp_path)[2])[0]["apart"] == "on these starts"
    put(tmp_path, "a1", {"train.lr": "1", "seed": "1"}, scores)
    put(tmp_path, "b1", {"train.lr": "2", "seed": "1"}, scores - 0.1)
    assert summary.differences(found(tmp_path)[2])[0]["apart"] == "on these starts"


def test_over_seeds_is_within_what_a_score_can_be(tmp_path):
    put(tmp_path, "0", {"seed": "0"}, np.full(10, 0.2))
    put(tmp_path, "1", {"seed": "1"}, np.full(10, 0.9))
    assert found(tmp_path)[2][0].over_seeds == (0.0, 1.0)


def test_other_starts_are_not_compared(tmp_path, random):
    put(tmp_path, "a", {"train.lr": "1"}, random.uniform(size=10))
    put(tmp_path, "b", {"train.lr": "2"}, random.uniform(size=10), seeds=range(10))
    assert len(found(tmp_path)[2]) == 2
    assert summary.differences(found(tmp_path)[2]) == []


def test_errors_are_best_when_small_and_weighted_by_steps(tmp_path):
    for name, errors in {"a": [0.1, 0.2], "b": [0.2, 0.4]}.items():
        run = put(tmp_path, name, {"train.lr": name}, np.zeros(2))
        steps = [30, 10]
        of_windows: dict[str, Any] = {
            "task": "t",
            "episode_errors": errors,
            "episode_ids": ["x", "y"],
            "episode_steps": steps,
        }
        of_windows |= {"action_error_relative": float(np.average(errors, weights=steps))}
        (tmp_path / "runs" / run.name / "evaluation/results.json").write_text(json.dumps(of_windows))
    _, runs, groups = found(tmp_path)
    assert [run.name for run in runs] == ["a", "b"]
    assert summary.differences(groups)[0]["difference"] == pytest.approx(0.125)
    assert summary.differences(groups)[0]["over_starts"] == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"task": "t"}', '{"task": "t", "scores": [1], "seeds": []}'),
        '{"task": "t", "scores": [NaN], "seeds": [1], "mean_score": 1}',
        '{"task": "t", "scores": [1], "seeds": [1], "mean_score": 1, "mean_interval": 5}',
        '{"task": "t", "scores": [1], "seeds": [1], "mean_score": 1, "success_rate": "all"}',
    ],
)
def test_results_that_cannot_be_read_are_no_result(tmp_path, text):
    run = put(tmp_path, "a", {"seed": "0"}, np.zeros(2))
    (tmp_path / "runs" / run.name / "evaluation/results.json").write_text(text)
    _, runs, groups = found(tmp_path)
    assert (runs[0].state, runs[0].measured, groups) == ("finished", None, [])


@pytest.mark.parametrize("text", ["", "[1]", '{"state": "finished"}', '{"state": 1, "settings": 2, "seconds": "x"}'])
def test_an_outcome_that_somebody_broke_is_none(tmp_path, text):
    put(tmp_path, "a", {"seed": "0"}, np.zeros(2))
    (tmp_path / "runs/a/run.json").write_text(text)
    _, runs, groups = found(tmp_path)
    assert [run.state for run in runs] == ["stopped"]
    assert groups == []


def test_the_page_names_what_failed_and_escapes_what_it_said(tmp_path, random):
    put(tmp_path, "a", {"train.lr": "1", "seed": "0"}, random.uniform(size=10))
    put(tmp_path, "b", {"train.lr": "2", "seed": "0"}, None)
    (tmp_path / "runs/a/metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"st')
    sweep, runs, groups = found(tmp_path)
    page.write(tmp_path / "report.html", sweep, runs, groups)
    text = (tmp_path / "report.html").read_text()
    assert "lr=2 seed=0 failed: &lt;b&gt;no&lt;/b&gt; luck" in text
    assert "Training loss" in text
    assert "Validation loss" not in text
    assert "1 of 2" in text
    json.dumps(summary.summarise(sweep, runs, groups), allow_nan=False)
