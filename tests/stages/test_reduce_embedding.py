"""Smaller embeddings: exact where nothing is lost, and the best directions where something is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_clip

from compress import calibrate
from compress.errors import PocketclipError
from compress.nn import vectors
from compress.stages import inherit, quantize, reduce_embedding
from compress.stages.reduce_embedding import Config
from compress.work import Work


def similarities(clip: object, work: Work) -> torch.Tensor:
    pairs = calibrate.draw(work.clip, work.data, 8, 0)
    with torch.no_grad():
        u, v = calibrate.embed(clip.model, pairs)
    return u @ v.T


def test_pca_of_full_width_keeps_every_similarity(work: Work, tmp_path: Path) -> None:
    made = reduce_embedding.run(work, Config(dim=16), tmp_path).clip
    torch.testing.assert_close(similarities(made, work), similarities(work.clip, work))


def test_pca_loses_less_than_cutting(work: Work, tmp_path: Path) -> None:
    wanted = similarities(work.clip, work)
    lost = [
        (similarities(reduce_embedding.run(work, cfg, tmp_path).clip, work) - wanted).abs().mean()
        for cfg in (Config(dim=6), Config(dim=6, method="truncate"))
    ]
    assert lost[0] < lost[1] / 2


def test_truncation_is_the_first_dimensions(work: Work, tmp_path: Path) -> None:
    made = reduce_embedding.run(work, Config(dim=4, method="truncate"), tmp_path).clip
    assert made.model.config.embed_dim == 4
    pairs = calibrate.draw(work.clip, work.data, 8, 0)
    with torch.no_grad():
        whole, _ = calibrate.embed(work.clip.model, pairs)
        cut, _ = calibrate.embed(made.model, pairs)
    torch.testing.assert_close(cut, vectors.truncate(whole, 4))


def test_what_cannot_be_cut_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(PocketclipError, match="17 is more than the model's 16"):
        reduce_embedding.run(work, Config(dim=17), tmp_path)
    rounded = quantize.run(work, quantize.Config(), tmp_path).clip
    with pytest.raises(PocketclipError, match="put this stage before quantize"):
        reduce_embedding.run(replace(work, clip=rounded), Config(dim=4), tmp_path)
    with pytest.raises(PocketclipError, match="inherit: the model is quantized"):
        inherit.run(replace(work, clip=rounded), inherit.Config(), tmp_path)
    assert tiny_clip().model.config.embed_dim == 16


@pytest.mark.parametrize(("kind", "size", "error"), [("int8", 32, 0.01), ("float16", 64, 1e-3)])
def test_integer_vectors_keep_scores(kind: vectors.Kind, size: int, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(300, 32, generator=generator), dim=-1)
    codec = vectors.fit(kind, x)
    assert codec.num_bytes() == size
    scores = codec.query(x[:50]) @ codec.stored(x).T
    assert (scores - x[:50] @ x.T).abs().max() < error


def test_signs_find_the_nearest_of_clear_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(20, 64, generator=generator), dim=-1)
    noisy = centres + 0.05 * torch.randn(20, 64, generator=generator)
    codec = vectors.fit("binary", centres)
    assert codec.num_bytes() == 8
    stored = codec.stored(centres)
    assert set(stored.unique().tolist()) == {-1.0, 1.0}
    assert ((codec.query(noisy) @ stored.T).argmax(1) == torch.arange(20)).all()
