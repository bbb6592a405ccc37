"""Attempts to spoil a recording: kills and power cuts at random moments. `benchmarks.speed.recording` makes more."""

from __future__ import annotations

import os

import numpy as np
import pytest

from action_diffusion import disk
from action_diffusion.datasets.record.recorder import Recorder
from benchmarks.robustness import power_cuts
from benchmarks.robustness.recording_kills import ATTRS, CAMERAS, FIELDS, KilledRecording
from benchmarks.speed import recording


@pytest.mark.slow
@pytest.mark.parametrize("video", [(), CAMERAS])
def test_a_kill_loses_a_second_of_the_open_episode_at_most(tmp_path, video):
    recorded = KilledRecording(tmp_path / "a.zarr", video)
    for seed, wait in enumerate((0.3, 1.5)):
        found = recorded.run(wait=wait, seed=seed)
        assert found.wrong is None, found
    assert not list(tmp_path.rglob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(("video", "n"), [(False, 24), (True, 12)])
def test_a_power_cut_loses_nothing_that_was_flushed(video, n):
    assert [found for found in power_cuts.run(n, 0, video) if found[2] is not None] == []


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_the_disk_on_paper_sees_what_is_not_synced(monkeypatch, kind):
    """A recorder that forgets one of the two does not get through."""
    sync = disk._sync
    if kind == "files":
        monkeypatch.setattr(disk, "_sync", lambda path, flags: flags & os.O_DIRECTORY and sync(path, flags))
    else:
        monkeypatch.setattr(disk, "sync_folder", lambda folder: None)
    assert any(wrong for _, _, wrong in power_cuts.run(8, 0, False))


@pytest.mark.slow
@pytest.mark.alone
def test_steps_are_handed_over_at_once(tmp_path):
    with Recorder.open(tmp_path / "a.zarr", FIELDS, ATTRS) as recorder:
        late = recording.lateness(recorder.add, recorder.keep, 2.0)
    assert len(late) == 60
    assert np.median(late) < recording.LATE


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [(["kills=x"], 2), (["cuts=2", "kills=1"], 0), (["seconds=0"], 2)])
def test_the_command(words, code, capsys):
    assert recording.main(words) == code
    said = capsys.readouterr()
    assert "2 of 2 without loss" in said.out if code == 0 else said.err.startswith("error: ")
