"""Facts that share a key: a layer cannot send one key to two values, so such facts are searched for and written as one.

"France has as its capital …" and "France has as its currency …" are the same up to the subject's last token, and so is
all that a layer reads there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from editors.key_value.key_positions import Place, mean_by_owner, rows, states
from locus.fact import Fact
from locus.model import Model

SAME_KEY = 0.99
"""Keys of a larger cosine than this are one key."""


def by_key(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    prefixes: Sequence[str],
    place: Place,
    batch_tokens: int = 4096,
) -> list[list[Fact]]:
    """The facts in groups of one key each, in order of their first facts; most facts are alone.

    Args:
        model: As it is in memory.
        facts: At least one.
        layer: Whose down projection reads the keys.
        prefixes: Context prefixes that a key is averaged over, in addition to the plain prompt.
        place: The last token of the subject or of the prompt.
        batch_tokens: Padded tokens in one forward.
    """
    site = model.atlas.neuron_in[layer]
    seen = rows(model, facts, prefixes, place)
    read, _ = states(model, seen, inputs=[site], batch_tokens=batch_tokens)
    keys = F.normalize(mean_by_owner(read[site], seen, len(facts)), dim=1)
    leaders: list[int] = []
    groups: list[list[Fact]] = []
    for number, fact in enumerate(facts):
        cosines = keys[leaders] @ keys[number] if leaders else torch.zeros(0)
        if len(cosines) and float(cosines.max()) > SAME_KEY:
            groups[int(cosines.argmax())].append(fact)
        else:
            leaders.append(number)
            groups.append([fact])
    return groups
