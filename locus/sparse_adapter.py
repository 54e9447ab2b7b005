"""A delta as peft's sparse adapter (SHiRA; Bhardwaj et al. 2024, arXiv:2406.13175), where peft can express it exactly.

peft keeps r (in + out) entries of every adapted Linear and adds them to the base. An edit has fewer: what is left over
is filled with unchanged entries and minus zero, which changes no number, zeros included. Values are added there and set
here, so every tensor is put together as peft does it and must come out bit for bit; an edit that does not is refused.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from locus.checkpoint import Checkpoint
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.files.artefact import atomic_folder
from locus.files.tensorfile import write_tensors
from locus.fingerprint import tensor_digest
from locus.model import module_shape
from locus.parameter_names import resolve
from locus.progress import track
from locus.selection import same_bits
from locus.tensor_delta import Change

_INSTEAD = "export the checkpoint instead (without --adapter)"


def export_adapter(base: Checkpoint, delta: WeightDelta, out: str | Path, hub_id: str = "") -> int:
    """Write adapter_config.json and adapter_model.safetensors, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        base: The checkpoint folder that the delta was made from; only read.
        delta: What to express.
        out: The folder to write; it appears under this name only when it is complete.
        hub_id: Under which others find the base; its folder where there is none.

    Returns:
        peft's r: the smallest that holds the edit.

    Raises:
        InputError: peft is not installed; the base is not the delta's; the edit touches something other than untied
            Linear weights, is too dense, or does not come out bit for bit when added; `out` exists or cannot be
            written.
    """
    try:
        from peft import ShiraConfig
    except ImportError as error:
        raise InputError("--adapter needs peft 0.17 or later: pip install 'locus-unlearn[lora]'") from error
    paths = _linears(base, delta)
    sides = {name: delta.changes[name].selection.shape for name in paths}
    changed = {name: _changed(change) for name, change in delta.changes.items()}
    r = max(1, *(math.ceil(len(flat) / sum(sides[name])) for name, flat in changed.items()))
    for name, (n_out, n_in) in sides.items():
        if r * (n_out + n_in) > n_out * n_in:
            raise InputError(
                f"{name}: peft's sparse adapters hold {r} × ({n_in} + {n_out}) entries of every tensor here, more than "
                f"this one has; the edit is too dense for them: {_INSTEAD}"
            )
    tensors: dict[str, Tensor] = {}
    for name in track(list(changed), "adapter"):
        (place, *_) = base.places(name)
        old = base.tensor(place)
        delta.check_digest(name, tensor_digest(old), str(base.folder))
        index = _filled(changed[name], r * sum(sides[name]), old.numel())
        values = _added(name, old, delta, changed[name], index)
        path = f"base_model.model.{paths[name]}"
        tensors[f"{path}.shira_indices"] = torch.stack([index // old.shape[1], index % old.shape[1]]).int()
        tensors[f"{path}.shira_weight"] = values
    config = ShiraConfig(
        r=r,
        target_modules=sorted(paths.values()),
        base_model_name_or_path=hub_id or str(base.folder),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with atomic_folder(Path(out)) as folder:
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt", "delta": delta.id})
        config.save_pretrained(str(folder))
    return r


def _linears(base: Checkpoint, delta: WeightDelta) -> dict[str, str]:
    """Changed tensor -> the model's name for the Linear that it is the weight of."""
    if not delta.changes:
        raise InputError("the delta changes nothing: there is no adapter to write")
    module = module_shape(base.folder)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    holders = collections.Counter(map(id, parameters.values()))
    paths: dict[str, str] = {}
    for name in delta.changes:
        known = resolve(name, parameters, "the model")
        path, _, attribute = known.rpartition(".")
        holder = module.get_submodule(path)
        if attribute != "weight" or type(holder) is not nn.Linear:
            raise InputError(
                f"{name}: peft's sparse adapters change weights of Linear modules only, this is the {attribute} of a "
                f"{type(holder).__name__}: {_INSTEAD}"
            )
        if holders[id(parameters[known])] > 1:
            raise InputError(
                f"{name}: is tied to another module, which an adapter leaves as it is: {_INSTEAD}"
            )
        paths[name] = path
    return paths


def _changed(change: Change) -> Int64[Tensor, " n"]:
    """Flat positions of the entries whose bits differ, ascending."""
    mark = torch.zeros(change.selection.shape, dtype=torch.bool)
    change.selection.put_(mark, ~same_bits(change.old, change.new))
    return mark.flatten().nonzero().flatten()


def _filled(changed: Int64[Tensor, " n"], total: int, numel: int) -> Int64[Tensor, " total"]:
    """The changed positions, and behind them the first others, up to `total`."""
    free = torch.ones(min(numel, total), dtype=torch.bool)
    free[changed[changed < len(free)]] = False
    return torch.cat([changed, free.nonzero().flatten()[: total - len(changed)]])


def _added(
    name: str, old: Tensor, delta: WeightDelta, changed: Int64[Tensor, " n"], index: Int64[Tensor, " total"]
) -> Float[Tensor, " total"]:
    """What is added at each position so that peft's sum is the edited tensor to the bit."""
    change = delta.changes[name]
    new = old.clone()
    change.selection.put_(new, change.new)
    before, after = old.flatten()[changed].double(), new.flatten()[changed]
    exact = after.double() - before
    values = torch.full((len(index),), -0.0)
    values[: len(changed)] = exact.float()
    for towards in (math.inf, -math.inf):  # where the difference itself is rounded, a neighbour may do
        wrong = ~same_bits(_merged(old, index, values).flatten()[changed], after)
        near = exact.float()[wrong]
        values[: len(changed)][wrong] = near.nextafter(torch.full_like(near, towards))
    if tensor_digest(_merged(old, index, values)) != delta.after[name]:
        missed = int((~same_bits(_merged(old, index, values), new)).sum())
        raise InputError(
            f"{name}: for {missed:,} of {len(changed):,} entries no float32 number added to the base gives the edited "
            f"value exactly: {_INSTEAD}"
        )
    return values


def _merged(old: Tensor, index: Int64[Tensor, " total"], values: Float[Tensor, " total"]) -> Tensor:
    """The base with the adapter in it, by the operation that peft uses."""
    places = torch.stack([index // old.shape[1], index % old.shape[1]])
    merged = old.clone()
    merged += torch.sparse_coo_tensor(places, values, old.shape, check_invariants=False)
    return merged
