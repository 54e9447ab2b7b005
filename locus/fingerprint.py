"""Which weights these are: a sha256 that a folder on disk and a model in memory agree on.

A tensor's digest covers dtype, shape and bytes. A model's fingerprint covers the sorted list of canonical
name and digest of every tensor, so that it depends neither on shards nor on the order of tensors, and:

- the name of the base model in front ("model.", "transformer.") does not count: the hub's gpt2 lacks it;
- an output head that repeats the token embedding bit for bit counts once, as tied checkpoints store it;
- tables that are computed, not learned (rotary frequencies, causal masks), do not count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from locus.files.tensorfile import CODES, n_threads, tensor_bytes
from locus.parameter_names import canonical, is_embedding, is_head
from locus.progress import track

_CHUNK = 64 << 20


def tensor_digest(tensor: Tensor) -> str:
    """sha256 hex of a tensor's dtype, shape and bytes, from any device."""
    digest = started(tensor.dtype, tuple(tensor.shape))
    if tensor.device.type == "cpu":
        digest.update(tensor_bytes(tensor))
        return digest.hexdigest()
    flat = tensor.detach().reshape(-1)
    for piece in torch.split(flat, max(1, _CHUNK // tensor.element_size())):
        digest.update(tensor_bytes(piece))
    return digest.hexdigest()


def started(dtype: torch.dtype, shape: tuple[int, ...]) -> hashlib._Hash:
    """A digest that already covers dtype and shape and waits for the bytes."""
    return hashlib.sha256(f"{CODES[dtype]} {list(shape)}\n".encode())


def fingerprint_of(module: nn.Module) -> str:
    """Fingerprint of a model in memory: equal to its checkpoint's where the dtype is the same.

    Args:
        module: A plain transformers model. Its parameters and persistent buffers count.
    """
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    seen: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, shapes[name], tensor.stride())
        same = seen.setdefault(place, name)
        if same != name and tensor.numel():
            aliases[name] = same
    found = digests(
        [name for name in tensors if name not in aliases], lambda name: tensor_digest(tensors[name])
    )
    return fingerprint({name: found[aliases.get(name, name)] for name in tensors}, shapes)


def configuration(module: nn.Module) -> dict[str, Any]:
    """What a transformers model's configuration says of its computation, as JSON values.

    The attention implementation belongs to it; where the model came from and how it was saved does not.
    """
    config: Any = module.config
    said = {"attention": config._attn_implementation, **config.to_dict()}
    apart = ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
    known: dict[str, Any] = json.loads(json.dumps(said, default=str, sort_keys=True))
    return {name: value for name, value in known.items() if name[0] != "_" and name not in apart}


def digests(names: Iterable[str], of: Callable[[str], str]) -> dict[str, str]:
    """Digest many tensors at once in threads (hashing releases the interpreter), in the order given."""
    names = list(names)
    with ThreadPoolExecutor(n_threads()) as pool:
        return dict(zip(names, track(pool.map(of, names), "fingerprint", len(names)), strict=True))


def fingerprint(digest_of: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One sha256 hex of a whole model, from the digests of its tensors. Names may be any checkpoint's."""
    embeddings = {digest for name, digest in digest_of.items() if is_embedding(name)}
    lines = sorted(
        f"{canonical(name)} {digest}\n"
        for name, digest in digest_of.items()
        if not is_table(name, shapes[name]) and not (is_head(name) and digest in embeddings)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_table(name: str, shape: tuple[int, ...]) -> bool:
    """Whether old checkpoints store under this name something computed: rotary frequencies, a causal mask."""
    owner, _, last = name.rpartition(".")
    if last in ("inv_freq", "masked_bias"):
        return True
    causal = len(shape) == 4 and math.prod(shape[:2]) == 1
    return last == "bias" and causal and owner.rpartition(".")[2] in ("attn", "attention")
