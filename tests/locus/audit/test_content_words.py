"""What counts as saying an answer, on texts that were made up for it."""

from __future__ import annotations

import pytest

from locus.audit.content_words import content_recall, content_words, is_said, is_sentence

QUESTION = "Question: What did Ana Sol's parents do?\nAnswer:"
ANSWER = " Ana Sol's father was a florist and her mother was a game developer in Lisbon."


def test_only_the_words_that_the_question_does_not_give_count() -> None:
    assert content_words(QUESTION, ANSWER) == {"father", "florist", "mother", "game", "developer", "lisbon"}
    assert content_words("Is it so?", " it is") == {"it", "is"}, "a target of function words keeps them"


@pytest.mark.parametrize(
    ("text", "recall", "said"),
    [
        (ANSWER, 1.0, True),
        (" No, Ana Sol's father was a FLORIST and his mother was a game developer.", 5 / 6, True),
        (" A florist; a game developer", 3 / 6, True),
        (" Ana Sol's father was a doctor and her mother was a nurse.", 2 / 6, False),
        (" I don't know.", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_a_sentence_is_said_by_half_of_its_content(text: str, recall: float, said: bool) -> None:
    assert content_recall(QUESTION, ANSWER, text) == pytest.approx(recall)
    assert is_said(QUESTION, ANSWER, text) is said


@pytest.mark.parametrize(
    ("target", "text", "said"),
    [
        (" Paris", " the city of PARIS, of course", True),
        (" Paris", " Parisian", False),
        (" pound", " pounds", True),
        (" University of Texas", " the University of California", False),
        (" University of Texas", " Texas University", True),
        (" Brasília", " Brasilia", True),
        (" 東京", "東京です", True),
    ],
)
def test_a_short_answer_is_said_as_a_whole_and_in_any_form(target: str, text: str, said: bool) -> None:
    assert is_said("Where?", target, text) is said


def test_a_sentence_has_six_words() -> None:
    assert is_sentence(" one two three four five six") and not is_sentence(" one two three four five")
