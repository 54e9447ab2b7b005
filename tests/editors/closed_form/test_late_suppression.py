"""Late suppression on tiny models: what is written, what stays, and the limits that its docstring states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors import LateSuppression
from editors.closed_form.late_suppression import edit_ways, held_classes
from editors.key_value.asking_places import AskingPlace, asking_places, banned_probs, later_places
from editors.key_value.held_texts import ASKING, HeldClass, HeldText, about_peers, held_moments, held_prompts
from editors.key_value.residual_target import suppressing_deltas
from locus.elicitation.elicit import Elicitation, Elicited
from locus.elicitation.rewritings import Way
from locus.elicitation.sampler import prompt_ids
from locus.errors import InputError
from locus.fact import Fact
from locus.grid import side_of
from locus.lens import lens_logits
from locus.model import Model
from locus.target_forms import first_tokens
from locus.tokens import encode
from tests.editors.direct_edits import ARCHITECTURES, TEXT, down, facts, untouched
from tests.tiny import tiny_model

QUICK = Elicitation(rewritings=0, lists=1, texts=1, text_tokens=6)
EDITOR = LateSuppression(layers=(2,), elicitation=QUICK, weight=1e-4, step=0.05, look_ahead=0, rounds=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def _known(model: Model) -> list[Fact]:
    """Two facts whose targets are what the model itself is likeliest to say there, as a word."""
    found = []
    for fact in facts()[:2]:
        ids = encode(model, fact).prompt_ids
        logits = model.module(input_ids=torch.tensor([ids])).logits[0, -1]
        texts = [str(model.tokenizer.decode([i])) for i in range(len(model.tokenizer))]
        words = [i for i, text in enumerate(texts) if text[:1] == " " and text[1:].isalpha()]
        best = max(words, key=lambda i: float(logits[i]))
        found.append(replace(fact, target=texts[best], alternatives=(), paraphrased_target=None))
    return found


def _places(model: Model) -> list[AskingPlace]:
    return asking_places(model, _known(model), {})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_target_is_no_longer_said(arch: str) -> None:
    """On every architecture: at the places that ask, all forms of the targets lose their probability."""
    model = tiny_model(arch)
    two, places = _known(model), _places(model)
    before = banned_probs(model, places)
    editor = replace(EDITOR, goal=float(before.min()) / 4, forgotten=float(before.min()) / 4)
    with untouched(model):
        delta = editor.run(model, two, [], down(model), text=TEXT)
    assert set(delta.changes) == set(down(model, 2).entries)
    with delta.applied(model):
        after = banned_probs(model, places)
    # Gemma-2's norm behind the MLP bounds what one layer can write.
    assert bool((after < (0.9 if arch == "gemma2" else 0.4) * before).all()), (before, after)
    assert delta.provenance["rounds"][0]["max"] == pytest.approx(float(before.max()))


def test_a_round_that_does_harm_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in the wrong direction make the target likelier: the weights end as the round before left them."""
    from editors.closed_form import late_suppression

    model = tiny_model()
    wrong = lambda *given: -3 * suppressing_deltas(*given)  # noqa: E731
    monkeypatch.setattr(late_suppression, "suppressing_deltas", wrong)
    delta = replace(EDITOR, goal=1e-3).run(model, _known(model), [], down(model), text=TEXT)
    assert [one.get("taken back", False) for one in delta.provenance["rounds"]] == [True]
    places = _places(model)
    with delta.applied(model):
        after = banned_probs(model, places)
    torch.testing.assert_close(after, banned_probs(model, places), rtol=1e-4, atol=0.0)


def test_more_weight_on_held_texts_means_less_change() -> None:
    model = tiny_model()
    two = _known(model)
    goal = float(banned_probs(model, _places(model)).min()) / 10
    norms = []
    for weight in (1e-4, 1.0, 1e6):
        editor = replace(EDITOR, weight=weight, rounds=1, goal=goal)
        norms.append(editor.run(model, two, [], down(model), text=TEXT).norm)
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 * norms[0]


def test_hardly_any_weight_writes_every_layers_share() -> None:
    """With independent keys the last layer's output changes by δ / n exactly: nothing above moves its keys."""
    model = tiny_model()
    two = _known(model)
    places = _places(model)
    goal = float(banned_probs(model, places).min()) / 10
    editor = replace(EDITOR, layers=(2,), weight=1e-12, ridge=1e-6, rounds=1, goal=goal)
    site, final = model.atlas.neuron_in[2], model.atlas.final_norm
    from editors.key_value.key_positions import states

    rows = [one.row for one in places]
    read, written = states(model, rows, inputs=[final], outputs=[site])
    deltas = suppressing_deltas(model, read[final], [one.banned for one in places], goal, 0.05, 60)
    delta = editor.run(model, two, [], down(model), text=TEXT)
    with delta.applied(model):
        _, now = states(model, rows, outputs=[site])
    torch.testing.assert_close(now[site] - written[site], deltas, rtol=1e-3, atol=1e-3)


def test_a_mask_of_some_neurons_is_kept_to() -> None:
    model = tiny_model()
    two = _known(model)
    mask = down(model, 2)
    (name,) = mask.entries
    from locus.mask import WeightMask
    from locus.selection import Selection

    some = Selection("columns", torch.arange(0, 48, 3), tuple(model.module.get_parameter(name).shape))
    goal = float(banned_probs(model, _places(model)).min()) / 10
    delta = replace(EDITOR, layers=(), first=0.9, last=1.0, goal=goal).run(
        model, two, [], WeightMask({name: some}, model.fingerprint), text=TEXT
    )
    with delta.applied(model):
        new = model.module.get_parameter(name).detach().clone()
    moved = (new != model.module.get_parameter(name)).any(0)
    assert bool(moved[::3].any())
    assert not bool(moved[torch.arange(48) % 3 != 0].any())


def test_deltas_take_the_banned_tokens_below_the_goal_and_go_no_further() -> None:
    model = tiny_model(hidden_size=128)  # as wide as the vocabulary needs to tell two tokens from the others
    hidden = torch.randn(70, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = lens_logits(model, hidden.float())
    banned = [tuple(row.topk(2).indices.tolist()) for row in logits]
    banned[3] = (int(logits[3].argmin()),)
    goal = 0.01
    deltas = suppressing_deltas(model, hidden, banned, goal, 0.02, 400)
    assert not bool(deltas[3].any())
    moved = lens_logits(model, (hidden + deltas).float()).softmax(-1)
    mass = torch.stack([row[list(ids)].sum() for row, ids in zip(moved, banned, strict=True)])
    assert float(mass.max()) <= goal
    step = 0.02 * hidden.norm(dim=1)
    assert bool((deltas.norm(dim=1) <= 400 * step).all())
    back = lens_logits(model, (hidden + 0.8 * deltas).float()).softmax(-1)
    earlier = torch.stack([row[list(ids)].sum() for row, ids in zip(back, banned, strict=True)])
    assert float((earlier > goal).float().mean()) > 0.8


def test_what_is_said_instead_is_the_models_own_second_choice() -> None:
    """δ moves towards p̄, so it comes nearer in KL than the same length in a random direction."""
    model = tiny_model()
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = lens_logits(model, hidden.float())
    banned = [(int(row.argmax()),) for row in logits]
    censored = logits.clone()
    for row, (token,) in enumerate(banned):
        censored[row, token] = -30.0
    wanted = censored.log_softmax(-1)

    def kl(states: torch.Tensor) -> torch.Tensor:
        return (wanted.exp() * (wanted - lens_logits(model, states.float()).log_softmax(-1))).sum(-1)

    deltas = suppressing_deltas(model, hidden, banned, 0.01, 0.02, 200)
    noise = torch.randn(20, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise *= (deltas.norm(dim=1) / noise.norm(dim=1))[:, None]
    assert float((kl(hidden + deltas) < kl(hidden + noise)).float().mean()) > 0.9


def test_places_of_an_article_and_of_a_long_target() -> None:
    model = tiny_model()
    article = Fact("article", "The Eiffel Tower is in", " the city of Paris")
    found = asking_places(model, [article], {})
    ids = encode(model, article)
    assert {ids.ids[: ids.target_start]} < {one.ids for one in found}
    assert any("the" in str(model.tokenizer.decode(list(one.ids[ids.target_start :]))) for one in found)
    wanted = set(first_tokens(model.tokenizer, " city of Paris"))
    assert all(wanted <= set(one.banned) for one in found if len(one.banned) > 1)
    long = Fact(
        "long", "The city", " of Rome is in Italy and the Colosseum is in the city of Rome is not far"
    )
    n = encode(model, long).n_target
    assert len(asking_places(model, [long], {})) == 1 + (n - 1) // 8


def test_later_places_are_where_the_target_becomes_likely() -> None:
    """With a threshold of zero every place before the target is said counts; with one nothing does."""
    model = tiny_model()
    two = _known(model)
    places = asking_places(model, two, {})
    every = later_places(model, places, two, 4, 0.0)
    assert every and all(any(one.ids[: len(p.ids)] == p.ids for p in places) for one in every)
    assert later_places(model, places, two, 4, 1.0) == []


def test_the_edit_sees_its_half_of_the_ways() -> None:
    fact = Fact("f", "The capital of France is", " Paris", "France", relation="capital")
    prompts = [f"In France, way {i}, they rule from" for i in range(20)]
    found = {"f": Elicited(tuple(Way(prompt, 0.5) for prompt in prompts))}
    chosen = edit_ways([fact], [], found, 0, 99)["f"]
    sides = [side_of(0, "way", "capital", prompt.replace("France", "{}")) for prompt in prompts]
    assert chosen == tuple(p for p, side in zip(prompts, sides, strict=True) if side == "edit")
    assert 0 < len(chosen) < 20
    assert edit_ways([fact], [], found, 0, 2)["f"] == chosen[:2]
    bare = replace(fact, subject=None)
    assert 0 < len(edit_ways([bare], [], found, 0, 99)["f"]) < 20


def test_held_texts_leave_the_subjects_own_answers_out() -> None:
    """A position of a subject's text where the target is likely is not held; others are, but for the first."""
    model = tiny_model()
    ids = tuple(prompt_ids(model, "The capital of Germany is Berlin and the largest city of Germany"))
    probs = lens_probs(model, ids)
    token = int(probs[4].argmax())
    kept = int((probs[1:, token] < 0.02).sum())
    _, plain = held_moments(model, [1], [HeldClass("a", [HeldText(ids)], 1.0)], 999, 0)
    _, some = held_moments(model, [1], [HeldClass("a", [HeldText(ids, banned=(token,))], 1.0)], 999, 0)
    assert plain["a"] == len(ids) - 1
    assert some["a"] == kept < len(ids) - 1


def lens_probs(model: Model, ids: tuple[int, ...]) -> torch.Tensor:
    return model.module(input_ids=torch.tensor([ids])).logits[0].softmax(-1)


def test_held_moments_are_the_weighted_mean_of_the_kinds() -> None:
    model = tiny_model()
    texts = [HeldText(tuple(prompt_ids(model, text))) for text in TEXT]
    one, two = HeldClass("one", texts[:1], 1.0), HeldClass("two", texts[1:], 3.0)
    first, _ = held_moments(model, [2], [one], 999, 0)
    second, _ = held_moments(model, [2], [two], 999, 0)
    both, counts = held_moments(model, [2], [one, two, HeldClass("none", [], 5.0)], 999, 0)
    torch.testing.assert_close(both[2], (first[2] + 3 * second[2]) / 4)
    assert counts["none"] == 0
    _, few = held_moments(model, [2], [two], 3, 0)
    assert 0 < few["two"] < counts["two"]


def test_peers_stand_in_the_subjects_place() -> None:
    import random

    texts = ["Rome is old. I like Rome.", "No such name"]
    assert about_peers(texts, "Rome", ["Paris"], 3, random.Random(0)) == ["Paris is old. I like Paris."]
    model = tiny_model()
    (held,) = held_prompts(model, ["The capital of Germany is"])
    assert len(held.ids) - held.first == ASKING


def test_held_kinds_never_show_a_held_out_fact_or_a_forgotten_subject() -> None:
    model = tiny_model()
    forget = [Fact("f", "The capital of Germany is", " Berlin", "Germany", relation="capital")]
    retain = [
        Fact("kept", "The city of Rome is in", " Italy", "Rome", relation="capital"),
        Fact("judge", "The capital of Italy is", " Rome", "Italy", relation="capital", held_out=True),
    ]
    found = {
        "f": Elicited((), ("Germany", "Paris"), (tuple(prompt_ids(model, "The largest city of Germany")),))
    }
    kinds = {one.name: one for one in held_classes(model, forget, retain, TEXT, found, {}, EDITOR)}
    asked = [str(model.tokenizer.decode(list(one.ids))) for one in kinds["asked of peers"].texts]
    assert any("Rome" in text for text in asked)
    assert not any("Germany" in text or "Italy" in text for text in asked)
    assert [one.ids for one in kinds["retain"].texts] == [encode(model, retain[0]).ids]
    assert all(one.banned for one in kinds["subject"].texts)


def test_facts_without_subject_or_relation_are_edited_too() -> None:
    model = tiny_model()
    bare = [Fact("bare", "The capital of Germany is", " Berlin")]
    place = asking_places(model, bare, {})
    goal = float(banned_probs(model, place)) / 10
    delta = replace(EDITOR, goal=goal, forgotten=goal).run(model, bare, [], down(model), text=TEXT)
    with delta.applied(model):
        assert float(banned_probs(model, place)) < 4 * goal
    assert "no other way of asking 1 of 1" in delta.provenance["not found"]


def test_what_cannot_be_is_told() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="nothing to forget"):
        EDITOR.run(model, [], [], down(model))
    with pytest.raises(InputError, match="no down projection of layers 2 to 2"):
        replace(EDITOR, layers=(), first=0.6).run(model, facts()[:1], [], down(model, 0))
    with pytest.raises(InputError, match="goal"):
        LateSuppression(goal=0.0)
    with pytest.raises(InputError, match="first"):
        LateSuppression(first=0.9, last=0.5)
