"""A model of which every process of a job holds a part: FSDP2, torch's own `fully_shard`.

Each parameter is cut along its first axis. A block's parameters are put together for its forward and again for its
backward, and given back afterwards; those outside the blocks (embedding, last norm, unembedding) stay together from a
step's first forward to the end of its backward. So a process needs its part of the model, one block and
the embeddings on its device; with offload the parts lie in its main memory and only what is in work is on the device.

Nothing is ever loaded whole: the modules are made without memory, and of each tensor in the checkpoint every
process keeps its own rows. While it loads, it needs the largest single tensor in main memory.

All processes must run the same forwards and backwards in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.folder import Checkpoint
from locus.progress import track

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


def load_sharded(
    folder: Path,
    config: Any,
    dtype: torch.dtype | str,
    device: torch.device,
    *,
    offload: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load this process's part of a checkpoint; all processes of the job call it.

    Args:
        folder: The checkpoint, which every process can read.
        config: transformers' configuration of it.
        dtype: Of the weights in memory; "auto" is the configuration's own.
        device: Kind of device that computes; of several GPUs the process's current one.
        offload: Keep the parts in main memory.
        attn_implementation: As transformers names it.
        trust_remote_code: Run modelling code that comes with the checkpoint.

    Raises:
        InputError: this process is not one of a job, or the checkpoint lacks a parameter of the model.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        raise InputError("a sharded model needs a job to be spread over: start with torchrun")
    module = _without_memory(config, dtype, attn_implementation, trust_remote_code)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _shard(module, mesh, offload)
    _fill(module, Checkpoint(folder), mesh, torch.device("cpu") if offload else device)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


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


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not sharded."""
    held: Any = tensor
    mine: Tensor = tensor if _mesh(tensor) is None else held.to_local()
    return mine


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them call it."""
    held: Any = tensor.detach()
    full: Tensor = tensor if _mesh(tensor) is None else held.full_tensor()
    return full


def gathered(value: Tensor) -> Tensor:
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
    return _part_of(full.to(local(model).device), mesh)


def given_back(module: nn.Module) -> None:
    """Give back what is still together of a sharded model: each process has its own part again, and no more.

    Also after a forward that was cut short, which leaves what lies outside the blocks together.
    """
    root: Any = module
    root.reset_iter_state()


def put_together(module: nn.Module) -> None:
    """Put together what lies outside the blocks, so that its modules can be called by themselves."""
    root: Any = module
    if hasattr(root, "unshard"):
        root.unshard()


def _mesh(tensor: Tensor) -> DeviceMesh | None:
    """The processes that hold parts of a tensor; None for a plain one."""
    return getattr(tensor, "device_mesh", None)


def _without_memory(config: Any, dtype: torch.dtype | str, attn: str | None, trust: bool) -> PreTrainedModel:
    """The modules, their parameters on the meta device; tables that are computed are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    kwargs = {} if attn is None else {"attn_implementation": attn}
    own = getattr(config, "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        module: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=own if dtype == "auto" else dtype, trust_remote_code=trust, **kwargs
        )
    module.tie_weights()
    module.eval().requires_grad_(False)
    return module


def _shard(module: PreTrainedModel, mesh: DeviceMesh, offload: bool) -> None:
    """Each block a group of its own, and one of what is left."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    from locus.atlas_reader import read_atlas

    where = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for name in read_atlas(module).blocks:
        fully_shard(module.get_submodule(name), mesh=mesh, offload_policy=where)
    fully_shard(module, mesh=mesh, offload_policy=where)


def _fill(module: PreTrainedModel, checkpoint: Checkpoint, mesh: DeviceMesh, device: torch.device) -> None:
    """Read every parameter, and of it keep this process's part."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    blank = dict(module.named_parameters())
    parts: dict[str, nn.Parameter] = {}
    for name, parameter in track(blank.items(), "load", len(blank)):
        full = checkpoint.tensor(name)
        if full.shape != parameter.shape:
            raise InputError(
                f"{checkpoint.folder}: {name} is {list(full.shape)}, the model's is {list(parameter.shape)}"
            )
        part = _part_of(full, mesh, parameter.dtype, device)
        # One object under all names of a tied parameter, so that it stays tied.
        parts |= dict.fromkeys(names[id(parameter)], nn.Parameter(part, requires_grad=False))
    module.load_state_dict(parts, strict=False, assign=True)


def _part_of(
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
