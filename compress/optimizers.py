"""Optimisers of the training loop, and their moments when a model is cut smaller on the way."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import parallel
from compress.muon import Muon

if TYPE_CHECKING:
    from compress.train import Training

Cut = tuple[Tensor | None, ...]
"""For each dimension of a parameter, the indices that are kept; None keeps all."""


def optimizers(
    model: nn.Module, cfg: "Training", own_groups: list[dict[str, Any]]
) -> list[torch.optim.Optimizer]:
    """Muon (if asked for) over the blocks' matrices, AdamW over the rest.

    own_groups: parameters with settings of their own, as AdamW's groups; they keep their lr.
    """
    apart = {id(p) for group in own_groups for p in group["params"]}
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in apart:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif parameter.ndim == 2 and ".blocks." in name:
            matrices.append(parameter)
        else:
            tables.append(parameter)
    use_muon = cfg.optimizer == "muon" and matrices
    groups: list[dict[str, Any]] = [
        {"params": tables if use_muon else tables + matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        *({**group, "fixed_lr": True} for group in own_groups),
    ]
    # Sharded and whole parameters cannot stand in one fused call.
    foreach = False if parallel.has_shards(model) else None
    adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=1e-6, foreach=foreach)
    if not use_muon:
        return [adamw]
    return [Muon(matrices, cfg.lr, cfg.weight_decay), adamw]


def set_lr(found: list[torch.optim.Optimizer], lr: float) -> None:
    """Give every group this learning rate, but for those that keep their own."""
    for optimizer in found:
        for group in optimizer.param_groups:
            if not group.get("fixed_lr"):
                group["lr"] = lr


def cut(tensor: Tensor, indices: Cut) -> Tensor:
    """What is left of a tensor."""
    for dim, kept in enumerate(indices):
        if kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def named_states(
    found: list[torch.optim.Optimizer], names: dict[int, str]
) -> dict[str, dict[str, Any]]:
    """The state of each parameter by its name; `names` is by the parameter's id."""
    return {
        names[id(parameter)]: state
        for optimizer in found
        for parameter, state in optimizer.state.items()
    }


def carry_over(
    states: dict[str, dict[str, Any]],
    found: list[torch.optim.Optimizer],
    model: nn.Module,
    cuts: dict[str, Cut],
) -> None:
    """Give new optimisers the old moments, cut as the parameters were. A parameter that is not in
    `cuts` is whole; one that is gone loses its state.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in found:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                state = states.get(name)
                if state is None:
                    continue
                indices = cuts.get(name, ())
                optimizer.state[parameter] = {
                    key: cut(value, indices) if torch.is_tensor(value) and value.ndim else value
                    for key, value in state.items()
                }
