"""From `name=value` on the command line to plain data: the only module that touches Hydra."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from action_diffusion.errors import InputError, unknown
from action_diffusion.training.settings import TrainSettings

BUDGETS = ("train.max_minutes", "train.max_steps", "train.max_epochs")
OPEN_SECTIONS = ("policy", "task")
GROUPS = ("task", "encoder", "denoiser", "scheduler")

ConfigStore.instance().store(group="train", name="defaults", node=TrainSettings)


def load(name: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, Any]:
    """The resolved configuration `name` ("train", "evaluate", …) with overrides, as plain data.

    config_dir: a folder with groups of the user's own (`task/my_arm.yaml`), searched first.
    Raises `InputError` for a misspelt key or choice, suggesting the close ones, and for a missing value.
    """
    overrides = list(overrides)
    for override in overrides:
        if "=" not in override:
            raise InputError(
                f"{override!r} is not of the form name=value; see: action-diffusion {name} --help"
            )
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise InputError(f"--config-dir={config_dir}: no such folder")
        overrides.append(f"hydra.searchpath=[file://{folder}]")
    GlobalHydra.instance().clear()
    with initialize_config_module("action_diffusion.configs", version_base="1.3"):
        overrides = _check(name, overrides)
        try:
            config = compose(name, overrides)
            data = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_one_line(error)) from None
    assert isinstance(data, dict)
    missing = [key for key in _paths(data) if _get(data, key) == "???"]
    if missing:
        raise InputError(f"{missing[0]} is required: action-diffusion {name} {missing[0]}=…")
    return {str(key): value for key, value in data.items()}


def choices(group: str) -> list[str]:
    """The options of a group that ship with the package ("task" → pusht_state, pusht_image, …)."""
    folder = Path(__file__).resolve().parent
    roots = (folder / "configs", folder.parent / "configs")
    return sorted(path.stem for root in roots for path in (root / group).glob("*.yaml"))


def _check(name: str, overrides: list[str]) -> list[str]:
    """Refuse unknown keys before Hydra does, to suggest what was meant; returns overrides that Hydra takes.

    Options of a component (`policy.encoder.crop`) need not stand in a file: the component itself refuses what it
    does not know.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise InputError(_one_line(error)) from None
    groups = [o for o in parsed if o.key_or_group in GROUPS or o.key_or_group == "hydra.searchpath"]
    loader = GlobalHydra.instance().config_loader()
    for override in groups:
        if override.key_or_group in GROUPS:
            found = sorted({*choices(override.key_or_group), *_searched(loader, override.key_or_group)})
            if not _is_searched(overrides) and override.value() not in found:
                raise unknown(override.key_or_group, str(override.value()), found)
    try:
        base = compose(name, [o.input_line for o in groups if o.input_line])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error)) from None
    assert isinstance(base, DictConfig)
    known = list(_paths(OmegaConf.to_container(base, resolve=False)))
    result = []
    for override in parsed:
        key, line = override.key_or_group, override.input_line or ""
        if override in groups or override.is_add() or override.is_delete() or key in known:
            result.append(line)
        elif key.split(".")[0] in OPEN_SECTIONS and key.rpartition(".")[0] in known and key.count(".") > 1:
            result.append(f"++{line}")
        else:
            close = difflib.get_close_matches(key, known, n=1)
            top = {k for k in known if "." not in k or close} | set(GROUPS if name == "train" else ())
            raise unknown("option", key, top)
    if any(o.key_or_group in BUDGETS for o in parsed):  # a budget that is asked for replaces the task's own
        given = {o.key_or_group for o in parsed}
        result += [f"{budget}=null" for budget in BUDGETS if budget not in given]
    return result


def _searched(loader: Any, group: str) -> list[str]:
    return list(loader.get_group_options(group))


def _is_searched(overrides: Sequence[str]) -> bool:
    return any(o.startswith("hydra.searchpath") for o in overrides)


def _paths(data: Any, prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        path = f"{prefix}{key}"
        yield path
        if isinstance(value, dict):
            yield from _paths(value, f"{path}.")


def _get(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data[key]
    return data


def _one_line(error: BaseException) -> str:
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{_short(error)}: {_short(error.__cause__)}"
    return _short(error)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{missing[1].removeprefix('task.')} is required: give {missing[1].removeprefix('task.')}=…"
    return re.sub(r" ?(full_key|object_type|reference_type): ?\S*", "", text).strip() or type(error).__name__
