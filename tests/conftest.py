"""Shared parts of the tests. One thread a worker: `pytest -n 3` then keeps two cores busy without a fight over them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import fcntl
import functools
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tiny import TINY, demonstrations, tiny_policy

from action_diffusion import native
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy.policy import DiffusionPolicy

torch.set_num_threads(1)
hypothesis.settings.register_profile("shared machine", deadline=None)  # other workers and programs take their time
hypothesis.settings.load_profile("shared machine")

if "benchmarks" not in sys.modules:  # not a package that installs, and the root is not on the path
    package = ModuleSpec("benchmarks", None, is_package=True)
    package.submodule_search_locations = [str(Path(__file__).resolve().parents[1] / "benchmarks")]
    sys.modules["benchmarks"] = module_from_spec(package)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, which children would inherit
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    config.addinivalue_line("markers", 'slow: takes half a second or more; the quick subset is -m "not slow"')
    config.addinivalue_line("markers", "alone: measures real time; no other worker runs a test meanwhile")


def _alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


_held: list[int] = []
"""A locked file, of the test that runs, and of the next one where both are marked `alone`: it need not wait again."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Shared by all tests, held by one that is marked `alone`, whose turn comes before that of later ones."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:  # one process, one test at a time
        return (yield)
    if not _held:
        folder = Path(tempfile.gettempdir())
        _held.append(os.open(folder / f"{run}.cores", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
        with open(folder / f"{run}.turn", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(_held[0], fcntl.LOCK_EX if _alone(item) else fcntl.LOCK_SH)
    try:
        return (yield)
    finally:
        if not (_alone(item) and _alone(nextitem)):
            os.close(_held.pop())


def pytest_unconfigure(config: pytest.Config) -> None:
    if run := getattr(config, "workerinput", {}).get("testrunuid"):
        for name in ("turn", "cores"):
            (Path(tempfile.gettempdir()) / f"{run}.{name}").unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not _alone(item))  # those that are marked come first, one after the other
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def buffer() -> ReplayBuffer:
    return demonstrations()


@pytest.fixture
def policy(buffer) -> DiffusionPolicy:
    return tiny_policy(buffer)


@pytest.fixture
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture
def make_policy(buffer):
    """`make_policy(process=…, …)`: a tiny policy with other parts."""
    return lambda **changes: tiny_policy(buffer, **changes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A chromium without a screen, by playwright."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@functools.cache
def compiled(source: Path, *flags: str) -> bytes:
    """A file of C as a library."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "library.so"
        always = ["-O2", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["gcc", *always, *flags, str(source), "-o", str(out), "-lm"], check=True)
        return out.read_bytes()


@pytest.fixture(params=["avx512", "avx2", "portable", "-DPORTABLE"])
def other_processor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], native.Library]:
    """Compiles a file of C, and has it run as on another processor than this one: what it is for is decided once."""
    flags = [request.param] if request.param.startswith("-D") else []
    name = "portable" if flags else request.param

    def build(source: Path) -> native.Library:
        out = tmp_path / f"{source.stem}.so"
        out.write_bytes(compiled(source, *flags))
        monkeypatch.setenv(native.SET_VARIABLE, name)
        library = native.Library(out)
        if library.instruction_set != name:
            pytest.skip(f"this processor has no {name}")
        return library

    return build
