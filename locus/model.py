"""A model and everything needed to speak with it: weights, tokenizer, atlas, the folder it came from.

The weights stay a plain transformers model: nothing is wrapped, renamed or replaced, so that whatever is
found or changed here holds for the model that everybody else loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from locus import embedded
from locus.atlas import Atlas
from locus.atlas_reader import read_atlas
from locus.checkpoint import Checkpoint, refuse_pointers
from locus.errors import InputError
from locus.fingerprint import fingerprint_of
from locus.fsdp_loader import load_sharded
from locus.parallel.sharding import device_of, reshard
from locus.progress import without_bars_of_transformers
from locus.quiet_stderr import unheard
from locus.weight_checks import Agreement, refuse_disagreement, refuse_nonfinite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOADED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model, ready to be traced and edited."""

    module: PreTrainedModel
    """The plain transformers model: in eval mode, no parameter requires a gradient."""
    tokenizer: PreTrainedTokenizerBase
    """A fast tokenizer (character offsets are needed to find subjects)."""
    atlas: Atlas
    """Names of the model's parts."""
    name: str
    """As the user called it."""
    folder: Path | None = None
    """The checkpoint folder it was read from; None for a model made in memory."""
    bos: int | None = None
    """Token put before every text; None for none."""
    chat: bool = False
    """Whether facts are asked as turns of a conversation, through the tokenizer's chat template."""

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device that computes the token embedding."""
        weight = self._embedding
        if weight.is_meta:  # accelerate has offloaded it, and knows where it computes
            hook: Any = getattr(self.module.get_submodule(self.atlas.embed), "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or "meta")
        return device_of(weight)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the token embedding."""
        return self._embedding.dtype

    @property
    def _embedding(self) -> torch.Tensor:
        weight: torch.Tensor = self.module.get_submodule(self.atlas.embed).weight  # type: ignore[assignment]
        return weight

    @property
    def n_embedded(self) -> int:
        """Rows of the token embedding: the token ids that the model can read are below it."""
        return self._embedding.shape[0]

    def check_embedded(self, id: int) -> None:
        """Refuse a token that no row of the embedding stands for.

        Raises:
            InputError: its id is not below the number of rows; says both, and the mend.
        """
        if id >= self.n_embedded:
            raise InputError(
                f"token {self.tokenizer.convert_ids_to_tokens(id)!r} has id {id}, the embedding has "
                f"{self.n_embedded} rows: resize it (model.resize_token_embeddings(len(tokenizer))) and save "
                "again, or take the model's own tokenizer"
            )

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens, where the configuration names one."""
        config = self.module.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(length := getattr(config, name, None), int):
                return length
        return None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every tensor of the checkpoint (of the memory, where there is no folder)."""
        return fingerprint_of(self.module) if self.folder is None else Checkpoint(self.folder).fingerprint()


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    bos: str | int | None = "auto",
    chat: bool = False,
    trust_remote_code: bool = False,
    shard: bool = False,
    offload: bool = False,
) -> Model:
    """Load a causal language model by folder, hub id, or `smollm2` (embedded, needs no hub).

    Args:
        name: A checkpoint folder (single file or sharded safetensors), a hub id, or "smollm2".
        dtype: "auto" is the checkpoint's own on an accelerator and float32 on a CPU (where bfloat16 is
            slow and coarse); or a torch dtype or its name.
        device: "auto" is "cuda" where there is one, else "cpu".
        device_map: accelerate's placement over several devices ("auto", "balanced", a mapping); then
            `device` is not used.
        attn_implementation: transformers' attention implementation, "sdpa" or "eager" for example.
        bos: Token before every text: "auto" is whatever the tokenizer itself puts there, None or "none"
            is nothing, else a token or its id.
        chat: Ask facts as turns of a conversation, through the tokenizer's chat template.
        trust_remote_code: Run modelling code that comes with the checkpoint. Off unless you trust it.
        shard: Spread it over the processes of a job (`locus.parallel.ranks.joined`), each of which calls this
            and holds a part: for training what no device holds whole. See `locus.fsdp_loader`.
        offload: Of a sharded model, keep the parts in main memory.

    Returns:
        The model in eval mode, no parameter requiring a gradient.

    Raises:
        InputError: no such folder or hub id, not a causal language model, no fast tokenizer, an unknown
            dtype, device or token, a damaged checkpoint, weights that the file lacks or has in another shape or
            as codes, NaN or infinite weights, an architecture whose parts have no exact names, or a model to be
            sharded without a job or over a device_map.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if (shard and device_map is not None) or (offload and not shard):
        raise InputError(
            "a model is spread over processes (shard, with offload if need be) or over devices (device_map)"
        )
    device = _device(device)
    folder = checkpoint_folder(str(name))
    checkpoint = Checkpoint(folder)  # refuses a missing shard or a truncated file in plain words
    with without_bars_of_transformers(), _told(folder, str(name)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        kwargs: dict[str, Any] = {"dtype": _dtype(dtype, device, device_map is not None)}
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        if device_map is not None:
            kwargs["device_map"] = device_map
        if shard:
            module = load_sharded(
                folder, config, kwargs["dtype"], device, offload=offload, attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        else:
            # Whatever file and model do not agree on is refused below, in our words; transformers would go on.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
            module, info = loaded
            refuse_disagreement(Agreement.of_loading(module, info, checkpoint), module, checkpoint, str(name))
        tokenizer = _tokenizer(folder, trust_remote_code)
        if device_map is None and not shard:
            torch.nn.Module.to(module, device)
        refuse_nonfinite(module, str(name))
        model = wrap(module, tokenizer, name=str(name), bos=bos, folder=folder, chat=chat)
        if shard:
            reshard(module)  # drawing the atlas has run it
        return model


def load_shape(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    bos: str | int | None = "auto",
    chat: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """A model without its weights, on the meta device: names, shapes and tokenizer, for estimates of its memory.

    Args:
        name: As in `load_model`; of the folder only the configuration and the tokenizer are read.
        dtype: "auto" is the configuration's own; else a torch dtype or its name.
        attn_implementation: As in `load_model`.
        bos: As in `load_model`.
        chat: As in `load_model`.
        trust_remote_code: As in `load_model`.

    Raises:
        InputError: as `load_model`, but for damaged weights, which it never looks at.
    """
    folder = checkpoint_folder(str(name))
    module = module_shape(
        folder, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    with without_bars_of_transformers(), _told(folder, str(name)):
        tokenizer = _tokenizer(folder, trust_remote_code)
        return wrap(module, tokenizer, name=str(name), bos=bos, folder=folder, chat=chat)


def module_shape(
    folder: Path,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A checkpoint's modules on the meta device, from its configuration alone; of any architecture.

    Args:
        folder: The checkpoint.
        dtype: As in `load_shape`.
        attn_implementation: As in `load_model`.
        trust_remote_code: As in `load_model`.

    Raises:
        InputError: there is no usable configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_pointers(folder)
    with without_bars_of_transformers(), _told(folder, str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        chosen = _dtype(dtype, torch.device("meta"), mapped=False)
        kwargs: dict[str, Any] = (
            {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        )
        with torch.device("meta"):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(config, "dtype", None) or torch.float32 if chosen == "auto" else chosen,
                trust_remote_code=trust_remote_code,
                **kwargs,
            )
        return module


def wrap(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "in-memory",
    bos: str | int | None = "auto",
    folder: Path | None = None,
    chat: bool = False,
) -> Model:
    """Make a `Model` of a transformers model and a fast tokenizer that are already in memory.

    The module itself is used, not a copy: it is put into eval mode and its parameters stop requiring
    gradients.

    Raises:
        InputError: the tokenizer is not a fast one, `bos` is no token of it, it has no template to `chat` by, or a
            part of the architecture has no exact name.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{name}: its tokenizer has no fast version, which is needed to find subjects by offsets"
        )
    module.eval().requires_grad_(False)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{name}: its tokenizer has no chat template; leave --chat out")
    model = Model(module, tokenizer, read_atlas(module), name, folder, _bos(tokenizer, bos, name), chat)
    if model.bos is not None:
        model.check_embedded(model.bos)
    return model


def bridge(model: Model) -> Any:
    """A TransformerLens TransformerBridge over a copy of the model: hooks and caches in its vocabulary.

    The copy costs the model's memory once more; the model itself is not touched (a bridge replaces
    submodules in place). TransformerLens puts the tokenizer's own `bos_token` before a text; hand it token ids
    (`locus.tokens.encode`) where that is not `model.bos`.
    """
    import copy
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    twin = copy.deepcopy(model.module)
    twin.config.architectures = [model.atlas.architecture]  # a model made in memory does not say
    with tempfile.TemporaryDirectory() as folder:  # TransformerLens reads a tokenizer from where it came
        model.tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            model.name,
            hf_model=twin,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device=str(model.device),
            dtype=model.dtype,
        )


def checkpoint_folder(name: str) -> Path:
    """The local folder that holds the checkpoint `name`: a folder, `smollm2`, or a hub id, fetched if need be.

    Raises:
        InputError: there is no such folder, and the hub does not give it.
    """
    if name == embedded.NAME:
        return embedded.embedded_folder()
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{name}: a model is a folder (config.json beside its safetensors), this is a file")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"{name}: there is no such folder; give a checkpoint folder, a hub id (owner/name), or {embedded.NAME}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{name}: no such folder here, and the hub did not give it ({reason}); check the name, log in if it is "
            f"gated, or use {embedded.NAME}, which needs no hub"
        ) from error


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device}: not available here ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device, mapped: bool) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" and not mapped else "auto"
    if dtype not in LOADED_DTYPES:
        raise InputError(f"dtype {dtype}: not one of auto, {', '.join(LOADED_DTYPES)}")
    return LOADED_DTYPES[dtype]


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, after a first word: one that was spoilt panics there."""
    from transformers import AutoTokenizer

    with unheard():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        tokenizer("a")
    return tokenizer


def _bos(tokenizer: Any, bos: str | int | None, name: str) -> int | None:
    if bos is None or bos == "none":
        return None
    if bos == "auto":
        bare = tokenizer("a", add_special_tokens=False).input_ids
        full = tokenizer("a").input_ids
        if full[: len(bare)] == bare:
            return None
        if full[1 : 1 + len(bare)] == bare:
            return int(full[0])
        raise InputError(
            f"{name}: its tokenizer puts more than one token before a text; say which with --bos TOKEN"
        )
    if isinstance(bos, int) or bos.isdecimal():
        if not 0 <= int(bos) < len(tokenizer):
            raise InputError(f"--bos {bos}: {name} has tokens 0 to {len(tokenizer) - 1}")
        return int(bos)
    if (known := tokenizer.get_vocab().get(bos)) is None:
        raise InputError(f"--bos {bos}: not a token of {name}; give auto, none, a token or its id")
    return int(known)


@contextlib.contextmanager
def _told(folder: Path, name: str) -> Iterator[None]:
    """Turn what transformers says of a bad folder into one line."""
    try:
        yield
    except (InputError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except (
        BaseException
    ) as error:  # a hostile folder raises anything: tokenizers gives bare Exceptions, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{name}: {_reason(folder, error)}") from error


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
_LONGEST = 300


def _reason(folder: Path, error: BaseException) -> str:
    """Why a folder cannot be loaded, in one line that is whole: what transformers says, with the mend it leaves out."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "its modelling code comes with it; read that code, and where you trust it, add --trust-remote-code"
    if not any(next(folder.glob(name), None) for name in _TOKENIZERS) and "tokenizer" in text.lower():
        return "there is no tokenizer in the folder (tokenizer.json): copy it from the model that this one was made of"
    said = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rpartition(' ')[0]} …"
    return f"transformers cannot load it as a causal language model: {said}"
