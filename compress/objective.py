"""What a student learns from, as weights in a recipe: each loss of `losses/`, constant or ramped.

A loss at weight 0 is never computed, nor is anything that only it needs.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Ramp(BaseModel):
    """A weight that moves linearly from `start` to `end`, and stays there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float
    """Value at the first step."""
    end: float
    """Value from `until` on."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps at which `end` is reached."""

    def at(self, done: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, done / self.until)


Weight = Annotated[float, Field(ge=0)] | Ramp


def weight_at(weight: float | Ramp, done: float) -> float:
    """The value of a weight when the share `done` of the steps is over."""
    return weight.at(done) if isinstance(weight, Ramp) else weight


def is_used(weight: float | Ramp) -> bool:
    """Whether a weight is ever other than 0."""
    return bool(weight.start or weight.end) if isinstance(weight, Ramp) else bool(weight)


class Objective(BaseModel):
    """Weights of the losses; a number, or {start, end, until} to ramp one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    affinity: Weight = 1.0
    """Affinity mimicking within the batch (TinyCLIP; with several teachers MobileCLIP's)."""
    off_diagonal: float | Ramp = 1.0
    """Weight of the negatives' part inside `affinity` (DARK anneals it below 0); 1 is all of it."""
    nested: Weight = 0.0
    """Affinity of the embeddings' first dimensions alone (Matryoshka), so that they can be cut."""
    nested_dims: tuple[int, ...] = ()
    """How many, for `nested`; empty: a quarter, half and all of the embedding width."""
    clip: Weight = 0.0
    """The hard CLIP loss; TinyCLIP's recipes have none. With all other weights 0 the teacher is not
    used."""
    sigmoid: Weight = 0.0
    """SigLIP's hard sigmoid loss."""
    sigmoid_affinity: Weight = 0.0
    """Binary cross entropy to the teacher's sigmoid probabilities."""
    divergence: Weight = 0.0
    """CLIP-KD's CRD: as affinity, as a divergence that is 0 at the teacher."""
    feature: Weight = 0.0
    """Squared distance to the teacher's embeddings, summed over the embedding width (CLIP-KD's FD
    times that width). A student of another width is projected; with several teachers the mean."""
    smooth_feature: Weight = 0.0
    """The same with smooth L1 (DC-CLIP's first stage)."""
    masked_feature: Weight = 0.0
    """CLIP-KD's MFD: `feature` of the image with `mask_share` of its patches dropped."""
    mask_share: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that `masked_feature` drops."""
    gradient: Weight = 0.0
    """CLIP-KD's GD: squared difference of the CLIP loss's gradients (CLIP-KD: 1e8)."""
    interactive: Weight = 0.0
    """CLIP-KD's ICL: student anchors against teacher keys, at a learnt scale of its own."""
    augmented: Weight = 0.0
    """CLIP-KD's AFD: InfoNCE of student and teacher embeddings fused by a learnt matrix."""
    softened: Weight = 0.0
    """LightCLIP's progressive label softening (our formulation); its share of the targets is
    `softening`."""
    softening: Weight = Ramp(start=0.0, end=0.2)
    """Share of a target that goes to negatives in `softened`."""
    matching: Weight = 0.0
    """LightCLIP's relaxed bipartite matching of image and text tokens (our formulation)."""
    masked_language: Weight = 0.0
    """LightCLIP's masked language modelling with the image fused in (our formulation)."""
    hard_negatives: Weight = 0.0
    """DCD: the teacher's hardest negatives only, weighted by difficulty (our formulation)."""
    num_hard_negatives: int = Field(default=16, ge=1)
    """Negatives per anchor in `hard_negatives`."""
    difficulty: float = Field(default=1.0, ge=0)
    """Exponent of an anchor's difficulty in `hard_negatives`; 0 weights all alike."""
    momentum: Weight = 0.0
    """ALBEF: InfoNCE towards a mix of the right pairs and the student's moving average."""
    momentum_share: Weight = 0.4
    """Share of the moving average's opinion in `momentum`."""
    momentum_decay: float = Field(default=0.995, ge=0, lt=1)
    """Decay of that moving average."""
    self_distillation: Weight = 0.0
    """Affinity to the student's own moving average (our formulation)."""
    hybrid: Weight = 0.0
    """CLIP-Refine: InfoNCE towards a mix of the right pairs and the teacher (our formulation)."""
    hybrid_share: Weight = 0.5
    """Share of the teacher's opinion in `hybrid`."""
    random_alignment: Weight = 0.0
    """CLIP-Refine: both embeddings of a pair drawn to one random reference (our formulation)."""
    bank: Weight = 0.0
    """Image-to-text affinity over a bank of all training names (our addition); with a stream, of
    the names in `data.classes`."""

    def used(self, *names: str) -> bool:
        """Whether any of these losses ever counts."""
        return any(is_used(getattr(self, name)) for name in names)

    @property
    def needs_teacher(self) -> bool:
        return self.used(*FROM_TEACHER)

    @property
    def needs_momentum(self) -> bool:
        return self.used("momentum", "self_distillation")


FROM_TEACHER = (
    "affinity", "nested", "sigmoid_affinity", "divergence", "feature", "smooth_feature",
    "masked_feature", "gradient", "interactive", "augmented", "hard_negatives", "hybrid", "bank",
)  # fmt: skip
ALONE = (
    "clip", "sigmoid", "softened", "matching", "masked_language", "momentum", "self_distillation",
    "random_alignment",
)  # fmt: skip
NEED_BOTH_TOWERS = (
    "matching", "masked_language", "momentum", "self_distillation", "random_alignment",
)  # fmt: skip
"""Losses that the teacher's embeddings cannot stand in for a tower of the student."""
FROM_PAIRS = (*ALONE, "gradient", "interactive", "augmented", "hard_negatives", "hybrid")
"""Losses that know which caption belongs to a picture."""
EQUAL_WIDTHS = ("feature", "smooth_feature", "masked_feature", "gradient", "interactive")
"""Losses that compare embeddings entry by entry: a student of another width is projected."""
