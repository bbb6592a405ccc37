"""`action-diffusion fit NAME bundle=DIR [name=value …]`: what acts while a policy's chunks are made."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from action_diffusion import hub
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import COMMANDS
from action_diffusion.options.extensions import FITS, Fit
from action_diffusion.options.finetune import LEARNT
from action_diffusion.policy.reading import read_config, read_spec, require
from action_diffusion.registry import EXTENSIONS
from action_diffusion.terminal import width

FIT_HELP = """\
action-diffusion fit NAME bundle=DIR [name=value …]     fit what acts while chunks are made, and store it in the bundle

  action-diffusion evaluate bundle=DIR extensions=[NAME]     then it acts: here, in deploy, and in serve

data=PATH takes other demonstrations than those of the training. docs/extensions.md says when to use which.
"""


def run(words: Sequence[str]) -> int:
    """`action-diffusion fit` with the words after it; returns the exit code. Raises `InputError` for bad ones."""
    if not words or words[0] in ("-h", "--help", "help") or {"-h", "--help"} & set(words):
        from action_diffusion.commands.help import fitted

        print(fitted(FIT_HELP), *_lines(), sep="\n")
        return 0
    from action_diffusion.options.configuration import plain, settings_of

    if words[0] in LEARNT:
        raise InputError(
            f"{words[0]} learns from trials, not from demonstrations: action-diffusion finetune "
            f"method={LEARNT[words[0]]} bundle=…"
        )
    if words[0] not in FITS:
        plain(
            "fit", [word for word in words[1:] if word.startswith("plugins=")], {"bundle": "a bundle"}
        )  # one may have it
        if words[0] not in EXTENSIONS:
            raise unknown("extension", words[0], EXTENSIONS)
        COMMANDS[f"fit {words[0]}"] = EXTENSIONS.load(words[0]).options
    for word in words[1:]:
        option, _, value = word.partition("=")
        if option == "bundle" and hub.is_reference(value):
            raise InputError(
                f"{word}: what is found is stored in the bundle: first action-diffusion bundle pull {value} out=DIR"
            )
    config = settings_of(f"fit {words[0]}", words[1:])
    require(Path(config.bundle))
    read_spec(Path(config.bundle))  # before torch is imported
    read_config(Path(config.bundle))
    from action_diffusion.training.fitting import fit

    for name, value in fit(words[0], config).items():
        print(f"{name}: {value}")
    return 0


def _lines() -> list[str]:
    common = {field.name for field in fields(Fit)}
    lines = []
    for name, takes in FITS.items():
        given = [f"{field.name}={_shown(field)}" for field in fields(takes) if field.name not in common]
        words = {f"  fit {name} {' '.join(given)}": 8, f"      {' '.join((takes.__doc__ or '').split())}": 6}
        lines += [
            "",
            *(
                textwrap.fill(text, min(100, width()), subsequent_indent=" " * n, break_on_hyphens=False)
                for text, n in words.items()
            ),
        ]
    return lines


def _shown(field: Field[Any]) -> str:
    """Its default, as one would type it; … where it has none."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return "…" if default is MISSING else "null" if default is None else str(default).replace(" ", "")
