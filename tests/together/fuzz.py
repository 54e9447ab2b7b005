"""Hostile input, thousands of times: every reader must read it or refuse it in one line.

    python -m tests.together.fuzz --inputs 10000 --seed 0

A fault is: an exception other than InputError (a traceback for the user), more than ten seconds, more than two
gigabytes of address space beyond the start, or a change outside the output folder. The first few of each kind
are printed with what made them; the exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locus.errors import InputError
from tests.tiny import save_tiny, tiny_model
from tests.together.mutation import MUTATORS, OUTSIDE

LIMIT_SECONDS = 10
LIMIT_BYTES = 2 << 30
_TINY: dict[str, int] = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 12}


class Hang(BaseException):
    """The time is up."""


@dataclass(frozen=True)
class Target:
    """A good file, and what is done with a spoilt one."""

    good: str
    """Below the world."""
    use: Callable[[Path, Path], object]
    """Gets the folder in which that file is spoilt, and a folder that it may write to."""


def facts(place: Path, out: Path) -> None:
    """Read as `locus trace` does; the ids name files."""
    from locus.fact import read_facts, write_facts

    (file,) = [path for path in place.iterdir() if path.name.startswith("facts")]
    found = read_facts(file)
    for fact in found:
        (out / f"{fact.id}.png").write_bytes(b"")
    write_facts(out / "facts.jsonl", found)
    assert len(read_facts(out / "facts.jsonl")) == len(found)


def mask(place: Path, out: Path) -> None:
    """Read, hold against the model, save."""
    from locus.mask import WeightMask, shapes_of

    found = WeightMask.load(place / "mask.safetensors")
    found.check(_model())
    found.complement(shapes_of(_model().module)).save(out / "mask.safetensors")


def delta(place: Path, out: Path) -> None:
    """Read, apply in memory, export."""
    from locus.checkpoint_export import export
    from locus.delta import WeightDelta

    found = WeightDelta.load(place / "delta.safetensors")
    found.to_json()
    with contextlib.suppress(InputError), found.applied(_model()):
        pass
    export(place.parent / "model", found, out / "checkpoint")


def scores(place: Path, out: Path) -> None:
    """Read and cut."""
    from locus.scores import NeuronScores

    NeuronScores.load(place / "scores.safetensors").top("10%").save(out / "mask.safetensors")


def trace(place: Path, out: Path) -> None:
    """Read and draw."""
    from locus.report import trace_report
    from locus.trace import Trace

    trace_report(Trace.load(place), out)
    _no_live_markup(out / "report.html")


def lens(place: Path, out: Path) -> None:
    from locus.lens import load_grids

    load_grids(place / "lens.safetensors")


def audit(place: Path, out: Path) -> None:
    """Compare it with itself."""
    from locus.cli.compare import compare
    from locus.cli.options import Talking

    shutil.copy(place / "audit.json", out / "audit.json")
    compare(place, out / "audit.json", out=out, talking=Talking(quiet=True))
    _no_live_markup(out / "compare.html")


def gate(place: Path, out: Path) -> None:
    from locus.audit.gate import read_gate

    read_gate(place / "gate.toml")


def config(place: Path, out: Path) -> None:
    """All that `locus run` does before it loads a model."""
    from locus.cli.options import Talking
    from locus.cli.run import Walk

    Walk.read(place / "run.toml", out, Talking(quiet=True))


def weights(place: Path, out: Path) -> None:
    """Fingerprint, compare, export."""
    from locus.checkpoint_export import Checkpoint, diff, export
    from locus.delta import WeightDelta

    Checkpoint(place).fingerprint()
    diff(place.parent / "sharded", place)
    export(place, WeightDelta.load(place.parent / "delta" / "delta.safetensors"), out / "checkpoint")


def model(place: Path, out: Path) -> None:
    """Load it, and encode a fact."""
    from locus.fact import Example
    from locus.model import load_model
    from locus.tokens import encode

    encode(load_model(place), Example("The Eiffel Tower is in the city of", " Paris"))


def state(place: Path, out: Path) -> None:
    """A training state that was left to be resumed."""
    from editors.training.run_state import load_state

    values = {"w": torch.nn.Parameter(torch.zeros(3))}
    load_state(place, "run", values, torch.optim.AdamW(values.values()))


TARGETS: dict[str, Target] = {
    "facts": Target("facts/facts.jsonl", facts),
    "facts, known_1000": Target("known/facts.json", facts),
    "facts, CounterFact": Target("counterfact/facts.json", facts),
    "facts, TOFU": Target("tofu/facts.jsonl", facts),
    "facts, text": Target("text/facts.txt", facts),
    "facts, gzip": Target("gzip/facts.jsonl.gz", facts),
    "mask": Target("mask/mask.safetensors", mask),
    "delta": Target("delta/delta.safetensors", delta),
    "scores": Target("scores/scores.safetensors", scores),
    "trace": Target("trace/trace.safetensors", trace),
    "trace.json": Target("trace/trace.json", trace),
    "lens": Target("lens/lens.safetensors", lens),
    "audit": Target("audit/audit.json", audit),
    "gate": Target("gate/gate.toml", gate),
    "run": Target("run/run.toml", config),
    "weights": Target("model/model.safetensors", weights),
    "shard": Target("sharded/model-00001-of-00002.safetensors", weights),
    "index": Target("sharded/model.safetensors.index.json", weights),
    "config": Target("model/config.json", model),
    "tokenizer": Target("model/tokenizer.json", model),
    "tokenizer config": Target("model/tokenizer_config.json", model),
    "state": Target("state/state.safetensors", state),
}


def _no_live_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8", errors="replace")
    assert "<script>alert" not in text and "<img src=x" not in text, "markup of the input is live in the page"


_kept: dict[str, Any] = {}


def _model() -> Any:
    if "model" not in _kept:
        _kept["model"] = tiny_model("llama", **_TINY)
    return _kept["model"]


def make_world(world: Path) -> None:
    """A good file of every kind."""
    from editors.training.run_state import RunState, save_state
    from locus.audit import AuditSettings
    from locus.audit import audit as judge
    from locus.delta import WeightDelta
    from locus.fact import write_facts
    from locus.lens import lens_grid, save_grids
    from locus.mask import WeightMask
    from locus.scores import NeuronScores
    from locus.tokens import encode
    from tests.tiny import tiny_facts
    from tracing import CausalTrace

    for name in {Path(target.good).parts[0] for target in TARGETS.values()}:
        (world / name).mkdir(parents=True)
    small, some = _model(), tiny_facts()
    save_tiny(small, world / "model")
    save_tiny(small, world / "sharded", shards=2)
    write_facts(world / "facts" / "facts.jsonl", some)
    (world / "gzip" / "facts.jsonl.gz").write_bytes(gzip.compress((world / "facts/facts.jsonl").read_bytes()))
    for name, records in _records().items():
        text = "\n".join(map(json.dumps, records)) if name == "tofu" else json.dumps(records)
        (world / name / ("facts.jsonl" if name == "tofu" else "facts.json")).write_text(text)
    (world / "text" / "facts.txt").write_text("A first text of some words.\n\nA second one, of more.\n" * 3)
    chosen = torch.zeros(small.atlas.n_layers, small.atlas.d_mlp, dtype=torch.bool)
    chosen[:, ::5] = True
    located = WeightMask.of_neurons(small.atlas, chosen, fingerprint=small.fingerprint)
    located.save(world / "mask" / "mask.safetensors")
    name, selection = next(iter(located.entries.items()))
    old = dict(small.module.named_parameters())[name]
    edit = WeightDelta.of_entries(small.module, {name: (selection, selection.take(old) + 1)}, located)
    edit.save(world / "delta" / "delta.safetensors")
    NeuronScores(chosen.float(), "saliency", small.fingerprint, small.atlas).save(
        world / "scores" / "scores.safetensors"
    )
    CausalTrace(samples=2).run(small, some[:2], folder=world / "trace")
    grid = lens_grid(small, encode(small, some[0]), some[0].id, "resid_post", 3)
    save_grids([grid], world / "lens" / "lens.safetensors", {"model": "tiny"})
    settings = AuditSettings(attacks=("none",))
    judge(small, {"edit": edit}, some[:1], some[1:], ["Some neutral text."] * 3, settings=settings).save(
        world / "audit"
    )
    (world / "gate" / "gate.toml").write_text(
        '[figures."forget.prob"]\nmax = 0.02\nend = "worst"\n[ratios.kept]\nmin = 0.8\n'
        '[change.off_mask]\nmax = 0\n[verdicts]\nforgotten = "yes"\n'
    )
    shutil.copy(Path(__file__).parents[2] / "demo.toml", world / "run" / "run.toml")
    values = {"w": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(values.values())
    values["w"].sum().backward()
    optimizer.step()
    save_state(world / "state", "run", RunState.fresh(2, values), values, optimizer)


def _records() -> dict[str, list[dict[str, Any]]]:
    known = {"known_id": 0, "subject": "Eiffel Tower", "attribute": "Paris", "template": "{} is in",
             "prediction": " Paris", "prompt": "Eiffel Tower is in", "relation_id": "P1"}  # fmt: skip
    rewrite = {"prompt": "{} is in", "relation_id": "P1", "target_new": {"str": "Rome", "id": "Q1"},
               "target_true": {"str": "Paris", "id": "Q2"}, "subject": "Eiffel Tower"}  # fmt: skip
    counter = {"case_id": 0, "pararel_idx": 1, "requested_rewrite": rewrite, "generation_prompts": [],
               "paraphrase_prompts": ["Where? Eiffel Tower is in"], "neighborhood_prompts": ["Louvre is in"],
               "attribute_prompts": []}  # fmt: skip
    tofu = {"question": "Where was she born?", "answer": "In Lima.", "paraphrased_question": "Her birthplace?",
            "paraphrased_answer": "Lima.", "perturbed_answer": ["In Rome.", "In Oslo."]}  # fmt: skip
    return {"known": [known, {**known, "known_id": 1}], "counterfact": [counter], "tofu": [tofu] * 3}


@contextlib.contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_once(target: Target, world: Path, scratch: Path, draw: random.Random) -> str | None:
    """Spoil the target's file and use it; what went wrong, or None."""
    good = world / target.good
    for name in ("in", "out"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    place, out = scratch / "in" / good.parent.name, scratch / "in" / "out"
    out.mkdir(parents=True)
    for other in world.iterdir():
        if other.name != good.parent.name:
            (scratch / "in" / other.name).symlink_to(other)
    place.mkdir()
    for file in good.parent.iterdir():
        os.link(file, place / file.name)
    (place / good.name).unlink()
    (place / good.name).write_bytes(MUTATORS[good.suffix](good.read_bytes(), draw))
    before = _listing(scratch, out)
    try:
        with _in_time(LIMIT_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.use(place, out)
    except InputError as error:
        if "\n" in str(error).strip() and len(str(error)) > 2000:
            return f"an error of {len(str(error))} characters"
    except Hang:
        return "hang: " + _where(sys.exc_info()[2])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return f"{type(error).__name__}: {str(error)[:120]} {_where(error.__traceback__)}"
    if (after := _listing(scratch, out)) != before:
        return f"wrote outside the output folder: {sorted(after ^ before)[:3]}"
    return None


def _listing(scratch: Path, out: Path) -> set[tuple[str, int]]:
    found = {
        (str(path), 0 if path.is_dir() else path.lstat().st_size)
        for path in scratch.rglob("*")
        if out not in path.parents and path != out
    }
    return found | {(str(path), 0) for path in (OUTSIDE, scratch.parent / "evil") if path.exists()}


def _where(trace: Any) -> str:
    frames = [f for f in traceback.extract_tb(trace) if "/tests/" not in f.filename]
    ours = [f for f in frames if any(f"/{room}/" in f.filename for room in ("locus", "tracing", "editors"))]
    last = (ours or frames or traceback.extract_tb(trace))[-1]
    return f"[{Path(last.filename).name}:{last.lineno} {last.name}]"


def fuzz(folder: Path, inputs: int, seed: int, only: str | None = None) -> dict[tuple[str, str], list[int]]:
    """Try so many inputs over all targets in turn; (target, fault) -> the seeds that made it."""
    world, scratch = folder / "world", folder / "scratch"
    make_world(world)
    scratch.mkdir()
    names = [name for name in TARGETS if only is None or name == only]
    faults: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for i in range(inputs):
        name = names[i % len(names)]
        fault = try_once(TARGETS[name], world, scratch, random.Random(f"{seed}/{i}"))
        if fault is not None:
            faults[name, fault].append(i)
    return dict(faults)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target alone")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES,) * 2)
        faults = fuzz(Path(folder), given.inputs, given.seed, given.only)
    for (name, fault), seeds in sorted(faults.items()):
        print(f"{name}: {fault}  ({len(seeds)} times, first at {seeds[0]})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{given.inputs} inputs over {1 if given.only else len(TARGETS)} kinds of file, seed {given.seed}: "
        f"{sum(map(len, faults.values()))} faults; {time.monotonic() - started:.0f} s, at most {peak:.0f} MB"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
