"""Does it come back: a short fine-tuning on half of the forgotten facts, tested on the other half.

What was really removed must be learned anew, fact by fact; what was only hidden returns as a whole (Lynch
et al. 2024, arXiv:2402.16835). The curve of the untaught half tells them apart, the curve of the taught
half shows that the attack itself worked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from locus.audit.measurement import Relearning
from locus.audit.questions import Answers, Questions, ask
from locus.audit.settings import RelearnAttack
from locus.errors import InputError
from locus.forward import batches, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model
from locus.progress import task
from locus.tokens import Encoded
from locus.weight_source import refuse_offloaded


def halves(facts: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the taught and of the tested half."""
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = len(facts) // 2
    return sorted(order[:cut]), sorted(order[cut:])


def relearn(
    model: Model,
    forget: Questions,
    attack: RelearnAttack,
    max_tokens: int = 4096,
    start: Answers | None = None,
) -> Relearning:
    """Train on half of the forget set and test on both halves; the weights come back to the bit.

    Args:
        model: Trained inside, and back as it was on leaving.
        forget: The questions, one a fact.
        attack: How the attacker trains.
        max_tokens: Batch size in tokens.
        start: The model's answers to `forget`, where they are known already.

    Raises:
        InputError: fewer than two facts.
    """
    if len(forget) < 2:
        raise InputError(
            "relearn: half of one fact cannot be taught; the attack needs at least two forget facts"
        )
    chosen = halves(forget.facts, attack.seed)
    taught, tested = (forget.take(half) for half in chosen)
    curve = [start if start is not None else ask(model, forget, max_tokens)]
    training = _full(model) if attack.method == "full" else _adapters(model, attack)
    lr = attack.lr if attack.lr is not None else {"full": 5e-5, "lora": 5e-3}[attack.method]
    with training as trained, task("relearn", total=attack.at[-1]) as line:
        fused = all(p.device.type in ("cpu", "cuda") for p in trained.masters)  # eight times faster on a CPU
        optimizer = torch.optim.AdamW(trained.masters, lr=lr, weight_decay=0.0, fused=fused)
        for step in range(1, attack.at[-1] + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = trained.gradients(lambda scale: _accumulate(model, taught.encoded, max_tokens, scale))
            optimizer.step()
            trained.write()
            line.advance(note=f"loss {loss:.3f}")
            if step in attack.at:
                curve.append(ask(model, forget, max_tokens))
    return Relearning(
        (0, *attack.at),
        taught.facts,
        tested.facts,
        torch.stack([answers.nll[chosen[0]] for answers in curve]),
        torch.stack([answers.nll[chosen[1]] for answers in curve]),
        torch.stack([answers.correct[chosen[1]] for answers in curve]),
    )


@torch.enable_grad()
def _accumulate(model: Model, encoded: Sequence[Encoded], max_tokens: int, scale: float) -> float:
    """Gradients of `scale` times the mean NLL per target token over all examples; returns that mean in nats."""
    n_labels = sum(e.n_target for e in encoded)
    total = 0.0
    for batch in batches(encoded, max_tokens):
        loss = label_nll(label_logits(model, batch), batch).sum() / n_labels
        (loss * scale).backward()
        total += loss.item()
    return total


_HALF = (torch.bfloat16, torch.float16)
_SCALE = 1024.0
"""What the loss is multiplied by where gradients are float16, in which small ones would vanish."""


class _Trained:
    """Parameters that the optimizer steps in float32, whatever the model's dtype is.

    A step of 5e-5 is less than half a unit in the last place of most bfloat16 weights and would be rounded away, so
    half-precision parameters have a float32 master each, which is cast into the model after every step.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        self.held = list(held)
        """What the model computes with."""
        self.masters = [p.detach().float() if p.dtype in _HALF else p for p in self.held]
        """What the optimizer steps."""
        self.scale = _SCALE if any(p.dtype == torch.float16 for p in self.held) else 1.0

    def gradients(self, accumulate: Callable[[float], float]) -> float:
        """Run `accumulate` on a scale of the loss and give the masters the unscaled gradients; returns its loss."""
        while True:
            for held in self.held:
                held.grad = None
            loss = accumulate(self.scale)
            if self.scale <= 1.0 or all(p.grad is None or torch.isfinite(p.grad).all() for p in self.held):
                break
            self.scale /= 2
        for held, master in zip(self.held, self.masters, strict=True):
            if held.grad is not None and (master is not held or self.scale != 1.0):
                master.grad = held.grad.float() / self.scale
                if master is not held:
                    held.grad = None
        return loss

    def write(self) -> None:
        """Cast the masters into the model."""
        with torch.no_grad():
            for held, master in zip(self.held, self.masters, strict=True):
                if master is not held:
                    held.copy_(master)


@contextlib.contextmanager
def _full(model: Model) -> Iterator[_Trained]:
    """All parameters, trainable inside; their old values are put back on leaving."""
    refuse_offloaded(dict(model.module.named_parameters()))
    parameters: list[Tensor] = [p for p in model.module.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield _Trained(parameters)
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, saved, strict=True):
                p.requires_grad_(False)
                p.grad = None
                p.copy_(old)


class _Adapter:
    """y += x A B beside one linear map; made at the first use, when both widths are known."""

    def __init__(self, rank: int, seed: int) -> None:
        self.rank, self.seed = rank, seed
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        self._input: Tensor | None = None

    def see(self, x: Tensor) -> None:
        self._input = x

    def add(self, y: Tensor) -> Tensor:
        assert self._input is not None
        x, self._input = self._input, None
        if self.down is None or self.up is None:
            noise = torch.randn(x.shape[-1], self.rank, generator=torch.Generator().manual_seed(self.seed))
            self.down = (noise / x.shape[-1] ** 0.5).to(x.device).requires_grad_(True)
            self.up = torch.zeros(self.rank, y.shape[-1], device=y.device, requires_grad=True)
        return y + (x.float() @ self.down @ self.up.to(x.device)).to(y.device, y.dtype)


@contextlib.contextmanager
def _adapters(model: Model, attack: RelearnAttack) -> Iterator[_Trained]:
    """Float32 low-rank adapters (Hu et al. 2021, arXiv:2106.09685) that live only inside, as hooks."""
    names = [*model.atlas.attn_z, *model.atlas.neuron_in]
    adapters = {name: _Adapter(attack.rank, attack.seed + i) for i, name in enumerate(names)}
    inputs = {name: adapter.see for name, adapter in adapters.items()}
    outputs = {name: adapter.add for name, adapter in adapters.items()}
    with patched(model.module, inputs=inputs, outputs=outputs):
        with torch.no_grad():
            model.module(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        yield _Trained([t for a in adapters.values() for t in (a.down, a.up) if t is not None])
