"""A recipe: YAML in, typed steps out, with every mistake reported at once before anything runs."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny

import benchmarks.run
import compress.evaluate
from compress import plugin
from compress.data.shards import expand
from compress.errors import PocketclipError
from compress.gates import Gate
from compress.plugin import did_you_mean
from compress.problems import Place, Problems, validate
from compress.recipe_file import apply_override, read
from compress.work import Data


class DataSettings(BaseModel):
    """Which shards; paths and globs are relative to the recipe file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[str, ...] = ()
    """Shards to train on: .tar, .tar.gz, .tar.xz, globs, or folders of images with .txt files."""
    evaluate: dict[str, tuple[str, ...]] = {}
    """Splits to measure on: a name of your choice, and its shards."""
    classes: str | None = None
    """JSON list of {"concept", "name"}: all zero-shot classes."""
    templates: tuple[str, ...] = ("{}",)
    """Zero-shot prompts; {} stands for the class name."""
    captions: Literal["own", "none"] = "own"
    """own: every training image has captions beside it. none: pictures alone, for quantization, for
    search of token schedules, and for distillation of the image tower towards the teacher's."""
    image_size: int | None = Field(default=None, ge=8)
    """Pixels a side at which training images are kept in memory: the short side resized, the centre
    cropped. By default what the model takes. Splits are measured on pictures as they come."""


class Step(BaseModel):
    """One entry of `stages:` or `export:`."""

    model_config = ConfigDict(frozen=True)

    name: str
    """File name of the stage or exporter."""
    config: SerializeAsAny[BaseModel]
    """Its settings, an instance of the `Config` in that file."""

    @property
    def folder_name(self) -> str:
        """`onnxruntime-int8`: the name, and the precision where the settings have one."""
        precision = getattr(self.config, "precision", None)
        return f"{self.name}-{precision}" if precision else self.name


class Recipe(BaseModel):
    """What to do with which model; see recipes/ for examples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w][\w.-]*$")
    """Name of the run folder (runs/NAME) and of the model that comes out."""
    model: str
    """The teacher: a folder relative to the recipe, open_clip:NAME/PRETRAINED, new:CONFIG.json."""
    seed: int = 0
    """Start of every random number; each stage begins with it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where training runs; auto takes a GPU where there is one."""
    data: DataSettings = DataSettings()
    """Shards, classes and prompts."""
    stages: tuple[Step, ...] = ()
    """What is done to the model, in order: files of compress/stages."""
    export: tuple[Step, ...] = ()
    """Where the result goes: files of export/."""
    evaluate: compress.evaluate.Config = compress.evaluate.Config()
    """How accuracy is measured."""
    bench: benchmarks.run.Config = benchmarks.run.Config()
    """How latency is measured."""
    gates: tuple[Gate, ...] = ()
    """Bounds that the result must keep."""

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """Where the recipe's paths start."""
        return self._folder

    @property
    def sha256(self) -> str:
        """Digest of the settings as written, the same on every machine."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.replace(f"{self.folder}/", "").encode()).hexdigest()

    def shards(self) -> Data:
        """The data with absolute paths, nothing read yet."""
        data = self.data
        return Data(
            train=[self.folder / path for path in data.train],
            evaluate={k: [self.folder / path for path in v] for k, v in data.evaluate.items()},
            classes_file=self.folder / data.classes if data.classes else None,
            templates=data.templates,
            image_size=data.image_size,
            captions=data.captions,
        )

    def resolved(self) -> str:
        """The whole recipe as YAML, defaults written out, paths absolute: it can be run again."""
        content = self.model_dump(mode="json")
        content["stages"] = [{s.name: s.config.model_dump(mode="json")} for s in self.stages]
        content["export"] = [{s.name: s.config.model_dump(mode="json")} for s in self.export]
        absolute = lambda path: str(self.folder / path)  # noqa: E731
        data = content["data"]
        data["train"] = [absolute(path) for path in data["train"]]
        data["evaluate"] = {k: [absolute(p) for p in v] for k, v in data["evaluate"].items()}
        data["classes"] = absolute(data["classes"]) if data["classes"] else None
        kind, argument = plugin.split_source(self.model)
        if kind == "folder":
            content["model"] = absolute(argument)
        elif (self.folder / argument).exists():
            content["model"] = f"{kind}:{absolute(argument)}"
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and check all of it.

    overrides: `stages.distill.lr=1e-3`, each a place (a step by name or index) and a YAML value.
    Raises PocketclipError with one line per mistake, each naming its place.
    """
    path = Path(path)
    problems = Problems(path)
    raw = read(path, problems)
    for override in overrides or []:
        apply_override(raw, override, problems)
    data = validate(DataSettings, raw.get("data") or {}, ("data",), problems) or DataSettings()
    alone = data.captions == "none"
    rows = {
        "stages": steps(raw, "stages", plugin.STAGES, path.parent, problems, alone),
        "export": steps(raw, "export", plugin.EXPORTERS, path.parent, problems),
    }
    _check_data(data, path.parent, problems)
    _check_model(raw.get("model"), path.parent, problems)
    _check_exports(rows["export"], problems)
    recipe = validate(Recipe, {**raw, **rows, "data": data}, (), problems)
    problems.raise_if_any()
    assert recipe is not None
    recipe._folder = path.parent.absolute()
    return recipe


def steps(
    raw: dict[str, Any],
    key: str,
    package: str,
    base: Path,
    problems: Problems,
    alone: bool = False,
) -> list[Step]:
    """Check each one-key mapping of `stages:` or `export:` against the Config in its file.

    alone: pictures come without captions, and a stage that needs them is a mistake:
    `needs_captions` of its file says why.
    """
    rows = raw.get(key) or []
    if not isinstance(rows, list):
        problems.add((key,), "a list is needed: one `- name: {settings}` per line")
        return []
    found = []
    for index, row in enumerate(rows):
        row = {row: {}} if isinstance(row, str) else row
        if not isinstance(row, dict) or len(row) != 1:
            problems.add((key, index), "one `name: {settings}` is needed")
            continue
        [(name, settings)] = row.items()
        if name not in plugin.names(package):
            known = did_you_mean(str(name), plugin.names(package))
            problems.add(
                (key, index, name), f"unknown {'stage' if key == 'stages' else 'target'}{known}"
            )
            continue
        module = plugin.find(package, name)
        config_class = module.Config
        settings = settings or {}
        for field in _path_fields(config_class, settings):
            _check_file((key, index, name, field), settings[field], base, problems)
            settings = {**settings, field: str(base.absolute() / settings[field])}
        config = validate(config_class, settings, (key, index, name), problems)
        if config is None:
            continue
        found.append(Step(name=name, config=config))
        reason = module.needs_captions(config) if hasattr(module, "needs_captions") else None
        if alone and reason:
            problems.add((key, index, name), f"data.captions is none, but {reason}")
    return found


def _path_fields(config_class: type[BaseModel], settings: Any) -> list[str]:
    """Settings of type Path: like every path of a recipe, they are relative to its file."""
    if not isinstance(settings, dict):
        return []
    fields = config_class.model_fields
    return [
        key
        for key, value in settings.items()
        if key in fields and "Path" in str(fields[key].annotation) and isinstance(value, str)
    ]


def _check_data(data: DataSettings, base: Path, problems: Problems) -> None:
    """Every file that `data:` names is there, and every template can be filled."""
    named: list[tuple[Place, str]] = [(("train", i), path) for i, path in enumerate(data.train)]
    for split, paths in data.evaluate.items():
        named += [(("evaluate", split, i), path) for i, path in enumerate(paths)]
    for place, path in named:
        try:
            expand([base / path])
        except PocketclipError as error:
            problems.add(("data", *place), str(error))
    if data.classes:
        _check_file(("data", "classes"), data.classes, base, problems)
    for index, template in enumerate(data.templates):
        if "{}" not in template:
            problems.add(("data", "templates", index), "a template needs {} for the class name")


def _check_model(model: Any, base: Path, problems: Problems) -> None:
    """A model that is a path must be there; a model by name is looked up when it is opened."""
    if isinstance(model, str):
        kind, argument = plugin.split_source(model)
        if kind in ("folder", "new"):
            _check_file(("model",), argument, base, problems)


def _check_file(place: Place, path: str, base: Path, problems: Problems) -> None:
    if not (base / path).exists():
        problems.add(place, f"no such file: {path} (looked in {base.absolute()})")


def _check_exports(steps: list[Step], problems: Problems) -> None:
    """Two exports must not write into one folder."""
    seen: dict[str, int] = {}
    for index, step in enumerate(steps):
        if step.folder_name in seen:
            problems.add(
                ("export", index, step.name),
                f"writes export/{step.folder_name} as export[{seen[step.folder_name]}] does",
            )
        seen[step.folder_name] = index
