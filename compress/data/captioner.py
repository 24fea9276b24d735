"""Captions written by open_clip's CoCa, token by token.

The loop is ours: `generate` of open_clip 3.3 needs beam search from transformers, which version 5
no longer has. Shapes: B pictures, R rows (captions of all pictures), L tokens, V vocabulary.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.errors import PocketclipError
from compress.nn.nucleus import nucleus

START, END = 49406, 49407
"""Ids of CLIP's vocabulary."""
MIN_LENGTH, MAX_LENGTH = 5, 30
"""Tokens of a caption, START included; open_clip's defaults, which DataCompDR took."""


@lru_cache(maxsize=1)
def open_captioner(name: str, device: str) -> tuple[Any, Any]:
    """open_clip's model and transform, by `architecture/pretrained weights`."""
    import open_clip

    architecture, _, pretrained = name.partition("/")
    model, _, transform = open_clip.create_model_and_transforms(
        architecture, pretrained=pretrained or None
    )
    if not hasattr(model, "text_decoder"):
        raise PocketclipError(
            f"reinforce.captions.model: {architecture} cannot write captions; name one of "
            "open_clip's coca models"
        )
    return model.eval().to(device), transform


@torch.no_grad()
def draw(model: Any, pixels: Tensor, num: int, top_p: float) -> Tensor:
    """`num` captions of each picture by nucleus sampling, from torch's global generator.

    pixels [B, 3, S, S] -> token ids [B, num, L], with END after the last word.
    """
    seen = model(pixels)
    latent, patches = (
        seen[name].repeat_interleave(num, dim=0) for name in ("image_features", "image_embs")
    )
    tokens = torch.full((len(latent), 1), START, device=pixels.device)  # [R, L], growing
    ended = torch.zeros(len(latent), dtype=torch.bool, device=pixels.device)
    while tokens.shape[1] < MAX_LENGTH and not ended.all():
        told = {"image_latent": latent, "image_embs": patches, "output_labels": False}
        logits = model(None, tokens, **told)["logits"][:, -1].float()  # [R, V]
        if tokens.shape[1] < MIN_LENGTH:
            logits[:, END] = float("-inf")
        drawn = torch.multinomial(nucleus(logits, top_p).softmax(dim=-1), 1)[:, 0]
        drawn = drawn.masked_fill(ended, END)
        ended |= drawn == END
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    return tokens.view(len(pixels), num, -1)


def words(tokens: Tensor) -> str:
    """Token ids [L] -> the caption up to its first full stop, without marks."""
    import open_clip

    text = open_clip.decode(tokens)
    for mark in ("<start_of_text>", "<end_of_text>"):
        text = text.replace(mark, " ")
    return " ".join(text.split(".")[0].split())
