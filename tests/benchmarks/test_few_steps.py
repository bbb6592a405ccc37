"""The few-step table: every way to sample, the same starts and noise in all of them, nothing lost."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles

ROOT = Path(__file__).resolve().parents[2]
few_steps = import_module("benchmarks.scores.few_steps")


@pytest.fixture
def bundle(make_policy, tiny_config, tmp_path):
    """`bundle(name, **changes)`: a folder with a tiny PushT policy whose episodes end after 12 steps."""

    def save(name: str, **changes) -> Path:
        changes = {key: tiny_config.get(key, {}) | value for key, value in changes.items()}
        policy = make_policy(**changes)
        policy.spec.env["max_steps"] = 12
        path = tmp_path / name / "bundle"
        bundles.save(path, policy, {"policy": tiny_config | changes})
        return path

    return save


def run(*words: str) -> int:
    return few_steps.main(list(words))


@pytest.mark.slow
def test_every_way_that_a_training_allows_is_a_row(bundle, tmp_path, capsys):
    flow = {"process": {"name": "flow", "prediction": "velocity"}, "sampler": {"scheduler": "flow", "eta": None}}
    flow["sampler"].pop("eta")
    output = tmp_path / "few.json"
    both = f"bundle={bundle('diffusion')},{bundle('flow', **flow)}"
    assert run(both, f"output={output}", "n_episodes=2", "steps=1,2") == 0
    rows = json.loads(output.read_text())["rows"]
    found = [(row["policy"], row["scheduler"], row["num_inference_steps"]) for row in rows]
    assert found == [
        ("diffusion", "ddpm", 100),
        ("diffusion", "ddim", 16),
        ("diffusion", "ddim", 1),
        ("diffusion", "ddim", 2),
        ("diffusion", "dpm_solver++", 1),
        ("diffusion", "dpm_solver++", 2),
        ("flow", "flow", 1),
        ("flow", "flow", 2),
    ]
    assert all(0 <= row["score_interval"][0] <= row["score"] <= row["score_interval"][1] <= 1 for row in rows)
    assert rows[0]["latency_ms"] > 5 * rows[2]["latency_ms"]  # 100 steps beside 1
    assert output.with_suffix(".png").stat().st_size > 5_000
    assert "ms a chunk" in capsys.readouterr().out


def test_bundles_in_folders_of_one_name_are_told_apart():
    paths = [Path("a/run/bundle"), Path("b/run/bundle"), Path("b/other/bundle")]
    assert few_steps._names(paths) == dict(zip(paths, ["a/run/bundle", "b/run/bundle", "other"], strict=True))


def test_regressions_are_measured_in_the_steps_that_they_have(bundle, tmp_path):
    mip = {"process": {"name": "mip", "prediction": "sample"}, "objective": {"name": "mip"}}
    path = bundle("mip", **mip, sampler={"scheduler": "mip", "num_inference_steps": 2})
    found = few_steps.ways(
        few_steps.FewStepsPlan(bundles=[path], output=tmp_path, n_episodes=1, seed=0, steps=[1, 2, 4, 8])
    )
    assert [way.sampler["num_inference_steps"] for way in found] == [1, 2]


def test_a_distilled_policy_is_measured_in_its_one_step(bundle, tmp_path):
    mip = {"process": {"name": "mip", "prediction": "sample"}, "objective": {"name": "distillation"}}
    path = bundle("one", **mip, sampler={"scheduler": "mip", "num_inference_steps": 1})
    plan = few_steps.FewStepsPlan(bundles=[path], output=tmp_path, n_episodes=1, seed=0, steps=[1, 2])
    assert [way.sampler["num_inference_steps"] for way in few_steps.ways(plan)] == [1]
    with pytest.raises(InputError, match="steps=2: none of the bundles"):
        few_steps.ways(few_steps.FewStepsPlan(**vars(plan) | {"steps": [2]}))


@pytest.mark.slow
def test_what_is_done_is_kept_when_it_is_stopped(bundle, tmp_path, monkeypatch, capsys):
    whole = few_steps.evaluate

    def until_the_third(way, plan, advance):
        if way.sampler["num_inference_steps"] == 1:
            raise KeyboardInterrupt
        whole(way, plan, advance)

    monkeypatch.setattr(few_steps, "evaluate", until_the_third)
    output = tmp_path / "few.json"
    assert run(f"bundle={bundle('one')}", f"output={output}", "n_episodes=1", "steps=1") == 130
    assert len(json.loads(output.read_text())["rows"]) == 2
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=a.json"], "bundle and output are required"),
        (["bundle=nowhere", "output=a.json"], "nowhere"),
        (["bundle=nowhere", "output=a.json", "steps=0"], "steps=0 must be a whole number of at least 1"),
        (["bundel=nowhere"], "bundel"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, capsys):
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
