"""What `--help` says: examples from here; options, defaults and words from the commented files in configs/."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import resources

from action_diffusion.options import TrainSettings
from action_diffusion.options.configuration import choices

EXAMPLES = {
    "train": """\
action-diffusion train [name=value …]     from demonstrations to a policy bundle, evaluated

  action-diffusion train                                            PushT from states, embedded demonstrations
  action-diffusion train task=pusht_image                           the same from camera images
  action-diffusion train data=pusht_human train.max_steps=5000      demonstrations by people (downloaded once)
  action-diffusion train task=custom data=my_robot.zarr             your own robot: keys and cameras from the data
  action-diffusion train output_dir=runs/a resume=true              go on with a run that was stopped
""",
    "finetune": """\
action-diffusion finetune bundle=DIR [name=value …]     better than its demonstrations: it tries, and learns from reward

  action-diffusion finetune bundle=outputs/a/bundle                          its denoising steps, by policy gradients
  action-diffusion finetune bundle=outputs/a/bundle method=dsrl              the noise is steered, the policy stays
  action-diffusion finetune bundle=outputs/a/bundle method=idql              the best of several chunks, by a critic
  action-diffusion finetune bundle=outputs/a/bundle output_dir=better resume=true     go on with a run that was stopped

It ends with a bundle, compared with the one that it began with: docs/finetune.md.
""",
    "evaluate": """\
action-diffusion evaluate bundle=DIR [name=value …]     how good is a policy, with intervals, videos and a report

  action-diffusion evaluate bundle=outputs/a/bundle n_episodes=50
  action-diffusion evaluate bundle=A/bundle compare=B/bundle         paired, on the same starts or held-out episodes
  action-diffusion evaluate bundle=[A/bundle,B/bundle,C/bundle]      several training seeds, summarised
  action-diffusion evaluate bundle=A/bundle workers=ray://head:10001      simulators on many machines
  action-diffusion evaluate robot=ur hardware=cell.yaml bundles=[A/bundle,B/bundle] trials=20     on your arm, blinded
""",
    "collect": """\
action-diffusion collect output=PATH [name=value …]     demonstrations into a replay buffer

  action-diffusion collect task=pusht_state agent=expert episodes=20 output=demos.zarr
  action-diffusion collect task=lift_image agent=expert robot=sim_arm episodes=40 output=arm.zarr    in real time
  action-diffusion collect task=pusht_state agent=teleop output=mine.zarr              you drive, in a browser
  action-diffusion collect task=lift_state agent=teleop device=gamepad output=lift.zarr
  action-diffusion collect agent=teleop robot=lerobot hardware=cell.yaml device=leader task=custom output=arm.zarr
  action-diffusion collect task=lift_state agent=expert workers=ray output=lift.zarr    on many machines
  action-diffusion collect agent=corrections from=DIR/record.zarr output=more.zarr     what a person mended in deploy
""",
    "deploy": """\
action-diffusion deploy bundle=DIR|server=URL [name=value …]     run a bundle in real time

  action-diffusion deploy bundle=outputs/a/bundle robot=sim_pusht
  action-diffusion deploy server=ws://HOST:8000 scheduling=rtc        another machine thinks: action-diffusion serve
  action-diffusion deploy replay=DIR [bundle=…] [scheduling=…]        a recorded run once more, offline: docs/deploy.md
  action-diffusion deploy calibrate=true robot=ur hardware=cell.yaml [bundle=DIR]   how late cameras, arm, policy are
""",
    "serve": """\
action-diffusion serve bundle=DIR|bundles={…} [name=value …]     a policy server: this machine thinks, the robot's moves

  action-diffusion serve bundle=outputs/a/bundle                                     for clients on this machine
  action-diffusion serve bundle=outputs/a/bundle host=0.0.0.0 token_file=~/token   for others too
  action-diffusion serve 'bundles={a: DIR, b: DIR}' max_connections=64               several, at ws://HOST:8000/a and /b
  kill -USR1 PID                                                                     take bundles that have changed

Clients: WebsocketClientPolicy of openpi-client, whose api_key is the token, and `action-diffusion deploy` (its option
server). GET /healthz, /readyz, /metrics are for load balancers and Prometheus. Needs the extra [serve]. docs/server.md
has the protocol, docs/fleet.md says how to serve many robots.
""",
}
GROUPS = ("task", "encoder", "denoiser", "scheduler", "objective")
PARTS = """\
  task.horizon=16                 steps of a chunk, 1 to 1024
  task.n_obs_steps=2              observation steps that are seen; task.n_action_steps=8 are executed of a chunk
  policy.…                        any option of a component, such as policy.denoiser.channels=[48,96,192]
"""
LINE = re.compile(r"( *)(\w+): *([^#]*?) *(?:# *(.*))?$")
WIDTH, COLUMN, NARROWEST = 120, 34, 60


def text(command: str) -> str:
    """The help of `command`: how it is called, and every option with its default."""
    parts = [EXAMPLES[command], "Options, with their defaults"]
    groups = {"train": GROUPS, "finetune": ("method",)}.get(command, ())
    parts += [_wrapped(f"{group}=…", ", ".join(choices(group))) for group in groups]
    parts += [_wrapped(option, words) for option, words in options(command)]
    if command == "train":
        parts += [PARTS.rstrip(), _settings()]
    if command in ("train", "collect"):
        parts.append(_wrapped("--config-dir DIR", "a folder with your own task/*.yaml, used as task=NAME"))
    return "\n".join(parts)


def options(command: str) -> Iterator[tuple[str, str]]:
    """("name=default", what it is) of each line of the command's file."""
    content = resources.files("action_diffusion.configs").joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    sections: list[tuple[int, str]] = []
    for line in content.splitlines():
        found = LINE.match(line)
        if found is None or found[2] == "defaults":
            continue
        indent, key, value, words = len(found[1]), found[2], found[3], found[4] or ""
        while sections and sections[-1][0] >= indent:
            sections.pop()
        name = ".".join([*(section for _, section in sections), key])
        if not value:
            sections.append((indent, key))
        elif not value.startswith("{") or value == "{}":
            yield f"{name}={'…' if value in ('???', '${task.data}') else value}", words
        else:
            for inner in re.findall(r"(\w+): ([^,}]+)", value):
                yield f"{name}.{inner[0]}={inner[1]}", words


def _settings() -> str:
    """`train.*`: what a training loop has everywhere, so that names say enough."""
    shown = []
    for field in fields(TrainSettings):
        default = "null" if field.default is None or field.default is MISSING else str(field.default)
        shown.append(f"train.{field.name}={default.lower().replace(' ', '').replace('(', '[').replace(')', ']')}")
    return textwrap.fill("  ".join(shown), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _wrapped(option: str, words: str) -> str:
    head = f"  {option}"
    if not words:
        return head
    head = f"{head}\n{' ' * COLUMN}" if len(head) > COLUMN - 2 else head.ljust(COLUMN)
    lines = textwrap.wrap(words, WIDTH - COLUMN, break_on_hyphens=False)
    return head + f"\n{' ' * COLUMN}".join(lines)


def fitted(words: str, width: int | None = None) -> str:
    """Help that is written for lines of 120, for lines of `width` characters (None: the terminal's).

    What a line says behind its last gap of two spaces goes on below, with the lines that went on there already.
    """
    width = width or shutil.get_terminal_size((WIDTH, 24)).columns
    if not NARROWEST <= width < WIDTH:
        return words
    whole: list[tuple[str, int]] = []
    for line in words.splitlines():
        indent = len(line) - len(line.lstrip())
        if whole and indent and indent == whole[-1][1]:
            whole[-1] = f"{whole[-1][0]} {line.strip()}", indent
            continue
        if whole and indent == 0 and line and len(whole[-1][0]) > WIDTH * 0.8 and whole[-1][1] == 0:
            whole[-1] = f"{whole[-1][0]} {line}", 0
            continue
        gaps = [gap.end() for gap in re.finditer(r"(?<=\S) {2,}(?=\S)", line)]
        whole.append((line, gaps[-1] if gaps else 0))
    return "\n".join(_fill(line, column, width) for line, column in whole)


def _fill(line: str, column: int, width: int) -> str:
    """column: where what it says begins, which is below where it is far right; 0 where the line has one part."""
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4 * (column > 0 or line.startswith(" ")))
    if column > width // 2:
        head = textwrap.fill(line[:column].rstrip(), width, subsequent_indent=indent, break_on_hyphens=False)
        return f"{head}\n{textwrap.fill(line[column:], width, initial_indent=indent, subsequent_indent=indent)}"
    return textwrap.fill(line, width, subsequent_indent=" " * column or indent, break_on_hyphens=False)
