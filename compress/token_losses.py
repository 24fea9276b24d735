"""Token embeddings out of the towers, and the small head of masked language modelling.

Shapes: B pairs, N image tokens, L text tokens, D width, E embedding, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import parallel
from compress.model import ImageTower, TextTower
from compress.nn.widen import unit

MASK_SHARE = 0.15
"""Share of a text's tokens that is hidden, BERT's."""


@contextmanager
def _last_hidden(tower: ImageTower | TextTower) -> Iterator[list[Tensor]]:
    """Collects what leaves the last block of every forward pass inside the block."""
    seen: list[Tensor] = []
    handle = tower.blocks[-1].register_forward_hook(lambda m, i, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def unit_image_tokens(
    tower: ImageTower, pixels: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """pixels [B, 3, S, S] -> unit embeddings [B, E] and unit patch embeddings [B, N, E]."""
    with _last_hidden(tower) as seen:
        u = unit(tower(pixels, keep=keep))
    patches = seen[0][:, int(tower.config.class_token) :]  # [B, N, D]
    return u, unit(tower.projection(tower.norm_post(patches)))


def text_hidden(tower: TextTower, tokens: Tensor) -> Tensor:
    """tokens [B, L] -> the last block's output after the final norm [B, L, D]."""
    with _last_hidden(tower) as seen:
        tower(tokens)
    return tower.norm_final(seen[0])


def unit_text_tokens(tower: TextTower, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, L] -> unit embeddings [B, E], unit token embeddings [B, L, E], and which tokens
    are not padding [B, L]: those up to the end of the text.
    """
    with _last_hidden(tower) as seen:
        v = unit(tower(tokens))
    words = unit(tower.projection(tower.norm_final(seen[0])))
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return v, words, places <= tokens.argmax(dim=-1, keepdim=True)


class MaskedLanguage(nn.Module):
    """LightCLIP's masked language modelling with image fusion, our formulation: the image embedding
    is added, by a matrix of its own, before every second text block; hidden tokens are predicted
    through the token embedding. Thrown away after training.
    """

    def __init__(self, tower: TextTower, embed_dim: int) -> None:
        super().__init__()
        self.layers = list(range(0, tower.config.num_layers, 2))
        width = tower.config.width
        self.fusion = nn.ModuleList(nn.Linear(embed_dim, width) for _ in self.layers)
        self.head = nn.Linear(width, width)

    def hide(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Replace some tokens by id 0 -> tokens [B, L], which are hidden [B, L]; at least one of
        the batch, and never a text's first or last token.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inside = real & (places > 0) & (places < tokens.argmax(dim=-1, keepdim=True))
        whole = torch.rand(len(tokens) * parallel.size(), tokens.shape[1])  # of all processes
        own = whole[parallel.own_rows(len(whole))].to(tokens.device)
        draw = own.masked_fill(~inside, 2.0)
        hidden = (draw < MASK_SHARE) | (draw == parallel.gather(draw).min())
        return tokens.masked_fill(hidden, 0), hidden

    @contextmanager
    def fused(self, tower: TextTower, u: Tensor) -> Iterator[None]:
        """Adds the image embedding u [B, E] to the tower's residual stream inside the block."""

        def adding(projection: nn.Module) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                x, *rest = inputs
                return (x + projection(u)[:, None].to(x.dtype), *rest)

            return hook

        with ExitStack() as stack:
            for layer, projection in zip(self.layers, self.fusion, strict=True):
                handle = tower.blocks[layer].register_forward_pre_hook(adding(projection))
                stack.callback(handle.remove)
            yield

    def forward(self, hidden: Tensor, token_embedding: Tensor) -> Tensor:
        """hidden [B, L, D], token_embedding [V, D] -> logits [B, L, V]."""
        return F.gelu(self.head(hidden)) @ token_embedding.T
