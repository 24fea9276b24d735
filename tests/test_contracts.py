"""A file in a plugin folder keeps the contract of its folder: a new file is tested by existing."""

import ast
import inspect
import itertools
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import benchmarks.run
import compress.evaluate
from compress import plugin
from compress.gates import Gate
from compress.recipe import DataSettings, Recipe

ROOT = Path(__file__).parents[1]
STAGES = plugin.names(plugin.STAGES)
EXPORTERS = plugin.names(plugin.EXPORTERS)
SOURCES = plugin.names(plugin.SOURCES)
HOSTS = plugin.names(plugin.HOSTS)


def configs() -> Iterator[Any]:
    """Every class that a recipe is checked against."""
    for package, names in ((plugin.STAGES, STAGES), (plugin.EXPORTERS, EXPORTERS)):
        for name in names:
            yield pytest.param(plugin.find(package, name).Config, id=f"{package}.{name}")
    for model in (compress.evaluate.Config, benchmarks.run.Config, Recipe, DataSettings, Gate):
        yield pytest.param(model, id=f"{model.__module__}.{model.__name__}")


def undocumented(model: type[BaseModel], seen: set[type[BaseModel]]) -> list[str]:
    """Fields without a docstring beneath them, in the model and in the models inside it."""
    seen.add(model)
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    body = [*definition.body, ast.Pass()]
    found = [
        f"{model.__name__}.{ast.unparse(line.target)}"
        for line, following in itertools.pairwise(body)
        if isinstance(line, ast.AnnAssign) and not is_docstring(following)
        if not ast.unparse(line.target).startswith("_")
    ]
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            if inner not in seen and inner is not BaseModel:
                found += undocumented(inner, seen)
    return found


def is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in models_in(inner)]


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("config", list(configs()))
def test_config_is_frozen_strict_and_documented(config: type[BaseModel]) -> None:
    assert config.model_config.get("frozen") is True
    assert config.model_config.get("extra") == "forbid"
    assert config.__doc__
    assert undocumented(config, set()) == []


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_version_config_and_run(name: str) -> None:
    stage = plugin.find(plugin.STAGES, name)
    assert isinstance(stage.VERSION, int)
    assert parameters(stage.run) == ["work", "cfg", "out"]
    assert stage.__doc__


@pytest.mark.parametrize("name", EXPORTERS)
def test_exporter_has_version_config_write_and_load(name: str) -> None:
    exporter = plugin.find(plugin.EXPORTERS, name)
    assert isinstance(exporter.VERSION, int)
    assert isinstance(exporter.REQUIRES, str)
    assert parameters(exporter.write) == ["clip", "cfg", "out"]
    assert parameters(exporter.load) == ["folder", "device", "threads"]
    assert exporter.__doc__


@pytest.mark.parametrize("name", SOURCES)
def test_source_has_load(name: str) -> None:
    source = plugin.find(plugin.SOURCES, name)
    assert parameters(source.load) == ["name"]
    assert source.__doc__


@pytest.mark.parametrize("name", HOSTS)
def test_host_says_what_it_is(name: str) -> None:
    assert plugin.find(plugin.HOSTS, name).__doc__


def test_check_of_docstrings_finds_a_bare_field() -> None:
    class Bare(BaseModel):
        width: int

    assert undocumented(Bare, set()) == ["Bare.width"]


@pytest.mark.parametrize("name", EXPORTERS)
def test_exporter_needs_an_extra_that_exists(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = plugin.find(plugin.EXPORTERS, name).REQUIRES
    assert extra == "" or extra in project["optional-dependencies"]


def test_optional_packages_are_imported_inside_functions() -> None:
    names = [f"{plugin.EXPORTERS}.{name}" for name in EXPORTERS]
    heavy = ["openvino", "coremltools", "executorch", "tensorrt", "ncnn", "MNN"]
    script = f"import sys, importlib; [importlib.import_module(n) for n in {names}]\n"
    script += f"assert not [m for m in {heavy} if m in sys.modules]"
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1]).returncode
        == 0
    )
