"""The gate: thresholds that an audit must meet before a model is released. Missing evidence fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locus.audit.metric_table import FIGURES
from locus.errors import InputError
from locus.files.toml import read_toml

if TYPE_CHECKING:
    from locus.audit.run import Audit

RATIOS = ("kept", "perplexity", "remaining", "recovered")
VERDICT_QUESTIONS = ("forgotten", "general", "spared", "intact", "hidden", "returns", "localized")
ANSWERS = ("yes", "partly", "no", "unclear", "not measured")


@dataclass(frozen=True)
class Threshold:
    """One number that must lie within bounds."""

    table: Literal["figures", "ratios", "change"]
    key: str
    low: float | None
    high: float | None
    end: Literal["mean", "worst"] = "mean"
    """"worst" asks of the bad end of the 95 % interval, not of the mean."""

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        parts = [f"at least {self.low:g}"] if self.low is not None else []
        parts += [f"at most {self.high:g}"] if self.high is not None else []
        return " and ".join(parts) + (" at the worse end of its interval" if self.end == "worst" else "")


@dataclass(frozen=True)
class Gate:
    """What a release must meet."""

    thresholds: Sequence[Threshold]
    verdicts: Mapping[str, tuple[str, ...]]
    """Question -> answers that pass."""


@dataclass(frozen=True)
class GateResult:
    """One requirement, met or not."""

    edit: str
    what: str
    wanted: str
    found: str
    passed: bool


def read_gate(path: str | Path) -> Gate:
    """Read a gate from a TOML file.

        [figures."forget.prob"]
        max = 0.02
        [figures."held_out.top1"]
        min = 0.7
        end = "worst"            # the worse end of the interval
        [ratios.kept]            # kept, perplexity, remaining, recovered: beside the base
        min = 0.8
        [change.off_mask]
        max = 0
        [verdicts]
        forgotten = "yes"        # or a list of answers that pass

    Raises:
        InputError: no such file, not TOML, an unknown figure, question or setting, or no requirement at all.
    """
    path = Path(path)
    table = read_toml(path, "the README shows one")
    known = {
        "figures": tuple(FIGURES),
        "ratios": RATIOS,
        "change": ("off_mask", "lost_bfloat16", "lost_cast", "share"),
    }
    thresholds: list[Threshold] = []
    for name, keys in known.items():
        for key, bounds in _table(path, table, name).items():
            if key not in keys and not (name == "figures" and key.startswith("harness.")):
                raise InputError(f"{path}: [{name}] has no {key!r}; there are {', '.join(keys)}")
            thresholds.append(_threshold(path, name, key, bounds))
    verdicts = {}
    for question, answers in _table(path, table, "verdicts").items():
        passing = tuple(answers) if isinstance(answers, list) else (answers,)
        if question not in VERDICT_QUESTIONS or not passing or any(a not in ANSWERS[:4] for a in passing):
            raise InputError(
                f"{path}: [verdicts] {question}: questions are {', '.join(VERDICT_QUESTIONS)}; answers yes, partly, no"
            )
        verdicts[question] = passing
    if table:
        raise InputError(
            f"{path}: unknown table [{next(iter(table))}]; there are figures, ratios, change, verdicts"
        )
    if not thresholds and not verdicts:
        raise InputError(
            f"{path}: the gate asks for nothing; a gate without requirements would pass anything"
        )
    return Gate(thresholds, verdicts)


def check_gate(audit: Audit | Mapping[str, Any], gate: Gate) -> list[GateResult]:
    """Hold every edit of an audit against a gate. What was not measured fails."""
    doc = audit if isinstance(audit, Mapping) else audit.document()
    results = []
    for state in doc["states"]:
        if state["role"] != "edit":
            continue
        results += [_check(state, t) for t in gate.thresholds]
        answers = {v["question"]: v["answer"] for v in doc["verdicts"][state["name"]]}
        for question, passing in gate.verdicts.items():
            found = answers.get(question, "not measured")
            passed = found in passing and found != "not measured"
            results.append(
                GateResult(state["name"], f"verdict {question}", " or ".join(passing), found, passed)
            )
    return results


def _table(path: Path, table: dict[str, Any], name: str) -> dict[str, Any]:
    """Take one table out of the file; empty where it is not there."""
    inner = table.pop(name, {})
    if not isinstance(inner, dict):
        raise InputError(f"{path}: {name} must be a table: [{name}] or [{name}.KEY]")
    return inner


def _threshold(path: Path, table: str, key: str, bounds: object) -> Threshold:
    if (
        not isinstance(bounds, dict)
        or not bounds.keys() <= {"min", "max", "end"}
        or not bounds.keys() & {"min", "max"}
    ):
        raise InputError(f'{path}: [{table}.{key}] takes min, max (at least one) and end = "mean" or "worst"')
    numbers = {name: bounds[name] for name in ("min", "max") if name in bounds}
    if any(type(v) not in (int, float) or not abs(v) < 1e300 for v in numbers.values()):
        raise InputError(f"{path}: [{table}.{key}] min and max must be numbers")
    end = bounds.get("end", "mean")
    if end not in ("mean", "worst"):
        raise InputError(f'{path}: [{table}.{key}] end = {end!r}: "mean" or "worst"')
    low, high = (None if name not in numbers else float(numbers[name]) for name in ("min", "max"))
    return Threshold(table, key, low, high, end)  # type: ignore[arg-type]


def _check(state: Mapping[str, Any], t: Threshold) -> GateResult:
    what = t.key if t.table == "figures" else f"{t.table} {t.key}"
    low, high = _found(state, t)
    if low is None or high is None:
        return GateResult(state["name"], what, t.wanted, "not measured", False)
    passed = (t.low is None or low >= t.low) and (t.high is None or high <= t.high)
    shown = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return GateResult(state["name"], what, t.wanted, shown, passed)


def _found(state: Mapping[str, Any], t: Threshold) -> tuple[float | None, float | None]:
    """What is held against the lower and against the upper bound."""
    if t.table == "change":
        value = None if state["change"] is None else state["change"].get(t.key)
        return (None, None) if value is None else (float(value), float(value))
    figure = state[t.table].get(t.key)
    if figure is None:
        return None, None
    if t.end == "worst":
        return figure["low"], figure["high"]
    return figure["mean"], figure["mean"]
