"""A new exporter is one new file: found, proved and verified without any other edit."""

import sys
from pathlib import Path

import pytest
from tiny import tiny_clip

import export
from compress import plugin
from export import _contract, _verify

SOURCE = '''\
"""Programs of torch.export, run by torch itself."""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from compress.clip import Clip
from export import _bundle
from export import onnx as portable

REQUIRES = ""
VERSION = 1


class Config(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Programs:
    """Both towers, a row a call."""

    def __init__(self, folder: Path) -> None:
        self.towers = {
            tower: torch.export.load(folder / f"{tower}.pt2").module() for tower in _bundle.TOWERS
        }

    def encode_image(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.towers["image"](row[None]) for row in pixels]).detach()

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.towers["text"](row[None]) for row in tokens.int()]).detach()


def write(clip: Clip, cfg: Config, out: Path) -> None:
    with _bundle.writing(clip, out, spec()) as folder:
        for tower in _bundle.TOWERS:
            example = portable.example(clip, tower, 1)
            program = torch.export.export(portable.unit(clip, tower), (example,))
            torch.export.save(program, folder / f"{tower}.pt2")


def load(folder: Path, device: str = "cpu", threads: int | None = None) -> Programs:
    return Programs(Path(folder))


def spec() -> _bundle.Spec:
    usage = "def open_tower(tower): ..."
    return _bundle.Spec("programs", "fp32", "pt2", 1, 0.9999, load, usage)
'''


def test_one_file_of_60_lines_is_an_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SOURCE.count("\n") <= 60
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "programs.py").write_text(SOURCE)
    monkeypatch.setattr(export, "__path__", [*export.__path__, str(folder)])
    assert "programs" in plugin.names(plugin.EXPORTERS)
    assert ("programs", None) in _contract.cases()
    try:
        rows = _contract.prove(tiny_clip(), "programs", None, tmp_path / "out")
        assert [(row["tower"], row["passed"]) for row in rows] == [("image", True), ("text", True)]
        assert min(_verify.verify(tmp_path / "out").values()) > 0.9999
    finally:
        sys.modules.pop("export.programs", None)
        vars(export).pop("programs", None)
