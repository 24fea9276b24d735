"""Each weight of a recipe reaches its own loss, with the arguments that the settings name."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress import losses
from compress.losses import TeacherFeatures
from compress.objective import ALONE, FROM_TEACHER, Objective, Ramp
from compress.terms import TERMS, Features, Parts, weighted_terms

NUM, WIDTH, DONE = 5, 8, 0.5


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def features() -> Features:
    teacher = TeacherFeatures(unit(NUM, WIDTH), unit(NUM, WIDTH), 7.0, -2.0)
    momentum = unit(NUM, WIDTH), unit(NUM, WIDTH)
    bank = unit(11, WIDTH), (unit(11, WIDTH),)
    u, v, masked = unit(NUM, WIDTH), unit(NUM, WIDTH), unit(NUM, WIDTH)
    return Features(u, v, 5.0, -1.0, (teacher,), momentum, masked, bank)


SETTINGS = {
    "num_hard_negatives": 2,
    "difficulty": 1.5,
    "momentum_share": Ramp(start=0.2, end=0.6),
    "hybrid_share": Ramp(start=0.0, end=0.5),
    "softening": Ramp(start=0.0, end=0.4),
}


def reference(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return F.normalize(torch.randn(NUM, WIDTH), dim=-1)


def fused(f: Features, parts: Parts, t: TeacherFeatures) -> Tensor:
    image, text = parts.fuse["image"], parts.fuse["text"]
    return losses.augmented_feature(f.u, f.v, t.u, t.v, image, text, 1 / 0.07)


def bank(f: Features, t: TeacherFeatures) -> Tensor:
    assert f.bank is not None
    return losses.bank_affinity(f.u, f.bank[0], t.u, f.bank[1][0], 5.0, 7.0)


def distances(x: Tensor | None, f: Features, t: TeacherFeatures) -> Tensor:
    """Squared, summed over the width, mean over pairs."""
    assert x is not None
    return (x - t.u).square().sum(1).mean() + (f.v - t.v).square().sum(1).mean()


Expected = Callable[[Features, Parts, TeacherFeatures], Tensor]
EXPECTED: dict[str, Expected] = {
    "clip": lambda f, p, t: losses.clip_info_nce(f.u, f.v, 5.0),
    "affinity": lambda f, p, t: losses.affinity_mimicking(f.u, f.v, t.u, t.v, 5.0, 7.0),
    "feature": lambda f, p, t: distances(f.u, f, t),
    "bank": lambda f, p, t: bank(f, t),
    "nested": lambda f, p, t: losses.nested_affinity(f.u, f.v, t.u, t.v, (2, 4, 8), 5.0, 7.0),
    "sigmoid": lambda f, p, t: losses.sigmoid_loss(f.u, f.v, 5.0, -1.0),
    "sigmoid_affinity": lambda f, p, t: losses.sigmoid_affinity(f.u, f.v, [t], 5.0, -1.0),
    "divergence": lambda f, p, t: losses.relational_divergence(f.u, f.v, [t], 5.0),
    "smooth_feature": lambda f, p, t: (
        WIDTH * (F.smooth_l1_loss(f.u, t.u) + F.smooth_l1_loss(f.v, t.v))
    ),
    "masked_feature": lambda f, p, t: distances(f.masked_u, f, t),
    "gradient": lambda f, p, t: losses.gradient_distance(f.u, f.v, t.u, t.v, 5.0, 7.0),
    "interactive": lambda f, p, t: losses.interactive(f.u, f.v, t.u, t.v, 1 / 0.07),
    "augmented": lambda f, p, t: fused(f, p, t),
    "softened": lambda f, p, t: losses.softened_info_nce(f.u, f.v, 5.0, 0.2),
    "hard_negatives": lambda f, p, t: losses.hard_negative_distillation(
        f.u, f.v, t.u, t.v, 5.0, 7.0, 2, 1.5
    ),
    "momentum": lambda f, p, t: losses.soft_targets(f.u, f.v, *(f.momentum or ()), 5.0, 0.4),
    "self_distillation": lambda f, p, t: losses.soft_targets(
        f.u, f.v, *(f.momentum or ()), 5.0, 1.0
    ),
    "hybrid": lambda f, p, t: losses.soft_targets(f.u, f.v, t.u, t.v, 5.0, 0.25),
    "random_alignment": lambda f, p, t: losses.random_alignment(f.u, f.v, reference(4)),
}


def test_every_loss_of_a_recipe_is_checked_here() -> None:
    assert set(EXPECTED) == set(TERMS)
    assert set(TERMS) | {"matching", "masked_language"} == set(FROM_TEACHER) | set(ALONE)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_weight_reaches_its_loss(features: Features, name: str) -> None:
    given = {"affinity": 0.0, name: Ramp(start=0.2, end=1.2), **SETTINGS}
    cfg = Objective.model_validate(given)
    parts = Parts(cfg, WIDTH, (WIDTH,))
    torch.manual_seed(4)
    terms = weighted_terms(cfg, features, parts, DONE)
    expected = 0.7 * EXPECTED[name](features, parts, features.teachers[0])
    assert list(terms) == [name]
    torch.testing.assert_close(terms[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["affinity", "feature", "masked_feature", "bank"])
def test_several_teachers_count_alike(features: Features, name: str) -> None:
    [first] = features.teachers
    second = TeacherFeatures(unit(NUM, 4), unit(NUM, 4), 3.0)
    assert features.bank is not None
    own, [first_bank] = features.bank
    banks = own, (first_bank, unit(11, 4))
    both = Features(
        features.u, features.v, 5.0, -1.0, (first, second), None, features.masked_u, banks
    )
    cfg = Objective.model_validate({"affinity": 0.0, name: 1.0})
    parts = Parts(cfg, WIDTH, (WIDTH, 4))
    [found] = weighted_terms(cfg, both, parts, 0.0).values()
    alone = []
    for k, teacher in enumerate((first, second)):
        one = Parts(cfg, WIDTH, (teacher.u.shape[1],))
        if len(parts.project_image):
            one.project_image[0], one.project_text[0] = (
                parts.project_image[k],
                parts.project_text[k],
            )
        bank_of_one = own, (banks[1][k],)
        f = Features(
            features.u, features.v, 5.0, -1.0, (teacher,), None, features.masked_u, bank_of_one
        )
        alone += weighted_terms(cfg, f, one, 0.0).values()
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-6)


def test_negatives_can_be_weighted_apart(features: Features) -> None:
    cfg = Objective(off_diagonal=Ramp(start=1.0, end=-1.0))
    parts = Parts(cfg, WIDTH, (WIDTH,))
    f, t = features, features.teachers[0]
    [found] = weighted_terms(cfg, f, parts, DONE).values()
    torch.testing.assert_close(found, losses.split_affinity(f.u, f.v, [t], 5.0, 0.0))


def test_learnt_scales_start_at_clips_and_stop_at_100(features: Features) -> None:
    cfg = Objective(affinity=0.0, interactive=1.0)
    parts = Parts(cfg, WIDTH, (WIDTH,))
    assert float(parts.scale["interactive"]) == pytest.approx(math.log(1 / 0.07))
    with torch.no_grad():
        parts.scale["interactive"].fill_(9.0)
    f, t = features, features.teachers[0]
    [found] = weighted_terms(cfg, f, parts, 0.0).values()
    torch.testing.assert_close(found, losses.interactive(f.u, f.v, t.u, t.v, 100.0))
