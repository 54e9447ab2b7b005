"""A checkpoint folder, read lazily: only headers until a tensor is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from locus.errors import InputError
from locus.files.tensorfile import TensorFile
from locus.fingerprint import digests, fingerprint, started
from locus.parameter_names import is_embedding, is_head, resolve

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


class Checkpoint:
    """The tensors of a Hugging Face folder, in one `model.safetensors` or in shards with an index.

    Attributes:
        folder: Where it is.
        files: File name -> open TensorFile, in order of name.
        shapes: Tensor name -> shape, for every tensor.
        dtypes: Tensor name -> dtype.

    Raises:
        InputError: no folder, no safetensors in it, a shard that is missing, damaged, truncated or named
            outside the folder, or a tensor that is stored twice.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = (
                "is a file, a checkpoint is a folder" if self.folder.exists() else "there is no such folder"
            )
            raise InputError(f"{self.folder}: {what}")
        refuse_pointers(self.folder)
        if (self.folder / "adapter_config.json").exists():
            raise InputError(f"{self.folder}: holds an adapter; merge it into its base model first")
        weight_map = self._weight_map()
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        self.files: Mapping[str, TensorFile] = MappingProxyType(
            {n: TensorFile(self.folder / n) for n in names}
        )
        self._file_of: dict[str, str] = {}
        for shard, file in self.files.items():
            for name in file.tensors:
                if name in self._file_of:
                    raise InputError(
                        f"{self.folder}: tensor {name} is stored twice, in {self._file_of[name]} "
                        f"and {shard}; remove one of them"
                    )
                self._file_of[name] = shard
        for name, shard in (weight_map or {}).items():
            if name not in self.files[shard].tensors:
                raise InputError(f"{self.folder / shard}: lacks tensor {name}, which {INDEX} says it holds")
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for file in self.files.values() for name, info in file.tensors.items()
        }
        self.dtypes: Mapping[str, torch.dtype] = {
            name: info.dtype for file in self.files.values() for name, info in file.tensors.items()
        }

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for file in self.files.values() for info in file.tensors.values())

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says; empty where there is none."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
        if not isinstance(config, dict):
            raise InputError(f"{path}: is not a JSON object; fetch it again")
        return config

    def file_of(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._file_of[name]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, by the model's name for it or the checkpoint's.

        Raises:
            InputError: there is none of this name, or the file ends early.
        """
        name = self.resolve(name)
        return self.files[self._file_of[name]].read(name)

    def digest(self, name: str) -> str:
        """sha256 hex of one tensor's dtype, shape and bytes, streamed."""
        file = self.files[self._file_of[name]]
        digest = started(file.tensors[name].dtype, file.tensors[name].shape)
        for piece in file.chunks(name):
            digest.update(piece)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 hex over every tensor, streamed once in threads.

        The same for any sharding, and for the model in memory where its dtype is the same.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(digests(self.shapes, self.digest), self.shapes)

    def resolve(self, name: str) -> str:
        """The checkpoint's name for a model's parameter: see `locus.parameter_names.resolve`.

        Raises:
            InputError: none matches, or more than one does.
        """
        return resolve(name, self.shapes, str(self.folder))

    def places(self, name: str) -> tuple[str, ...]:
        """Every tensor of the checkpoint that holds this parameter.

        One, except where a tied checkpoint stores the token embedding and, bit for bit the same, the head.

        Raises:
            InputError: none matches, or more than one does.
        """
        first = self.resolve(name)
        other = is_head if is_embedding(first) else is_embedding if is_head(first) else None
        twins = [twin for twin in self.shapes if other is not None and other(twin)]
        same = [twin for twin in twins if self.digest(twin) == self.digest(first)]
        return (first, *same) if same and self._tied() else (first,)

    def _tied(self) -> bool:
        """Whether the head is the token embedding; only asked where their bits are the same."""
        config = self.config.get("text_config", self.config)
        if isinstance(config, dict) and "tie_word_embeddings" in config:
            return bool(config["tie_word_embeddings"])
        if "model_type" not in self.config:
            return True
        from transformers import AutoConfig

        try:
            known = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError):
            return True
        return bool(getattr(known.get_text_config(), "tie_word_embeddings", True))

    def _weight_map(self) -> dict[str, str] | None:
        """Tensor -> shard, None for a single file. A single file wins over an index, as in transformers."""
        path = self.folder / INDEX
        if (self.folder / SINGLE).exists():
            return None
        if not path.exists():
            raise self._no_weights()
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error}); fetch it again") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path}: has no weight_map; fetch it again")
        for shard in weight_map.values():
            named = (
                isinstance(shard, str)
                and Path(shard).name == shard
                and len(shard) < 200
                and shard.isprintable()
            )
            if not named or not shard.endswith(".safetensors"):
                raise InputError(
                    f"{path}: names the shard {str(shard)[:80]!r}; shards are .safetensors files beside the index"
                )
        missing = sorted({shard for shard in weight_map.values() if not (self.folder / shard).exists()})
        if missing:
            raise InputError(
                f"{self.folder}: {len(missing)} shards are missing ({missing[0]}, …); fetch them again"
            )
        return weight_map

    def _no_weights(self) -> InputError:
        names = sorted(path.name for path in self.folder.iterdir())
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        others = [name for name in names if name.endswith(".safetensors")]
        if pickled:
            return InputError(
                f"{self.folder}: has only pickled weights ({pickled[0]}); they can run code and are never "
                "read; where you trust them, convert with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        if others:
            return InputError(f"{self.folder}: has {others[0]} but neither {SINGLE} nor {INDEX}; rename it")
        return InputError(f"{self.folder}: holds neither {SINGLE} nor {INDEX}; is this a checkpoint folder?")


def refuse_pointers(folder: Path) -> None:
    """Raise InputError where a file of the folder is a pointer of Git LFS that was never fetched."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json", ".model", ".txt", ".jinja") or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                start = file.read(len(_POINTER))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        if start == _POINTER:
            raise InputError(
                f"{path}: a Git LFS pointer, not the file itself: fetch it with git lfs pull, or with hf download"
            )
