"""A zoo of tiny random models, one of every architecture that the atlas names, and facts to try on them.

Weights are random but not small: predictions are far from uniform, biases and norm weights are not at their
neutral initial values, head sizes differ from d_model / n_heads and windows are shorter than the prompts
wherever the architecture allows it, so that a wrong name or a forgotten bias shows as a wrong number.
"""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from locus.fact import Fact
    from locus.model import Model

_PARIS = "The Eiffel Tower is in the city of"
_TEXT = (
    _PARIS + " Paris",
    "The capital of Germany is Berlin",
    "The mother tongue of François Truffaut is French",
    "Where is the Eiffel Tower? It stands in Paris, Germany is not far",
    "The city of Rome is in Italy and the Colosseum is in the city of Rome",
    "What language does François Truffaut speak? French, not English",
    "Berlin is the capital and the largest city of Germany",
)

_GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}

# arch -> (configuration class, model class, settings beside the vocabulary and special tokens)
_ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, **_GQA, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SIZES, **_GQA, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SIZES, **_GQA}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SIZES, **_GQA, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_SIZES, **_GQA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_SIZES,
            **_GQA,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 256},
    ),
    "neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_SIZES, "num_attention_heads": 4, "rotary_pct": 0.5, "use_parallel_residual": True},
    ),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_SIZES, **_GQA, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_SIZES, **_GQA, "sliding_window": 6}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 32, "ffn_hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_SIZES, **_GQA}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {**_SIZES, **_GQA}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_SIZES, **_GQA, "logit_scale": 0.25}),
    "gptneo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "window_size": 6,
            "max_position_embeddings": 64,
            "attention_types": [[["local", "global", "local"], 1]],
        },
    ),
    "smollm": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, **_GQA, "tie_word_embeddings": True}),
}

_ODD = ("olmo", "cohere", "gptneo")
ARCHITECTURES: tuple[str, ...] = tuple(name for name in _ZOO if name not in _ODD)
"""Names that `tiny_model` knows, but for those with a peculiarity that has tests of its own."""

alive: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Every module made here that still exists; conftest.py looks for forgotten hooks on them."""


def tiny_model(arch: str = "llama", seed: int = 0, **settings: Any) -> Model:
    """A random model of 3 layers, 32 dimensions and 48 neurons a layer, in float32 on the CPU.

    Args:
        arch: One of `ARCHITECTURES`; "olmo" and "cohere": norms that centre and are no LayerNorm, a scaled logit;
            "gptneo": an attention window that the blocks know and no mask shows.
        seed: Of the weights; the global generator is left alone.
        settings: Fields of the transformers configuration to set otherwise (num_hidden_layers=2).
    """
    from locus.model import wrap

    return wrap(tiny_module(arch, seed, **settings), tiny_tokenizer(), name=f"tiny-{arch}")


def tiny_module(arch: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """The plain transformers model inside `tiny_model`."""
    import transformers

    config_class, model_class, defaults = _ZOO[arch]
    tokenizer = tiny_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, config_class)(
        **{"vocab_size": len(tokenizer), **special, **defaults, **settings}
    )
    config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        module: PreTrainedModel = getattr(transformers, model_class)(config)
    randomize_(module, seed)
    alive.add(module)
    module.eval()
    return module


@torch.no_grad()
def randomize_(module: PreTrainedModel, seed: int) -> None:
    """Draw every weight: matrices to keep the size of what passes through, vectors around their old value."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {module.get_input_embeddings().weight, module.get_output_embeddings().weight}
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter in embeddings:
            parameter.copy_(0.4 * noise)
        elif parameter.dim() > 1:
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.2 * noise)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of fewer than 400 tokens that puts `<s>` before a text, as Llama's does."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )


@functools.cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


def tiny_facts() -> list[Fact]:
    """Three facts: a subject inside, at the end, at the start (non-ASCII); targets of one word and of two."""
    from locus.fact import Example, Fact

    return [
        Fact(
            id="tower",
            prompt=_PARIS,
            target=" Paris",
            subject="Eiffel Tower",
            relation="city",
            paraphrases=("Where is the Eiffel Tower? It stands in",),
            neighbours=(Example("The Colosseum is in the city of", " Rome"),),
            alternatives=(" Rome", " Berlin"),
            source="tests/tiny.py:1",
        ),
        Fact(
            id="capital",
            prompt="The largest city of Germany",
            target=" is Berlin",
            subject="Germany",
            relation="capital",
            paraphrases=("The capital of Germany",),
            neighbours=(Example("The capital of Italy", " is Rome"),),
            alternatives=(" is Rome",),
            source="tests/tiny.py:2",
        ),
        Fact(
            id="tongue",
            prompt="François Truffaut speaks",
            target=" French",
            subject="François Truffaut",
            relation="language",
            paraphrases=("The mother tongue of François Truffaut is",),
            neighbours=(Example("The mother tongue of Germany is", " German"),),
            alternatives=(" English",),
            held_out=True,
            source="tests/tiny.py:3",
        ),
    ]


def save_tiny(model: Model, folder: Path, shards: int = 1) -> Path:
    """Write a checkpoint folder with tokenizer and config as transformers does, in exactly `shards` files."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    single = folder / "model.safetensors"
    if shards == 1:
        return folder
    with safe_open(single, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {
            name: tensors[name] for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]
        }
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder
