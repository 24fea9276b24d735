"""A hub that serves a folder: repositories are its subfolders, each of one revision."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from open_clip import pretrained

REVISION = "0123abcd"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Name of a repository -> the folder whose files it serves, as the hub's cache lays it out."""
    cache = tmp_path / "hub"

    def folder(repository: str) -> Path:
        path = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / REVISION
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def download(repo_id: str, filename: str, **_: object) -> str:
        path = folder(repo_id) / filename
        if not path.is_file():
            raise FileNotFoundError(f"{repo_id} has no {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    return folder
