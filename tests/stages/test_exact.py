"""Exact passes: less to compute and to store, and no embedding moves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clip

import compress.clip
from compress.clip import Clip
from compress.errors import PocketclipError
from compress.inspect import describe
from compress.stages.exact import Config, class_matrix, pooled_last, restructured, run, with_context
from compress.structure import ClipConfig
from compress.work import Data, Work
from export import onnxruntime

TEXTS = ["red square", "a green bar", "x", ""]
# Other orders of the same float32 sums.
EXACT = {"rtol": 0, "atol": 1e-5}


def embeddings(clip: Clip, texts: list[str] = TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return clip.model.encode_image(pixels), clip.model.encode_text(clip.tokenizer(texts))


def test_every_pass_together_changes_no_embedding(work: Work, tmp_path: Path) -> None:
    cfg = Config(vocabulary="data", patch_as="matmul")
    exact = run(work, cfg, tmp_path).clip
    for wanted, found in zip(embeddings(work.clip), embeddings(exact), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)
    assert exact.model.config.vision.last_block == exact.model.config.text.last_block == "pooled"
    assert exact.provenance[-1]["step"] == "exact"


def test_the_last_block_is_no_longer_paid_for_all_tokens(clip: Clip) -> None:
    before, after = describe(clip), describe(pooled_last(clip))
    for tower in ("image", "text"):
        assert after[tower]["num_macs"] < 0.65 * before[tower]["num_macs"]  # one of two blocks


def test_the_context_is_that_of_the_longest_text(work: Work, tmp_path: Path) -> None:
    captions = [c for row in work.data.pairs.captions for c in row]
    longest = max(len(text) for text in [*captions, "a green square"]) + 2  # one token a letter
    exact = run(work, Config(), tmp_path).clip
    text = exact.model.config.text
    assert text.context_length == exact.tokenizer.contract.context_length == 16 >= longest
    eleven = with_context(work.clip, 11)
    assert eleven.tokenizer(["red bar"]).shape == (1, 11)
    wanted, found = embeddings(work.clip, ["red bar"]), embeddings(eleven, ["red bar"])
    torch.testing.assert_close(found[1], wanted[1], **EXACT)


def test_a_tower_that_sees_what_follows_a_text_is_not_cut(work: Work, tmp_path: Path) -> None:
    config = work.clip.model.config.model_dump()
    config["text"] |= {"causal": False, "pooling": "first"}
    model = compress.clip.build(
        ClipConfig.model_validate(config), work.clip.model.state_dict(), "test"
    )
    clip = replace(work.clip, model=model)
    with pytest.raises(PocketclipError, match="isn't causal"):
        with_context(clip, 8)
    kept = run(replace(work, clip=clip), Config(), tmp_path).clip.model.config.text
    assert kept.context_length == 16 and kept.last_block == "all"


def test_fixed_prompts_become_a_class_matrix_that_travels(work: Work, tmp_path: Path) -> None:
    exact = run(work, Config(), tmp_path / "stage").clip
    assert exact.classes is not None and exact.classes.names[0] == "red square"
    prompts = [t.format("green bar") for t in work.data.templates]
    with torch.no_grad():
        each = F.normalize(work.clip.model.encode_text(work.clip.tokenizer(prompts)), dim=-1)
    wanted = F.normalize(each.mean(dim=0), dim=-1)
    row = exact.classes.names.index("green bar")
    torch.testing.assert_close(exact.classes.embeddings[row], wanted, **EXACT)
    compress.clip.save(exact, tmp_path / "model")
    again = compress.clip.load(tmp_path / "model")
    assert again.classes is not None and again.classes.names == exact.classes.names
    assert again.with_model(again.model, {}).classes is None


def test_a_bundle_holds_the_class_matrix(work: Work, tmp_path: Path) -> None:
    clip = replace(work.clip, classes=class_matrix(work.clip, work.data))
    onnxruntime.write(pooled_last(clip), onnxruntime.Config(), tmp_path / "bundle")
    matrix = np.load(tmp_path / "bundle" / "classes.npy")
    assert np.array_equal(matrix, clip.classes.embeddings.numpy())
    assert '"labels": "labels.json"' in (tmp_path / "bundle" / "bundle.json").read_text()


def test_without_data_the_passes_that_need_it_are_left_out(clip: Clip, tmp_path: Path) -> None:
    work = Work(clip, clip, Data())
    exact = run(work, Config(), tmp_path).clip
    assert exact.classes is None and exact.model.config.text.context_length == 16
    with pytest.raises(PocketclipError, match="neither classes nor training captions"):
        run(work, Config(vocabulary="data"), tmp_path)


def test_a_context_that_cannot_be_is_refused(clip: Clip) -> None:
    with pytest.raises(PocketclipError, match="must lie between 3 and 16"):
        with_context(clip, 99)


def test_patches_as_a_matrix_product_have_their_bias() -> None:
    clip = restructured(tiny_clip(), vision={"patch_as": "matmul"})
    pixels = torch.randn(2, 3, 32, 32)
    wanted = tiny_clip().model.encode_image(pixels)
    torch.testing.assert_close(clip.model.encode_image(pixels), wanted, **EXACT)
