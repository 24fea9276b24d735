"""The 38 standard data sets: any artifact of ours as a model of `clip_benchmark` (extra [eval]).

    python -m benchmarks.standard BUNDLE --data DIR --dataset wds/cars

DIR holds data sets in clip_benchmark's webdataset layout, one folder each, such as wds_cars/ with
classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt and test/0.tar. Exported
files and torch models run through the same code of theirs, so that the figures compare with
published ones.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artifact import Artifact, open_artifact
from compress.errors import PocketclipError


class Model(nn.Module):
    """An artifact as clip_benchmark calls models: encode_image, encode_text, unit length or not."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__()
        self.encoder = artifact.encoder

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, E]."""
        return self.encoder.encode_image(pixels.cpu().float())

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E]."""
        return self.encoder.encode_text(tokens.cpu().to(torch.int32))


def parts(artifact: Artifact) -> tuple[Model, Callable[..., Tensor], Callable[..., Tensor]]:
    """Model, image transform and tokenizer, as clip_benchmark's own loaders return them."""
    tokenize = lambda texts: artifact.tokenizer(  # noqa: E731
        [texts] if isinstance(texts, str) else list(texts)
    )
    return Model(artifact).eval(), artifact.preprocess, tokenize


def zero_shot(
    artifact: Artifact, dataset: str, data: Path, batch_size: int = 64
) -> dict[str, float]:
    """clip_benchmark's zero-shot figures (acc1, acc5, mean_per_class_recall) on one data set.

    `dataset` as it names them: wds/cars, wds/vtab/pets. Raises PocketclipError where the data or
    clip_benchmark is missing.
    """
    try:
        from clip_benchmark.datasets.builder import build_dataset
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        raise PocketclipError(f"{error}; run pip install 'pocketclip[eval]'") from error
    model, transform, tokenizer = parts(artifact)
    root = data / dataset.replace("/", "_")
    if not root.exists():
        raise PocketclipError(f"{root}: no such folder; --data holds a folder for each data set")
    built = build_dataset(
        dataset_name=dataset, root=str(root), transform=transform, split="test", download=False
    )
    loader = torch.utils.data.DataLoader(
        built.batched(batch_size), batch_size=None, shuffle=False, num_workers=0
    )
    classifier = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, built.classes, built.templates, "cpu", amp=False
    )
    logits, labels = zeroshot_classification.run_classification(
        model, classifier, loader, "cpu", amp=False
    )
    return figures(logits, labels)


def figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """logits [N, C], labels [N] -> their figures, by our own sums: theirs fail with NumPy 2.4."""
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # [N], 0 is the best
    right = (ranks == 0).double()
    recalls = [right[labels == label].mean() for label in labels.unique()]
    return {
        "acc1": float(right.mean()),
        "acc5": float((ranks < 5).double().mean()),
        "mean_per_class_recall": float(torch.stack(recalls).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a bundle, a model folder, or open_clip:NAME")
    parser.add_argument("--dataset", action="append", required=True, help="such as wds/cars")
    parser.add_argument("--data", type=Path, required=True, help="where the data sets lie")
    given = parser.parse_args()
    artifact = open_artifact(given.model)
    for dataset in given.dataset:
        print(json.dumps({"dataset": dataset, **zero_shot(artifact, dataset, given.data)}))


if __name__ == "__main__":
    main()
