"""The fastest of several ways is measured here, once, and kept for this machine."""

from __future__ import annotations

import json
import os
import time

import processes
import pytest
import torch

from action_diffusion import choice
from action_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ACTION_DIFFUSION_KERNELS", raising=False)
    choice.forget()
    yield tmp_path
    choice.forget()


def ways(**seconds: float):
    """Ways that take so long, and the names of those that ran."""
    ran: list[str] = []

    def way(name: str):
        def run() -> None:
            ran.append(name)
            time.sleep(seconds[name])

        return run

    return {name: way(name) for name in seconds}, ran


@pytest.mark.parametrize(("plain", "ours", "chosen"), [(0.001, 0.004, "plain"), (0.004, 0.001, "ours")])
def test_the_fastest_is_taken_and_measured_once(plain, ours, chosen):
    given, ran = ways(plain=plain, ours=ours)
    assert choice.fastest("op", (1, 2), given, ["ours"]) == chosen
    assert {"plain", "ours"} == set(ran)
    ran.clear()
    assert choice.fastest("op", (1, 2), given, ["ours"]) == chosen
    choice.forget()  # as another process would
    assert choice.fastest("op", (1, 2), given, ["ours"]) == chosen
    assert ran == []


def test_each_operation_size_and_number_of_threads_is_measured_for_itself():
    before = torch.get_num_threads()
    seen = []
    try:
        for operation, size, threads in (
            ("a", (1,), 1),
            ("b", (1,), 1),
            ("a", (2,), 1),
            ("a", (1,), 2),
            ("a", (1,), 1),
        ):
            torch.set_num_threads(threads)
            given, ran = ways(x=0.0, y=0.0)
            choice.fastest(operation, size, given)
            seen.append(bool(ran))
    finally:
        torch.set_num_threads(before)
    assert seen == [True, True, True, True, False]


@pytest.mark.parametrize(("mode", "chosen"), [("off", "plain"), ("on", "ours")])
def test_the_environment_decides(mode, chosen, monkeypatch):
    monkeypatch.setenv("ACTION_DIFFUSION_KERNELS", mode)
    given, ran = ways(plain=0.0, ours=0.0)
    assert choice.fastest("op", (1,), given, ["ours"]) == chosen
    assert ran == []  # nothing to choose between
    given, ran = ways(plain=0.002, other=0.0, ours=0.0)  # two of torch's own
    assert choice.fastest("more", (1,), given, ["ours"]) == {"off": "other", "on": "ours"}[mode]


def test_another_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ACTION_DIFFUSION_KERNELS", "fast")
    with pytest.raises(InputError, match="unknown ACTION_DIFFUSION_KERNELS 'fast': choose from auto, off, on"):
        choice.fastest("op", (1,), ways(a=0.0, b=0.0)[0])


def test_past_the_budget_the_first_way_is_taken_and_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(choice, "BUDGET", 0.01)
    slow, _ = ways(plain=0.02, ours=0.0)
    assert choice.fastest("first", (1,), slow, ["ours"]) == "ours"
    given, ran = ways(plain=0.001, ours=0.0)
    assert choice.fastest("second", (1,), given, ["ours"]) == "plain"
    assert ran == []
    choice.forget()  # another process has a budget of its own
    assert choice.fastest("second", (1,), given, ["ours"]) == "ours"


def test_a_measurement_inside_another_counts_once():
    inner, _ = ways(a=0.0, b=0.002)
    outer = {"x": lambda: choice.fastest("inner", (1,), inner), "y": lambda: time.sleep(0.05)}
    began = time.perf_counter()
    assert choice.fastest("outer", (1,), outer) == "x"
    assert choice.table().spent <= time.perf_counter() - began
    assert choice.fastest("inner", (1,), {"a": None, "b": None}) == "a"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"op 1": {"x": "fast"}}'])
def test_a_damaged_table_is_measured_anew(text):
    path = choice.table_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    choice.forget()
    assert choice.fastest("op", (1,), ways(plain=0.002, ours=0.0)[0], ["ours"]) == "ours"
    assert list(json.loads(path.read_text())) == [f"op 1 threads={torch.get_num_threads()}"]


def test_a_folder_that_cannot_be_written_to_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    choice.forget()
    assert choice.fastest("op", (1,), ways(plain=0.002, ours=0.0)[0], ["ours"]) == "ours"


def test_the_table_is_of_this_processor_and_these_versions(monkeypatch):
    path = choice.table_path()
    assert path == choice.table_path()
    for name, value in (("ACTION_DIFFUSION_ISA", "avx2"), ("ATEN_CPU_CAPABILITY", "avx2")):
        monkeypatch.setenv(name, value)
        assert choice.table_path() != path
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert choice.table_path() != path


@pytest.mark.slow
def test_what_two_processes_measure_is_kept_of_both(folder):
    code = (
        "import sys, time; from action_diffusion import choice;"
        "choice.fastest(sys.argv[1], (1,), {'a': lambda: time.sleep(0.01), 'b': lambda: None})"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    for name in ("one", "two"):
        assert processes.run("-c", code, name, env=environment).returncode == 0
    assert sorted(json.loads(choice.table_path().read_text())) == ["one 1 threads=1", "two 1 threads=1"]


def test_ways_of_another_process_are_taken_unmeasured():
    choose, ran = ways(plain=0.0, ours=0.001)
    there = choice.Table(choice.table_path())
    name = there.choose("product", (4, "float32"), choose, ["ours"])
    assert there.taken == {f"product 4:float32 threads={torch.get_num_threads()}": name}
    other = {"plain": "ours", "ours": "plain"}[name]
    ran.clear()
    choice.table().take({key: other for key in there.taken})
    assert choice.fastest("product", (4, "float32"), choose, ["ours"]) == other
    assert choice.table().taken == {key: other for key in there.taken}
    assert not ran
    choice.table().take({key: "gone" for key in there.taken})
    assert choice.fastest("product", (4, "float32"), choose, ["ours"]) == name
