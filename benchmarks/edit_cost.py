"""What a masked edit costs in memory and time, beside full fine-tuning and gradient-masked fine-tuning.

    python -m benchmarks.edit_cost                        SmolLM2, 16 facts, 1 % of the neurons, float32
    python -m benchmarks.edit_cost --no-retain --steps 5  NPO alone

Every arm runs in a process of its own: `inference` (forwards of the same batches that keep what a backward to the
inputs needs, each let go before the next), `deltas` (what `locus edit` does), `upper` (as many neurons, of the upper
half of the layers), `live` (as `deltas`, but the base is asked for its logits in every step), `elements` (as many
single weights), `masked-gradient` (the located tensors train whole, their gradient is masked, what moved outside is
put back) and `full` (everything trains). Same facts, same loss, AdamW. But for `live` the base has been asked
beforehand, as a run keeps what it said: `full` is given its logits, the others its last states. Before a figure is
printed, the weights of `masked-gradient` after the steps must equal those of `deltas`. Seconds are processor time of
one thread, median of the steps after the first; memory is the peak resident set of the steps above the process with
nothing but its libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.editor import EditData
from editors.objectives.npo import NPO, npo_loss
from editors.training.data import Data
from editors.training.finetune import Run
from editors.training.parametrize import Deltas
from editors.training.prediction import Prediction
from editors.training.reference import References
from editors.training.retain import Retain
from editors.training.run_state import RunState
from editors.training.settings import Training, make_optimizer
from locus.fact import neutral_text, read_facts
from locus.files.artefact import load_tensors, save_tensors
from locus.forward import Batch, label_logits, label_nll
from locus.hooks import record
from locus.mask import WeightMask
from locus.metrics import kl_divergence
from locus.model import Model, load_model
from locus.selection import Selection

ARMS = ("inference", "deltas", "upper", "live", "elements", "masked-gradient", "full")


def resident_mb(what: str = "VmRSS") -> float:
    """Resident set of this process now ("VmRSS") or at its peak ("VmHWM"), in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(what))


def forget_the_peak() -> None:
    """Let the peak of the resident set begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def neuron_mask(model: Model, share: float, lowest: int = 0) -> WeightMask:
    """A random share of all neurons, spread evenly over the layers from `lowest` on."""
    atlas = model.atlas
    source = torch.Generator().manual_seed(0)
    chosen = torch.zeros(atlas.n_layers, atlas.d_mlp, dtype=torch.bool)
    each = max(1, round(share * atlas.d_mlp * atlas.n_layers / (atlas.n_layers - lowest)))
    for layer in range(lowest, atlas.n_layers):
        chosen[layer, torch.randperm(atlas.d_mlp, generator=source)[:each]] = True
    return WeightMask.of_neurons(atlas, chosen)


def element_mask(model: Model, like: WeightMask) -> WeightMask:
    """As many random single weights of the same tensors."""
    source = torch.Generator().manual_seed(0)
    entries = {}
    for name, selection in like.entries.items():
        drawn = torch.randint(selection.numel, (selection.n,), generator=source)
        entries[name] = Selection("elements", drawn, selection.shape)
    return WeightMask(entries)


def editor(args: argparse.Namespace) -> NPO:
    """The edit that is measured: no rule may stop it, no example is spared."""
    retain = Retain(term="kl" if args.retain else "none")
    training = Training(steps=args.steps, lr=1e-4, floor=0.0, goal=0.0, utility=0.0, max_kl=0.0, clip=0.0)
    return NPO(retain=retain, training=training)


def located_steps(
    model: Model, data: Data, npo: NPO, mask: WeightMask, live: bool
) -> Iterator[Callable[[], Any]]:
    """Steps of the real loop; afterwards the new weights are in `args.out`."""
    deltas = Deltas(model.module, mask)
    references = None if live else References(model, deltas)
    if references is not None and npo.retain.active:
        for step in range(npo.training.steps):
            for batch in data.retain_batches(npo.retain, npo.training, step):
                references.logits(data.retain, batch)
            for batch in data.text_batches(npo.retain, npo.training, step):
                references.logits(data.texts, batch)
    run = Run(npo, model, deltas, data, make_optimizer(npo.training, deltas.parameters), references)
    state = RunState.fresh(len(data.forget), deltas.values)
    with deltas.attached():
        for _ in range(npo.training.steps):
            yield lambda: run.take_step(state)
    yield deltas.new_entries


def plain_steps(model: Model, data: Data, npo: NPO, mask: WeightMask | None) -> Iterator[Callable[[], Any]]:
    """Fine-tuning as it is usually done, of the mask's tensors or of all; its references are computed beforehand."""
    module = model.module
    named = dict(module.named_parameters())
    trained = named if mask is None else {name: named[name] for name in mask.entries}
    inside = {} if mask is None else {name: s.dense() for name, s in mask.entries.items()}
    old = {name: trained[name].detach().clone() for name in inside}
    kept = [_kept(data, npo, step) for step in range(npo.training.steps)]
    with torch.no_grad():
        references = [[label_logits(model, batch) for batch in batches] for batches in kept]
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=npo.training.lr, weight_decay=0.0)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in data.forget_batches(npo.training, number):
            forget = Prediction(model, Deltas(module, WeightMask({})), batch, data.reference.nll)
            forget_loss: Tensor = npo_loss(forget.nll, forget.ref_nll, npo.beta)
            forget_loss.backward()
        for batch, reference in zip(kept[number], references[number], strict=True):
            kl = kl_divergence(reference, label_logits(model, batch)).mean()
            (npo.retain.weight * kl).backward()
        for name, where in inside.items():
            gradient = trained[name].grad
            assert gradient is not None
            gradient.mul_(where)
        optimizer.step()
        with torch.no_grad():
            for name, where in inside.items():
                trained[name].copy_(torch.where(where, trained[name], old[name]))

    for number in range(npo.training.steps):
        yield partial(step, number)
    entries = {} if mask is None else mask.entries
    yield lambda: {name: selection.take(trained[name]) for name, selection in entries.items()}


def _kept(data: Data, npo: NPO, step: int) -> list[Batch]:
    if not npo.retain.active:
        return []
    return [
        *data.retain_batches(npo.retain, npo.training, step),
        *data.text_batches(npo.retain, npo.training, step),
    ]


def inference_steps(model: Model, data: Data, npo: NPO) -> Iterator[Callable[[], Any]]:
    """Forwards of the first step's batches that keep their activations, each let go before the next."""
    batches = [*data.forget_batches(npo.training, 0), *_kept(data, npo, 0)]

    def forward() -> None:
        for batch in batches:
            with record(model.module, outputs=[model.atlas.embed], detach=False):
                label_nll(label_logits(model, batch), batch.to(model.device)).sum()

    for _ in range(npo.training.steps):
        yield forward
    yield dict


def measure_arm(args: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process."""
    bare = resident_mb()
    model = load_model(args.model)
    npo = editor(args)
    forget, kept = read_facts("demo-forget")[: args.facts], read_facts("demo-retain")
    data = Data.read(model, EditData(forget, kept, neutral_text()), npo.retain, npo.training)
    mask = neuron_mask(model, args.share)
    if args.arm == "inference":
        steps = inference_steps(model, data, npo)
    elif args.arm in ("deltas", "live", "upper", "elements"):
        upper = neuron_mask(model, args.share, model.atlas.n_layers // 2)
        chosen = {"upper": upper, "elements": element_mask(model, mask)}.get(args.arm, mask)
        steps = located_steps(model, data, npo, chosen, live=args.arm == "live")
    else:
        steps = plain_steps(model, data, npo, mask if args.arm == "masked-gradient" else None)
    seconds: list[float] = []
    peak = 0.0
    for number in range(args.steps):
        step = next(steps)
        if number == 0:
            forget_the_peak()
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
        peak = resident_mb("VmHWM")
    new: dict[str, Tensor] = next(steps)()
    save_tensors(args.out, "benchmark", {name: value.contiguous() for name, value in new.items()}, {})
    return {
        "arm": args.arm,
        "seconds": statistics.median(seconds[1:] or seconds),
        "peak_mb": peak - bare,
        "n_weights": mask.n_weights
        if args.arm != "full"
        else sum(p.numel() for p in model.module.parameters()),
    }


def compare(args: argparse.Namespace, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Every arm in its own process, one thread, and the check that two of them made the same weights."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in args.arms:
            out = Path(folder, f"{arm}.safetensors")
            command = [
                sys.executable,
                "-m",
                "benchmarks.edit_cost",
                *arguments,
                "--arm",
                arm,
                "--out",
                str(out),
            ]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
            results[arm] = json.loads(done.stdout)
            print(json.dumps(results[arm]), file=sys.stderr, flush=True)
        ours, _ = load_tensors(Path(folder, "deltas.safetensors"), "benchmark")
        theirs, _ = load_tensors(Path(folder, "masked-gradient.safetensors"), "benchmark")
    for name, value in ours.items():
        # Adam turns a gradient that is zero but for rounding into a full step of either sign: compare the bulk.
        close = (value - theirs[name]).abs() <= 0.02 * args.steps * 1e-4
        assert float(close.float().mean()) > 0.99, f"{name}: the two ways of masked training disagree"
    return results


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--facts", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--retain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure_arm(args)))
        return
    results = compare(args, [a for a in sys.argv[1:] if a != "--json"])
    if args.json:
        print(json.dumps(results))
        return
    base, full = results["inference"]["peak_mb"], results["full"]["seconds"]
    print(f"{'':16} {'weights':>12} {'s/step':>7} {'of full':>8} {'peak MB':>8} {'of inference':>13}")
    for arm, r in results.items():
        print(
            f"{arm:16} {r['n_weights']:12,} {r['seconds']:7.2f} {r['seconds'] / full:8.2f} "
            f"{r['peak_mb']:8.0f} {r['peak_mb'] / base:13.2f}"
        )


if __name__ == "__main__":
    main()
