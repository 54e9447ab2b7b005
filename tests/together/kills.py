"""kill -9 at random moments, hundreds of times: never a broken artefact, always resumed to the undisturbed result.

    python -m tests.together.kills --kills 500 --seed 0

Every run of trace, edit, export or revert is a process forked from a warm one and killed after a random time,
some of them again while they resume. After each kill whatever stands under a final name must be whole; after the
last resume every artefact must be that of an undisturbed run, byte for byte, and nothing else may be left behind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from locus.cli import execute
from locus.errors import InputError
from locus.files.artefact import load_json, load_tensors
from locus.files.tensorfile import TensorFile
from tests.tiny import save_tiny, tiny_model
from tests.together.forked import fork

FACTS = [
    {
        "id": f"f{i}",
        "prompt": f"The {word} Tower is in the city of",
        "target": " Paris",
        "subject": f"{word} Tower",
    }
    for i, word in enumerate(("Eiffel", "Gothic", "Marble"))
]
_TIMED = ("report.html", "trace.json")
"""They tell how long the work took."""
_EDIT = [
    "edit",
    "model",
    "facts.jsonl",
    "--mask",
    "mask.safetensors",
    "--method",
    "ga",
    "-q",
    "--steps",
    "12",
]

COMMANDS: dict[str, list[str]] = {
    "trace": ["trace", "model", "facts.jsonl", "--samples", "2", "--kinds", "block", "-q"],
    "edit": [
        *_EDIT,
        "--min-steps",
        "12",
        "--save-every",
        "1",
        "--utility",
        "0",
        "--floor",
        "0",
        "--goal",
        "0",
    ],
    "export": ["export", "model", "--delta", "whole-edit/delta.safetensors", "-q"],
    "revert": ["revert", "whole-export", "--delta", "whole-edit/delta.safetensors", "-q"],
}


@dataclass(frozen=True)
class World:
    """A folder with a model, facts, a mask and the undisturbed result of every command."""

    place: Path
    seconds: dict[str, float]
    """How long each command takes, undisturbed."""

    @classmethod
    def make(cls, place: Path) -> World:
        """Everything that the commands need, and what comes out when nobody disturbs them."""
        save_tiny(tiny_model("llama"), place / "model", shards=3)
        (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
        locate = ["locate", "model", "facts.jsonl", "-o", "mask.safetensors", "--budget", "20%", "-q"]
        first = [[*argv, "-o", f"whole-{name}"] for name, argv in COMMANDS.items()]
        with contextlib.chdir(place):
            for argv in (locate, *first):  # in this process: all modules are in memory afterwards
                assert execute(argv) == 0
        seconds = {}
        for name in COMMANDS:
            shutil.rmtree(place / f"whole-{name}")
            started = time.monotonic()
            assert cls(place, {}).run(name, f"whole-{name}") == 0, (place / "log").read_text()
            seconds[name] = time.monotonic() - started
        return cls(place, seconds)

    def run(self, name: str, out: str, *, kill_after: float | None = None, resume: bool = False) -> int:
        """Run a command in a process of its own; its exit code, -9 where the kill came in time."""
        argv = [*COMMANDS[name], "-o", out, *(["--resume"] if resume else [])]
        child = fork(lambda: execute(argv), self.place / "log", self.place)
        if kill_after is not None:
            time.sleep(kill_after)
            child.kill()
        return child.wait(300)

    def broken(self, out: str) -> Iterator[str]:
        """Files under a final name that are not whole."""
        for path in sorted((self.place / out).rglob("*")):
            if (
                path.is_dir()
                or "locus-tmp" in str(path.relative_to(self.place))
                or path.name == ".locus.lock"
            ):
                continue
            if problem := _problem(path):
                yield f"{path.relative_to(self.place)}: {problem}"

    def differing(self, name: str, out: str) -> Iterator[str]:
        """What is not as in the undisturbed run, or should not be there."""
        whole, now = self.place / f"whole-{name}", self.place / out
        expected, found = ({p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (whole, now))
        yield from (f"{path}: only in one" for path in sorted(expected ^ found))
        for path in sorted(expected & found):
            if path.name not in _TIMED and (whole / path).read_bytes() != (now / path).read_bytes():
                yield f"{path}: differs"
        yield from (f"{left.name}: left behind" for left in self.place.glob(f".{out}.*"))


def _problem(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            about = TensorFile(path).metadata.get("locus")
            if about is not None:
                load_tensors(path, json.loads(about)["format"])
        elif path.suffix == ".json" and "format" in (raw := json.loads(path.read_text())):
            load_json(path, raw["format"])
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), "a picture that ends early"
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), "a page that ends early"
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
    except (InputError, ValueError, AssertionError) as error:
        return str(error)
    return None


@dataclass
class Tally:
    """What came of the kills of one command."""

    kills: int = 0
    """Kills that came before the end."""
    late: int = 0
    """Kills that found the process gone, its work done."""
    twice: int = 0
    """Runs killed again while resuming."""


def kill(world: World, name: str, draw: random.Random, tally: Tally) -> list[str]:
    """Kill one run of a command, perhaps again while it resumes, and resume it; what was found wrong."""
    out, wrong, resume = f"killed-{name}", [], False
    shutil.rmtree(world.place / out, ignore_errors=True)
    while True:
        moment = draw.uniform(0.0, 1.1) * world.seconds[name]
        code = world.run(name, out, kill_after=moment, resume=resume)
        tally.kills, tally.late = tally.kills + (code == -9), tally.late + (code == 0)
        if code not in (0, -9):
            wrong.append(f"exit {code}: {(world.place / 'log').read_text()[-300:]}")
        wrong += world.broken(out)
        if resume or draw.random() > 0.25:
            break
        tally.twice, resume = tally.twice + 1, True
    if (code := world.run(name, out, resume=True)) != 0:
        return [*wrong, f"resuming gave {code}: {(world.place / 'log').read_text()[-300:]}"]
    return [*wrong, *world.differing(name, out)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="go on from this run of the same seed")
    given = parser.parse_args()
    started, done, faults = time.monotonic(), 0, 0
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(Path(folder))
        names, run = list(COMMANDS), given.first
        while done < given.kills:
            name = names[run % len(names)]
            wrong = kill(world, name, random.Random(f"{given.seed}/{run}"), tallies[name])
            faults += bool(wrong)
            for line in wrong:
                print(f"run {run}, {name}: {line}", flush=True)
            run, done = run + 1, sum(tally.kills for tally in tallies.values())
            if run % 40 == 0:
                print(f"  {done} kills, {faults} faults, {time.monotonic() - started:.0f} s", flush=True)
    for name, tally in tallies.items():
        print(
            f"{name:7} {tally.kills:4} kills in time, {tally.late:3} too late, {tally.twice:3} while resuming"
        )
    print(f"{done} kills, seed {given.seed}: {faults} runs with a fault; {time.monotonic() - started:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
