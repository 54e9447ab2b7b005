"""What a command shares with its method reaches the nested settings of the same name too."""

from __future__ import annotations

from typing import Any

from editors import NPO, WHP
from locus.cli.options import method_settings, settings_from


def test_the_seed_of_the_command_is_every_seed() -> None:
    """Also that of the first stage of whp; given by its own name it has its own value."""
    made = method_settings("edit", WHP, [], {"seed": 7, "batch_tokens": 100})
    assert (made.training.seed, made.reinforce.seed) == (7, 7)
    assert (made.training.batch_tokens, made.reinforce.batch_tokens) == (100, 100)
    own = method_settings("edit", WHP, ["--reinforce-seed", "3"], {"seed": 7, "batch_tokens": None})
    assert (own.training.seed, own.reinforce.seed) == (7, 3)
    assert own.reinforce.batch_tokens == WHP().reinforce.batch_tokens
    assert settings_from("[edit]", NPO, {}, {"seed": 5}).training.seed == 5


def test_the_page_of_a_method_shows_the_value_that_holds(capsys: Any) -> None:
    from locus.cli.options import method_app

    method_app("edit", WHP, {"seed": 7}).help_print([])
    page = capsys.readouterr().out
    assert "--reinforce-seed" in page and "7" in page.split("--reinforce-seed")[1].split("--")[0]
