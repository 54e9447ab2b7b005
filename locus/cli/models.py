"""`locus models`: the architectures whose parts have exact names."""

from __future__ import annotations

from locus.cli.options import Talking

TESTED = {
    "LlamaForCausalLM": "Llama 1 to 3, SmolLM, TinyLlama, Vicuna",
    "MistralForCausalLM": "Mistral 7B",
    "Qwen2ForCausalLM": "Qwen 1.5, 2, 2.5",
    "Qwen3ForCausalLM": "Qwen 3, dense",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3, text only",
    "GPT2LMHeadModel": "GPT-2",
    "GPTNeoXForCausalLM": "Pythia, GPT-NeoX",
    "GPTJForCausalLM": "GPT-J",
    "PhiForCausalLM": "Phi 1, 1.5, 2",
    "Phi3ForCausalLM": "Phi 3, Phi 4",
    "OPTForCausalLM": "OPT",
    "FalconForCausalLM": "Falcon",
    "Olmo2ForCausalLM": "OLMo 2",
}
"""Class -> models of that architecture. The tests hold every named part of these against the model itself."""


def models(*, talking: Talking = Talking()) -> None:
    """List the architectures that are tested, and what holds for others."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("architecture")
    table.add_column("such as")
    for name, examples in TESTED.items():
        table.add_row(name, examples)
    table.caption = (
        "smollm2 is embedded and needs no hub. Any other decoder that TransformerLens knows is tried: every name is "
        "checked against the model before use, and what cannot be named exactly is refused."
    )
    table.caption_justify = "left"
    talking.finish({"embedded": ["smollm2"], "tested": TESTED}, table)
