"""A smaller tower of the same kind: heads, MLP channels, whole blocks and the residual width go.

Both towers are ranked together, by what the contrastive loss on training pairs says of each part,
for the time or the multiply-adds that it costs. Distil afterwards.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compress import atomic, importance
from compress.batches import Sampler, embed_images, embed_texts
from compress.clip import Clip, build
from compress.errors import PocketclipError
from compress.importance import Gates, Loss, Place
from compress.model import ClipModel, plain_image_tower, plain_text_tower
from compress.nn.slim import cheapest_to_lose, whole_heads
from compress.stages import _costs
from compress.structure import ClipConfig, require_float
from compress.train import step_generator
from compress.work import Work

VERSION = 1
MULTIPLE = 8
CONFIGS = {"image": "vision", "text": "text"}


class Sizes(BaseModel):
    """What a dimension of each tower is cut to; null leaves it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: int | None = Field(default=None, ge=1)
    """The image tower's."""
    text: int | None = Field(default=None, ge=1)
    """The text tower's."""


class Config(BaseModel):
    """Settings of the prune_structure stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    importance: Literal["taylor", "activation", "module_drop", "upop"] = "taylor"
    """What a head or a channel is ranked by; see `compress/importance.py`."""
    keep: float = Field(default=0.6, gt=0, le=1)
    """Share of the cost of all heads and channels, of the towers in `towers`, that stays."""
    cost: Literal["macs", "latency"] = "macs"
    """What they cost: multiply-adds for one image and one text, or their measured share of the
    towers' latency in ONNX Runtime, one thread."""
    towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """The towers that are cut, ranked together."""
    layers: Sizes = Sizes()
    """Blocks to keep; those go first whose loss the model feels least."""
    width: Sizes = Sizes()
    """Residual width to keep, a multiple of 8: the channels of largest activation."""
    batches: int = Field(default=4, ge=1)
    """Batches that importance is measured on; for upop, the training steps."""
    batch_size: int = Field(default=128, ge=4)
    """Pairs in each."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of upop's training."""

    @model_validator(mode="after")
    def _whole_vectors(self) -> "Config":
        for tower in CONFIGS:
            width = getattr(self.width, tower)
            if width is not None and width % MULTIPLE:
                raise ValueError(f"width.{tower}: {width} is no multiple of {MULTIPLE}")
        return self


def needs_captions(cfg: Config) -> str | None:
    """Why pictures alone will not do."""
    return "its importance is that for the contrastive loss of pairs"


def run(work: Work, cfg: Config, out: Path) -> Work:
    """Blocks first, then heads and channels, then width; what stays is noted in out/kept.json."""
    require_float(work.clip.model.config, "prune_structure")
    plain_image_tower(work.clip.model, "prune_structure")
    plain_text_tower(work.clip.model, "prune_structure")
    clip = work.clip
    for tower in CONFIGS:
        if (wanted := getattr(cfg.layers, tower)) is not None:
            clip = _without_layers(clip, tower, wanted, _loss(clip, work, cfg), cfg.batches)
    if cfg.keep < 1:
        clip = _narrower(clip, work, cfg, out)
    for tower in CONFIGS:
        if (wanted := getattr(cfg.width, tower)) is not None:
            clip = _thinner(clip, tower, wanted, _loss(clip, work, cfg), cfg.batches)
    kept = {
        tower: {"heads": list(config.heads), "mlp_width": list(config.mlp_width)}
        for tower, name in CONFIGS.items()
        if (config := getattr(clip.model.config, name))
    }
    atomic.write_json(out / "kept.json", kept)
    step = {"step": "prune_structure", "settings": cfg.model_dump(mode="json"), "kept": kept}
    return replace(work, clip=clip.with_model(clip.model, step))


def _loss(clip: Clip, work: Work, cfg: Config) -> Loss:
    """Batch n of training pairs -> the contrastive loss of the model."""
    pairs = work.data.pairs
    sampler = Sampler(pairs)
    size = min(cfg.batch_size, len(sampler.members))

    def loss(n: int) -> Tensor:
        generator = step_generator(work.seed, n)
        indices, _ = sampler.draw(size, generator)
        pixels = torch.stack([clip.preprocess(pairs.image(i)) for i in indices.tolist()])
        u = embed_images(clip.model.image, pixels)
        tokens = clip.tokenizer(sampler.captions(indices, generator))
        return importance.contrastive(u, embed_texts(clip.model.text, tokens))

    return loss


def _narrower(clip: Clip, work: Work, cfg: Config, out: Path) -> Clip:
    """Whole heads and groups of 8 channels less, down to the budget."""
    gates = importance.gates_of({t: getattr(clip.model, t).blocks for t in cfg.towers})
    if cfg.importance == "upop":
        clip = replace(clip, model=build(clip.model.config, _copied(clip), "prune_structure"))
        gates = importance.gates_of({t: getattr(clip.model, t).blocks for t in cfg.towers})
    loss = _loss(clip, work, cfg)
    scores = _scores(gates, loss, cfg, clip)
    measure = _costs.by_latency if cfg.cost == "latency" else _costs.by_macs
    return cut(clip, chosen(scores, measure(clip, gates, out), cfg))


def _scores(gates: Gates, loss: Loss, cfg: Config, clip: Clip) -> dict[Place, Tensor]:
    if cfg.importance == "upop":
        optimizer = torch.optim.AdamW(clip.model.parameters(), lr=cfg.lr)
        found = importance.progressive(gates, loss, cfg.batches, 1 - cfg.keep, optimizer)
        lowest = min(float(score.min()) for score in found.values())
        return {place: score - lowest for place, score in found.items()}  # positive, same order
    measure = {
        "taylor": importance.taylor,
        "activation": importance.activation,
        "module_drop": importance.module_drop,
    }[cfg.importance]
    return measure(gates, loss, cfg.batches)


def chosen(
    scores: dict[Place, Tensor], costs: dict[Place, float], cfg: Config
) -> dict[Place, list[int]]:
    """What stays of each block: the heads, and channels in groups of 8 of like importance.

    costs: of one head, or of one channel. Every block keeps one head and 8 channels.
    """
    units: list[tuple[Place, list[int]]] = []
    kept: dict[Place, list[int]] = {}
    total = 0.0
    for place, score in scores.items():
        order = score.argsort().tolist()
        size = 1 if place.kind == "heads" else MULTIPLE
        spare = max(0, (len(order) - size) // size * size)
        units += [(place, order[n : n + size]) for n in range(0, spare, size)]
        kept[place] = sorted(order)
        total += costs[place] * len(order)
    gone = cheapest_to_lose(
        [float(scores[place][group].sum()) for place, group in units],
        [costs[place] * len(group) for place, group in units],
        (1 - cfg.keep) * total,
    )
    for n in gone:
        place, group = units[n]
        kept[place] = sorted(set(kept[place]) - set(group))
    return kept


def cut(clip: Clip, kept: dict[Place, list[int]]) -> Clip:
    """The model with only these heads and channels."""
    config, state = clip.model.config.model_dump(), clip.model.state_dict()
    for place, units in kept.items():
        tower = config[CONFIGS[place.tower]]
        block = f"{place.tower}.blocks.{place.layer}"
        key = "heads" if place.kind == "heads" else "mlp_width"
        tower[key] = (*tower[key][: place.layer], len(units), *tower[key][place.layer + 1 :])
        head_width = tower["head_width"]
        for name in ("weight", "bias"):
            if place.kind == "heads":
                qkv = f"{block}.attention.qkv.{name}"
                state[qkv] = whole_heads(state[qkv], 3, head_width, units)
            else:
                state[f"{block}.mlp.up.{name}"] = state[f"{block}.mlp.up.{name}"][units]
        if place.kind == "heads":
            out = f"{block}.attention.out.weight"
            state[out] = whole_heads(state[out].T, 1, head_width, units).T.contiguous()
        else:
            down = f"{block}.mlp.down.weight"
            state[down] = state[down][:, units].contiguous()
    return _rebuilt(clip, config, state)


def _without_layers(clip: Clip, tower: str, wanted: int, loss: Loss, batches: int) -> Clip:
    """`wanted` blocks of a tower; one after the other, the one goes that the loss feels least."""
    if getattr(clip.model.config, CONFIGS[tower]).num_layers < wanted:
        raise PocketclipError(f"prune_structure.layers.{tower}: the tower has fewer than {wanted}")
    whole = getattr(clip.model, tower).blocks
    left = list(range(len(whole)))
    while len(left) > wanted:
        losses = {}
        for layer in left:
            getattr(clip.model, tower).blocks = nn.ModuleList(whole[n] for n in left if n != layer)
            with torch.no_grad():
                losses[layer] = sum(float(loss(n)) for n in range(batches))
        left.remove(min(losses, key=lambda layer: losses[layer]))
    getattr(clip.model, tower).blocks = whole
    return only_layers(clip, tower, left)


def only_layers(clip: Clip, tower: str, left: list[int]) -> Clip:
    """The model with these blocks of a tower; a schedule of token sites keeps its places."""
    config, state = clip.model.config.model_dump(), clip.model.state_dict()
    shape = config[CONFIGS[tower]]
    if shape.get("reduction"):
        raise PocketclipError("prune_structure.layers: put it before prune_tokens, whose sites "
                              "count the blocks")  # fmt: skip
    for key in ("heads", "mlp_width"):
        shape[key] = [shape[key][n] for n in left]
    prefix = f"{tower}.blocks."
    place = {str(old): str(new) for new, old in enumerate(left)}
    found = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            found[name] = tensor
            continue
        layer, rest = name.removeprefix(prefix).split(".", 1)
        if layer in place:
            found[f"{prefix}{place[layer]}.{rest}"] = tensor
    return _rebuilt(clip, config, found)


def _thinner(clip: Clip, tower: str, wanted: int, loss: Loss, batches: int) -> Clip:
    """The residual channels that carry most, over all blocks."""
    module = getattr(clip.model, tower)
    if module.config.width < wanted:
        raise PocketclipError(
            f"prune_structure.width.{tower}: {wanted} is more than {module.config.width}"
        )
    total = torch.zeros(module.config.width)

    def note(_: nn.Module, __: Any, given: Tensor | tuple[Tensor, Tensor]) -> None:
        x = given[0] if isinstance(given, tuple) else given
        total.add_(x.abs().flatten(0, -2).mean(dim=0) / x.abs().mean())

    handles = [block.register_forward_hook(note) for block in module.blocks]
    with torch.no_grad():
        for n in range(batches):
            loss(n)
    for handle in handles:
        handle.remove()
    return only_channels(clip, tower, sorted(total.topk(wanted).indices.tolist()))


def only_channels(clip: Clip, tower: str, kept: list[int]) -> Clip:
    """The model with these residual channels of a tower; its heads and MLPs keep their size."""
    config, state = clip.model.config.model_dump(), clip.model.state_dict()
    width = config[CONFIGS[tower]]["width"]
    config[CONFIGS[tower]]["width"] = len(kept)
    smaller = {n: tuple(t.shape) for n, t in _shape(config).state_dict().items()}
    for name, tensor in state.items():
        if not name.startswith(f"{tower}."):
            continue
        for dim, size in enumerate(smaller[name]):
            if size != tensor.shape[dim]:
                assert (tensor.shape[dim], size) == (width, len(kept)), name
                tensor = tensor.index_select(dim, torch.tensor(kept))
        state[name] = tensor.contiguous()
    return _rebuilt(clip, config, state)


def _shape(config: dict[str, Any]) -> ClipModel:
    with torch.device("meta"):
        return ClipModel(ClipConfig.model_validate(config))


def _copied(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}


def _rebuilt(clip: Clip, config: dict[str, Any], state: dict[str, Tensor]) -> Clip:
    new = ClipConfig.model_validate(config)
    return replace(clip, model=build(new, state, "prune_structure"))
