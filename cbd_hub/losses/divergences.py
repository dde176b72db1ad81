"""Divergences of a student's distribution from a teacher's, with their gradients in closed form.

All are made of two skewed divergences (Ko et al., "DistiLLM", 2024, arXiv:2402.03898), in which a share of the
distribution on the left is mixed into the one on the right, so that their ratio stays bounded,

    forward  KL(p || s p + (1 - s) q)        reverse  KL(q || s q + (1 - s) p)        p teacher, q student:

s = 0 leaves plain KL and reverse KL, and half of each at s = 1/2 is Jensen-Shannon. Everything is computed from
log-probabilities: a word that both find impossible in float32 still adds 0 and not NaN.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from cbd_hub.errors import RecipeError, did_you_mean
from cbd_hub.losses.names import DivergenceName

__all__ = [
    "Divergence",
]


@dataclass(frozen=True)
class Divergence:
    """``forward * KL(p || s p + (1 - s) q) + reverse * KL(q || s q + (1 - s) p)``, in nats, summed over tokens."""

    forward: float
    """Weight of the divergence that makes the student cover what the teacher does."""
    reverse: float
    """Weight of the divergence that keeps the student to what the teacher does."""
    skew: float
    """s, from 0 to below 1: how much of the left distribution is mixed into the right one."""

    @classmethod
    def named(cls, name: DivergenceName, skew: float = 0.1) -> "Divergence":
        """Returns a divergence by its name, for a teacher p and a student q.

        - ``"forward_kl"``: KL(p || q).
        - ``"reverse_kl"``: KL(q || p).
        - ``"js"``: Jensen-Shannon, KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2; at most ln 2.
        - ``"skewed_kl"``: KL(p || skew p + (1 - skew) q); at most -ln(skew).
        - ``"skewed_reverse_kl"``: KL(q || (1 - skew) p + skew q); at most -ln(skew).

        Args:
            name: one of the above.
            skew: used by the skewed ones alone; at 0 they are the plain ones, towards 1 they vanish.

        Raises:
            RecipeError: there is no such divergence, or `skew` is not in [0, 1).
        """
        if not 0 <= skew < 1:
            raise RecipeError(f"skew must be at least 0 and below 1 (0.1 is usual), got {skew}.")
        named = {
            "forward_kl": cls(1.0, 0.0, 0.0),
            "reverse_kl": cls(0.0, 1.0, 0.0),
            "js": cls(0.5, 0.5, 0.5),
            "skewed_kl": cls(1.0, 0.0, skew),
            "skewed_reverse_kl": cls(0.0, 1.0, skew),
        }
        if name not in named:
            names = ", ".join(get_args(DivergenceName))
            raise RecipeError(f"Unknown divergence {name!r}.{did_you_mean(str(name), named)} Use one of {names}.")
        return named[name]

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The divergence summed over tokens, a scalar, differentiable in both.

        Args:
            log_p: (n, V) the teacher's log-probabilities.
            log_q: (n, V) the student's.
        """
        total = log_q.new_zeros(())
        if self.forward:
            log_m = _log_mixture(log_p, log_q, self.skew)
            total = total + self.forward * (log_p.exp() * (log_p - log_m)).sum()
        if self.reverse:
            log_m = _log_mixture(log_q, log_p, self.skew)
            total = total + self.reverse * (log_q.exp() * (log_q - log_m)).sum()
        return total

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its gradient (n, V) in the logits u whose log-softmax is `log_q`; keeps no graph.

        With g the derivatives in q at fixed p, ``d D / d u = q g - q sum(q g)``, and where m is the mixture,

            forward  q g = -(1 - s) p q / m        reverse  q g = q log(q / m) - s q q / m + q

        of which the last q drops out. Both quotients are taken as exp of a difference that is never above 0.
        Needs up to seven (n, V) tensors at once, the arguments and the result among them.
        """
        q = log_q.exp()
        value = log_q.new_zeros(())
        qg = torch.zeros_like(q)
        if self.forward:
            log_m = _log_mixture(log_p, log_q, self.skew)
            p = log_p.exp()
            value += self.forward * (log_p - log_m).mul_(p).sum()
            if self.skew:
                p *= (log_q - log_m).add_(math.log1p(-self.skew)).exp_()
            qg.sub_(p, alpha=self.forward)
        if self.reverse:
            ratio = log_q - _log_mixture(log_q, log_p, self.skew)
            value += self.reverse * (q * ratio).sum()
            qg.addcmul_(q, ratio, value=self.reverse)
            if self.skew:
                ratio.add_(math.log(self.skew)).exp_()
                qg.addcmul_(q, ratio, value=-self.reverse)
        return value, qg.addcmul_(q, qg.sum(-1, keepdim=True), value=-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """``log(share * a + (1 - share) * b)``; for share 0 that is `log_b` itself, not a copy."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
