"""Losses as pure functions of unit embeddings, by what they compare; `objective.py` weighs them."""

from compress.losses.affinity import (
    TeacherFeatures,
    affinity_mimicking,
    bank_affinity,
    interactive,
    multi_teacher_affinity,
    relational_divergence,
    sigmoid_affinity,
    soft_targets,
    split_affinity,
)
from compress.losses.contrastive import (
    bank_classification,
    clip_info_nce,
    hard_negative_distillation,
    sigmoid_loss,
    softened_info_nce,
)
from compress.losses.features import (
    augmented_feature,
    feature_distance,
    gradient_distance,
    info_nce_gradients,
    random_alignment,
    smooth_feature_distance,
)
from compress.losses.nested import nested_affinity
from compress.losses.tokens import masked_language, matching_loss, matching_scores

__all__ = [
    "TeacherFeatures",
    "affinity_mimicking",
    "augmented_feature",
    "bank_affinity",
    "bank_classification",
    "clip_info_nce",
    "feature_distance",
    "gradient_distance",
    "hard_negative_distillation",
    "info_nce_gradients",
    "interactive",
    "masked_language",
    "matching_loss",
    "matching_scores",
    "multi_teacher_affinity",
    "nested_affinity",
    "random_alignment",
    "relational_divergence",
    "sigmoid_affinity",
    "sigmoid_loss",
    "smooth_feature_distance",
    "soft_targets",
    "softened_info_nce",
    "split_affinity",
]
