"""Losses on tokens instead of whole embeddings (LightCLIP; our formulation, as the paper's
coefficients could not be checked).

Shapes: B pairs, N image tokens, L text tokens, E embedding, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.nn.widen import widened


def matching_scores(image_tokens: Tensor, text_tokens: Tensor, real: Tensor) -> Tensor:
    """Relaxed bipartite matching: each token to its best counterpart, both directions averaged.

    image_tokens [B, N, E], text_tokens [B, L, E], unit length; real [B, L] is true on text tokens
    that are not padding -> [B, B], image i against text j.
    """
    similarity = (image_tokens.flatten(0, 1) @ text_tokens.flatten(0, 1).T).unflatten(
        0, image_tokens.shape[:2]
    )
    similarity = similarity.unflatten(2, text_tokens.shape[:2])  # [B, N, B, L]
    best_patch = similarity.amax(dim=1)  # [B, B, L]
    of_text = (best_patch * real).sum(dim=-1) / real.sum(dim=-1)  # [B, B]
    padding = ~real
    of_image = similarity.masked_fill(padding, -2.0).amax(dim=-1).mean(dim=1)  # [B, B]
    return (of_text + of_image) / 2


def matching_loss(
    image_tokens: Tensor, text_tokens: Tensor, real: Tensor, scale: Tensor | float
) -> Tensor:
    """Symmetric InfoNCE over `matching_scores`: shapes as there -> scalar."""
    scores = scale * matching_scores(image_tokens, text_tokens, real)  # [B, B]
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def masked_language(
    logits: Tensor, tokens: Tensor, masked: Tensor, num: Tensor | None = None
) -> Tensor:
    """Cross entropy of the masked tokens, their mean. logits [B, L, V], tokens and masked (bool)
    [B, L] -> scalar. num: what the sum is divided by in place of the masked tokens' number.
    """
    guesses, right = widened(logits[masked]), tokens[masked].long()
    if num is None:
        return F.cross_entropy(guesses, right)
    return F.cross_entropy(guesses, right, reduction="sum") / num
