"""From logits to one number: the metrics of a trace.

All of them are higher when the model is closer to saying the target, so that an indirect effect above zero
always means that something was given back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Metric = Literal["prob", "first_prob", "logprob", "logit_diff", "kl", "rank"]
METRICS: tuple[Metric, ...] = ("prob", "first_prob", "logprob", "logit_diff", "kl", "rank")


@dataclass(frozen=True)
class Readout:
    """What is read off the logits at the positions that predict the target.

    prob: probability of the whole target, teacher-forced. first_prob: of its first token. logprob: log of the
    whole target's probability, in nats. logit_diff: logit of the first target token minus the foil's. kl: minus
    the Kullback-Leibler divergence of the first prediction from the clean run's, KL(clean‖patched), in nats.
    rank: minus the number of tokens with a higher logit than the first target token.
    """

    metric: Metric
    labels: Int[Tensor, " read"]
    """The target's tokens, one for each position read."""
    foil: int | None = None
    """Token that the target's first is compared with; needed by logit_diff."""
    clean_logits: Float[Tensor, " d_vocab"] | None = None
    """Logits of the clean run at the first position read; needed by kl."""

    def __call__(self, logits: Float[Tensor, "n read d_vocab"]) -> Float[Tensor, "n 2"]:
        """The metric, and the whole target's probability beside it, for each run.

        Logits that need no gradient are overwritten: they are the largest tensor of a trace, and one copy is enough.
        """
        if logits.shape[1] != len(self.labels):
            raise ValueError(f"{logits.shape[1]} positions are read and {len(self.labels)} labels given")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        index = self.labels.to(logits.device).expand(len(logits), -1)[..., None]
        # Not own - logsumexp: rounding two logits of size 20 costs ten times the precision of their difference.
        top = logits.amax(-1, keepdim=True)
        below_top = logits - top if logits.requires_grad else logits.sub_(top)
        own = below_top.gather(-1, index)[..., 0]
        value = self._of_first(below_top[:, 0], own[:, 0])
        mass = below_top.exp() if below_top.requires_grad else below_top.exp_()
        token_logprob = own - mass.sum(-1).log()
        prob = token_logprob.sum(-1).exp()
        match self.metric:
            case "prob":
                value = prob
            case "first_prob":
                value = token_logprob[:, 0].exp()
            case "logprob":
                value = token_logprob.sum(-1)
        return torch.stack([value, prob], dim=-1)

    def _of_first(self, logits: Float[Tensor, "n d_vocab"], own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Metrics of the whole first prediction, which do not change when all its logits are shifted."""
        match self.metric:
            case "logit_diff":
                if self.foil is None:
                    raise ValueError("logit_diff needs a foil: the token that the target is compared with")
                return own - logits[:, self.foil]
            case "kl":
                if self.clean_logits is None:
                    raise ValueError("kl needs the logits of the clean run")
                clean = self.clean_logits.to(logits.device, torch.float32).log_softmax(-1)
                return (clean.exp() * (logits.log_softmax(-1) - clean)).sum(-1)
            case "rank":
                return -(logits > own[:, None]).sum(-1).to(own.dtype)
        return own
