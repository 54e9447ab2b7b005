"""Neutral text that a model writes itself: something to hold it by where no other text is at hand.

Sampled from the model as it is, so a KL to it on this text asks no more than that it goes on as it would have.
"""

from __future__ import annotations

from itertools import islice

import torch

from locus import progress
from locus.model import Model
from locus.readers.scripts import units

OPENINGS = ("The", "In", "It", "When", "A", "Most", "After", "People", "We", "There", "Every", "For")
"""First words of the paragraphs, in turn."""


@torch.no_grad()
def generated_text(model: Model, n: int = 24, n_tokens: int = 96, seed: int = 0) -> list[str]:
    """Paragraphs sampled at temperature 1; each ends at the model's end of text, or after `n_tokens`.

    Args:
        model: Left as it is.
        n: How many. One that comes out empty or a second time is left out.
        n_tokens: Most tokens of each.
        seed: Of the draws; the global generators are left alone.
    """
    words = [OPENINGS[i % len(OPENINGS)] for i in range(n)]
    by_length: dict[int, list[list[int]]] = {}
    for word in words:
        ids = model.tokenizer(word, add_special_tokens=False).input_ids
        ids = ids if model.bos is None else [model.bos, *ids]
        by_length.setdefault(len(ids), []).append(ids)
    on_gpu = [model.device] if model.device.type == "cuda" else []
    texts: dict[str, None] = {}
    with torch.random.fork_rng(devices=on_gpu), progress.task("write text", total=n) as line:
        torch.manual_seed(seed)
        for rows in by_length.values():
            start = torch.tensor(rows, device=model.device)
            written = model.module.generate(  # type: ignore[operator]
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=n_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                pad_token_id=_pad(model),
            )
            for row in written.tolist():
                text = model.tokenizer.decode(row, skip_special_tokens=True)
                paragraph = " ".join(str(text).split())
                if len(list(islice(units(paragraph), 2))) > 1:
                    texts[paragraph] = None
            line.advance(len(rows))
    return list(texts)


def _pad(model: Model) -> int:
    """What fills up the rows that ended early: the end of text, which is dropped from what is read."""
    ends = model.module.config.get_text_config().eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return 0 if first is None else int(first)
