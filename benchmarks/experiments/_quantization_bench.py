"""Models, data and figures of the quantization experiment."""

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compress.clip
from compress import plugin, recipe
from compress.batches import embed_images, embed_texts
from compress.clip import Clip, Encoder, TorchEncoder
from compress.embeddings import Config as Evaluation
from compress.embeddings import Embeddings, embed
from compress.errors import PocketclipError
from compress.evaluate import measure
from compress.stages import quantize
from compress.work import Data, Work

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/emoji/quickstart.yaml"
SPLIT = "held_out_style"
FIGURES = ("top1", "image_to_text_r1", "text_to_image_r1")
TEACHER = RECIPE.parent / "teacher/open_clip_model.safetensors"
STUDENT = "01-distill"
# Cosines nearer than this count as a tie that rounding decides.
TIE = 2e-3


def digest(path: Path) -> str:
    """sha256 of a file; of one that isn't there, a word that no hash is."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"


def margins(own: Embeddings) -> np.ndarray:
    """What the right class of each image is ahead of the best other one, in cosine: [N]."""
    split = own.split
    number = {name: n for n, name in enumerate(dict.fromkeys(split.class_names))}
    names = np.array([number[name] for name in split.class_names])  # [C]
    labelled = split.labels >= 0
    right = names[split.labels[labelled]][:, None] == names  # [N, C]
    scores = own.images[labelled].astype(np.float64) @ own.classes.T.astype(np.float64)
    best = [np.where(which, scores, -np.inf).max(1) for which in (right, ~right)]
    found: np.ndarray = best[0] - best[1]
    return found


def near_ties(ahead: np.ndarray) -> dict[str, Any]:
    """How many images any change of their scores can turn, those that are right and those not; and
    the least leads of right ones."""
    close = np.abs(ahead) < TIE
    return {
        "right_by_a_hair": int((close & (ahead >= 0)).sum()),
        "wrong_by_a_hair": int((close & (ahead < 0)).sum()),
        "least_leads": [round(float(lead), 6) for lead in np.sort(ahead[ahead >= 0])[:3]],
        "num_images": len(ahead),
    }


class Simulation(TorchEncoder):
    """A torch model that cuts texts behind their end, as is exact for causal towers."""

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        return embed_texts(self.model.text, tokens)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        return embed_images(self.model.image, pixels)


class Bench:
    """Models, data and figures of the experiment; everything slow is done once."""

    def __init__(self, folder: Path, quick: bool, run: Path | None = None) -> None:
        """`run`: the folder of a finished quickstart; without, its student is trained here."""
        self.folder, self.quick, self.given = folder, quick, run
        self.evaluation = Evaluation(captions_per_image=1, resamples=200, splits=(SPLIT,))
        self.floats: dict[str, Embeddings] = {}
        self.made: tuple[Any, Clip] | None = None

    @cached_property
    def data(self) -> Data:
        return replace(recipe.load(RECIPE).shards(), templates=("{}",))

    @cached_property
    def teacher(self) -> Clip:
        return plugin.source("teacher", RECIPE.parent)

    @cached_property
    def student(self) -> Clip:
        """The quickstart's student: that of the given run, or one trained here, once."""
        weights = self.weights("student")
        if not weights.exists():
            if self.given:
                raise PocketclipError(f"--student {self.given}: the run has no {STUDENT}")
            self._train(weights.parent.parent)
        return compress.clip.load(weights.parent)

    def _train(self, run: Path) -> None:
        command = [sys.executable, "-m", "compress", "run", str(RECIPE), "--out", str(run)]
        settings = ["export=[]", f"evaluate.splits=[{SPLIT}]"]
        settings += ["stages.distill.steps=100"] if self.quick else []
        done = subprocess.run([*command, *(a for s in settings for a in ("--set", s))], cwd=ROOT)
        if done.returncode:
            sys.exit("training the student failed")

    def weights(self, model: str) -> Path:
        """The file that a model's figures are of; the student's may not be there yet."""
        run = self.given or self.folder / "student"
        return TEACHER if model == "teacher" else run / STUDENT / "model.safetensors"

    def kept(self, name: str, model: str | None) -> Path:
        """Where an arm's rows are kept: under the hash of the weights and the stage's version, so
        that those of others aren't mistaken for them."""
        weights = f"{digest(self.weights(model))[:12]}-{quantize.VERSION}" if model else ""
        return self.folder / weights / f"{name}.json"

    def clip(self, model: str) -> Clip:
        return self.teacher if model == "teacher" else self.student

    def figures(self, encoder: Encoder, model: str, texts: bool = True) -> dict[str, Any]:
        """Accuracy on the held-out style; without `texts` against the float model's texts."""
        if model not in self.floats:
            self.floats[model] = self.embeddings(Simulation(self.clip(model)), model)
        plain = self.floats[model]
        if texts:
            own = self.embeddings(encoder, model)
        else:
            own = replace(plain, images=encoder.encode_image(self.pixels(model)).numpy())
        found = measure(own, self.evaluation)
        cosine = (own.images * plain.images).sum(1)
        words = (own.captions * plain.captions).sum(1)
        return {key: found[key] for key in FIGURES} | {
            "image_cosine": float(cosine.mean()),
            "text_cosine": float(words.mean()) if texts else None,
        }

    def embeddings(self, encoder: Encoder, model: str) -> Embeddings:
        """What an encoder makes of the held-out style."""
        return embed(encoder, self.clip(model), self.data, self.evaluation, [SPLIT])[SPLIT]

    def pixels(self, model: str) -> Tensor:
        """The held-out style's images [N, 3, H, W]."""
        pairs, clip = self.data.split(SPLIT), self.clip(model)
        return torch.stack([clip.preprocess(pairs.image(i)) for i in range(len(pairs))])

    def quantized(self, model: str, settings: dict[str, Any], seed: int) -> Clip:
        """The quantized model; the last one is kept, as several runtimes follow each other."""
        key = (model, settings, seed)
        if self.made is None or self.made[0] != key:
            self.made = key, self._quantized(*key)
        return self.made[1]

    def _quantized(self, model: str, settings: dict[str, Any], seed: int) -> Clip:
        clip = self.clip(model)
        work = Work(clip, clip, self.data, seed=seed)
        with tempfile.TemporaryDirectory() as out:
            return quantize.run(work, quantize.Config.model_validate(settings), Path(out)).clip
