"""`data=` of other formats: converted into the cache once, said in one line, and never touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from robomimic_files import h5py, write_robomimic, write_robosuite

from action_diffusion.commands import data
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.sources import look_at, open_data
from action_diffusion.datasets.doctor.examine import examine
from action_diffusion.datasets.formats.contract import Settings
from action_diffusion.datasets.formats.conversion import convert
from action_diffusion.datasets.formats.registry import named
from action_diffusion.datasets.formats.zarr_buffer import ZARR
from action_diffusion.errors import InputError


def demonstrations() -> ReplayBuffer:
    random = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "state": random.normal(size=(20, 3)).astype(np.float32),
        "action": random.normal(size=(20, 2)).astype(np.float32),
        "img": np.full((20, 16, 16, 3), 90, np.uint8),
    }
    return ReplayBuffer.from_arrays(columns, [8, 20], {"control_rate": 20.0})


def written(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        demonstrations().save(folder / "own.zarr")
        convert(ZARR.open(folder / "own.zarr"), folder / "source", named(kind), Settings(20.0))
        return folder / "source"

    return write


def robomimic(folder: Path) -> Path:
    return write_robomimic(folder / "demo.hdf5")


def aloha(folder: Path) -> Path:
    (folder / "aloha").mkdir()
    for number, length in enumerate((5, 8, 3)):
        with h5py.File(folder / "aloha" / f"episode_{number}.hdf5", "w") as file:
            file["action"] = np.arange(length * 2, dtype=np.float32).reshape(length, 2)
            file["observations/qpos"] = np.arange(length * 3, dtype=np.float32).reshape(length, 3)
    return folder / "aloha"


def csv(folder: Path) -> Path:
    (folder / "runs").mkdir()
    for number in range(2):
        rows = [f"{i},{i + 1},{2 * i},{i}" for i in range(6)]
        (folder / "runs" / f"run_{number}.csv").write_text("\n".join(["x,y,action,word", *rows, ""]))
    return folder / "runs"


SOURCES = {
    "lerobot": written("lerobot"),
    "lerobot21": written("lerobot21"),
    "folder": written("folder"),
    "robomimic, ours": written("robomimic"),
    "robomimic": robomimic,
    "aloha": aloha,
    "csv": csv,
}


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_another_format_is_converted_once_and_never_changed(kind: str, tmp_path: Path) -> None:
    source, cache, said = SOURCES[kind](tmp_path), tmp_path / "cache", list[str]()
    before = contents(source)
    buffer = open_data(source, cache_dir=cache, say=said.append)
    copy = buffer.path
    assert copy is not None
    assert copy.parent == cache / "converted"
    assert said == [said[0]]
    assert "\n" not in said[0]
    for words in (
        str(source),
        f"{buffer.n_episodes} episodes",
        str(copy),
        f"action-diffusion data convert in={source} ",
    ):
        assert words in said[0]
    expected = ReplayBuffer.open(copy)
    changed = copy.stat().st_mtime_ns
    again = open_data(source, cache_dir=cache, say=said.append)
    assert said[1] == f"{source} is read from its copy {copy}, made of it before"
    assert copy.stat().st_mtime_ns == changed
    for found in (buffer, again, look_at(source, cache_dir=cache)):
        assert found.name == str(source)
        assert found.episode_ends.tolist() == expected.episode_ends.tolist()
        for key in expected.keys:
            np.testing.assert_array_equal(found[key][:], expected[key][:])
    assert contents(source) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_the_command_that_is_said_makes_the_same_copy(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, said = SOURCES[kind](tmp_path), list[str]()
    cached = open_data(source, cache_dir=tmp_path / "cache", say=said.append)
    monkeypatch.chdir(tmp_path)
    command = said[0].partition("action-diffusion data ")[2].partition(";")[0].split()
    assert data.run(command) == 0
    typed = ReplayBuffer.open(command[2].removeprefix("out="))
    assert set(typed.keys) == set(cached.keys)
    for key in typed.keys:
        np.testing.assert_array_equal(typed[key][:], cached[key][:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_columns_are_looked_at_without_a_conversion(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path)
    seen = look_at(source, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    converted = open_data(source, cache_dir=tmp_path / "cache", say=lambda _: None)
    assert set(converted.keys) - {"demo"} == set(seen.keys)
    assert {key: seen[key].shape for key in seen.keys} == {key: converted[key].shape for key in seen.keys}
    assert seen.left_out == converted.left_out


def test_a_source_that_has_changed_is_converted_anew_and_the_older_copy_goes(tmp_path: Path) -> None:
    source, cache = csv(tmp_path), tmp_path / "cache"
    other = open_data(aloha(tmp_path), cache_dir=cache, say=lambda _: None).path
    old = open_data(source, cache_dir=cache, say=lambda _: None).path
    assert old is not None
    assert other is not None
    (cache / "converted" / f".{old.name}.converting").mkdir()  # as a kill leaves it
    text = (source / "run_1.csv").read_text()
    (source / "run_1.csv").write_text(text.replace("5,6,10,5", "5,6,77,5"))
    os.utime(source / "run_1.csv", (1, 1))
    new = open_data(source, cache_dir=cache, say=lambda _: None)
    assert new["action"][-1] == 77
    assert sorted(path.name for path in (cache / "converted").iterdir() if path.suffix != ".lock") == sorted(
        path.name for copy in (new.path, other) if copy for path in (copy, copy.with_suffix(".json"))
    )


@pytest.mark.parametrize(
    "notes", [None, b"", b"{", b"[]", b"\xff", b'{"format": "folder"}', b'{"format": 1, "left_out": []}']
)
def test_a_copy_whose_notes_are_damaged_is_made_anew(notes: bytes | None, tmp_path: Path) -> None:
    source, cache = csv(tmp_path), tmp_path / "cache"
    copy = open_data(source, cache_dir=cache, say=lambda _: None).path
    assert copy is not None
    copy.with_suffix(".json").unlink()
    if notes is not None:
        copy.with_suffix(".json").write_bytes(notes)
    assert look_at(source, cache_dir=cache).n_steps == 12
    said = list[str]()
    assert open_data(source, cache_dir=cache, say=said.append).n_steps == 12
    assert "converting it once" in said[0]
    assert open_data(source, cache_dir=cache, say=said.append).n_steps == 12
    assert "is read from its copy" in said[1]


def test_a_conversion_that_was_killed_is_made_to_its_end(tmp_path: Path) -> None:
    source, cache = written("lerobot")(tmp_path), tmp_path / "cache"
    script = """
import os, sys
from pathlib import Path
from action_diffusion.datasets.batches.sources import open_data

def killed(name):
    move = getattr(os, name)
    return lambda a, b, **more: os.kill(os.getpid(), 9) if str(b).endswith(".zarr") else move(a, b, **more)

os.rename, os.replace = killed("rename"), killed("replace")
open_data(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]), say=print)
"""
    killed = subprocess.run([sys.executable, "-c", script, str(source), str(cache)], capture_output=True, timeout=60)
    assert killed.returncode == -9
    said = list[str]()
    buffer = open_data(source, cache_dir=cache, say=said.append)
    np.testing.assert_array_equal(buffer["state"][:], demonstrations()["state"][:])
    assert "converting it once" in said[0]


def test_two_at_once_make_one_copy(tmp_path: Path) -> None:
    source, cache, said = written("lerobot")(tmp_path), tmp_path / "cache", list[str]()
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: open_data(source, cache_dir=cache, say=said.append), range(2)))
    assert sorted("converting it once" in line for line in said) == [False, True]
    assert opened[0].path == opened[1].path
    for buffer in opened:
        np.testing.assert_array_equal(buffer["state"][:], demonstrations()["state"][:])


def test_values_that_are_not_finite_are_there_for_the_doctor(tmp_path: Path) -> None:
    source = robomimic(tmp_path)
    with h5py.File(source, "r+") as file:
        demo = next(iter(file["data"].values()))
        demo["obs/object"][4, 2] = np.nan
    buffer = open_data(source, cache_dir=tmp_path / "cache", say=lambda _: None)
    found = examine(buffer, ("nan",))
    assert [(finding.key, finding.first, finding.last) for finding in found] == [("object", 4, 4)]


def test_another_converter_converts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache, said = csv(tmp_path), tmp_path / "cache", list[str]()
    open_data(source, cache_dir=cache, say=said.append)
    monkeypatch.setattr("action_diffusion.datasets.formats.cached._VERSION", 99)
    open_data(source, cache_dir=cache, say=said.append)
    assert ["converting it" in line for line in said] == [True, True]


def test_what_was_left_out_is_still_known_of_the_copy(tmp_path: Path) -> None:
    source = csv(tmp_path)
    for file in source.iterdir():
        file.write_text(
            file.read_text().replace(",5\n", ",five\n").replace(",0\n", ",zero\n").replace(",1\n", ",one\n")
        )
        file.write_text("".join(f"{line.rpartition(',')[0]},word\n" for line in file.read_text().splitlines()))
    for _ in range(2):
        assert open_data(source, cache_dir=tmp_path / "cache", say=lambda _: None).left_out == {"word": "words"}


def test_a_disk_that_is_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written("lerobot")(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    said = list[str]()
    with pytest.raises(InputError, match=r"converting .*source needs 0.00 GB .* make room, or set XDG_CACHE_HOME"):
        open_data(source, cache_dir=tmp_path / "cache", say=said.append)
    assert not said
    assert not list(tmp_path.glob("cache/converted/*.zarr"))
    # 15.9 kB as they are, of which the grey picture packs to nothing
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
    assert open_data(source, cache_dir=tmp_path / "cache", say=said.append).n_steps == 20


def test_states_of_a_simulator_need_a_decision(tmp_path: Path) -> None:
    source = write_robosuite(tmp_path / "demo.hdf5")
    for use in (look_at, open_data):
        with pytest.raises(
            InputError, match=rf"no observations, .*: action-diffusion data convert in={source} out=demo.zarr, and"
        ):
            use(source, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/converted/*.zarr"))


def test_the_rate_of_a_simulator_is_that_of_the_file(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "demo.hdf5")
    assert look_at(source, cache_dir=tmp_path / "cache").rate == 20
    assert open_data(source, cache_dir=tmp_path / "cache", say=lambda _: None).rate == 20


def test_what_is_no_format_is_refused_with_the_command_for_one_that_is(tmp_path: Path) -> None:
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.npy").write_bytes(b"x")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04.")
    for path in (tmp_path / "junk", tmp_path / "a.pkl"):
        for use in (look_at, open_data):
            with pytest.raises(InputError, match=r"no known format.*action-diffusion data convert in=FOLDER"):
                use(path, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"give the folder, .*runs$"):
        open_data(csv(tmp_path) / "run_0.csv", cache_dir=tmp_path / "cache")


def test_a_source_with_links_is_refused_and_nothing_follows_them(tmp_path: Path) -> None:
    source = aloha(tmp_path)
    (source / "episode_9.hdf5").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link"):
        open_data(source, cache_dir=tmp_path / "cache")


def test_the_data_commands_take_other_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = written("lerobot")(tmp_path)
    assert data.run(["inspect", str(source)]) == 0
    out, err = capsys.readouterr()
    assert "episodes: 2, steps: 20" in out
    assert "converting it once" in err
    page, json_file = tmp_path / "found.html", tmp_path / "found.json"
    assert data.run(["doctor", str(source), "--json", str(json_file), "--fix"]) in (0, 1)
    assert isinstance(json.loads(json_file.read_text()), list)
    assert not page.exists()
    assert ReplayBuffer.open(tmp_path / "source.fixed.zarr").n_episodes == 2  # beside the source
    assert data.run(["edit", str(source), f"out={tmp_path / 'second.zarr'}", "drop=0"]) == 0
    assert ReplayBuffer.open(tmp_path / "second.zarr").n_steps == 12
    out, err = capsys.readouterr()
    assert err.count("is read from its copy") == 2
