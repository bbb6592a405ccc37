"""Episodes that are there twice, as a whole or in part: rows are compared by a hash of all their numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import Survey

SHARED = 0.5
"""Of the shorter episode's rows."""
_MANY = 20
"""Episodes that may share a row before it counts as a common state, such as the start."""


def duplicates(survey: Survey) -> Iterator[Finding]:
    """The later of two episodes that share rows, with the first and last of those rows."""
    hashes = _hashes(survey)
    if hashes is None:
        return
    rows_of = defaultdict(list)
    order = np.argsort(hashes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1)
    for group in groups:
        episodes = np.unique(survey.episode[group])
        if 1 < len(episodes) <= _MANY:
            for row in group:
                for earlier in episodes[episodes < survey.episode[row]]:
                    rows_of[int(earlier), int(survey.episode[row])].append(int(row))
    lengths = survey.ends - survey.starts
    told = Counter[int]()
    for (earlier, later), rows in sorted(rows_of.items()):
        share = len(set(rows)) / min(lengths[earlier], lengths[later])
        if share >= SHARED and len(set(rows)) > 1 and not told[later]:
            told[later] += 1
            words = f"{share:.0%} of the rows are those of episode {earlier}"
            yield Finding("duplicate", "all", later, min(rows), max(rows), share / SHARED, words)


def _hashes(survey: Survey) -> np.ndarray | None:
    """uint64 [N] of all continuous columns, or of the cameras' points where there are none."""
    parts = [low.raw for low in survey.low.values() if low.motion.any()]
    parts = parts or [camera.points for camera in survey.cameras.values()]
    if not parts:
        return None
    random = np.random.default_rng(0)
    total = np.zeros(survey.n_rows, np.uint64)
    for part in parts:
        words = np.ascontiguousarray(part).view(np.uint8).reshape(survey.n_rows, -1).astype(np.uint64)
        factors = random.integers(1, 1 << 63, words.shape[1], dtype=np.uint64) | np.uint64(1)
        total += words @ factors  # modulo 2^64
    return total
