"""Evaluation of small encoders on small splits, against figures counted by hand and by loops."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from compress.embeddings import embed, headline_split, read_split, split_names
from compress.errors import PocketclipError
from compress.evaluate import Config, evaluate, measure
from compress.preprocess import Preprocess
from compress.work import Data

WIDTH = 16
QUIET = {"progress": False}


@dataclass
class Split:
    captions: list[list[str]]
    concepts: list[str] | None
    shades: list[int]

    def image(self, index):
        return Image.new("RGBA", (2, 2), (self.shades[index],) * 3 + (255,))


@dataclass
class Splits:
    """Stands for `compress.work.Data` with the pairs already in memory."""

    evaluate: dict[str, Split]
    classes: list[tuple[str, str]] = field(default_factory=list)
    templates: tuple[str, ...] = ("{}",)

    @property
    def classes_file(self):
        return "classes.json" if self.classes else None

    def split(self, name):
        return self.evaluate[name]


class Shade:
    """Image = one-hot of its shade; text = one-hot of the number written in it, plus some noise."""

    def __init__(self, noise=0.0, seed=0):
        self.noise, self.seed, self.batches = noise, seed, []

    def vectors(self, index, salt):
        out = torch.nn.functional.one_hot(index % WIDTH, WIDTH).float()
        for row, number in zip(out, index):
            random = torch.Generator().manual_seed(1000 * self.seed + 7 * int(number) + salt)
            row += self.noise * torch.randn(WIDTH, generator=random)
        return torch.nn.functional.normalize(out, dim=-1)

    def encode_image(self, pixels):
        self.batches.append(len(pixels))
        return self.vectors(pixels[:, 0, 0, 0].long(), 1)

    def encode_text(self, tokens):
        return self.vectors(tokens[:, 0].long(), 2)


def number(text):
    digits = "".join(c for c in text if c.isdigit())
    return int(digits) if digits else 0


CLIP = SimpleNamespace(
    preprocess=lambda image: torch.full((3, 2, 2), float(np.asarray(image)[0, 0, 0])),
    tokenizer=lambda texts: torch.tensor([[number(t)] for t in texts], dtype=torch.int32),
)


def numbers(count=12, images_of_each=2):
    shades = [i for i in range(count) for _ in range(images_of_each)]
    concepts = [f"c{i}" for i in shades]
    captions = [[f"number {i}", f"the {i}"] for i in shades]
    classes = [(f"c{i}", f"name {i}") for i in range(count)]
    return Splits({"val": Split(captions, concepts, shades)}, classes, ("{}", "a {}"))


def test_perfect_encoder_scores_one_although_images_share_captions():
    row = evaluate(Shade(), CLIP, numbers(), "val", **QUIET)
    names = ["top1", "top5", *(f"{d}_r{k}" for d in DIRECTIONS for k in (1, 5, 10))]
    assert [row[name] for name in names] == [1.0] * 8
    assert row["top1_ci95"] == [1.0, 1.0]
    assert (row["num_images"], row["num_captions"], row["num_classes"]) == (24, 24, 12)


DIRECTIONS = ("image_to_text", "text_to_image")


def test_figures_equal_a_slow_loop():
    data, encoder = numbers(), Shade(noise=0.3)
    row = evaluate(encoder, CLIP, data, "val", **QUIET)
    split = data.split("val")
    images = [encoder.encode_image(torch.full((1, 3, 2, 2), float(s)))[0] for s in split.shades]
    text = {t: encoder.encode_text(CLIP.tokenizer([t]))[0] for pair in split.captions for t in pair}
    right = {t: [t in pair for pair in split.captions] for t in text}

    def recall(queries, gallery, correct, k):
        hits = 0
        for q, query in enumerate(queries):
            order = sorted(range(len(gallery)), key=lambda g: -float(query @ gallery[g]))
            best = min(order.index(g) for g in range(len(gallery)) if correct(q, g))
            hits += best < k
        return hits / len(queries)

    texts = list(text)
    for k in (1, 5, 10):
        to_text = recall(images, list(text.values()), lambda i, t: right[texts[t]][i], k)
        to_image = recall(list(text.values()), images, lambda t, i: right[texts[t]][i], k)
        assert row[f"image_to_text_r{k}"] == pytest.approx(to_text)
        assert row[f"text_to_image_r{k}"] == pytest.approx(to_image)

    def class_vector(name):
        prompts = [encoder.encode_text(CLIP.tokenizer([t.format(name)]))[0] for t in data.templates]
        return torch.nn.functional.normalize(torch.stack(prompts).mean(0), dim=0)

    classes = [class_vector(name) for _, name in data.classes]
    guesses = [max(range(12), key=lambda c: float(image @ classes[c])) for image in images]
    top1 = np.mean([guess == shade for guess, shade in zip(guesses, split.shades)])
    assert 0.3 < top1 < 1, "the case must be neither hopeless nor trivial"
    assert row["top1"] == pytest.approx(top1)


def test_class_embedding_is_the_unit_mean_of_unit_template_embeddings():
    class Templates(Shade):
        def encode_text(self, tokens):
            out = torch.zeros(len(tokens), WIDTH)
            out[torch.arange(len(tokens)), tokens[:, 0].long()] = 1
            return out

    data = Splits({"val": Split([["0"]], ["a"], [0])}, [("a", "1"), ("b", "2")], ("{}", "3{}"))
    clip = SimpleNamespace(
        preprocess=CLIP.preprocess,
        tokenizer=lambda texts: torch.tensor([[{"1": 1, "31": 2}.get(t, 4)] for t in texts]),
    )
    classes = embed(Templates(), clip, data, Config(), ["val"], **QUIET)["val"].classes
    expected = np.zeros(WIDTH)
    expected[[1, 2]] = np.sqrt(0.5)
    assert classes[0] == pytest.approx(expected)


def test_classes_of_the_same_name_are_one_class():
    data = numbers(count=4, images_of_each=1)
    data.classes[3] = ("c3", "name 2")
    row = evaluate(Shade(), CLIP, data, "val", **QUIET)
    assert row["top1"] == 0.75  # shade 3 points at no class, shade 2 at two of the same name


def test_without_classes_only_retrieval_is_measured():
    data = numbers()
    data.classes.clear()
    data.evaluate["val"].concepts = None
    row = evaluate(Shade(), CLIP, data, "val", **QUIET)
    assert "top1" not in row and row["num_classes"] == 0
    assert row["image_to_text_r1"] == 1.0


def test_agreement_with_itself_is_complete_and_with_another_is_counted():
    data, cfg = numbers(), Config(resamples=100)
    own = embed(Shade(noise=0.3), CLIP, data, cfg, **QUIET)["val"]
    other = embed(Shade(noise=0.3, seed=5), CLIP, data, cfg, **QUIET)["val"]
    same = measure(own, cfg, own)
    for name in ("top1_agreement", "image_cosine", "text_cosine", "overlap10"):
        assert same[f"teacher_{name}"] == pytest.approx(1.0)
    row = measure(own, cfg, other)
    guesses = [(e.images @ e.classes.T).argmax(1) for e in (own, other)]
    assert row["teacher_top1_agreement"] == pytest.approx((guesses[0] == guesses[1]).mean())
    near = [np.argsort(-(e.images @ e.captions.T), 1, "stable")[:, :10] for e in (own, other)]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(*near)]
    assert row["teacher_overlap10"] == pytest.approx(np.mean(shared))
    assert row["teacher_image_cosine"] == pytest.approx((own.images * other.images).sum(1).mean())


def test_images_of_no_class_count_in_no_class_figure():
    data, cfg = numbers(), Config(resamples=100)
    concepts = data.evaluate["val"].concepts
    concepts[-8:] = [""] * 8
    own = embed(Shade(noise=0.3), CLIP, data, cfg, **QUIET)["val"]
    other = embed(Shade(noise=0.3, seed=5), CLIP, data, cfg, **QUIET)["val"]
    row = measure(own, cfg, other)
    guesses = [(e.images @ e.classes.T).argmax(1) for e in (own, other)]
    right = np.array([int(c[1:]) for c in concepts[:-8]])
    assert row["top1"] == pytest.approx((guesses[0][:-8] == right).mean())
    agree = guesses[0] == guesses[1]
    assert agree[:-8].mean() != agree.mean(), "the case must tell them apart"
    assert row["teacher_top1_agreement"] == pytest.approx(agree[:-8].mean())


def test_batch_size_changes_no_figure():
    encoder = Shade(noise=0.4)
    rows = [
        evaluate(encoder, CLIP, numbers(), "val", Config(batch_size=b), **QUIET) for b in (1, 7, 64)
    ]
    assert rows[0] == rows[1] == rows[2]
    assert max(encoder.batches) == 24 and 7 in encoder.batches


@pytest.mark.parametrize("value, state", [(float("nan"), "not finite"), (0.0, "zero")])
def test_broken_embedding_is_refused_by_name(value, state):
    class Broken(Shade):
        def encode_image(self, pixels):
            out = super().encode_image(pixels)
            out[pixels[:, 0, 0, 0] == 5] *= value
            return out

    with pytest.raises(PocketclipError, match=f"image 10 of split 'val' is {state}"):
        evaluate(Broken(), CLIP, numbers(), "val", Config(batch_size=4), **QUIET)


def test_chosen_images_are_the_same_for_every_encoder():
    cfg = Config(num_images=5)
    first, second = (read_split(numbers(), "val", cfg) for _ in range(2))
    assert len(first.indices) == 5 and np.array_equal(first.indices, second.indices)


def test_split_names_follow_the_recipe_and_unknown_ones_are_refused():
    data = numbers()
    data.evaluate["styles"] = data.evaluate["val"]
    assert split_names(data, Config()) == ["val", "styles"]
    assert headline_split(data, Config()) == "val"
    assert headline_split(data, Config(headline="styles")) == "styles"
    assert split_names(data, Config(splits=("val",), headline="styles")) == ["val", "styles"]
    with pytest.raises(PocketclipError, match="no split named 'vall'"):
        split_names(data, Config(splits=("vall",)))


def test_concept_outside_the_class_list_is_named():
    data = numbers()
    data.evaluate["val"].concepts[3] = "1f600"
    with pytest.raises(PocketclipError, match="split 'val': concept '1f600'"):
        read_split(data, "val", Config())


def test_old_index_is_asked_with_new_queries():
    """Pictures of the old model, captions of the new: against a slow loop over both."""
    data, cfg = numbers(), Config()
    old = embed(Shade(0.3, 1), CLIP, data, cfg, **QUIET)["val"]
    new = embed(Shade(0.3, 2), CLIP, data, cfg, **QUIET)["val"]
    row = measure(new, cfg, old)
    hits, same = [], []
    for caption, (fresh, stale) in enumerate(zip(new.captions, old.captions)):
        ten = sorted(range(24), key=lambda i: -float(fresh @ old.images[i]))[:10]
        before = sorted(range(24), key=lambda i: -float(stale @ old.images[i]))[:10]
        right = [i for i in ten if old.split.caption_groups[caption, old.split.groups[i]]]
        hits.append(bool(right))
        same.append(len(set(ten) & set(before)) / 10)
    assert row["index_text_to_image_r10"] == pytest.approx(np.mean(hits))
    assert row["index_overlap10"] == pytest.approx(np.mean(same))
    assert measure(old, cfg, old)["index_text_to_image_r10"] == row_of(old, cfg)


def row_of(embeddings, cfg):
    return measure(embeddings, cfg)["text_to_image_r10"]


def test_a_models_own_preprocessing_sees_the_whole_picture(tmp_path):
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 10, 20))  # outside of what a centre crop keeps
    wide.save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a bar")
    squash = Preprocess(size=(24, 24), resize_mode="squash")
    seen = []

    def encode_image(pixels):
        seen.append(pixels)
        return torch.ones(len(pixels), 1)

    encoder = SimpleNamespace(
        encode_image=encode_image, encode_text=lambda tokens: torch.ones(len(tokens), 1)
    )
    contracts = SimpleNamespace(preprocess=squash, tokenizer=lambda texts: torch.ones(len(texts)))
    data = Data(evaluate={"val": [tmp_path]}, image_size=16)
    embed(encoder, contracts, data, Config(), **QUIET)
    assert torch.equal(seen[0][0], squash(Image.open(tmp_path / "wide.png")))
