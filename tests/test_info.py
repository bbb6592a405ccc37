"""`action-diffusion info` says what runs on this machine, and why."""

from __future__ import annotations

import pytest

from action_diffusion import choice, cli
from action_diffusion.policy.kernels import winograd


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACTION_DIFFUSION_KERNELS", raising=False)
    choice.forget()
    yield tmp_path
    choice.forget()


@pytest.mark.slow
def test_it_measures_the_default_policies_once_and_shows_what_is_taken(capsys):
    assert cli.main(["info"]) == 0
    first = capsys.readouterr().out
    for operation in ("conv1d", "conv2d", "group_norm"):
        assert operation in first
    assert str(choice.table_path()) in first
    library = winograd.library()
    assert f"convolutions {library.instruction_set if library else 'not compiled'}" in first
    measured = dict(choice.table().seconds)
    assert cli.main(["info"]) == 0
    assert choice.table().seconds == measured
    assert cli.main(["info", "measure=again"]) == 0
    assert choice.table().seconds != measured


def test_nothing_is_measured_where_nothing_is_chosen(capsys, monkeypatch):
    monkeypatch.setenv("ACTION_DIFFUSION_KERNELS", "off")
    assert cli.main(["info"]) == 0
    assert cli.main(["info", "measure=false"]) == 0
    assert "kernels: off" in capsys.readouterr().out
    assert choice.table().seconds == {}


@pytest.mark.parametrize(
    ("words", "message"), [(["measur=true"], "did you mean measure?"), (["measure=1"], "expected true, false or again")]
)
def test_what_is_wrong_is_said(words, message, capsys):
    assert cli.main(["info", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_says_what_to_type(capsys):
    assert cli.main(["info", "--help"]) == 0
    assert "ACTION_DIFFUSION_KERNELS=off" in capsys.readouterr().out
