"""Look at and change what flows between a model's modules. The only file that registers hooks.

Everything here is a context manager, checks all names before it touches anything, and is undone on leaving,
whatever happened inside. Modules are named by their plain dotted path, as in `named_modules()`.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from locus.errors import InputError

HookFunction = Callable[[Tensor], Tensor | None]
"""Given a module's input or output, its replacement, or None to leave it as it is."""

_NOTHING: Mapping[str, HookFunction] = MappingProxyType({})


@dataclass(frozen=True)
class Recording:
    """What went through the named modules in the latest forward."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> the tensor it returned (the first one, where it returned a tuple)."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Module name -> the tensor it was called with (the first positional one, else `hidden_states`)."""


class StopForward(Exception):
    """Raised inside a forward by `stop_after`, and caught by it."""


@contextlib.contextmanager
def patched(
    module: nn.Module,
    outputs: Mapping[str, HookFunction] = _NOTHING,
    inputs: Mapping[str, HookFunction] = _NOTHING,
) -> Iterator[None]:
    """Pass the inputs or outputs of named modules through functions, within the context.

    A patch receives the module's (first) tensor and returns its replacement, or None to keep it. Tensors come
    as `batch pos d` also from modules that run on flattened rows (OPT's MLP). Patches of nested contexts on
    one module run in the order in which the contexts were entered.

    Args:
        module: The model; never left changed.
        outputs: Module name -> patch of what the module returns.
        inputs: Module name -> patch of what the module is called with.

    Raises:
        InputError: no module has that name; nothing has been registered then.
    """
    found = _find(module, [*outputs, *inputs])
    with contextlib.ExitStack() as stack:
        rows: dict[str, list[int]] = {}
        for name in found:
            parent = name.rpartition(".")[0]
            if parent not in rows:
                rows[parent] = []
                note = partial(_note_rows, rows[parent])
                around = module.get_submodule(parent)
                stack.enter_context(_registered(around.register_forward_pre_hook(note, with_kwargs=True)))
        for name, patch in inputs.items():
            hook = partial(_patch_input, patch, rows[name.rpartition(".")[0]])
            stack.enter_context(_registered(found[name].register_forward_pre_hook(hook, with_kwargs=True)))
        for name, patch in outputs.items():
            hook = partial(_patch_output, patch, rows[name.rpartition(".")[0]])
            stack.enter_context(_registered(found[name].register_forward_hook(hook)))
        yield


@contextlib.contextmanager
def record(
    module: nn.Module, outputs: Iterable[str] = (), inputs: Iterable[str] = (), detach: bool = True
) -> Iterator[Recording]:
    """Keep what goes in and out of named modules; the recording stays readable after the context.

    Recorded tensors are copies: some models add to a module's output in place (Falcon), which must not
    change what was recorded.

    Args:
        module: The model; never left changed.
        outputs: Names of modules whose (first) output tensor to keep.
        inputs: Names of modules whose (first) input tensor to keep.
        detach: Keep values only. If False the recorded tensors stay part of the graph, so that
            `torch.autograd.grad(loss, recording.outputs[name])` is the gradient at that site; a tensor
            that would need no gradient (all weights frozen) becomes a leaf that does.

    Raises:
        InputError: no module has that name; nothing has been registered then.
    """
    kept = Recording()
    keep = _keep_value if detach else _keep_in_graph
    at_outputs = {name: partial(keep, kept.outputs, name) for name in outputs}
    at_inputs = {name: partial(keep, kept.inputs, name) for name in inputs}
    with patched(module, at_outputs, at_inputs):
        yield kept


def _keep_value(into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    into[name] = tensor.detach().clone()


def _keep_in_graph(into: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not tensor.requires_grad:
        tensor = tensor.detach().requires_grad_()
    into[name] = tensor
    return tensor.clone()  # what flows on is the copy: nothing downstream can overwrite ours


@contextlib.contextmanager
def stop_after(module: nn.Module, name: str) -> Iterator[None]:
    """End the context as soon as the module called `name` has returned: a truncated forward.

    Enter it last, so that recordings and patches of that module still run:

        with record(model, outputs=[block]) as recording, stop_after(model, block):
            model(ids)

    Raises:
        InputError: no module has that name.
    """
    target = _find(module, [name])[name]
    reached = StopForward(name)
    with _registered(target.register_forward_hook(partial(_stop, reached))):
        try:
            yield
        except StopForward as stopped:
            if stopped is not reached:
                raise


def _stop(reached: StopForward, *_: Any) -> None:
    raise reached


@contextlib.contextmanager
def record_calls(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Keep the arguments with which named modules were called last, by the names of their parameters.

    The arguments are kept as they are, not copied. Extra keyword arguments stand beside the named ones, so
    that `module(**arguments)` repeats the call.

    Raises:
        InputError: no module has that name; nothing has been registered then.
    """
    found = _find(module, names)
    kept: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for name, target in found.items():
            hook = partial(_keep_arguments, kept, name, inspect.signature(target.forward))
            stack.enter_context(_registered(target.register_forward_pre_hook(hook, with_kwargs=True)))
        yield kept


def _keep_arguments(
    into: dict[str, dict[str, Any]],
    name: str,
    signature: inspect.Signature,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    into[name] = arguments


@contextlib.contextmanager
def record_results(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Keep what named modules returned last, as they returned it: a tuple stays a tuple; nothing is copied.

    Raises:
        InputError: no module has that name; nothing has been registered then.
    """
    kept: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, target in _find(module, names).items():
            hook = partial(_keep_result, kept, name)
            stack.enter_context(_registered(target.register_forward_hook(hook)))
        yield kept


def _keep_result(into: dict[str, Any], name: str, _: nn.Module, __: Any, result: Any) -> None:
    into[name] = result


@contextlib.contextmanager
def skipped(module: nn.Module, results: Mapping[str, Any]) -> Iterator[None]:
    """Do not run named modules, within the context: each returns what is given for it here.

    Raises:
        InputError: no module has that name; nothing is skipped then.
    """
    with contextlib.ExitStack() as stack:
        for name, target in _find(module, results).items():
            stack.enter_context(replaced_forward(target, partial(_returned, results[name])))
        yield


def _returned(result: Any, *_: Any, **__: Any) -> Any:
    return result


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand for the module's own forward, within the context.

    Contexts nest: each puts back what it found, be it the class's forward or one set on the instance (accelerate).
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _find(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The named modules, or an InputError that lists near matches."""
    found = {}
    for name in names:
        try:
            found[name] = module.get_submodule(name)
        except AttributeError:
            found[name] = module
        if found[name] is module:  # "" is the model itself: never what was meant
            tree = [path for path, _ in module.named_modules() if path]
            near = difflib.get_close_matches(name, tree, n=3, cutoff=0.5)
            mend = f"near: {', '.join(near)}" if near else f"names look like {tree[-1]}"
            raise InputError(f'{type(module).__name__} has no module "{name}"; {mend}')
    return found


def _note_rows(batch_pos: list[int], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep `batch pos` of each call around a module, to unflatten what runs on rows inside."""
    where = _first(args, kwargs)
    shape = where[0][where[1]].shape if where else ()
    batch_pos[:] = shape[:2] if len(shape) == 3 else ()


@contextlib.contextmanager
def _registered(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Where the tensor that flows through a call is: (container, key)."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return args, i
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs, "hidden_states"
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return kwargs, key
    return None


def _apply(patch: HookFunction, tensor: Tensor, batch_pos: list[int]) -> Tensor | None:
    """Call the patch on `batch pos d`, give its answer back in the tensor's own shape."""
    if tensor.dim() == 2 and batch_pos and batch_pos[0] * batch_pos[1] == tensor.shape[0]:
        new = patch(tensor.reshape(*batch_pos, tensor.shape[-1]))
        return None if new is None else new.reshape(tensor.shape)
    return patch(tensor)


def _patch_input(
    patch: HookFunction,
    batch_pos: list[int],
    called: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    where = _first(args, kwargs)
    if where is None:
        raise TypeError(f"{type(called).__name__} was called without a tensor; nothing to patch or record")
    container, key = where
    new = _apply(patch, container[key], batch_pos)
    if new is None:
        return None
    if container is args:
        return (*args[:key], new, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: new}


def _patch_output(patch: HookFunction, batch_pos: list[int], called: nn.Module, _: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return _apply(patch, output, batch_pos)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        new = _apply(patch, output[0], batch_pos)
        return None if new is None else (new, *output[1:])
    raise TypeError(f"{type(called).__name__} returned {type(output).__name__}, neither a tensor nor a tuple")
