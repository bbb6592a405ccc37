"""A camera's process: reads frames as they come, and puts them into a ring of the camera's name.

Cameras are thereby read at the same time, and a slow one delays nobody. A camera that dies or hangs is silent, and one
that sends nothing for a second ends its process: either stops the arm, since a policy must not move it blindly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from action_diffusion.deploy.hardware.protocols import check_frame, frame_dtype, make_camera
from action_diffusion.deploy.ipc.processes import Ending, Heartbeat, report, serve
from action_diffusion.deploy.ipc.rings import Fields, RingWriter
from action_diffusion.errors import InputError

PATIENCE = 1.0
"""Without a frame for so long (s), a camera counts as dead; at least ten of its periods."""


def run(*, folder: Path, name: str, driver: str, settings: Mapping[str, object], stamp_latency: float = 0.0) -> None:
    """Connect, put a first frame into the ring `NAME`, say so in NAME.json, and serve until there is no parent.

    stamp_latency: by how much the driver's stamps are late (s): a frame is taken to be that much older. Beside it the
    ring has `arrived`, when the frame came (monotonic s).

    Raises `InputError` for a camera that does not deliver what its driver says, and where it falls silent.
    """
    ending = Ending()
    camera = make_camera(driver, **settings)
    camera.connect()
    try:
        fields: Fields = {"image": (frame_dtype(camera.shape).str, camera.shape), "arrived": ("f8", ())}
        ring = RingWriter(folder / name, fields=fields, n_slots=16)
        patience = max(PATIENCE, 10 / camera.rate)
        heart = Heartbeat(folder / f"{name}.beat", lease=patience)
        began = time.monotonic()
        while not ending:
            try:
                frame = camera.read()
            except TimeoutError:
                if time.monotonic() - began > patience:
                    raise InputError(f"no frame for {patience:g} s") from None
                continue
            check_frame(frame, camera.shape)
            began = time.monotonic()
            ring.append(frame.t - stamp_latency, {"image": frame.image, "arrived": began})
            heart.renew()
            if ring.count == 1:
                report(folder, name, {"shape": list(camera.shape), "rate": camera.rate})
    finally:
        camera.close()


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
