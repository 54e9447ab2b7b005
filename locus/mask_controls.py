"""Control masks: as many weights of the same kind as a located mask has, somewhere else.

A located mask is worth its trouble only where it beats such masks. "The same kind" is meant to the weight: whole FFN
neurons by whole neurons with the same parts (gate, up, down, their biases), rows by rows, columns by columns, single
weights by single weights of the same tensor, queries by queries where one projection makes queries, keys and values.
Whole tensors have no other place in their own layer, so they move to layers in which the mask has nothing of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from locus.atlas import Atlas
from locus.errors import InputError
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.selection import Selection

Profile = Literal["layers", "uniform"]
"""layers: as many weights in each layer as the mask has there; uniform: drawn over all layers. Whole tensors always
move to other layers, and a bias or norm that is selected whole beside other weights of its layer stays with them."""

TRIES = 30
"""Draws for one control before it is said that there is none."""

Rng = np.random.Generator
BoolArray = NDArray[np.bool_]


def control_masks(
    model: Model, mask: WeightMask, n: int, profile: Profile = "layers", seed: int = 0
) -> list[WeightMask]:
    """Draw n masks of the same size and kind, none equal to the mask or to another one.

    The first masks of a longer list are those of a shorter one.

    Args:
        model: The model of the mask.
        mask: What was located.
        n: How many to draw.
        profile: Whether each layer keeps its number of weights.
        seed: Seed of the draws.

    Raises:
        InputError: no mask of this kind differs from it (a whole embedding, whole tensors of most layers), or fewer
            than n do.
    """
    return list(itertools.islice(drawn_masks(model, mask, profile, seed), n))


def drawn_masks(
    model: Model, mask: WeightMask, profile: Profile = "layers", seed: int = 0
) -> Iterator[WeightMask]:
    """As `control_masks`, one after the other; raises where no further one differs from those before it."""
    if profile not in get_args(Profile):
        raise InputError(f"control profile {profile!r}: not one of {', '.join(get_args(Profile))}")
    mask.check(model)
    if not mask.n_weights:
        raise InputError("no control can be made: the mask is empty")
    place = _Place.of(model, mask)
    seen = {_weights(mask)}
    for number in itertools.count():
        for attempt in range(TRIES):
            about = {"control": number, "seed": seed, "profile": profile, "of": dict(mask.provenance)}
            rng = np.random.default_rng((seed, number, attempt))
            drawn = WeightMask(place.draw(rng, profile), mask.fingerprint, about)
            if drawn.n_weights != mask.n_weights:
                raise RuntimeError(f"a control of {drawn.n_weights} weights for a mask of {mask.n_weights}")
            if (digest := _weights(drawn)) not in seen:
                seen.add(digest)
                yield drawn
                break
        else:
            found = f"no more than {number} controls" if number else "no control"
            raise InputError(
                f"{found} can be made: {model.name} has no other mask of the same size and kind to draw"
            )


def _weights(mask: WeightMask) -> str:
    return WeightMask(mask.entries).digest


@dataclass
class _Place:
    """A mask taken apart into what is moved, drawn or kept."""

    atlas: Atlas
    shapes: Mapping[str, tuple[int, ...]]
    kept: dict[str, Selection] = field(default_factory=dict)
    """Vectors selected whole beside other weights of their layer."""
    moved: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Layer -> tensors of it, without the block's name, that are selected whole."""
    neurons: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """Layer -> for each FFN neuron the parts selected of it, one bit for each part of the atlas."""
    slices: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """Parameter, axis, class -> how many whole rows (axis 0) or columns (1) besides those of neurons."""
    elements: dict[tuple[str, int], int] = field(default_factory=dict)
    """Parameter, class -> how many single weights besides."""
    touched: set[str] = field(default_factory=set)
    """Every parameter that the mask has anything of."""

    @classmethod
    def of(cls, model: Model, mask: WeightMask) -> _Place:
        place = cls(model.atlas, shapes_of(model.module), touched=set(mask.entries))
        partial = {place.layer(name) for name, one in mask.entries.items() if one.kind != "all"}
        moved: dict[int, list[str]] = {}
        rest: dict[str, BoolArray] = {}
        for name, selection in mask.entries.items():
            layer = place.layer(name)
            if selection.kind != "all":
                rest[name] = selection.dense().numpy()
            elif len(selection.shape) < 2 and layer in partial:
                place.kept[name] = selection
            elif layer is None:
                raise InputError(
                    f"no control can be made: the mask holds all of {name}, and the model has no other of its kind"
                )
            else:
                moved.setdefault(layer, []).append(place.kind(name))
        place.moved = {layer: tuple(kinds) for layer, kinds in moved.items()}
        place._take_neurons(rest)
        place._take_slices(rest)
        return place

    def layer(self, name: str) -> int | None:
        """The layer of a parameter; None for what stands outside the blocks."""
        for layer, block in enumerate(self.atlas.blocks):
            if name.startswith(f"{block}."):
                return layer
        return None

    def kind(self, name: str) -> str:
        """The parameter's name within its block."""
        layer = self.layer(name)
        return name if layer is None else name.removeprefix(f"{self.atlas.blocks[layer]}.")

    def classes(self, name: str) -> tuple[int, NDArray[np.int64]]:
        """The axis that parts of a tensor lie along, and the part that each index on it belongs to.

        In a fused gate-up projection gate is 0 and up 1. Of fused queries, keys and values the layout differs (behind
        each other, or one head after the other): two indices are alike here if they are the same part in both.
        """
        shape, layer = self.shapes[name], self.layer(name)
        if layer is None:
            return 0, np.zeros(shape[0] if shape else 1, np.int64)
        if parts := [part for part in self.atlas.neurons[layer] if part.param == name]:
            axis = parts[0].axis
            labels = np.full(shape[axis], len(parts), np.int64)
            for number, part in enumerate(parts):
                labels[part.offset : part.offset + self.atlas.d_mlp] = number
            return axis, labels
        heads, groups, width = self.atlas.n_heads, self.atlas.n_kv_heads, self.atlas.d_head
        fused = (heads + 2 * groups) * width
        if not self.atlas.attn_q and name.startswith(f"{self.atlas.attn[layer]}.") and fused in shape:
            block = np.arange(fused) // width
            behind = np.searchsorted([heads, heads + groups], block, side="right")
            period = max(1, heads // groups) + 2
            return shape.index(fused), behind * period + block % period
        return 0, np.zeros(shape[0] if shape else 1, np.int64)

    def _take_neurons(self, rest: dict[str, BoolArray]) -> None:
        """Take whole neuron parts out of what is left of the mask."""
        for layer, parts in enumerate(self.atlas.neurons):
            bits = np.zeros(self.atlas.d_mlp, np.int64)
            for number, part in enumerate(parts):
                if part.param not in rest:
                    continue
                along = np.moveaxis(rest[part.param], part.axis, 0)[
                    part.offset : part.offset + self.atlas.d_mlp
                ]
                whole = along.reshape(len(along), -1).all(1)
                along[whole] = False
                bits |= whole.astype(np.int64) << number
            if bits.any():
                self.neurons[layer] = bits

    def _take_slices(self, rest: Mapping[str, BoolArray]) -> None:
        """Count the whole rows or columns, then the single weights, of what is left."""
        for name, chosen in rest.items():
            axis, labels = self.classes(name)
            for along in range(chosen.ndim if chosen.ndim > 1 else 0):
                view = np.moveaxis(chosen, along, 0).reshape(chosen.shape[along], -1)
                whole = view.all(1)
                if view.shape[1] == 1 or not whole.any():
                    continue
                np.moveaxis(chosen, along, 0)[whole] = False
                kinds = labels if along == axis else np.zeros(chosen.shape[along], np.int64)
                for label, count in zip(*np.unique(kinds[whole], return_counts=True), strict=True):
                    self.slices[name, along, int(label)] = int(count)
            left = np.moveaxis(chosen, axis, 0).reshape(chosen.shape[axis] if chosen.ndim else 1, -1).sum(1)
            for label in np.unique(labels[left > 0]):
                self.elements[name, int(label)] = int(left[labels == label].sum())

    # ---- drawing

    def draw(self, rng: Rng, profile: Profile) -> dict[str, Selection]:
        """One mask of the same size."""
        entries = dict(self.kept)
        for name in self._elsewhere(rng):
            entries[name] = Selection("all", None, self.shapes[name])
        sheet = _Sheet(self, rng, profile == "uniform", frozenset(entries))
        sheet.take_neurons()
        for (name, axis, label), count in self.slices.items():
            sheet.take(name, axis, label, count)
        for (name, label), count in self.elements.items():
            sheet.take(name, None, label, count)
        return entries | {
            name: Selection.of(torch.from_numpy(chosen)) for name, chosen in sheet.taken.items()
        }

    def _elsewhere(self, rng: Rng) -> list[str]:
        """The whole tensors, in other layers drawn at random."""
        found: list[str] = []
        free = rng.permutation(self.atlas.n_layers).tolist()
        for kinds in self.moved.values():
            for layer in free:
                names = [f"{self.atlas.blocks[layer]}.{kind}" for kind in kinds]
                if all(name in self.shapes and name not in self.touched for name in names):
                    found += names
                    free.remove(layer)
                    break
            else:
                raise InputError(
                    f"no control can be made: the mask holds all of {', '.join(kinds)} in {len(self.moved)} of "
                    f"{self.atlas.n_layers} layers, which leaves too few other layers"
                )
        return found


@dataclass
class _Sheet:
    """One control while it is drawn."""

    place: _Place
    rng: Rng
    uniform: bool
    """Over all layers, not with the mask's number in each."""
    full: frozenset[str]
    """Parameters that are selected whole already."""
    taken: dict[str, BoolArray] = field(default_factory=dict)
    """What is drawn so far, by parameter."""

    def take_neurons(self) -> None:
        """Draw as many neurons with the same parts."""
        atlas, mine = self.place.atlas, self.place.neurons
        if not mine:
            return
        drawn = np.zeros((atlas.n_layers, atlas.d_mlp), np.int64)
        if self.uniform:
            some = np.concatenate([bits[bits > 0] for bits in mine.values()])
            layers = [i for i, parts in enumerate(atlas.neurons) if not self.full & {p.param for p in parts}]
            at = self.rng.choice(len(layers) * atlas.d_mlp, len(some), replace=False)
            drawn[np.array(layers)[at // atlas.d_mlp], at % atlas.d_mlp] = some
        else:
            for layer, bits in mine.items():
                some = bits[bits > 0]
                drawn[layer, self.rng.choice(atlas.d_mlp, len(some), replace=False)] = some
        for parts, bits in zip(atlas.neurons, drawn, strict=True):
            for number, part in enumerate(parts):
                wanted = np.flatnonzero(bits >> number & 1)
                if len(wanted):
                    np.moveaxis(self._held(part.param), part.axis, 0)[wanted + part.offset] = True

    def take(self, name: str, axis: int | None, label: int, count: int) -> None:
        """Draw whole rows or columns, or without an axis single weights, of one class of a tensor's kind."""
        for where, some in self._shares(name, axis, label, count):
            free = self._free(where, axis, label)
            if some > len(free):
                raise InputError(
                    f"no control can be made: {some} more of {where} are wanted, {len(free)} of their kind are left"
                )
            at = self.rng.choice(free, some, replace=False, shuffle=False)
            held = self._held(where)
            if axis is None:
                held.reshape(-1)[at] = True
            else:
                np.moveaxis(held, axis, 0)[at] = True

    def _shares(self, name: str, axis: int | None, label: int, count: int) -> list[tuple[str, int]]:
        """How many fall on each tensor of the kind: all on the mask's own, or in proportion to what is free."""
        place = self.place
        if not self.uniform or place.layer(name) is None:
            return [(name, count)]
        names = [f"{block}.{place.kind(name)}" for block in place.atlas.blocks]
        names = [n for n in names if place.shapes.get(n) == place.shapes[name] and n not in self.full]
        free = [len(self._free(n, axis, label)) for n in names]
        shares = self.rng.multivariate_hypergeometric(free, min(count, sum(free)), method="marginals")
        return [(n, int(some)) for n, some in zip(names, shares, strict=True) if some]

    def _free(self, name: str, axis: int | None, label: int) -> NDArray[np.int64]:
        """Rows or columns, or without an axis flat positions, of one class that are not taken yet."""
        along, labels = self.place.classes(name)
        shape, taken = self.place.shapes[name], self.taken.get(name)
        if axis is not None:
            free = labels == label if axis == along else np.ones(shape[axis], np.bool_)
            if taken is not None:
                free = free & ~np.moveaxis(taken, axis, 0).reshape(shape[axis], -1).any(1)
            return np.flatnonzero(free)
        sides = [1] * len(shape)
        sides[along] = shape[along]
        free = np.broadcast_to((labels == label).reshape(sides), shape)
        return np.flatnonzero(free if taken is None else free & ~taken)

    def _held(self, name: str) -> BoolArray:
        if name not in self.taken:
            self.taken[name] = np.zeros(self.place.shapes[name], np.bool_)
        return self.taken[name]
