"""Freed memory is kept: what is taken again costs no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from action_diffusion import cli, memory

FAULTS = """
import resource
from action_diffusion.memory import keep_freed_memory
kept = {keep}
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 60_000_000
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no such option")


def faults(keep: str, **variables: str) -> tuple[bool, int]:
    """Whether memory is kept, and the page faults of taking 60 MB for the third time."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | variables
    words = [sys.executable, "-c", FAULTS.format(keep=keep)]
    kept, count = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return kept == "True", int(count)


@pytest.mark.slow
def test_memory_that_is_taken_again_costs_no_page_faults():
    assert faults("False")[1] > 500
    kept, count = faults("keep_freed_memory()")
    assert kept
    assert count < 100


def test_what_a_user_sets_stays():
    kept, count = faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept
    assert count > 500


def test_every_command_keeps_it(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: asked.append(True))
    cli.main(["--version"])
    assert asked == [True]
