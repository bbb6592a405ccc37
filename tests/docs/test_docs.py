"""The pages: lines that troubleshooting quotes are printed by the code, and the options of every command are there."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from action_diffusion.commands.data import SUBCOMMANDS
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load
from action_diffusion.options.extensions import FITS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("action_diffusion", "policy", "datasets", "envs", "training", "deploy")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_THEIR_OWN = ("plugins=", "--config-dir", "task=my_arm")
"""Commands with files that a reader makes first; tests/test_extending.py runs those of extending.md."""
COMMAND = re.compile(r"action-diffusion ((?:train|evaluate|collect|deploy|serve|fit|data) [^|;&]*)")
FOREIGN = "ImportError: libGL"
"""The dynamic linker's, not ours."""


def said() -> list[str]:
    """Every text in the package's source, with … for what is filled in."""
    texts = []
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def quoted() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


@pytest.mark.slow
def test_troubleshooting_quotes_lines_that_the_code_prints() -> None:
    lines, texts = quoted(), said()
    assert len(lines) >= 25
    unknown = []
    for line in lines:
        parts = [re.escape(part) for part in line.split("…")]
        pattern = re.compile(".*".join(parts), flags=re.DOTALL)
        if not line.startswith(FOREIGN) and not any(pattern.fullmatch(text) for text in texts):
            unknown.append(line)
    assert not unknown


@pytest.mark.slow
def test_a_line_that_nothing_prints_is_noticed() -> None:
    assert not any(re.fullmatch("the arm has .* wings", text) for text in said())


def commands() -> list[tuple[str, str]]:
    """(page, command) for every `action-diffusion …` in the pages' shell blocks, without comments."""
    found = set()
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                found |= {(page.name, command.strip()) for command in COMMAND.findall(re.split(" #|   ", line)[0])}
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), commands())
def test_options_of_every_command_in_the_pages_are_there(page: str, command: str) -> None:
    name, *words = shlex.split(command.replace("$s", "0"))
    if any(word.startswith(OF_THEIR_OWN) for word in words):
        pytest.skip("needs a file of the reader's own")
    if name == "data":
        subcommand = SUBCOMMANDS[words[0]]
        keys = {word.partition("=")[0] for word in words[1:] if "=" in word}
        assert keys <= set(subcommand.options)
        return
    if name == "fit":
        assert {word.partition("=")[0] for word in words[1:]} <= {field.name for field in fields(FITS[words[0]])}
        return
    try:
        load(name, words)
    except InputError as error:
        pytest.fail(f"{page}: {error}")
