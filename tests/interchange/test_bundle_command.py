"""`action-diffusion bundle`: what is told of a policy, and one line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from action_diffusion import cli
from action_diffusion.commands import bundle as command
from action_diffusion.policy import bundle as bundles


@pytest.fixture
def bundle(policy, tiny_config, tmp_path: Path) -> Path:
    bundles.save(tmp_path / "bundle", policy, {"policy": tiny_config, "data": "demos.zarr"})
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_help_of_a_subcommand_names_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"action-diffusion bundle {name} ")
    for option in command.SUBCOMMANDS[name].options:
        assert f"{option.rstrip('_')}=" in out


def test_inspect_says_what_a_policy_sees_and_does(bundle: Path, policy, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "extensions").mkdir()
    (bundle / "extensions" / "guard.safetensors").touch()
    assert cli.main(["bundle", "inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "fitted: guard (extensions=[NAME] switches one on)" in out
    for key in policy.spec.observations:
        assert f"{key} {list(policy.spec.observations[key].shape)}" in out
    assert f"control_rate: {policy.spec.control_rate:g} Hz" in out
    assert "demonstrations: demos.zarr" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["inspect"], "PATH is required"),
        (["import", "in=BUNDLE", "out=x"], "is a bundle of ours already"),
        (["import", "in=EMPTY", "out=x"], "no policy that is known here"),
        (["import", "in=EMPTY", "out=BUNDLE"], "is there already"),
        (["export", "in=BUNDLE", "out=x", "format=tensorrt"], "unknown format 'tensorrt'"),
        (["export", "in=EMPTY", "out=x", "format=lerobot"], "is not a complete bundle"),
        (["pushh", "x"], "unknown subcommand of bundle 'pushh'"),
        (["push", "BUNDLE", "to=somewhere"], "somewhere: expected hf://user/name"),
        (["push", "BUNDLE", "to=hf://me/it@v1"], "push to hf://me/it, which makes a new revision"),
        (["push", "EMPTY", "to=hf://me/it"], "is not a complete bundle"),
        (["pull", "hf://me", "out=x"], "hf://me: expected hf://user/name"),
        (["pull", "hf://me/it/../../x", "out=x"], "whose name leads elsewhere"),
        (["pull", "hf://me/it", "out=BUNDLE"], "is there already"),
    ],
)
def test_bad_input_gets_one_line(words, message, bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [word.replace("BUNDLE", "bundle").replace("EMPTY", "empty") for word in words]
    assert cli.main(["bundle", *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "x").exists()
