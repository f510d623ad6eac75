"""How lambda rises from 0 to its target."""

import torch

__all__ = ["LinearSchedule"]


class LinearSchedule:
    """Equal steps, ``lam_k = k lam / n_stages``, as in Algorithm 1 of Liu et al. (2023).

    A row leaves a stage when its relative gradient is small enough or the stage's share of the
    budget is spent, whichever comes first; rows do not wait for each other.

    Parameters
    ----------
    n_stages : int, default=20
    share : float in (0, 1), default=0.5
        Share of the remaining budget for the stages before the last.
    tol : float, default=0.1
        Relative gradient at which a stage is good enough.
    """

    def __init__(self, n_stages=20, share=0.5, tol=0.1):
        self.n_stages = n_stages
        self.share = share
        self.tol = tol

    def begin(self, target, budget):
        """First lambda and per-row state, for per-row budgets in evaluations."""
        stage = torch.ones_like(budget)
        allowance = (self.share * budget / self.n_stages).floor().clamp_min(1).to(budget.dtype)
        # Fewer evaluations than stages: skip some, so that the last still gets its share.
        stride = (self.n_stages / (self.share * budget)).ceil().clamp_min(1).to(budget.dtype)
        state = dict(stage=stage, spent=torch.zeros_like(stage), per=allowance, stride=stride)
        return self._lam(stage, target), state

    def _lam(self, stage, target):
        fraction = stage.clamp_max(self.n_stages).to(target.dtype) / self.n_stages
        return target * fraction

    def advance(self, state, lam, target, relative_gradient):
        """Lambda for the next iteration."""
        state["spent"] += 1
        move = (state["spent"] >= state["per"]) | (relative_gradient <= self.tol)
        state["stage"] = state["stage"] + state["stride"] * move
        state["spent"] = torch.where(move, 0, state["spent"])
        return self._lam(state["stage"], target)
