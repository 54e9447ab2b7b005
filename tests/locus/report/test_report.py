"""Pages that stand alone, escape what they are given, and show every figure with its n and interval."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from locus.audit import AuditSettings, RelearnAttack, audit
from locus.delta import WeightDelta
from locus.report import audit_report, plot_trace, terminal_table, trace_report
from locus.report.chart import HEIGHT, WIDTH, Chart, HeatMap, Series, ticks
from locus.report.locate_report import LocatedRow, agreement_headline
from locus.report.page import number, percent, span
from locus.report.trace_report import kind_name
from locus.trace import FactTrace, Trace
from tests.tiny import tiny_facts, tiny_model

EVIL = '<script>alert("x")</script> & <b>'


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    model = tiny_model("llama")
    forget = tiny_facts()

    def scaled_by(factor: float) -> WeightDelta:
        module = copy.deepcopy(model.module)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(factor)
        return WeightDelta.between(model, module)

    settings = AuditSettings(relearn=RelearnAttack(at=(1, 2)), rounding=("int4",))
    done = audit(
        model,
        {"located": scaled_by(1.01)},
        forget,
        [],
        ["The city of Rome is in Italy"],
        {"random": scaled_by(0.99)},
        settings=settings,
    )
    doc = done.document()
    doc["facts"][0]["prompt"] = EVIL
    doc["model"]["name"] = EVIL
    return doc


class _Page(HTMLParser):
    """Which tags are open at the end, and every attribute that could fetch something."""

    void = frozenset({"meta", "br", "link", "img", "input", "rect", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.titles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.titles += sum(key == "title" for key, _ in attrs)
        self.fetches += [
            f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")
        ]
        if tag in ("script", "iframe", "link"):
            self.fetches.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def _checked(path: Path) -> tuple[str, _Page]:
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert not page.open and not page.fetches
    assert not re.search(r"https?://|@import|url\(", text), "the page must stand alone"
    assert "<script" not in text
    return text, page


def test_the_audits_page_stands_alone_and_escapes_facts(document: dict[str, Any], tmp_path: Path) -> None:
    text, page = _checked(audit_report(document, tmp_path))
    assert "&lt;script&gt;alert" in text
    assert page.titles > 40, "definitions, n and intervals are on hover"
    for label in ("p(target)", "paraphrases right", "KL on neutral text", "Readable inside", "Relearning"):
        assert label in text
    assert "not measured" in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_every_figure_carries_its_n_and_interval(document: dict[str, Any]) -> None:
    for state in document["states"]:
        for key, figure in state["figures"].items():
            if figure is not None:
                assert figure["n"] >= 1 and figure["low"] <= figure["mean"] <= figure["high"], key
                assert document["metrics"][key]["definition"], key


def test_the_terminal_shows_the_same_states(document: dict[str, Any]) -> None:
    from rich.console import Console

    document = copy.deepcopy(document)
    document["states"][1]["name"] = "[red]located"
    document["headline"]["[red]located"] = document["headline"]["located"]
    document["verdicts"]["[red]located"] = document["verdicts"]["located"]
    console = Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(document))
    shown = console.export_text()
    assert "base" in shown and "[red]located" in shown and "random" in shown and "p(target)" in shown


def fact_trace(subject: tuple[int, int] | None = (1, 3)) -> FactTrace:
    grid = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 0.5
    grid[:, 0] = 0.1
    kinds = ("block", "mlp", "attn")
    return FactTrace(
        fact_id="tower",
        prompt=EVIL,
        target=" $5",
        tokens=("<s>", "The", " $Tower\n", " is", " <b>", " in"),
        subject=subject,
        corrupted=(1, 2),
        scores={kind: grid for kind in kinds},
        standard_error={kind: torch.zeros(4, 6) for kind in kinds},
        clean_prob=0.7,
        corrupted_prob=0.1,
        clean_score=0.7,
        corrupted_score=0.1,
        seed=0,
        samples=10,
        patched_forwards=720,
        engine="replay",
    )


def test_a_heat_map_is_written_as_picture_and_as_paper(tmp_path: Path) -> None:
    png = plot_trace(fact_trace(), tmp_path / "deep" / "tower.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert plot_trace(fact_trace(None), tmp_path / "tower.pdf").read_bytes().startswith(b"%PDF")


def test_the_traces_page_stands_alone_and_marks_the_subject(tmp_path: Path) -> None:
    trace = Trace(
        (fact_trace(), fact_trace(None)), {"samples": 10}, "f" * 64, tiny_model("llama").atlas, EVIL
    )
    text, _ = _checked(trace_report(trace, tmp_path))
    assert "The*" in text and "$Tower↵*" in text and "&lt;s&gt;" in text
    assert text.count('class="cell"') == 2 * 3 * 4 * 5, "cells without effect are not drawn"
    assert "last subject token (n 1)" in text and "10" in text


def test_the_traces_page_says_what_was_measured_and_what_was_estimated(tmp_path: Path) -> None:
    """Windows in the titles, the metric and the corruption in words, and how much of a hybrid trace is exact."""
    exact = torch.zeros(4, 6, dtype=torch.bool)
    exact[:, 2] = True
    fact = replace(fact_trace(), verified={"mlp": exact}, rank_correlation={"mlp": 0.875}, clean_score=-0.3)
    settings = {"window": 10, "metric": "logprob", "corruption": "swap", "direction": "noise"}
    trace = Trace((fact,), settings, "f" * 64, tiny_model("llama").atlas, "m")
    text, _ = _checked(trace_report(trace, tmp_path))
    for words in (
        "MLP output, 10 layers around",
        "log-probability in nats",
        "exchanged for that of another fact",
        "pale squares and low curves",
        "rank correlation with exact values 0.88",
        "exact: 4 of 24 squares (MLP output)",
    ):
        assert words in text, words
    plain, _ = _checked(trace_report(replace(trace, settings={}), tmp_path))
    assert "Gaussian noise" in plain and "Then one state at a time is put back" in plain


def test_kinds_have_names_that_people_read() -> None:
    assert kind_name("attn", 4) == "attention output, 4 layers around"
    assert kind_name("mlp", 1) == "MLP output" and kind_name("block", 10) == "block output"
    assert kind_name("query:3") == "query of head 3"
    assert kind_name("value:1") == "value of key/value head 1"


def test_a_heat_map_shades_from_nothing_to_the_strongest() -> None:
    drawn = HeatMap("t", "h-mlp", ["a*", "b"], [True, False], [[0.0, 0.2], [0.4, -0.1]], "0", "1", "effect")
    assert [(c.shade, c.hover.split(" · ")[0]) for c in drawn.cells] == [(0.5, "a"), (1.0, "b"), (0.0, "b")]
    assert "layer 0: effect +0.4" in drawn.cells[1].hover


@pytest.mark.parametrize(
    ("low", "high", "whole"), [(0.0, 1.0, False), (0, 29, True), (0.0, 0.003, False), (-0.2, 0.7, False)]
)
def test_ticks_span_the_axis_with_round_numbers(low: float, high: float, whole: bool) -> None:
    marks = ticks(low, high, whole)
    assert marks[0] <= low and marks[-1] >= high and 3 <= len(marks) <= 8
    steps = {round(b - a, 9) for a, b in pairwise(marks)}
    assert len(steps) == 1


def test_a_chart_keeps_its_lines_inside_and_its_gaps_open() -> None:
    series = Series("one", [0, 1, 2], [0.0, None, 0.5], "s-base", low=[0.0, 0.1, 0.4], high=[0.1, 0.2, 0.6])
    chart = Chart("t", "c", "x", "y", [series])
    (line,) = chart.lines
    assert len(line.points) == 2 and line.band
    assert all(0 <= p.x <= WIDTH and 0 <= p.y <= HEIGHT for p in line.points)
    assert line.points[0].y > line.points[1].y, "up is more"


def test_numbers_as_a_reader_wants_them() -> None:
    assert [percent(x) for x in (0.0, 1.0, 0.5, 0.0123, 0.0001, 0.9996, None)] == [
        "0 %", "100 %", "50 %", "1.2 %", "< 0.1 %", "100.0 %", "not finite",
    ]  # fmt: skip
    assert number(0.05512) == "0.0551" and number(-3.0) == "−3" and number(12345.6) == "12\u202f346"
    assert (
        span("1 %", "5 %") == "1 to 5 %"
        and span("0", "0") == "0"
        and span("< 0.1 %", "2 %") == "< 0.1 to 2 %"
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_real_browser_nothing_sticks_out(document: dict[str, Any], tmp_path: Path, width: int) -> None:
    page = audit_report(document, tmp_path)
    trace = Trace((fact_trace(),), {}, "f" * 64, tiny_model("llama").atlas, "tiny")
    for path in (page, trace_report(trace, tmp_path / "trace")):
        script = (
            "<script>document.title = innerWidth + ' ' + document.documentElement.scrollWidth</script></body>"
        )
        path.write_text(path.read_text().replace("</body>", script))
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --dump-dom"
        command = [
            "chromium",
            *flags.split(),
            f"--user-data-dir={tmp_path}/chromium",
            f"--window-size={width},900",
        ]
        dom = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        seen = re.search(r"<title>(\d+) (\d+)</title>", dom)
        assert seen is not None
        inner, needed = map(int, seen.groups())
        assert inner == width and needed <= inner


def test_the_headline_of_localizers_compares_masks_of_like_size() -> None:
    """A tensor of ten weights inside a mask of a thousand is not agreement; two masks of 1,000 and 900 may agree."""
    rows = [LocatedRow(name, "", [1], n, "", 1.0, {}, "") for name, n in (("a", 1000), ("b", 900), ("c", 10))]
    overlaps = [[1.0, 0.4, 1.0], [0.4, 1.0, 0.9], [1.0, 0.9, 1.0]]
    assert agreement_headline(rows, overlaps) == "a and b share 40% of their weights."
    assert agreement_headline(rows[1:], [[1.0, 0.9], [0.9, 1.0]]) == "b: 900 weights; c: 10 weights."


def test_a_token_is_shown_as_it_can_be_seen() -> None:
    from locus.report.token_text import plain, seen

    shown = {
        " the": "the",
        "\n": "↵",
        "a\tb": "a⇥b",
        "  ": "␣",
        "\x17": "\\x17",
        "a\u00a0b": "a\\xa0b",
        "$x$": "$x$",
    }
    assert {token: seen(token, 8) for token in shown} == shown
    assert seen("Constantinople", 8) == "Constan…"
    assert plain("$5 or $6") == r"\$5 or \$6"
