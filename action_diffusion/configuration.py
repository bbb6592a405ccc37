"""From `name=value` on the command line to plain data: the only module that touches Hydra.

words ─▶ form and quotes ─▶ groups (task=…) composed ─▶ names and types checked against them ─▶ all composed
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from action_diffusion.errors import InputError, unknown
from action_diffusion.training.settings import TrainSettings

BUDGETS = ("train.max_minutes", "train.max_steps", "train.max_epochs")
GROUPS = {"train": ("task", "encoder", "denoiser", "scheduler"), "collect": ("task",)}
OPEN = re.compile(r"(policy|task)\.\w+\.|sampler\.")
"""Options of components, which need not stand in a file: the component itself refuses what it does not know."""
PATHS = (
    *("bundle", "compare", "data", "output", "output_dir", "init", "script", "from"),
    *("dataset.cache_dir", "token_file", "server", "hardware", "replay", "page_token_file"),
)
"""Taken as typed, so that `=`, commas, spaces and names of digits mean nothing special in them."""
NUMBERS = {
    "dataset.max_episodes": 100,
    "dataset.memory_gb": 4.0,
    "sampler.num_inference_steps": 10,
    "task.control_rate": 10.0,
    "train.max_epochs": 10.0,
    "train.max_minutes": 8.0,
    "train.max_steps": 1000,
}
"""Examples of numbers whose type the default does not tell, because it is null or a task may write 10 for 10.0."""
TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str, int), "a word"),
    list: ((list,), "a list"),
}
"""What may be given, by the type of the default."""
TASK_KEYS = ("name", "control_rate", "n_obs_steps", "horizon", "n_action_steps", "action")

ConfigStore.instance().store(group="train", name="defaults", node=TrainSettings)


def load(name: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The resolved configuration `name` ("train", "evaluate", …) with overrides, as plain data.

    config_dir: a folder with groups of the user's own (`task/my_arm.yaml`), beside those of the package.
    Raises `InputError` for a misspelt key or choice, suggesting the close ones, for a value of another type than
    the key's, for a missing one, and for files of the user's own that cannot be read.
    """
    parsed = [_parse(name, word) for word in overrides]
    folder = None if config_dir is None else Path(config_dir).resolve()
    if folder is not None and not folder.is_dir():
        raise InputError(f"--config-dir={config_dir}: no such folder")
    search = [] if folder is None else [f"hydra.searchpath=[{_quoted(f'file://{folder}')}]"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("action_diffusion.configs", version_base="1.3"):
            data = _plain(compose(name, search + _checked(name, parsed, search, folder)), resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise InputError(_one_line(error)) from None
    missing = [key for key, value in _items(data) if value == "???" and key != "task.data"]  # data= replaces that one
    if missing:
        raise InputError(f"{missing[0]} is required: action-diffusion {name} {missing[0]}=…")
    if "task" in data:
        _check_task(data["task"])
    return data


def choices(group: str) -> list[str]:
    """The options of a group that ship with the package ("task" → pusht_state, pusht_image, …)."""
    folder = Path(__file__).resolve().parent
    return sorted(name for root in (folder / "configs", folder.parent / "configs") for name in _files(root, group))


def _files(root: Path, group: str) -> list[str]:
    return [path.stem for path in (root / group).glob("*.yaml")]


def _parse(name: str, word: str) -> Override:
    """One word of the command line, by Hydra's grammar, after what is a path has been put in quotes."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise InputError(f"{word!r} is not of the form name=value; see: action-diffusion {name} --help")
    if key[0] in "+~":
        raise InputError(f"{word!r}: write {key.lstrip('+~')}=value, without {key[0]}")
    if key in PATHS:
        if not value:
            raise InputError(f"{key}= is empty: give {key}=PATH")
        if value != "null" and value[0] not in "['\"":
            word = f"{key}={_quoted(value)}"
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise InputError(f"{word!r} cannot be read ({_short(error)}): put quotes around its value") from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def _checked(name: str, parsed: Sequence[Override], search: list[str], folder: Path | None) -> list[str]:
    """The overrides for Hydra, after a check of every name and type; a budget that is asked for replaces the others."""
    groups = [override for override in parsed if override.key_or_group in GROUPS.get(name, ())]
    for override in groups:
        group = override.key_or_group
        found = choices(group) + ([] if folder is None else _files(folder, group))
        if override.value() not in found:
            raise unknown(group, str(override.value()), found)
    chosen = [override.input_line or "" for override in groups]
    base = dict(_items(_plain(compose(name, search + chosen), resolve=False)))
    result = list(chosen)
    for override in parsed:
        if override in groups:
            continue
        key, line = override.key_or_group, override.input_line or ""
        if key in base:
            if not override.is_sweep_override():
                _check_type(key, override.value(), base)
            result.append(line)
        elif OPEN.match(key) and key.rpartition(".")[0] in base:
            result.append(f"++{line}")
        else:
            raise _unknown_option(name, key, base)
    given = {override.key_or_group for override in parsed}
    if given & set(BUDGETS):
        result += [f"{budget}=null" for budget in BUDGETS if budget not in given]
    return result


def _check_type(key: str, value: Any, base: Mapping[str, Any]) -> None:
    """Refuse a value of another type than the default has; of a component, null may stand for all but a number."""
    default = NUMBERS.get(key, "PATH" if key in PATHS else base[key])
    component = key.startswith(("policy.", "task."))
    is_number = isinstance(default, bool | int | float)
    if value is None and (base[key] is None or key in BUDGETS or (component and not is_number)):
        return
    if default is None or "${" in str(value) or (key == "bundle" and isinstance(value, list)):
        return
    if isinstance(default, dict):
        if component:
            return
        inside = next(path for path in base if path.startswith(f"{key}."))
        raise InputError(f"{key} is a section: give its values one by one, such as {inside}=…")
    accepted, expected = TYPES[type(default)]
    bool_for_number = isinstance(value, bool) and not isinstance(default, bool)
    if bool_for_number or not isinstance(value, accepted) or value != value:  # NaN differs from itself
        expected = "a path" if key in PATHS else expected
        example = "" if isinstance(default, bool) or key in PATHS else f", such as {default}"
        raise InputError(f"{key}={'null' if value is None else value}: expected {expected}{example}")


def _unknown_option(name: str, key: str, base: Mapping[str, Any]) -> InputError:
    """Suggest the same name in another section; else a similar one where it was looked for, or list what is there."""
    same = [path for path, value in base.items() if _last(path) == _last(key) and not isinstance(value, dict)]
    if same:
        return unknown("option", key, same)
    section = key
    while section and section not in base:
        section = section.rpartition(".")[0]
    inside = [path for path in base if path.rpartition(".")[0] == section]
    return unknown("option", key, inside if section else {*inside, *GROUPS.get(name, ())})


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _check_task(task: Any) -> None:
    """A task of the user's own says everything that a policy must know."""
    missing = [key for key in TASK_KEYS if not isinstance(task, dict) or key not in task]
    if missing:
        named = f"task {task['name']}" if "name" not in missing else "the task"
        raise InputError(
            f"{named} does not say {', '.join(missing)}: add them under task: in its file, "
            "which begins with the line '# @package _global_'"
        )


def _plain(config: Any, *, resolve: bool) -> dict[str, Any]:
    data = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=False)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _items(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its path, sections before what is in them."""
    for key, value in data.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, dict):
            yield from _items(value, f"{path}.")


def _one_line(error: BaseException) -> str:
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{_short(error)}: {_short(error.__cause__)}"
    return _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1].removeprefix('task.')} is required: give {missing[1].removeprefix('task.')}=…"
    text = re.sub(r" ?(full_key|object_type|reference_type)[:=] ?\S*", "", text)
    text = re.sub(r" (Config search path|See https).*", "", text).removeprefix("Error merging override ")
    return text.strip() or type(error).__name__
