"""Weight inheritance by least squares: a narrower tower that computes what its teacher computes.

Our formulation. TinyCLIP's manual inheritance keeps the leading channels of each tensor, whatever
they carry. Here the residual stream keeps its principal directions (as in SliceGPT, Ashkboos et
al., 2024, with one basis for all layers, so that the student stays a plain transformer), and every
matrix is then fitted in closed form on a few hundred calibration pairs, layer after layer, to the
teacher's activations given what the student really computed up to there. No gradient step is taken.

Shapes: B samples, N tokens, M rows (B * N, or those that count), D the teacher's width, d the
student's, E embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import PocketclipError
from compress.layers import Attention, Block, Mlp, activated
from compress.model import ImageTower, TextTower

RIDGE = 1e-3
"""Ridge penalty, in units of a regressor's mean square."""
MOST_VALUES = 2**25
"""Entries of a stream, tokens of all samples times width: 128 MiB for each of the layers."""
Tower = ImageTower | TextTower
Seen = dict[str, tuple[Tensor, Tensor]]
"""Linear layer of a block -> its input and output, [B, N, channels] each."""


@dataclass(frozen=True)
class Fit:
    """What all blocks of a tower are fitted with."""

    basis: Tensor
    """The student's channels as rows over the teacher's [d, D]."""
    rows: Tensor
    """Tokens that can reach the embedding, bools [B, N]."""
    mask: Tensor | None
    """What attention adds to its scores."""


@torch.no_grad()
def fit_tower_(student: Tower, teacher: Tower, layers: list[int], inputs: Tensor) -> None:
    """Set the student's weights in place; its block n stands for the teacher's block layers[n].

    inputs: pixels [B, 3, S, S], or token ids [B, L], as the tower takes them; no more of them are
    used than MOST_VALUES allows. Raises PocketclipError for towers other than pre-norm ones that
    pool a token or the mean.
    """
    check(teacher)
    tokens = inputs.shape[1] if isinstance(teacher, TextTower) else teacher.config.num_tokens
    inputs = inputs[: max(1, MOST_VALUES // (tokens * teacher.config.width))]
    streams, embedding = _streams(teacher, inputs)
    rows = _counting_rows(teacher, inputs, streams[0].shape)
    basis = principal_basis([stream[rows] for stream in streams], student.config.width)
    _set_embeddings(student, teacher, basis)
    x = _embedded(student, inputs)
    mask = student._mask(inputs) if isinstance(student, TextTower) else None
    fit = Fit(basis, rows, mask)
    for block, layer, end in zip(student.blocks, layers, [*layers[1:], len(teacher.blocks)]):
        own = teacher.blocks[layer]
        assert isinstance(own, Block) and isinstance(block, Block)
        x = _fit_block(block, own, streams[layer], streams[end], x, fit)
    _fit_projection(student, x, embedding, inputs)


def check(tower: Tower) -> None:
    """Refuse towers whose parts this fit does not know."""
    config = tower.config
    odd = [
        ("post_norm", config.post_norm),
        ("attention pooling", getattr(tower, "pool", None) is not None),
        ("token reduction", bool(getattr(config, "reduction", None))),
        ("a mixer", bool(getattr(config, "mixer_kernel", 0))),
        ("a norm after pooling", getattr(config, "norm_after_pooling", False)),
        ("an embedding norm", getattr(config, "embedding_norm", False)),
        ("no linear projection", config.projection != "linear"),
    ]
    found = [name for name, wrong in odd if wrong]
    if found:
        raise PocketclipError(
            f"inherit.weights: principal does not know {', '.join(found)} (the teacher's "
            f"{'image' if isinstance(tower, ImageTower) else 'text'} tower has it); use leading"
        )


def principal_basis(streams: list[Tensor], width: int) -> Tensor:
    """The new channels as rows over the old ones: [d, D], of rank d - 1.

    Streams [M, D] count alike, each row normalised as the layer norms that read it do. The new
    channels of any row add up to 0, as layer norm takes the mean away anyway.
    """
    old = streams[0].shape[1]
    covariance = torch.zeros(old, old, dtype=torch.float64)
    for stream in streams:
        normed = F.layer_norm(stream, (old,))
        covariance += (normed.T @ normed).double() / len(normed)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : width - 1]  # [D, d - 1]
    # An orthonormal basis of what adds up to 0: the right factor of the centring matrix.
    centring = torch.eye(width, dtype=torch.float64) - 1 / width
    flat = torch.linalg.eigh(centring).eigenvectors[:, 1:]  # [d, d - 1]
    return (flat @ directions.T).float()


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression with an intercept: x [M, a], y [M, b] -> weight [b, a], bias [b]."""
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    centred = x - mean_x
    gram = (centred.T @ centred).double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, (centred.T @ (y - mean_y)).double()).T.float()
    return weight, mean_y - weight @ mean_x


def _streams(teacher: Tower, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The stream before each block and after the last, [B, N, D] each, and the embedding [B, E]."""
    found: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, given: found.append(given[0]))
        for block in teacher.blocks
    ]
    last: list[Tensor] = []
    handles.append(teacher.blocks[-1].register_forward_hook(lambda m, g, out: last.append(out)))
    try:
        embedding = teacher(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [*found, *last], embedding


def _watched(block: Block, x: Tensor, mask: Tensor | None) -> Seen:
    """Input and output of each linear layer of a teacher's block that reads x [B, N, D]."""
    seen: Seen = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            seen[name] = (given[0], output)

        return hook

    linear = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(keep(name)) for name, module in linear]
    try:
        block(x, mask)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _counting_rows(tower: Tower, inputs: Tensor, shape: torch.Size) -> Tensor:
    """Which tokens can reach the embedding: [B, N] of bools."""
    rows = torch.ones(shape[:2], dtype=torch.bool)
    if isinstance(tower, TextTower) and tower.config.sees_no_padding:
        rows = torch.arange(shape[1]) <= inputs.argmax(dim=-1, keepdim=True)
    return rows


def _set_embeddings(student: Tower, teacher: Tower, basis: Tensor) -> None:
    """What writes the first stream, through the basis [d, D]; the norm before the blocks too."""
    if isinstance(student, TextTower):
        assert isinstance(teacher, TextTower)
        student.token.weight.copy_(teacher.token.weight @ basis.T)
        into = basis
    else:
        assert isinstance(teacher, ImageTower)
        into = basis
        if isinstance(teacher.norm_pre, nn.LayerNorm):
            into = basis * teacher.norm_pre.weight  # what it multiplies, before it normalises
            into = into - into.mean(dim=1, keepdim=True)
        student.patch.weight.copy_(torch.einsum("dD,Dchw->dchw", into, teacher.patch.weight))
        if student.patch.bias is not None and teacher.patch.bias is not None:
            student.patch.bias.copy_(into @ teacher.patch.bias)
        if isinstance(student.norm_pre, nn.LayerNorm):
            assert isinstance(teacher.norm_pre, nn.LayerNorm)
            _unit(student.norm_pre)
            student.norm_pre.bias.copy_(basis @ teacher.norm_pre.bias)
    student.position.copy_(teacher.position @ into.T)
    if student.class_token is not None and teacher.class_token is not None:
        student.class_token.copy_(into @ teacher.class_token)


def _embedded(student: Tower, inputs: Tensor) -> Tensor:
    """The student's stream before its first block: [B, N, d]."""
    found: list[Tensor] = []
    first = student.blocks[0]
    handle = first.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    try:
        student(inputs)
    finally:
        handle.remove()
    return found[0]


def _fit_block(
    block: Block, own: Block, stream: Tensor, end: Tensor, x: Tensor, fit: Fit
) -> Tensor:
    """Set a block to do what the teacher's does between two streams: x [B, N, d] -> [B, N, d].

    stream, end [B, N, D]: what the teacher's block `own` reads, and what should be there after it.
    """
    seen, rows = _watched(own, stream, fit.mask), fit.rows
    _unit(block.norm1)
    normed = block.norm1(x)
    heads, width = own.attention.heads, own.attention.head_width
    kept = _best_heads(own.attention, seen["attention.out"][0][rows], block.attention.heads)
    wanted = seen["attention.qkv"][1][rows].view(-1, 3, heads, width)[:, :, kept]
    _set(block.attention.qkv, *least_squares(normed[rows], wanted.flatten(1)))
    read = _watched(block, x, fit.mask)["attention.out"][0]
    middle = (stream + seen["attention.out"][1]) @ fit.basis.T
    _set(block.attention.out, *least_squares(read[rows], (middle - x)[rows]))
    x = x + block.attention.out(read)
    _unit(block.norm2)
    normed = block.norm2(x)
    chosen = _best_channels(own.mlp, seen["mlp.down"][0][rows], block.mlp.up.out_features)
    _set(block.mlp.up, *least_squares(normed[rows], seen["mlp.up"][1][rows][:, chosen]))
    hidden = activated(block.mlp.up(normed), block.mlp.activation)
    _set(block.mlp.down, *least_squares(hidden[rows], (end @ fit.basis.T - x)[rows]))
    return x + block.mlp.down(hidden)


def _best_heads(attention: Attention, mixed: Tensor, num: int) -> list[int]:
    """Heads that write most: mixed [M, H * K] -> indices, in order."""
    width = attention.head_width
    sizes = []
    for parts, weight in zip(mixed.split(width, dim=1), attention.out.weight.split(width, dim=1)):
        sizes.append((weight @ parts.T.cov() * weight).sum())  # variance: a constant is a bias
    return sorted(torch.stack(sizes).topk(num).indices.tolist())


def _best_channels(mlp: Mlp, inner: Tensor, num: int) -> Tensor:
    """Channels that write most: inner [M, H] -> indices [num], in order."""
    size = inner.var(dim=0) * mlp.down.weight.square().sum(dim=0)
    return size.topk(num).indices.sort().values


def _fit_projection(student: Tower, x: Tensor, wanted: Tensor, inputs: Tensor) -> None:
    """Set the last norm and the projection: stream x [B, N, d], the teacher's embeddings [B, E].

    The projection has no intercept of its own; the norm's bias takes what it can of it.
    """
    last = student.norm_post if isinstance(student, ImageTower) else student.norm_final
    if isinstance(last, nn.LayerNorm):
        _unit(last)
    if isinstance(student, ImageTower):
        pooled = student._pooled(x, None)
    else:
        pooled = student._pooled(last(x), inputs)
    weight, bias = least_squares(pooled, wanted)
    assert isinstance(student.projection, nn.Linear)
    student.projection.weight.copy_(weight)
    if student.projection.bias is not None:
        student.projection.bias.copy_(bias)
    elif isinstance(last, nn.LayerNorm):
        last.bias.copy_(torch.linalg.lstsq(weight, bias.unsqueeze(1)).solution.squeeze(1))


def _unit(norm: nn.Module) -> None:
    assert isinstance(norm, nn.LayerNorm)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
