"""What no learning at all reaches on the emoji data: the figure a teacher has to beat.

    python -m benchmarks.experiments.emoji_baseline          about a minute on one core

Each image becomes a HOG descriptor (Dalal and Triggs 2005) and a 16-pixel thumbnail; a test image
gets the names of the training images most like it. All names of concepts.json count as wrong
answers, as they do for a CLIP; those without a training image (unseen concepts) are never given.
The weight of the thumbnail is chosen on val, not on the held-out style.
"""

import argparse
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.feature import hog

from benchmarks import machine
from compress.atomic import write_json
from compress.data.pairs import Pairs, load_pairs

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "emoji" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "emoji_baseline.json"
SPLITS = ("val", "held_out_style", "unseen")
IMAGE_PX, THUMBNAIL_PX = 64, 16
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)
QUICK = ROOT / "build" / "emoji_baseline.json"
# What an independent trial of the same method on the same packages gave.
TRIAL = {"top1": 0.431, "top5": 0.600}
SEED, NUM_RESAMPLES = 0, 2000

Array = NDArray[np.float32]


def describe(pairs: Pairs) -> tuple[Array, Array]:
    """HOG [N, 1764] and thumbnails [N, 768] of the images on white."""
    shapes, thumbnails = [], []
    for index in range(len(pairs)):
        white = Image.new("RGBA", (IMAGE_PX, IMAGE_PX), "white")
        image = Image.alpha_composite(white, pairs.image(index)).convert("RGB")
        grey = np.asarray(image.convert("L"), np.float32) / 255
        shapes.append(hog(grey, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2)))
        small = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
        thumbnails.append(np.asarray(small, np.float32).ravel() / 255)
    return np.asarray(shapes, np.float32), np.asarray(thumbnails, np.float32)


def cosines(a: Array, b: Array) -> Array:
    """a [N, D], b [M, D] -> [N, M]; an all-zero row is like nothing."""
    norms = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (a, b)]
    return (a / norms[0]) @ (b / norms[1]).T


def concept_ranks(likeness: Array, train: Pairs, test: Pairs) -> NDArray[np.int64]:
    """Rank of the right concept per test image [N], a concept being as like as its nearest image.

    A concept without a training image ranks behind all that have one.
    """
    assert train.concepts and test.concepts
    concepts, column = np.unique(train.concepts, return_inverse=True)
    nearest = np.full((len(test), len(concepts)), -np.inf, np.float32)  # [N, concepts]
    for image, concept in enumerate(column):
        np.maximum(nearest[:, concept], likeness[:, image], out=nearest[:, concept])
    place = {concept: index for index, concept in enumerate(concepts)}
    ranks = np.full(len(test), len(concepts), np.int64)
    for row, concept in enumerate(test.concepts):
        if concept in place:
            ranks[row] = (nearest[row] > nearest[row, place[concept]]).sum()
    return ranks


def row(split: str, weight: float, ranks: NDArray[np.int64]) -> dict[str, Any]:
    """Top-1 and top-5 of ranks [N] with 95 % bootstrap intervals."""
    random = np.random.default_rng(SEED)
    resampled = ranks[random.integers(0, len(ranks), (NUM_RESAMPLES, len(ranks)))]
    found: dict[str, Any] = {"split": split, "pixel_weight": weight, "num_images": len(ranks)}
    for k in (1, 5):
        low, high = np.quantile((resampled < k).mean(1), (0.025, 0.975))
        found[f"top{k}"] = float((ranks < k).mean())
        found[f"top{k}_ci95"] = [float(low), float(high)]
    return found


def measure(train_shards: str) -> list[dict[str, Any]]:
    """Rows: every weight on val, then the best of them on the other splits."""
    train = load_pairs([DATA / train_shards], IMAGE_PX)
    tests = {split: load_pairs([DATA / f"{split}.tar.xz"], IMAGE_PX) for split in SPLITS}
    train_shapes, train_thumbnails = describe(train)
    mean = train_thumbnails.mean(0)
    likeness = {}
    for split, test in tests.items():
        shapes, thumbnails = describe(test)
        likeness[split] = (
            cosines(shapes, train_shapes),
            cosines(thumbnails - mean, train_thumbnails - mean),
        )

    def ranks(split: str, weight: float) -> NDArray[np.int64]:
        by_shape, by_pixels = likeness[split]
        return concept_ranks(by_shape + np.float32(weight) * by_pixels, train, tests[split])

    rows = [row("val", weight, ranks("val", weight)) for weight in WEIGHTS]
    best = max(rows, key=lambda found: found["top1"])["pixel_weight"]
    held_out = ranks("held_out_style", best)
    rows.append(row("held_out_style", best, held_out))
    seen = held_out < len(set(train.concepts or ()))
    rows.append(row("held_out_style, concepts seen in training", best, held_out[seen]))
    rows.append(row("unseen", best, ranks("unseen", best)))
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    index = next(i for i, found in enumerate(rows) if found["split"] == "held_out_style")
    return [
        {
            "name": f"no-learning baseline, held-out style, {top}",
            "value": rows[index][top],
            "goal": goal,
            "unit": "fraction",
            "better": "higher",
            "holds": rows[index][top] >= goal,
            "rows": [index],
        }
        for top, goal in TRIAL.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"one shard only; writes {QUICK}")
    quick = parser.parse_args().quick
    rows = measure("train-000.tar.xz" if quick else "train-*.tar.xz")
    result = {
        "command": "python -m benchmarks.experiments.emoji_baseline",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.describe(),
        "versions": machine.versions() | {"scikit-image": version("scikit-image")},
        "seeds": [SEED],
        "rows": rows,
        "claims": claims(rows),
    }
    path = QUICK if quick else RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    for found in rows:
        print(
            f"{found['split']}, pixel weight {found['pixel_weight']}: "
            f"top-1 {found['top1']:.3f}, top-5 {found['top5']:.3f} of {found['num_images']}"
        )


if __name__ == "__main__":
    main()
