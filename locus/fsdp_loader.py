"""A model of which every process of a job holds a part: FSDP2, torch's own `fully_shard`.

Each parameter is cut along its first axis. A block's parameters are unsharded for its forward and again for its
backward, and resharded afterwards; those outside the blocks (embedding, last norm, unembedding) stay unsharded from a
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
from torch import nn

from locus.atlas_reader import read_atlas
from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.parallel.sharding import part_of
from locus.progress import track
from locus.weight_checks import Agreement, refuse_disagreement

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
        InputError: this process is not one of a job, or the checkpoint and the model do not agree
            (`locus.weight_checks.refuse_disagreement`).
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        raise InputError("a sharded model needs a job to be spread over: start with torchrun")
    module = _without_memory(config, dtype, attn_implementation, trust_remote_code)
    checkpoint = Checkpoint(folder)
    refuse_disagreement(Agreement.of_names(module, checkpoint), module, checkpoint, str(folder))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _shard(module, mesh, offload)
    _fill(module, checkpoint, mesh, torch.device("cpu") if offload else device)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


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
        part = part_of(checkpoint.tensor(name), mesh, parameter.dtype, device)
        # One object under all names of a tied parameter, so that it stays tied.
        parts |= dict.fromkeys(names[id(parameter)], nn.Parameter(part, requires_grad=False))
    module.load_state_dict(parts, strict=False, assign=True)
