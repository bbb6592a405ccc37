"""`action-diffusion data`: help that can be typed, and one line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from robomimic_files import FakeObserver, h5py, write_robomimic, write_robosuite

from action_diffusion.commands import data
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.envs.robosuite import states
from action_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_help_names_every_subcommand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert data.run(words) == 0
    out = capsys.readouterr().out
    for name in data.SUBCOMMANDS:
        assert f"  action-diffusion data {name} " in out


@pytest.mark.parametrize("name", data.SUBCOMMANDS)
def test_help_of_a_subcommand_names_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.run([name, "in=x", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"action-diffusion data {name} ")
    for option in data.SUBCOMMANDS[name].options:
        assert f"{option}=" in out


@pytest.mark.slow
def test_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    write_robomimic(Path("a.hdf5"))
    assert data.run(["convert", "in=a.hdf5", "out=a.zarr", "workers=1"]) == 0
    out = capsys.readouterr().out
    assert "output: a.zarr\nepisodes: 3\nsteps: 16\n" in out
    assert "subsets: train (2), valid (1)\n" in out
    assert "observed" not in ReplayBuffer.open("a.zarr").attrs
    assert data.run(["convert", "in=a.zarr", "out=b.h5"]) == 0
    assert "episodes: 3\n" in capsys.readouterr().out
    with h5py.File("b.h5") as file:
        assert len(file["data"]) == 3


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ([], ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")),
        (["observations=object,agentview_image"], ("object", "agentview_image")),
    ],
)
def test_states_are_rendered_where_there_is_nothing_else(
    words: list[str], keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(env_args: object, keys: tuple[str, ...]) -> FakeObserver:
        asked.append(keys)
        return FakeObserver()

    monkeypatch.setattr(states, "SimulatorObserver", fake)
    write_robosuite(Path("a.hdf5"), [4])
    assert data.run(["convert", "in=a.hdf5", "out=a.zarr", "workers=1", *words]) == 0
    assert asked == [keys]
    assert "object" in ReplayBuffer.open("a.zarr")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convrt", "unknown subcommand of data 'convrt': did you mean convert?"),
        ("convert", "in is required: action-diffusion data convert in=…"),
        ("convert in=a.hdf5", "out is required: action-diffusion data convert out=…"),
        ("convert in=a.hdf5 out=", "out= is empty: give out=PATH"),
        ("convert in=a.hdf5 in=b.hdf5", "in= is given twice"),
        ("convert a.hdf5", "'a.hdf5' is not of the form name=value; see: action-diffusion data convert --help"),
        ("convert --in=a.hdf5", "'--in=a.hdf5' is not of the form name=value"),
        ("convert in=a.hdf5 output=a.zarr", "unknown option 'output': did you mean out?"),
        ("convert in=a.zarr out=b", "out=b: which format? Add format=, one of zarr, zarr2, umi, robomimic, lerobot"),
        ("convert in=a.zarr out=b format=lerobt", "unknown format 'lerobt': did you mean lerobot or lerobot21?"),
        ("convert in=a.zarr out=b.zarr rate=0", "rate=0 must be steps a second, from 0.01 to 10000"),
        ("convert in=a.zarr out=b.zarr rate=fast", "rate=fast: expected steps a second, from 0.01 to 10000"),
        ("convert in=a.zarr out=b.zarr rate=5,10", "rate=5,10: give one value, or a list in [ ]"),
        ("convert in=a.hdf5 out=a.zarr observations=", "observations= is empty: give observations=…"),
        ("convert in=[a].hdf5 out=a.zarr", "[a].hdf5: no such file or folder"),
        ("convert in=a.zarr out=a.hdf5 plugins=[a.py]", "a.py: no such Python file"),
        ("inspect a.zarr plt=a.png", "unknown option 'plt': did you mean plot?"),
        ("inspect a.zarr path=b.zarr", "unknown option 'path'"),
        ("convert in=a.zarr out=b.zarr video=low", "unknown video 'low'"),
        ("convert in=a.hdf5 out=a.zarr workers=0", "workers=0 must be at least 1"),
        ("convert in=a.hdf5 out=a.zarr", "a.hdf5: no such file or folder"),
        ("convert in=a.zarr out=a.hdf5", "a.zarr: no such file or folder"),
        ("convert in=a.zarr out=a.hdf5 observations=object", "observations= is for converting HDF5 to a"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        data.run(words.split())
    assert message in str(caught.value)
    assert list(folder.iterdir()) == []
