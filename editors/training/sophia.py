"""Sophia-G: clipped second-order steps with a diagonal Gauss-Newton-Bartlett estimate of the Hessian.

Liu et al. 2023 (arXiv:2305.14342); used for unlearning by Jia et al. 2024, SOUL (arXiv:2404.18239).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class SophiaG(torch.optim.Optimizer):
    """theta <- (1 - lr * decay) * theta - lr * clip(m / max(rho * h, eps), -1, 1), element by element.

    m is the running mean of the gradient, h that of n * g_hat ** 2, where g_hat is the gradient of the mean loss
    on n labels drawn from the model itself: call `update_hessian` with such gradients in place every so many
    steps. While h = 0 (never updated) each step is lr * sign(m).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        weight_decay: float = 0.0,
        eps: float = 1e-15,
    ) -> None:
        """State of zeros for every parameter.

        Args:
            params: The trained tensors.
            lr: Learning rate.
            betas: Decay of the running means of the gradient and of the Hessian's diagonal.
            rho: Scale of the Hessian; smaller clips more steps.
            weight_decay: Decoupled weight decay.
            eps: Least value of rho * h.
        """
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"m": torch.zeros_like(p), "h": torch.zeros_like(p)}

    @torch.no_grad()
    def update_hessian(self, n_labels: int) -> None:
        """Fold the gradients now in place (of the mean loss over `n_labels` sampled labels) into h."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    beta = group["betas"][1]
                    self.state[p]["h"].mul_(beta).addcmul_(p.grad, p.grad, value=(1 - beta) * n_labels)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update from the gradients in place; parameters without one stay where they are."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state["m"].mul_(group["betas"][0]).add_(p.grad, alpha=1 - group["betas"][0])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                scale = (group["rho"] * state["h"]).clamp_(min=group["eps"])
                p.sub_((m / scale).clamp_(-1, 1), alpha=group["lr"])
        return loss
