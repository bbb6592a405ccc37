"""Types of single values, that several options have."""

from __future__ import annotations

import re
from typing import Annotated

from action_diffusion.schema import Between, FilePath, Matching, OneOf, Sized

KINDS = ("state", "image", "text", "depth", "points")
"""Of observations."""
MOST_STEPS = 1024
"""Of a chunk, and of denoising: far beyond what robots use, and soon computed."""
SEEDS = 4_000_000_000
"""So that a seed and those counted up from it are numbers of 32 bits."""

Word = str | int
"""A name may be made of digits."""
AsTyped = Annotated[str, Matching("a word", bool)]
"""Lists and ranges that have a grammar of their own, such as 3,7-9."""
Address = Annotated[str, Matching("an address, such as ws://HOST:8000", bool)]
Device = Annotated[
    Word,
    Matching(
        "a word, such as auto, cpu, cuda or cuda:1",
        lambda value: re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?|\d{1,3}", str(value)) is not None,
    ),
]
Port = Annotated[int, Matching("a whole number from 0 to 65535", lambda value: 0 <= value <= 65_535)]
Workers = (
    Annotated[int, Between(1, 1024)]
    | Annotated[
        str,
        Matching(
            "a number of processes, ray, or ray://HOST:10001",
            lambda value: re.fullmatch(r"ray(://[^\s/:]+:\d{1,5})?", value) is not None,
        ),
    ]
)
"""Where simulators are, see `envs.workers`."""
Seed = Annotated[int, Between(0, SEEDS)]
Count = Annotated[int, Between(1, 100_000)]
Seconds = Annotated[float, Between(0, 1e6)]
Column = Annotated[int, Between(0, 1_000_000)]
Columns = Annotated[list[Column], Sized(1, 4096)]
Pose = Annotated[list[Column], Sized(3, 3)]
Side = Annotated[int, Between(1, 8192)]
Size = Annotated[list[Side], Sized(2, 2)]
Finite = Annotated[float, Between(-1e12, 1e12)]
Place = Annotated[list[Finite], Sized(2, 2)]
Places = Annotated[list[Place], Sized(0, 1000)]
Share = Annotated[float, Between(0, 1)]
Plugins = FilePath | list[FilePath] | None
"""Python files of the user's own that register parts, see `action_diffusion.registry`."""
Precision = Annotated[str, OneOf("fp32", "bf16", "fp16")]
Extensions = list[
    Annotated[str, Matching("the name of an extension", lambda name: re.fullmatch(r"[a-z0-9_]{1,64}", name))]
]
"""What acts while chunks are made, see `policy.extensions`."""
