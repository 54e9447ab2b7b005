"""A tensor of which every process of a job holds a part: how to ask for what is here, and for all of it.

The parts are those of FSDP2, torch's own `fully_shard` (`locus.fsdp_loader`): each parameter is cut along its first
axis. All of these are also answered for plain tensors, which are whole everywhere.

All processes must run the same forwards and backwards in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(module: nn.Module) -> bool:
    """Whether other processes hold parts of this model."""
    return any(_mesh(parameter) is not None for parameter in module.parameters())


def class_name(module: nn.Module) -> str:
    """Name of a module's class, without what `fully_shard` puts before it."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if hasattr(module, "unshard") else name


def device_of(weight: Tensor) -> torch.device:
    """The device that computes with a parameter, wherever it is kept."""
    mesh = _mesh(weight)
    if mesh is None or mesh.device_type == "cpu":
        return weight.device
    return torch.device(mesh.device_type, torch.cuda.current_device())


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not sharded."""
    held: Any = tensor
    mine: Tensor = tensor if _mesh(tensor) is None else held.to_local()
    return mine


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them call it."""
    held: Any = tensor.detach()
    full: Tensor = tensor if _mesh(tensor) is None else held.full_tensor()
    return full


def gather(value: Tensor) -> Tensor:
    """All of a tensor; its gradient, summed over the processes, goes back to their parts. All of them call it."""
    if _mesh(value) is None:
        return value
    from torch.distributed.tensor import Partial, Replicate

    held: Any = value
    full: Tensor = held.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return full


def zeros_beside(base: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the device that computes with `base`, and sharded where it is."""
    mesh = _mesh(base)
    if mesh is None:
        return torch.zeros(shape, dtype=dtype, device=base.device)
    from torch.distributed.tensor import Shard, zeros

    return zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def laid_out_as(model: Tensor, full: Tensor) -> Tensor:
    """A tensor that every process has whole, on the device of `model` and sharded where that is."""
    mesh = _mesh(model)
    if mesh is None:
        return full.to(model.device)
    return part_of(full.to(to_local(model).device), mesh)


def reshard(module: nn.Module) -> None:
    """Give back what is still together of a sharded model: each process has its own part again, and no more.

    Also after a forward that was cut short, which leaves what lies outside the blocks together.
    """
    root: Any = module
    root.reset_iter_state()


def unshard(module: nn.Module) -> None:
    """Put together what lies outside the blocks, so that its modules can be called by themselves."""
    root: Any = module
    if hasattr(root, "unshard"):
        root.unshard()


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    """The processes that hold parts of a tensor; None for a plain one."""
    return getattr(tensor, "device_mesh", None)


def part_of(
    full: Tensor, mesh: DeviceMesh, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """This process's rows of a tensor, as a tensor that knows of the others'."""
    from torch.distributed.tensor import DTensor, Shard

    rows = torch.tensor_split(full, _edges(full.shape[0], mesh.size()))[mesh.get_local_rank()]
    part = rows.to(device=device or full.device, dtype=dtype or full.dtype).clone().contiguous()
    return DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def _edges(n: int, size: int) -> list[int]:
    """Where torch cuts `n` rows for `size` processes: equal parts, what is left over missing at the end."""
    step = -(-n // size)
    return [min(n, step * i) for i in range(1, size)]
