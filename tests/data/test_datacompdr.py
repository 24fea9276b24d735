"""Apple's layouts, written by hand here and read by the reader; and the other way round."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.data import datacompdr
from compress.errors import PocketclipError

WIDTHS = (4, 3)
AUG, SYN = 3, 2


def rows(num: int, seed: int) -> np.ndarray:
    """`num` rows of two teachers' unit vectors, side by side."""
    random = np.random.default_rng(seed)
    parts = [random.normal(size=(num, width)) for width in WIDTHS]
    parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    return np.concatenate(parts, axis=1).astype(np.float32)


ENTRIES = [[[n, 2, 50, 60], [[3, -30.45], [12, 0.0]]] for n in range(AUG)]


def members(layout: str, dtype: str) -> dict[str, bytes]:
    """One sample as its publisher writes it; nothing of ours takes part."""
    images, own, synthetic = rows(AUG, 0), rows(1, 1), rows(SYN, 2)
    name = "syn_text" if layout != "new" else "syn_text_dfn_mscoco38k"
    arrays = {"image_emb": images, "text_emb": np.concatenate([own, synthetic])}
    if layout == "new":
        arrays = {"image_emb": images, "text_emb": own, f"{name}_emb": synthetic}
    buffer = io.BytesIO()
    if dtype == "npz":
        np.savez(buffer, **arrays)
        embeddings = {"npz": buffer.getvalue()}
    else:
        torch.save({k: torch.from_numpy(v).to(torch.bfloat16) for k, v in arrays.items()}, buffer)
        embeddings = {"pth.gz": gzip.compress(buffer.getvalue())}
    entries: object = json.dumps(ENTRIES) if layout == "string" else ENTRIES
    return {
        "url.txt": b"https://example.org/cat.jpg",
        "syn.json": json.dumps({name: ["a cat", "cat on a mat"]}).encode(),
        "paug.json": json.dumps({"param_aug": entries}).encode(),
        **embeddings,
        "json": json.dumps({"uid": "u1", "sha256": "ab"}).encode(),
    }


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("dtype", ["npz", "pth.gz"])
@pytest.mark.parametrize("layout", ["legacy", "new", "string"])
def test_published_layouts_are_read(tmp_path: Path, layout: str, dtype: str) -> None:
    path = shard(
        tmp_path / "00000.tar", {"u1": members(layout, dtype), "u2": members("new", dtype)}
    )
    first, second = datacompdr.read(path)
    assert (first.key, second.key) == ("u1", "u2")
    assert first.param_aug == ENTRIES and first.about["sha256"] == "ab"
    assert first.image is None and first.caption is None
    [(name, synthetic)] = first.synthetic.items()
    assert first.synthetic_texts[name] == ["a cat", "cat on a mat"]
    # bfloat16 keeps 8 bits of the mantissa
    near = {"rtol": 0, "atol": 0 if dtype == "npz" else 4e-3}
    torch.testing.assert_close(first.images, torch.from_numpy(rows(AUG, 0)), **near)
    torch.testing.assert_close(first.texts, torch.from_numpy(rows(1, 1)), **near)
    torch.testing.assert_close(synthetic, torch.from_numpy(rows(SYN, 2)), **near)
    for part in datacompdr.split_teachers(first.images, WIDTHS):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(AUG), rtol=0, atol=1e-2)


def test_npz_counts_where_both_are_there(tmp_path: Path) -> None:
    both = members("new", "npz") | {"pth.gz": gzip.compress(b"not looked at")}
    [record] = datacompdr.read(shard(tmp_path / "a.tar", {"u1": both}))
    assert record.images.shape == (AUG, sum(WIDTHS))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_what_we_write_reads_as_it_was(tmp_path: Path, bfloat16: bool, legacy: bool) -> None:
    [record] = datacompdr.read(shard(tmp_path / "a.tar", {"u1": members("legacy", "pth.gz")}))
    assert datacompdr.write(tmp_path / "b.tar", [record], bfloat16, legacy) == 1
    [again] = datacompdr.read(tmp_path / "b.tar")
    assert again.param_aug == record.param_aug
    for ours, first in ((again.images, record.images), (again.texts, record.texts)):
        assert torch.equal(ours, first)
    assert torch.equal(again.synthetic["syn_text"], record.synthetic["syn_text"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paug.json": b'{"param_aug": []}'}, "0 augmentations for 3 image embeddings"),
        ({"syn.json": b"{"}, r"u1\.syn\.json: not JSON"),
        ({"npz": b"PK nothing"}, "unsound embeddings"),
        ({"syn.json": b'{"syn_text": ["only one"]}'}, r"3 rows for 1 \+ 1 captions"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    path = shard(tmp_path / "a.tar", {"u1": members("legacy", "npz") | change})
    with pytest.raises(PocketclipError, match=message):
        list(datacompdr.read(path))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, ("1 / 0",))

    buffer = io.BytesIO()
    torch.save({"image_emb": Evil()}, buffer)
    harmful = members("new", "pth.gz") | {"pth.gz": gzip.compress(buffer.getvalue())}
    with pytest.raises(PocketclipError, match="unsound embeddings"):
        list(datacompdr.read(shard(tmp_path / "a.tar", {"u1": harmful})))
