"""What a training loop must keep to go on exactly: weights, averages, moments, structure."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress import atomic, parallel
from compress.errors import PocketclipError
from compress.optimizers import Cut, carry_over, cut, named_states, optimizers

CHECKPOINT = "checkpoint.pt"


class Surgery(Protocol):
    """Cuts a model smaller, once, at the start of step `step`."""

    @property
    def step(self) -> int:
        """When."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Parameters that decide about the cut, as optimiser groups; empty after it."""
        ...

    def operate(self) -> dict[str, Cut]:
        """Cut the model in place -> what is left of each parameter; one not named is whole."""
        ...

    def structure(self) -> dict[str, Any]:
        """JSON of the model's structure, with which `restore` builds it again."""
        ...

    def restore(self, structure: dict[str, Any]) -> None:
        """Give an uncut model the structure it had after the cut; weights follow."""
        ...


@dataclass
class State:
    """A training loop between two steps."""

    model: nn.Module
    cfg: Any
    identity: dict[str, Any]
    surgery: Surgery | None = None
    average: dict[str, Tensor] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None
    structure: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.optimizers = optimizers(self.model, self.cfg, self.own_groups())
        self.average = {n: p.detach().clone() for n, p in self._trained()}
        if self.cfg.precision == "fp16":
            self.scaler = torch.amp.GradScaler(next(self.model.parameters()).device.type)

    def own_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with settings of their own."""
        return self.surgery.groups() if self.surgery else []

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def average_(self, decay: float) -> None:
        """Move the averages towards the weights."""
        for name, parameter in self._trained():
            self.average[name].lerp_(parameter, 1 - decay)

    def operate(self) -> None:
        """Cut the model, its averages and its moments."""
        assert self.surgery is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        moments = named_states(self.optimizers, names)
        cuts = self.surgery.operate()
        self.structure = self.surgery.structure()
        self.optimizers = optimizers(self.model, self.cfg, self.own_groups())
        carry_over(moments, self.optimizers, self.model, cuts)
        self.average = {n: cut(self.average[n], cuts.get(n, ())) for n, _ in self._trained()}

    def save(self, out: Path, step: int) -> None:
        """Write out/checkpoint.pt; the first process writes, all must call."""
        state = {
            "step": step,
            "identity": self.identity,
            "structure": self.structure,
            "model": _whole(self.model.state_dict()),
            "average": _whole(self.average),
            "optimizers": [_whole(optimizer.state_dict()) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        if parallel.rank() == 0:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            atomic.write_bytes(out / CHECKPOINT, buffer.getvalue())
        if parallel.size() > 1:
            dist.barrier()

    def resume(self, out: Path) -> int:
        """Continue from the checkpoint in `out`, if there is one -> the first step to run."""
        path = out / CHECKPOINT
        if not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            return 0
        device = next(self.model.parameters()).device
        saved = torch.load(path, weights_only=True, map_location=device)
        if saved["identity"] != self.identity:
            raise PocketclipError(f"{path} belongs to other settings: remove it to start over")
        if saved["structure"] is not None:
            assert self.surgery is not None
            self.surgery.restore(saved["structure"])
            self.structure = saved["structure"]
            self.optimizers = optimizers(self.model, self.cfg, self.own_groups())
        own = self.model.state_dict()
        self.model.load_state_dict({n: _like(own[n], t) for n, t in saved["model"].items()})
        parameters = dict(self.model.named_parameters())
        self.average = {n: _like(parameters[n], t) for n, t in saved["average"].items()}
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for parameter, moments in optimizer.state.items():
                for key, value in moments.items():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        moments[key] = _like(parameter, value)
        if self.scaler:
            self.scaler.load_state_dict(saved["scaler"])
        return int(saved["step"])


def _whole(value: Any) -> Any:
    """Sharded tensors gathered, inside dicts and lists; so any number of processes can go on."""
    if torch.is_tensor(value):
        return parallel.whole(value)
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    return [_whole(inner) for inner in value] if isinstance(value, list) else value


def _like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as `target` is."""
    if not hasattr(target, "device_mesh") or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
