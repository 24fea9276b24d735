"""Synthetic captions by a tiny CoCa with random weights: what is drawn, and the store they make."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from compress.data import captioner, reinforced
from compress.data.captions import Captions
from compress.errors import PocketclipError
from compress.nn.nucleus import nucleus
from compress.stages.reinforce import FOLDER, Config, run
from compress.work import Work

TOWER = {"width": 32, "heads": 4, "layers": 1}
TEXT = {**TOWER, "context_length": 76, "vocab_size": 49408}
COCA = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 16,
        "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True,
    },
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 4},
    "custom_text": True,
}  # fmt: skip


@pytest.fixture
def coca(tmp_path: Path) -> str:
    """The name of coca_ViT-B-32's design, shrunk."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny_coca.json").write_text(json.dumps(COCA))
    open_clip.add_model_config(folder)
    captioner.open_captioner.cache_clear()
    model, _ = captioner.open_captioner("tiny_coca", "cpu")
    torch.manual_seed(3)
    for parameter in model.parameters():  # open_clip leaves some as the memory was
        torch.nn.init.normal_(parameter, std=0.2)
    return "tiny_coca"


def test_the_nucleus_equals_a_slow_loop() -> None:
    logits = torch.randn(6, 9)
    for row, found in zip(logits, nucleus(logits, 0.7), strict=True):
        probability, total, kept = row.softmax(0), 0.0, set()
        for token in row.argsort(descending=True).tolist():
            if total < 0.7:
                kept.add(token)
            total += float(probability[token])
        assert {n for n, value in enumerate(found.tolist()) if value > -1e30} == kept
        assert torch.equal(found[list(kept)], row[list(kept)])
    assert (nucleus(logits, 1e-9) > -1e30).sum(1).tolist() == [1] * 6


def test_the_nucleus_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(5, 50)
    theirs = transformers.TopPLogitsWarper(0.9)(torch.zeros(5, 1), logits.clone())
    assert torch.equal(nucleus(logits, 0.9), theirs)


def test_the_likeliest_caption_is_that_of_whole_forward_passes(coca: str) -> None:
    model, _ = captioner.open_captioner(coca, "cpu")
    pixels = torch.randn(2, 3, 32, 32)
    [first, second] = captioner.draw(model, pixels, 1, 1e-9)[:, 0]
    for image, drawn in zip(pixels, (first, second), strict=True):
        tokens = torch.tensor([[captioner.START]])
        while tokens.shape[1] < captioner.MAX_LENGTH and tokens[0, -1] != captioner.END:
            with torch.no_grad():
                logits = model(image[None], tokens, output_labels=False)["logits"][0, -1]
            if tokens.shape[1] < captioner.MIN_LENGTH:
                logits[captioner.END] = -1e9
            tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
        assert drawn[: tokens.shape[1]].tolist() == tokens[0].tolist()


class Script:
    """Stands for a CoCa that writes given tokens, one row after the other."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = torch.tensor(rows)

    def __call__(self, image: Any, tokens: Any = None, **told: Any) -> dict[str, torch.Tensor]:
        if tokens is None:
            return {"image_features": torch.zeros(2, 4), "image_embs": torch.zeros(2, 3, 4)}
        logits = torch.zeros(len(self.rows), tokens.shape[1], 49408)
        logits[torch.arange(len(self.rows)), -1, self.rows[:, tokens.shape[1] - 1]] = 99.0
        return {"logits": logits}


def test_a_caption_ends_once_and_not_too_early() -> None:
    end = captioner.END
    script = Script([[11, end, 13, 14, end, 16, 17], [21, 22, 23, 24, 25, 26, end]])
    found = captioner.draw(script, torch.zeros(2, 3, 8, 8), 1, 0.5)[:, 0].tolist()
    assert found[0][1] == 11 and found[0][2] != end, "an end before the fifth token"
    assert found[0][3:] == [13, 14, end, end, end]
    assert found[1] == [captioner.START, 21, 22, 23, 24, 25, 26, end]


def test_words_stop_at_the_first_full_stop() -> None:
    ids = open_clip.get_tokenizer("ViT-B-32")("A red bar. It is long")[0]
    assert captioner.words(ids[:9]) == "a red bar"


def test_a_store_holds_captions_that_a_second_run_would_write_too(
    work: Work, tmp_path: Path, coca: str
) -> None:
    captions = Captions(source="coca", model=coca, num=2)
    cfg = Config(captions=captions, views=1, shard_size=3, precision="fp32")
    run(work, cfg, tmp_path / "out")
    store = reinforced.open_store(tmp_path / "out" / FOLDER)
    samples = [sample for shard in store.shards for sample in shard.samples]
    assert len(samples) == 8
    for sample in samples:
        assert 1 <= len(sample.synthetic) <= 2 and all(sample.synthetic)
        assert sample.captions == work.data.pairs.captions[work.data.pairs.keys.index(sample.key)]
    key, first = samples[4].key, samples[4].synthetic[0]
    with torch.no_grad():
        v = work.teacher.model.encode_text(work.teacher.tokenizer([first]))[0]
    stored = store.texts(0, [key], [len(samples[4].captions)])[0]
    torch.testing.assert_close(stored, v / v.norm(), rtol=0, atol=4e-3)  # bfloat16
    path = tmp_path / "out" / FOLDER / "00001.json"
    before = path.read_bytes()
    path.unlink()
    torch.rand(7)  # captions are drawn from the shard's own seed
    run(work, cfg, tmp_path / "out")
    assert path.read_bytes() == before


def test_a_model_without_a_decoder_is_refused() -> None:
    with pytest.raises(PocketclipError, match="RN50 cannot write captions"):
        captioner.open_captioner("RN50", "cpu")
