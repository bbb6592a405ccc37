"""The weak PushT policy of `steering`, its denoising steps trained by policy gradients."""

from __future__ import annotations

from benchmarks.reward.steering import STARTS, improved
from benchmarks.rows.system import Measured, System


def measure(seed: int) -> Measured:
    measured, baseline = improved(seed, "dppo")
    return Measured(measured, baseline, measured["success"] >= baseline["success"] + 0.2)


SYSTEM = System(
    name="dppo",
    what="a weak PushT policy becomes better than its demonstrations by policy gradients on its denoising steps",
    bar=f"success 0.2 above that of the policy alone, on {len(STARTS)} starts from {STARTS.start}",
    measure=measure,
)
