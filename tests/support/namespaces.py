"""Two hosts with a network between them: Linux network namespaces and a pair of virtual cables (veth)."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from processes import Forked

_numbers = itertools.count()
INSIDE = """
import ctypes, os, sys
namespace = os.open(f"/run/netns/{sys.argv.pop(1)}", os.O_RDONLY)
if ctypes.CDLL(None, use_errno=True).setns(namespace, 0x40000000):
    raise OSError(ctypes.get_errno(), "setns")
from action_diffusion import cli
sys.exit(cli.main(sys.argv[1:]))
"""


class Pair:
    """addresses, cables, names: of both hosts."""

    def __init__(self, tag: str) -> None:
        self.names = [f"ad-{tag}-{host}" for host in "ab"]
        self.cables = ["ada", "adb"]  # each in a namespace of its own
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def up(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        (a, b), (one, other) = self.names, self.cables
        _ip("link", "add", one, "netns", a, "type", "veth", "peer", "name", other, "netns", b)
        for name, cable, address in zip(self.names, self.cables, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            for link in (cable, "lo"):
                _ip("-n", name, "link", "set", link, "up")

    def down(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def environment(self, rank: int, world: int = 2, port: int = 29500) -> dict[str, str]:
        """Of process `rank` on host `rank`, as a launcher sets it."""
        return os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.cables[rank],
            "OMP_NUM_THREADS": "1",
        }

    def start(self, host: int, *words: str, **given: Any) -> Forked:
        """`action-diffusion WORDS` on a host."""
        options: dict[str, Any] = {"env": self.environment(host), "start_new_session": True} | given
        return Forked("-c", INSIDE, self.names[host], *words, **options)

    def unplug(self, host: int) -> None:
        """From now on what is sent goes nowhere, and nobody is told."""
        _ip("-n", self.names[host], "link", "set", self.cables[host], "down")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Two connected hosts. Skips the test where namespaces cannot be made."""
    hosts = Pair(f"{os.getpid()}-{next(_numbers)}")
    try:
        try:
            hosts.up()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            why = error.stderr.decode().strip() if isinstance(error, subprocess.CalledProcessError) else "no iproute2"
            pytest.skip(f"network namespaces cannot be made here: {why}")
        yield hosts
    finally:
        hosts.down()
