"""The shipped shards are whole, licensed, and keep held-out images out of training."""

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from compress.data.shards import Sample, read_samples

DATA = Path(__file__).parents[2] / "recipes" / "emoji" / "data"
STYLES = {"twemoji", "noto", "noto-v1", "fluent-flat", "fluent-3d"}
LICENSES = {"CC-BY-4.0", "Apache-2.0", "MIT"}
MAX_BYTES = 25_000_000


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Sample]]:
    names = {"train": "train-*", "val": "val", "unseen": "unseen", "held_out": "held_out_style"}
    return {split: list(read_samples([DATA / f"{name}.tar.xz"])) for split, name in names.items()}


@pytest.fixture(scope="module")
def classes() -> list[dict]:
    return json.loads((DATA / "concepts.json").read_text(encoding="utf-8"))


def concepts(samples: list[Sample]) -> set[str]:
    return {sample.concept for sample in samples}


def test_files_match_their_checksums_and_fit() -> None:
    sums = dict(
        reversed(line.split("  ")) for line in (DATA / "SHA256SUMS").read_text().splitlines()
    )
    packed = {path.name for path in DATA.iterdir() if path.suffix in (".xz", ".json")}
    assert set(sums) == packed
    for name, expected in sums.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == expected, name
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= MAX_BYTES


def test_unseen_concepts_are_in_no_training_image(splits) -> None:
    assert len(concepts(splits["unseen"])) == 96
    assert not concepts(splits["unseen"]) & concepts(splits["train"] + splits["val"])


def test_held_out_style_is_in_no_other_split(splits) -> None:
    assert {sample.style for sample in splits["held_out"]} == {"emojione"}
    for split in ("train", "val", "unseen"):
        assert {sample.style for sample in splits[split]} == STYLES


def test_val_images_are_new_and_their_concepts_are_not(splits) -> None:
    train = {(sample.concept, sample.style) for sample in splits["train"]}
    assert not train & {(sample.concept, sample.style) for sample in splits["val"]}
    assert concepts(splits["val"]) <= concepts(splits["train"])
    assert len(concepts(splits["val"])) == len(splits["val"])


def test_no_held_out_image_is_a_copy_of_a_training_image(splits) -> None:
    def pixels(split: str) -> set[bytes]:
        return {hashlib.sha256(sample.image.tobytes()).digest() for sample in splits[split]}

    assert not pixels("train") & (pixels("val") | pixels("unseen") | pixels("held_out"))


def test_every_image_has_alpha_captions_labels_and_a_license(splits) -> None:
    samples = [sample for split in splits.values() for sample in split]
    for sample in samples:
        assert sample.image.size == (64, 64) and sample.image.getextrema()[3][1] == 255, sample.key
        assert len(sample.captions) >= 2 and sample.captions[0] == sample.name, sample.key
        assert len(sample.labels) >= 8 and sample.license in LICENSES, sample.key
        assert sample.source.startswith("npm:@"), sample.key
    see_through = [sample for sample in samples if sample.image.getextrema()[3][0] == 0]
    assert len(see_through) > 0.8 * len(samples)


def test_notice_names_every_source(splits) -> None:
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    packages = {
        sample.source.removeprefix("npm:").split("#")[0]
        for split in splits.values()
        for sample in split
    }
    assert len(packages) == len(STYLES) + 1
    for package in packages:
        assert package in notice
    for text in ("Creative Commons Attribution 4.0", "MIT License", "Apache License"):
        assert text in notice


def test_clipart_is_apart_and_public_domain(splits) -> None:
    clipart = list(read_samples([DATA / "clipart.tar.xz"]))
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    assert len(clipart) > 1000 and not concepts(clipart) & concepts(splits["train"])
    for sample in clipart:
        assert (sample.license, sample.style) == ("CC-PDDC", "openclipart"), sample.key
        assert sample.concept.startswith("clipart:") and sample.image.size == (64, 64), sample.key
        assert sample.source.removeprefix("deb:").split("#")[0] in notice, sample.key
        assert sample.captions[0] == sample.name, sample.key


def test_classes_are_distinct_and_cover_every_image(splits, classes) -> None:
    names = {entry["concept"]: entry["name"] for entry in classes}
    assert len(names) == len(classes) == len(set(names.values())) == 1914
    for samples in splits.values():
        assert all(names[sample.concept] == sample.name for sample in samples)
    assert all(len(entry["labels"]) >= 8 and entry["group"] for entry in classes)


def test_tokenizer_ends_with_the_highest_id_and_encodes_any_text() -> None:
    tokenizer = Tokenizer.from_file(str(DATA / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id("<|startoftext|>") == 4094
    assert tokenizer.token_to_id("<|endoftext|>") == 4095
    for text in ("grinning face", "日本 😀 café", "İstanbul \x00"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert max(ids) < 4094 and tokenizer.decode(ids).strip() == text.lower().strip()
        assert tokenizer.encode(text).ids == [4094, *ids, 4095]
    assert tokenizer.encode("", add_special_tokens=False).ids == []
