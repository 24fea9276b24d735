"""Several processes as one: which rows of a batch are ours, and features of all of them.

Every process computes the whole batch's loss from gathered features, so each gradient of a gathered
row is that of the whole loss; averaged over processes (as DDP and FSDP do), the gradient of the
weights is that of one process with the whole batch. The sums are the same, in another order: in
float64 they agree to 1e-9, in float32 to 1e-5 of the largest gradient.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress.errors import PocketclipError


def rank() -> int:
    """Number of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device: str) -> None:
    """Join the processes that torchrun started; nothing to do without torchrun.

    Raises PocketclipError where the extra is missing.
    """
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise PocketclipError("torchrun needs: pip install 'pocketclip[distributed]'") from None
    PartialState(cpu=torch.device(device).type == "cpu")


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """This process's own GPU of its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" and size() > 1 else device


def own_rows(num: int) -> slice:
    """The rows of a batch of `num` that this process embeds."""
    if num % size():
        raise PocketclipError(f"batch_size {num} cannot be shared evenly by {size()} processes")
    share = num // size()
    return slice(rank() * share, (rank() + 1) * share)


def announce(message: Any = None) -> Any:
    """The first process's message, in every process."""
    box = [message]
    if size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def once(make: Callable[[], None]) -> None:
    """Let the first process make something, and the others wait until it is there."""
    if rank() == 0:
        make()
    if size() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    """All processes' rows; backward: our rows of the gradient, times the number of processes.

    The factor undoes the averaging of gradients that follows, as each process holds the gradient of
    the whole loss by its own rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        [gradient] = gradients
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows] * size()


def gather(x: Tensor) -> Tensor:
    """x [b, ...] of each process -> [B, ...] of all, with gradients; x itself for one process."""
    if size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def mean(number: Tensor) -> Tensor:
    """The mean over processes of a scalar, without gradient."""
    return gather(number.detach().float()[None]).mean()


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    """The module to call in training, which shares gradients among processes in backward."""
    if size() == 1:
        return model
    if strategy == "fsdp2":
        return shard_(model)
    from accelerate import Accelerator, DistributedDataParallelKwargs

    options = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    on_cpu = next(model.parameters()).device.type == "cpu"
    return Accelerator(cpu=on_cpu, kwargs_handlers=[options]).prepare_model(model)


def shard_(model: nn.Module) -> nn.Module:
    """FSDP2 in place: blocks and towers are sharded over the processes, the few scalars are not."""
    from torch.distributed.fsdp import fully_shard

    towers = [module for name, module in model.named_modules() if name in TOWERS]
    for tower in towers:
        blocks = [child for name, child in tower.named_children() if name == "blocks"]
        for block in blocks[0].children() if blocks else ():
            fully_shard(block)
        fully_shard(tower)
    return model


TOWERS = ("student.image", "student.text")


def average_replicated_(model: nn.Module) -> None:
    """Average the gradients of parameters that FSDP2 left whole; DDP has done so for all."""
    if size() == 1 or not has_shards(model):
        return
    for parameter in model.parameters():
        if parameter.grad is not None and not _is_sharded(parameter):
            dist.all_reduce(parameter.grad)
            parameter.grad /= size()


def has_shards(model: nn.Module) -> bool:
    """Whether FSDP2 has spread any of the parameters over the processes."""
    return any(_is_sharded(parameter) for parameter in model.parameters())


def clip_(model: nn.Module, limit: float, apart: set[int]) -> Tensor:
    """Scale gradients down to a total norm of `limit` -> the norm before; those of the parameters
    whose ids are in `apart` stay.
    """
    parameters = [p for p in model.parameters() if id(p) not in apart]
    if not any(_is_sharded(p) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    kinds = [[p for p in parameters if _is_sharded(p) == sharded] for sharded in (True, False)]
    norms = [_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    total = torch.stack(norms).norm()
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(float(factor))
    return total


def _norm(gradients: list[Tensor]) -> Tensor:
    if not gradients:
        return torch.zeros(())
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full, where it is sharded; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
