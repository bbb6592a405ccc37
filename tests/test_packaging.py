"""What ships: a folder or file forgotten in pyproject.toml works here, and is missing from the wheel."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from action_diffusion import __version__

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "benchmarks", "docs", "typings", "build", "dist", "outputs"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def folders(project) -> dict[str, Path]:
    """The folder of every package that pyproject.toml lists."""
    setuptools = project["tool"]["setuptools"]
    return {name: ROOT / setuptools["package-dir"][name] for name in setuptools["packages"]}


def shipped_files() -> list[Path]:
    """Every file in a folder at the root that is meant to ship."""
    roots = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_SHIPPED]
    visible = [path for path in roots if not path.name.startswith(".") and not path.name.endswith(".egg-info")]
    files = [path for root in visible for path in root.rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts and not path.name.startswith(".")]


def test_every_folder_with_python_files_is_a_package(project, folders):
    with_python = {path.parent for path in shipped_files() if path.suffix == ".py"}
    assert set(folders.values()) == {
        *with_python,
        ROOT / "datasets",
    }  # which has none of its own
    assert set(project["tool"]["setuptools"]["package-dir"]) == set(folders)


def test_every_other_file_is_package_data(project, folders):
    patterns = project["tool"]["setuptools"]["package-data"]
    assert set(patterns) <= set(folders)
    covered = {file for name, globs in patterns.items() for glob in globs for file in folders[name].glob(glob)}
    compiled = project["tool"]["setuptools"]["ext-modules"]
    covered |= {ROOT / file for module in compiled for file in module["sources"] + module.get("depends", [])}
    assert {path for path in shipped_files() if path.suffix not in (".py", ".so")} - covered == set()
    assert folders["action_diffusion.configs"] / "task" / "pusht_state.yaml" in covered


def test_packages_import_by_their_names(folders):
    for name, folder in folders.items():
        module = importlib.import_module(name)
        assert str(folder) in [str(Path(path)) for path in module.__path__]


def test_datasets_is_not_mistaken_for_the_package_of_that_name():
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_type_checkers_see_every_package_and_module(folders):
    links = {path.name: path.resolve() for path in (ROOT / "typings" / "action_diffusion").iterdir()}
    modules = {path.name: path for path in (ROOT / "action_diffusion").glob("*.py")}
    packages = {name.split(".")[1]: folder for name, folder in folders.items() if name.count(".") == 1}
    assert links == modules | packages


def test_the_version_is_written_once_more_correctly(project):
    assert project["project"]["version"] == __version__


def test_the_command_is_a_function(project):
    module, _, function = project["project"]["scripts"]["action-diffusion"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_licence_ships(project):
    assert project["project"]["license"] == "MIT"
    for name in project["project"]["license-files"]:
        assert "MIT" in (ROOT / PurePosixPath(name)).read_text()
