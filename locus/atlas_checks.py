"""An atlas proved on its model: shapes first, then a few forwards of four tokens.

What the values must satisfy: every block's output is its input + attn_out + mlp_out; a neuron's rows move its
own activation and no other; doubling the `up` rows of a gated neuron doubles its activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from locus.atlas_names import STILL
from locus.errors import InputError
from locus.hooks import patched, record, stop_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from locus.atlas import Atlas, NeuronPart
    from locus.atlas_names import Names


def check_shapes(atlas: Atlas, names: Names) -> None:
    """Every projection and every neuron part is as large as the atlas says.

    Raises:
        InputError: one is not: layers of different widths, projected embeddings.
    """
    expected = [(atlas.unembed, atlas.d_model, atlas.d_vocab)]
    for z, down in zip(atlas.attn_z, atlas.neuron_in, strict=True):
        expected += [(z, atlas.n_heads * atlas.d_head, atlas.d_model), (down, atlas.d_mlp, atlas.d_model)]
    for parts in atlas.neurons:
        expected += [(name, atlas.d_model, atlas.d_mlp * n) for name, n in _projections(parts).items()]
    for name, d_in, d_out in expected:
        found = names.width(name, "in"), names.width(name, "out")
        if found != (d_in, d_out):
            raise InputError(
                f"{atlas.architecture}: {name} maps {found[0]} to {found[1]}, expected {d_in} to {d_out}: "
                f"layers that differ in width, or projected embeddings, have no exact names; {STILL}"
            )


def check_values(atlas: Atlas, module: PreTrainedModel) -> bool | None:
    """Run a few tokens and hold what flows against what the atlas claims.

    Returns:
        Whether the MLP of block 0 ignores its attention (parallel); None on the meta device.

    Raises:
        InputError: a claim does not hold; says which.
    """
    weight = module.get_submodule(atlas.embed).weight
    if weight.is_meta and not hasattr(module, "hf_device_map"):
        return None
    ids = torch.arange(4, device="cpu" if weight.is_meta else weight.device)[None] * 7 + 5  # type: ignore[arg-type]
    inputs = {"input_ids": ids % atlas.d_vocab, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def run(last: str) -> None:
        with stop_after(module, last):
            module(**inputs)

    with torch.no_grad():
        _check_residuals(atlas, module, run)
        for part in atlas.neurons[0]:
            if part.role in ("gate", "up"):
                _check_neurons(atlas, module, part, run)
        return _is_parallel(atlas, module, run)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's mode is put back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _projections(parts: tuple[NeuronPart, ...]) -> dict[str, int]:
    """Modules that hold gate and up -> how many of the two."""
    counts: dict[str, int] = {}
    for part in parts:
        if part.role in ("gate", "up"):
            name = part.param.removesuffix(".weight")
            counts[name] = counts.get(name, 0) + 1
    return counts


def _check_residuals(atlas: Atlas, module: nn.Module, run: Callable[[str], None]) -> None:
    """Each block adds exactly what attn_out and mlp_out name."""
    outputs = [*atlas.blocks, *atlas.attn_out, *atlas.mlp_out]
    with record(module, outputs, atlas.blocks) as seen:
        run(atlas.blocks[-1])
    for block, attn, mlp in zip(atlas.blocks, atlas.attn_out, atlas.mlp_out, strict=True):
        total = seen.outputs[block].cpu().double()
        terms = [t.cpu().double() for t in (seen.inputs[block], seen.outputs[attn], seen.outputs[mlp])]
        if not torch.isfinite(total).all():
            dtype = seen.outputs[block].dtype
            raise InputError(
                f"{atlas.architecture}: {block} computes NaN or infinity on plain input: damaged weights, or "
                f"a range too small for {dtype} (load with another dtype)"
            )
        rounding = 4 * torch.finfo(seen.outputs[block].dtype).eps * sum(term.abs() for term in terms)
        if ((total - sum(terms)).abs() > rounding).any():
            raise InputError(
                f"{atlas.architecture}: the output of {block} is not its input + {attn} + {mlp}: in a "
                f"scaled, post-norm or otherwise routed residual stream these have no exact names; {STILL}"
            )


def _check_neurons(atlas: Atlas, module: nn.Module, part: NeuronPart, run: Callable[[str], None]) -> None:
    """Doubling what half of the neurons' rows give moves these neurons' activations and no others."""
    projection, down = part.param.removesuffix(".weight"), atlas.neuron_in[0]
    chosen = torch.arange(0, atlas.d_mlp, 2)
    others = torch.arange(1, atlas.d_mlp, 2)

    def double(output: Tensor) -> Tensor:
        output = output.clone()
        output[..., part.offset + chosen] *= 2
        return output

    with record(module, inputs=[down]) as plain:
        run(atlas.blocks[0])
    with patched(module, {projection: double}), record(module, inputs=[down]) as doubled:
        run(atlas.blocks[0])
    before, after = plain.inputs[down], doubled.inputs[down]
    gated = any(other.role == "gate" for other in atlas.neurons[0])
    linear = part.role == "up" and gated  # what the activation function does not see
    moved = not _same(after[..., chosen], before[..., chosen])
    right = _same(after[..., chosen], 2 * before[..., chosen]) if linear else moved
    if not right or not _same(after[..., others], before[..., others]):
        raise InputError(
            f"{atlas.architecture}: {part.param} ({part.role}) does not hold one row per neuron of {down}'s "
            f"input: neurons that are normalized or mixed together have no exact names; {STILL}"
        )


def _is_parallel(atlas: Atlas, module: nn.Module, run: Callable[[str], None]) -> bool:
    """Whether block 0's MLP gives the same when its attention adds something else, as large as the input."""
    block, attn, mlp = atlas.blocks[0], atlas.attn_out[0], atlas.mlp_out[0]
    with record(module, [mlp], [block]) as plain:
        run(block)
    size = plain.inputs[block].abs().max()

    def ramp(output: Tensor) -> Tensor:
        slope = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
        return (slope * size.to(output)).expand_as(output)

    with patched(module, {attn: ramp}), record(module, [mlp]) as changed:
        run(block)
    return _same(changed.outputs[mlp], plain.outputs[mlp])


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for what two runs on an accelerator may differ by; a wrong name is off by far more."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return torch.allclose(actual, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())
