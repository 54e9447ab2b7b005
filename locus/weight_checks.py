"""What a loaded model's weights must be: all of them from the file, of the model's shapes, floats, finite.

transformers gives random values to every parameter that a checkpoint lacks and goes on; a model like that answers
otherwise at each run, and whatever is found or edited in it is an accident. So file and model are held
against each other, name by name, before anything runs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.parallel.sharding import to_local
from locus.parameter_names import canonical

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""dtypes in which a weight is a number; any other one holds codes."""

_CODES = re.compile(
    r"(^|[._])(SCB|scales?|scale_inv|absmax|quant_map|nested_absmax|nested_quant_map|qweight|qzeros|zero_points?|g_idx"
    r"|weight_packed|weight_shape|weight_format|quant_state[\w.]*|amax|codebooks?|packed)$"
)
"""How the names end that quantized checkpoints give to codes and to their scales."""

_OLD_BUFFERS = re.compile(r"(^|[._])(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
"""Constants that older versions of transformers saved and newer ones compute."""

_WRAPPERS = {
    "base_model.model.": "PEFT put it there: merge the adapter (merge_and_unload) and save the result",
    "base_layer.": "PEFT put it there: merge the adapter (merge_and_unload) and save the result",
    "_fsdp_wrapped_module.": "FSDP put it there: save the inner model's full state dict",
    "_checkpoint_wrapped_module.": "activation checkpointing put it there: save the inner model",
    "_orig_mod.": "torch.compile put it there: save model._orig_mod",
    "module.": "DataParallel or DeepSpeed put it there: save model.module",
}
"""What training wrappers put into the names of the parameters that they hold, and the mend."""

_LAYER = re.compile(r"^(.*?\.)??(\d+)\.(?=.)")


@dataclass(frozen=True)
class Agreement:
    """What the file and the model do not agree on; all empty where they agree."""

    missing: tuple[str, ...] = ()
    """Parameters of the model that the file lacks, in the model's order, tied ones once; tied to a loaded one is
    not missing."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the file that the model has no place for."""
    differing: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """Name, shape in the file, shape in the model."""
    decoded: bool = False
    """Whether transformers itself turned a quantized checkpoint's codes into what the model holds."""

    @classmethod
    def of_loading(cls, module: nn.Module, info: Mapping[str, Any], checkpoint: Checkpoint) -> Agreement:
        """By transformers' own account of what it loaded (`output_loading_info=True`)."""
        from transformers.quantizers.auto import AutoHfQuantizer

        missing = set(info.get("missing_keys", ()))
        differing = {
            name: (tuple(file), tuple(model)) for name, file, model in info.get("mismatched_keys", ())
        }
        named = [name for name, _ in module.named_parameters() if name in missing]
        twins = {name for name, _ in module.named_parameters(remove_duplicate=False)} - set(named)
        return cls(
            (*named, *sorted(missing - set(named) - twins)) or tuple(sorted(missing)),
            tuple(sorted(info.get("unexpected_keys", ()), key=_natural)),
            tuple((name, *differing[name]) for name, _ in module.named_parameters() if name in differing),
            # Of a method that it does not know, transformers takes the codes as they are.
            bool(
                "quantization_config" in checkpoint.config
                and AutoHfQuantizer.supports_quant_method(checkpoint.config["quantization_config"])
            ),
        )

    @classmethod
    def of_names(cls, module: nn.Module, checkpoint: Checkpoint) -> Agreement:
        """By names and shapes alone, before any tensor is read; for a module without weights."""
        stored = {canonical(name): name for name in checkpoint.shapes}
        groups: dict[int, list[str]] = {}
        shapes = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
            shapes[name] = tuple(parameter.shape)
        missing, differing = [], []
        for names in groups.values():
            held = next((stored[one] for one in map(canonical, names) if one in stored), None)
            if held is None:
                missing.append(names[0])
            elif tuple(checkpoint.shapes[held]) != shapes[names[0]]:
                differing.append((names[0], tuple(checkpoint.shapes[held]), shapes[names[0]]))
        known = {canonical(name) for name in (*shapes, *(name for name, _ in module.named_buffers()))}
        ignored = [
            re.compile(pattern)
            for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        unexpected = [
            name
            for name in checkpoint.shapes
            if canonical(name) not in known and not any(pattern.search(name) for pattern in ignored)
        ]
        return cls(tuple(missing), tuple(sorted(unexpected, key=_natural)), tuple(differing))


def refuse_disagreement(agreement: Agreement, module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Refuse a model that does not hold what its file holds, all of it and nothing else.

    Tensors that belong to no part of the model (a vision tower, a value head) are left out with a note.

    Args:
        agreement: What file and model do not agree on.
        module: The model.
        checkpoint: The file.
        name: The model's, for the messages.

    Raises:
        InputError: parameters are missing, shapes differ, a tensor holds codes where the model has floats,
            or the file has weights for a part of the model that the model does not have.
    """
    quantized = agreement.decoded
    extra = [one for one in agreement.unexpected if not _OLD_BUFFERS.search(one)]
    if not quantized:
        coded = [one for one in extra if _CODES.search(one)]
        if coded:
            raise InputError(
                _coded(name, f"the file has {_several(coded)}, and the model has no such parameter")
            )
    if agreement.missing:
        first, n = agreement.missing[0], len(agreement.missing)
        lacks = f"{n} parameters of the model are" if n > 1 else "1 parameter of the model is"
        raise InputError(
            f"{name}: {lacks} not in the file ({'the first is ' if n > 1 else ''}{first}), and random values would "
            f"stand in: {_mend(agreement, checkpoint)}"
        )
    if agreement.differing:
        first, file, model = agreement.differing[0]
        n = len(agreement.differing)
        more = f" ({n} parameters differ)" if n > 1 else ""
        raise InputError(
            f"{name}: {first} is {list(file)} in the file, the model's is {list(model)}{more}: config.json and the "
            "weights are of different models; fetch both from one place"
        )
    if not quantized:
        _refuse_codes(module, checkpoint, extra, name)
    within = [one for one in extra if _within(one, module)]
    if within and not quantized:
        above = _layers_above(within, module)
        mend = (
            f"config.json says {above[0]} layers, the file has {above[1]}: correct num_hidden_layers"
            if above
            else "config.json is of another model or lacks a setting (a bias, a norm): fetch both from one place"
        )
        raise InputError(f"{name}: the file has {_several(within)}, which the model would leave out: {mend}")
    if extra and not within:
        warnings.warn(
            f"{name}: the file has {_several(extra)}, not part of this language model and left out",
            stacklevel=2,
        )


def refuse_coded(checkpoint: Checkpoint, names: Iterable[str], name: str) -> None:
    """Refuse to edit parameters that the checkpoint does not store as numbers of their own.

    An edit is written in the dtype of its base. Codes of a quantized model, float8 among them, have no dtype in
    which a small change could be written; a model like that can be traced and audited.

    Args:
        checkpoint: The base of the edit.
        names: The parameters that the edit may change.
        name: The model's, for the message.

    Raises:
        InputError: names the first such parameter and says how to get a dense base.
    """
    for parameter in names:
        try:
            dtype = checkpoint.dtypes[checkpoint.resolve(parameter)]
        except InputError:
            if "quantization_config" not in checkpoint.config:
                raise
            kind = "codes under other names"
        else:
            if dtype in FLOATS:
                continue
            kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name}: {parameter} is stored as {kind}, in which an edit cannot be written: make a dense base first "
            "(AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16), of a quantized model .dequantize(), "
            "then save_pretrained(NEW_FOLDER)) and edit that"
        )


def refuse_nonfinite(module: nn.Module, name: str) -> None:
    """Raise InputError for the first parameter that holds NaN or infinity; `name` is the model's."""
    for parameter, held in module.named_parameters():
        value = to_local(held)
        # A sum is finite only if every term is; it costs no copy. Only where it is not, look closer.
        if value.is_meta or torch.isfinite(value.sum(dtype=torch.float32)):
            continue
        if bad := int((~torch.isfinite(value)).sum()):
            raise InputError(
                f"{name}: {parameter} holds {bad} NaN or infinite values; the checkpoint is damaged"
            )


def _refuse_codes(module: nn.Module, checkpoint: Checkpoint, extra: Collection[str], name: str) -> None:
    """Integers that were loaded into a parameter; into a buffer they may be what they are."""
    buffers = {canonical(buffer) for buffer, _ in module.named_buffers()}
    for stored, dtype in checkpoint.dtypes.items():
        if dtype.is_floating_point or stored in extra or _OLD_BUFFERS.search(stored):
            continue
        if canonical(stored) not in buffers:
            kind = str(dtype).removeprefix("torch.")
            raise InputError(_coded(name, f"{stored} is {kind} in the file where the model has floats"))


def _coded(name: str, what: str) -> str:
    return (
        f"{name}: {what}: the file holds codes of a quantized model, and its config.json has no quantization_config "
        "that can be used here; fetch the dense model, or dequantize it (weight = code · scale) and save again"
    )


def _mend(agreement: Agreement, checkpoint: Checkpoint) -> str:
    """How to come by the missing parameters."""
    first = agreement.missing[0]
    names = [f".{one}" for one in agreement.unexpected]
    if wrapper := next((mark for mark in _WRAPPERS if any(f".{mark}" in one for one in names)), None):
        return f'names in the file have "{wrapper}" in them; {_WRAPPERS[wrapper]}, or take it off the names'
    if other := next((one for one in agreement.unexpected if one.endswith(f".{first}")), None):
        prefix = other[: -len(first)]
        return f'names in the file begin with "{prefix}": take it off, or save again with save_pretrained'
    heads = [
        one for one in agreement.unexpected if re.match(r"(score|classifier|classification_head)\.", one)
    ]
    if heads:
        return f"the file is a classifier's (it has {heads[0]}): give the causal language model that it was made of"
    if all(re.search(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$", one) for one in agreement.missing):
        return (
            "the file has no output head: save again from AutoModelForCausalLM, or, where the head is the token "
            'embedding, set "tie_word_embeddings": true in config.json'
        )
    numbers, stored = _numbers(agreement.missing), _numbers(checkpoint.shapes)
    if numbers and stored and min(numbers) > max(stored):
        return (
            f"config.json says {max(numbers) + 1} layers, the file has {max(stored) + 1}: correct "
            "num_hidden_layers, or fetch the rest of the weights"
        )
    return "fetch the checkpoint again, or save the whole model with save_pretrained"


def _within(name: str, module: nn.Module) -> bool:
    """Whether a tensor of the file belongs to a part of the model: a submodule, or one more layer of a stack."""
    parent = name.rpartition(".")[0]
    layer = _LAYER.match(name)
    places = [parent, *([layer[1].removesuffix(".")] if layer and layer[1] else [])]
    known = {canonical(f"{one}.") for one, _ in module.named_modules() if one}
    return any(canonical(f"{place}.") in known for place in places if place)


def _layers_above(names: Iterable[str], module: nn.Module) -> tuple[int, int] | None:
    """How many layers the model has and the file has, where all these tensors are of layers above the model's."""
    held, found = _numbers(name for name, _ in module.named_parameters()), list(names)
    numbers = _numbers(found)
    if (
        held
        and numbers
        and len(found) == sum(1 for one in found if _LAYER.match(one))
        and min(numbers) > max(held)
    ):
        return max(held) + 1, max(numbers) + 1
    return None


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(match[2]) for name in names if (match := _LAYER.match(name))}


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return list(_pieces(name))


def _pieces(name: str) -> Iterator[tuple[int, str]]:
    for piece in name.split("."):
        yield (int(piece), "") if piece.isdecimal() else (-1, piece)
