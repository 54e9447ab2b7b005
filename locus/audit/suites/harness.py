"""Tasks of lm-evaluation-harness as a suite: what else the edit cost, by other people's yardsticks.

Optional: `pip install "locus-unlearn[harness]"`. The model is scored in memory, in the state under audit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State
from locus.errors import InputError
from locus.fact import Fact
from locus.model import Model

MISSING = 'lm-evaluation-harness is not installed: pip install "locus-unlearn[harness]"'


@dataclass(frozen=True)
class Harness:
    """Tasks by their names in the harness."""

    tasks: tuple[str, ...]
    limit: int | None = None
    """At most so many documents a task; None for all."""
    include: Path | None = None
    """Folder with the YAML files of further tasks."""
    facts: Sequence[Fact] = ()
    retain: Sequence[Fact] = ()

    def __post_init__(self) -> None:
        manager = self._manager()
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            raise InputError(f"--tasks {unknown[0]}: lm-evaluation-harness has no such task")

    @property
    def figures(self) -> tuple[str, ...]:
        """One figure a task is expected; its metric is the task's own."""
        return ()

    def run(self, state: State, context: Context) -> FigureValues:
        """Every metric of every task that has one value a document; others as one number for the set."""
        with state.active() as model:
            results = self._evaluate(model, context.max_tokens, context.seed)
        items: dict[str, Items] = {}
        scalars: dict[str, float] = {}
        for task, metrics in results["results"].items():
            samples = results.get("samples", {}).get(task, ())
            for name, value in metrics.items():
                metric = str(name).removesuffix(",none")
                if (
                    not isinstance(value, int | float)
                    or "stderr" in metric
                    or "," in metric
                    or metric == "sample_len"
                ):
                    continue
                key = f"harness.{task}.{metric}"
                values = [s[metric] for s in samples if isinstance(s.get(metric), int | float)]
                if samples and len(values) == len(samples):
                    groups = tuple(f"{task} {s['doc_id']}" for s in samples)
                    items[key] = Items(groups, torch.tensor(values, dtype=torch.float32))
                else:
                    scalars[key] = float(value)
        return FigureValues(items, scalars)

    def _evaluate(self, model: Model, max_tokens: int, seed: int) -> Mapping[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(
            pretrained=model.module,
            tokenizer=model.tokenizer,
            batch_size=max(1, min(32, max_tokens // 128)),
            add_bos_token=None if model.bos is None else True,
        )
        try:
            found = simple_evaluate(
                lm,
                tasks=list(self.tasks),
                limit=self.limit,
                task_manager=self._manager(),
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"--tasks {' '.join(self.tasks)}: lm-evaluation-harness failed: {reason}"
            ) from error
        return found or {"results": {}}

    def _manager(self) -> Any:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError(f"--tasks {' '.join(self.tasks)}: {MISSING}") from None
        return TaskManager(include_path=None if self.include is None else str(self.include))
