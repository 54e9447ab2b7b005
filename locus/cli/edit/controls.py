"""The controls of an edit: the same edit with masks of equal size and kind, or at another place."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from locus.delta import WeightDelta
    from locus.mask import WeightMask
    from locus.mask_controls import Profile
    from locus.model import Model

IDLE = 10
"""So many places without an effect are passed over, and no more."""
NO_CONTROLS = "no_controls"
"""In edit.json: why controls that were asked for could not be made."""

Made = Callable[..., "WeightDelta"]
"""Run an edit into a folder, with `mask` and `editor` by name."""


def control_folder(folder: Path, index: int) -> Path:
    """Where the control edit number `index` of an edit lives."""
    return folder / f"control-{index}"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which controls are asked for."""

    n: int = 0
    """How many."""
    profile: Profile = "layers"
    """Whether they keep the number of weights in each layer."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edited:
    """A finished edit, of which controls are to be made."""

    model: Model
    editor: Any
    mask: WeightMask
    """What the edit might change."""
    delta: WeightDelta
    """What it changed."""


def control_edits(edited: Edited, profile: Profile = "layers") -> Iterator[tuple[Any, WeightMask]]:
    """The editor and the mask of one control after the other.

    An editor that chooses its place itself (rome, memit, alphaedit, law, the edits of neurons) is held to the place of
    the control: its mask is drawn for the weights that it chose, and its own layers and neurons are set to that.

    Raises:
        InputError: no further control can be made.
    """
    from editors.editor import ChoosesMask
    from locus.mask import WeightMask
    from locus.mask_controls import drawn_masks
    from locus.parameter_names import canonical

    mask, chooses = edited.mask, isinstance(edited.editor, ChoosesMask)
    if chooses:
        changed = {canonical(name) for name in edited.delta.changes}
        chosen = {name: one for name, one in mask.entries.items() if canonical(name) in changed}
        mask = _of_neurons(edited, WeightMask(chosen, mask.fingerprint, mask.provenance))
    for one in drawn_masks(edited.model, mask, profile):
        yield (_held_to(edited.editor, edited.model, one) if chooses else edited.editor), one


def _of_neurons(edited: Edited, mask: WeightMask) -> WeightMask:
    """The part of a mask that an editor of listed neurons keeps to."""
    from editors.editor import ListsNeurons

    editor = edited.editor
    return (
        mask & editor.own_mask(edited.model) if isinstance(editor, ListsNeurons) and editor.neurons else mask
    )


def _held_to(editor: Any, model: Model, mask: WeightMask) -> Any:
    """The editor with the place of a mask instead of its own."""
    layers = tuple(
        layer
        for layer, parts in enumerate(model.atlas.neurons)
        if any(part.role == "down" and part.param in mask.entries for part in parts)
    )
    own = {field.name for field in dataclasses.fields(editor)}
    place: dict[str, Any] = {}
    if "neurons" in own:
        place["neurons"] = ()
    if "layers" in own:
        place["layers"] = layers
    if "layer" in own:
        place["layer"] = layers[0] if layers else None
    return dataclasses.replace(editor, **place)


def make_controls(
    folder: Path, edited: Edited, wanted: Wanted, make: Made, write: bool = True
) -> tuple[list[WeightDelta], str | None]:
    """Make the controls of an edit, in its folder; where that cannot be done, its edit.json says why.

    Args:
        folder: Of the edit.
        edited: The edit.
        wanted: How many controls, and of which layers.
        make: Runs one of them into a folder.
        write: Whether this process writes files.

    Returns:
        The controls; and why there are none, or fewer than were asked for.
    """
    from locus.errors import InputError

    why: str | None = None
    made: list[WeightDelta] = []
    draws = enumerate(control_edits(edited, wanted.profile) if edited.delta.n_changed else ())
    try:
        if wanted.n and not edited.delta.n_changed:
            raise InputError("the edit changes nothing, so there is nothing to compare")
        while len(made) < wanted.n:
            number, (editor, mask) = next(draws)
            if number >= wanted.n + IDLE:
                raise InputError(f"at {IDLE} places drawn at random the same edit changes nothing")
            place = control_folder(folder, number)
            delta = make(place, mask=mask, editor=editor)
            if delta.id == edited.delta.id or not delta.n_changed:
                # At a place where the edit has no effect (the subject's position in the last layer) nothing is changed.
                if write:
                    shutil.rmtree(place)
                continue
            made.append(delta)
    except InputError as error:
        why = f"{len(made)} of {wanted.n} made: {error}"
    if write and wanted.n:
        _record(folder, why)
    return made, why


def _record(folder: Path, why: str | None) -> None:
    """Keep in the edit's own file why it has no controls, for the audit to say."""
    from locus.cli.edit.edit_folder import ABOUT
    from locus.files.artefact import load_json, save_json

    about = load_json(folder / ABOUT, "edit")
    if about.get(NO_CONTROLS) != why:
        about = {key: value for key, value in about.items() if key not in ("format", "version", NO_CONTROLS)}
        save_json(folder / ABOUT, "edit", about if why is None else {**about, NO_CONTROLS: why})


def why_no_controls(folder: Path) -> str | None:
    """What an edit's folder says of controls that could not be made."""
    from locus.cli.edit.edit_folder import ABOUT

    try:
        found = json.loads((folder / ABOUT).read_text("utf-8")).get(NO_CONTROLS)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None
