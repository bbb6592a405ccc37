"""From `name=value` on the command line to plain data: the only module that touches Hydra, beside `training.sweep`.

words ─▶ form and quotes ─▶ groups (task=…) composed ─▶ names and types checked against them ─▶ all composed
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_origin

from antlr4 import CommonTokenStream, InputStream
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from action_diffusion import hub
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import COMMANDS, Address, AsTyped, Plugins, Sentence, TrainSettings
from action_diffusion.registry import use_plugins
from action_diffusion.schema import FilePath, alternatives, check, hint_at, needed, without_rules

BUDGETS = ("train.max_minutes", "train.max_steps", "train.max_epochs")
GROUPS = {
    "train": ("task", "encoder", "denoiser", "scheduler", "objective"),
    "collect": ("task",),
    "finetune": ("method",),
}
OPEN = re.compile(r"(policy|task)\.\w+\.|sampler\.|method\.")
"""Options of components, which need not stand in a file."""
QUOTES = ("'", '"')
BESIDE_QUOTES = r""",(?=(?:[^'"]|'[^']*'|"[^"]*")*$)"""
"""Commas that part values."""
TASK_KEYS = ("name", "control_rate", "n_obs_steps", "horizon", "n_action_steps", "action")

ConfigStore.instance().store(group="train", name="defaults", node=TrainSettings)


def load(name: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The resolved configuration `name` ("train", "evaluate", …) with overrides, as plain data.

    config_dir: a folder with groups of the user's own (`task/my_arm.yaml`), beside those of the package.
    Raises `InputError` for a misspelt key or choice, suggesting the close ones, for a value of another type or out of
    its range (`options`), for a missing one, and for files of the user's own that cannot be read.
    """
    parsed = [_parse(name, word) for word in overrides]
    _use_plugins(parsed)
    folder = None if config_dir is None else Path(config_dir).resolve()
    if folder is not None and not folder.is_dir():
        raise InputError(f"--config-dir={config_dir}: no such folder")
    search = [] if folder is None else [f"hydra.searchpath=[{quoted(f'file://{folder}')}]"]
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
    check(data, COMMANDS[name])
    return from_hub(name, _without_nulls(data))


def settings(name: str, overrides: Sequence[str], config_dir: str | None = None) -> Any:
    """As `load`, typed: `options.Deploy`, `options.Serve`, … of what the words say."""
    return check(load(name, overrides, config_dir), COMMANDS[name])


def plain(name: str, overrides: Sequence[str], beside: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to `name`, a command without groups and defaults ("data edit", …), as plain data.

    beside: options that were not typed as name=value. Raises `InputError` as `load` does, and for one given twice.
    """
    parsed = [_parse(name, word) for word in overrides]
    _use_plugins(parsed)
    data = dict(beside)
    for one in parsed:
        key = one.key_or_group
        if key in data:
            raise InputError(f"{key}= is given twice")
        if one.is_sweep_override():
            raise InputError(f"{one.input_line}: give one value, or a list in [ ]")
        section, _, inner = key.partition(".")
        if inner:
            inside = data.setdefault(section, {})
            if not isinstance(inside, dict) or inner in inside:
                raise InputError(f"{key}= is given twice")
            inside[inner] = one.value()
        else:
            data[key] = one.value()
    for key in needed(COMMANDS[name]):
        if key not in data:
            raise InputError(f"{key} is required: action-diffusion {name} {key}=…")
    given = vars(check(data, COMMANDS[name]))
    return from_hub(name, {key.rstrip("_"): value for key, value in given.items() if value is not None})


def alternatives_in(name: str, word: str) -> Override:
    """A word of a sweep over the command `name`, by Hydra's grammar: commas part values (`seed=0,1`), those of lists
    (`drop=[a],[b]`) and of paths too; a path with a comma in it stands in quotes.

    Raises `InputError` for what cannot be read.
    """
    key, equals, value = word.partition("=")
    typed = {FilePath, Address, AsTyped} & set(alternatives(hint_at(COMMANDS[name], key)))
    if equals and value and typed and not re.match(r"\[|[a-z]+\(", value):
        parts = re.split(BESIDE_QUOTES, value)
        word = f"{key}={','.join(part if part == 'null' or part[:1] in QUOTES else quoted(part) for part in parts)}"
    return _parse(name, word, as_typed=False)


def from_hub(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the command `name`, with folders on this machine for policies on the Hub, and commits for its data.

    Raises `InputError` for what is not there.
    """
    inspected = name in ("bundle inspect", "bundle import", "bundle export")
    policies = ("bundle", "bundles", "compare", "init", "visited_by", *(("path", "in") if inspected else ()))

    def fetch(value: Any) -> Any:
        if isinstance(value, list):
            return [fetch(one) for one in value]
        if isinstance(value, dict):
            return {key: fetch(one) for key, one in value.items()}
        return str(hub.fetched(value, hub.POLICY)) if hub.is_reference(value) else value

    def pin(value: Any) -> Any:
        if isinstance(value, list):
            return [pin(one) for one in value]
        return hub.pinned(value, hub.DATA) if hub.is_reference(value) else value

    found = {key: fetch(value) if key in policies else value for key, value in options.items()}
    if "data" in found:
        found["data"] = pin(found["data"])
    policy = found.get("policy")
    objective = policy.get("objective") if isinstance(policy, dict) else None
    if isinstance(objective, dict) and "teacher" in objective:
        objective["teacher"] = fetch(objective["teacher"])
    return found


def settings_of(name: str, overrides: Sequence[str]) -> Any:
    """As `plain`, typed, with what was not given: `options.extensions.Fit`, …"""
    return check(plain(name, overrides, {}), COMMANDS[name])


def override(name: str, config: Mapping[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    """A whole configuration of `name` that is there already (in the file `where`), with overrides of single values.

    Raises `InputError` as `load` does, and for another choice of a group.
    """
    parsed = [_parse(name, word) for word in overrides]
    use_plugins(config.get("plugins"))
    _use_plugins(parsed)
    base = dict(_items(config))
    try:
        check(config, COMMANDS[name])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    data = copy.deepcopy(dict(config))
    for one in parsed:
        key, value = one.key_or_group, None if one.is_sweep_override() else one.value()
        if key in GROUPS.get(name, ()):
            raise InputError(f"{one.input_line}: the parts that it began with are in {where}, and it keeps them")
        if one.is_sweep_override() or "${" in str(value):
            raise InputError(f"{one.input_line}: give one value, and as it is")
        _check_value(name, key, value, base)
        _put(data, key, value)
    given = {one.key_or_group for one in parsed}
    for budget in BUDGETS if given & set(BUDGETS) else ():
        if budget not in given:
            _put(data, budget, None)
    check(data, COMMANDS[name])
    return from_hub(name, _without_nulls(data))


def _without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """`task.observations.NAME=null` as what it means: the task names the others; where it names none, drop=[NAME]."""
    task = data.get("task") or {}
    observations = task.get("observations") or {}
    nulls = [key for key, options in observations.items() if options is None]
    if not nulls:
        return data
    named = {key: options for key, options in observations.items() if options is not None}
    dropped = {"drop": [*(data["drop"] or ()), *nulls]} if "drop" in data and not named else {}
    return data | dropped | {"task": task | {"observations": named or None}}


def _use_plugins(parsed: Sequence[Override]) -> None:
    """Before names are checked: a plugin may have them."""
    for override in parsed:
        if override.key_or_group == "plugins" and not override.is_sweep_override():
            value = override.value()
            check(value, Plugins, "plugins")
            use_plugins(cast(Any, value))


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        data = data[section]
        if not isinstance(data, dict):
            raise InputError(f"{key}: {section} is no section")
    data[last] = value


def choices(group: str) -> list[str]:
    """The options of a group that ship with the package ("task" → pusht_state, pusht_image, …)."""
    folder = Path(__file__).resolve().parents[1]
    return sorted(name for root in (folder / "configs", folder.parent / "configs") for name in _files(root, group))


def _files(root: Path, group: str) -> list[str]:
    return [path.stem for path in (root / group).glob("*.yaml")]


def _parse(name: str, word: str, *, as_typed: bool = True) -> Override:
    """One word of the command line, by Hydra's grammar; as_typed: after what is taken as typed was put in quotes."""
    key, equals, value = word.partition("=")
    if not equals or not key or key[0] == "-":
        raise InputError(f"{word!r} is not of the form name=value; see: action-diffusion {name} --help")
    if key[0] in "+~":
        raise InputError(f"{word!r}: write {key.lstrip('+~')}=value, without {key[0]}")
    hints = set(alternatives(hint_at(COMMANDS[name], key)))
    if {FilePath, Address, AsTyped, Sentence} & hints and as_typed:  # "=" and "," in it, too
        if not value:
            raise InputError(f"{key}= is empty: give {key}={'PATH' if FilePath in hints else '…'}")
        lists = any(get_origin(without_rules(hint)) is list for hint in hints)
        listed = value[0] == "[" and (lists or value[-1] == "]")
        if value != "null" and value[0] not in "'\"" and not listed:  # in quotes already, or a list
            word = f"{key}={quoted(value)}"
    elif as_typed and value and value[0] != "[" and value != "null" and "${" not in value and _is_list(name, key):
        word = f"{key}=[{value}]"  # of one, or with commas
    try:
        parsed = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
        word = word if len(word) < 200 else f"{word[:200]}…"
        raise InputError(f"{word!r} cannot be read ({_short(error)[:200]}): put quotes around its value") from None
    _refuse_twice(key, word)
    return parsed


def _refuse_twice(key: str, word: str) -> None:
    """`InputError` for a section { } in a well-formed `word` that names something twice: Hydra takes the last."""
    if "{" not in word:
        return
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(word))))
    trees: list[Any] = [cast(Any, parser).override()]
    for tree in trees:
        trees.extend(getattr(tree, "children", None) or ())
        if isinstance(tree, OverrideParser.DictContainerContext):
            names = [pair.dictKey().getText() for pair in tree.dictKeyValuePair()]
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f"{key}: {name} is named twice")


def _is_list(name: str, key: str) -> bool:
    """Whether an option is a list, and nothing else; not of a policy's parts, whose types are not known yet."""
    hints = alternatives(hint_at(COMMANDS[name], key))
    parts = [without_rules(hint) for hint in hints if hint is not type(None)]
    return bool(parts) and all(get_origin(part) is list for part in parts)


def quoted(text: str) -> str:
    """Text as Hydra's grammar takes it for what it is."""
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
        value = None if override.is_sweep_override() else override.value()
        if not override.is_sweep_override():
            _check_value(name, key, value, base)
        if isinstance(value, Mapping) and "name" in value and key in base:
            result.append(f"{key}=null")  # another component, of whose options none stays
        result.append(line if key in base else f"++{line}")
    given = {override.key_or_group for override in parsed}
    if given & set(BUDGETS):
        result += [f"{budget}=null" for budget in BUDGETS if budget not in given]
    return result


def _check_value(name: str, key: str, value: Any, base: Mapping[str, Any]) -> None:
    """Refuse an option that is not there, or another type or range; what is not plain yet is checked when it is."""
    if key not in base and not (OPEN.match(key) and key.rpartition(".")[0] in base):
        raise _unknown_option(name, key, base)
    section, _, word = key.rpartition(".")
    if section == "task.observations" and value is None and base[section] and key not in base:
        raise unknown("observation", word, base[section], section)
    default = base.get(key)
    if isinstance(default, dict) and not key.startswith(("policy.", "task.")) and hint_at(COMMANDS[name], key):
        inside = next((path for path in base if path.startswith(f"{key}.")), f"{key}.…")
        raise InputError(f"{key} is a section: give its values one by one, such as {inside}=…")
    hint = hint_at(COMMANDS[name], key)
    if hint is not None and not isinstance(value, Mapping) and "${" not in str(value):
        check(
            value, hint, key, example=None if isinstance(default, str) and FilePath in alternatives(hint) else default
        )


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
