"""Quasi-Newton steps while the objective is smooth, annealed first-order steps where it is not."""

import copy
from contextlib import contextmanager

import torch

from skaipo.solvers._base import Method
from skaipo.solvers._first_order import Adam
from skaipo.solvers._lbfgs import LBFGS

__all__ = ["Hybrid"]

_SMOOTH = LBFGS(give_up=0.15)
_ROUGH = Adam(warm_up=10, preconditioner="gaussian")


class Hybrid(Method):
    """L-BFGS for each row until its line search keeps failing, then annealed Adam.

    A flow's networks are often piecewise linear, and the log-density of its images then has a kink
    wherever one of their units switches. Where a step crosses few of them, L-BFGS converges to any
    tolerance within some dozen evaluations. Where it crosses thousands, as in flows of images, the
    gradient at one point says little about the next, half of the trial steps fail, and L-BFGS
    stalls above what Adam reaches, whose moments average over the kinks and whose steps shrink by
    plan. Each row finds out by itself which of the two it is.

    Parameters
    ----------
    smooth : LBFGS, default=None
        None: ``LBFGS(give_up=0.15)``, which hands a row over when more than 15 % of its trials
        fail.
    rough : Method, default=None
        None: ``Adam(warm_up=10, preconditioner="gaussian")``.
    """

    def __init__(self, smooth=None, rough=None):
        self.smooth = smooth
        self.rough = rough

    # Whether noise may be what looks to the smooth part like the end of the way.
    _noisy = False

    @property
    def wants_metric(self):
        return any(method.wants_metric for method in self._both())

    def _both(self):
        return (
            _SMOOTH if self.smooth is None else self.smooth,
            _ROUGH if self.rough is None else self.rough,
        )

    def prepare(self, objective):
        prepared = copy.copy(self)
        prepared.smooth, prepared.rough = (method.prepare(objective) for method in self._both())
        prepared._noisy = getattr(objective, "smooths_all", False)
        return prepared

    def start(self, objective, u, evaluation, lam):
        memory = dict(
            changed=torch.zeros_like(lam, dtype=torch.bool),
            # Share of the budget that was spent, now and when the row changed over.
            progress=torch.zeros_like(lam),
            since=torch.zeros_like(lam),
            # Steps from the start of the clock, where the budget is known.
            ahead=torch.full_like(lam, torch.nan),
        )
        for part, method in zip(("smooth", "rough"), self._both(), strict=True):
            for key, value in method.start(objective, u, evaluation, lam).items():
                memory[f"{part}.{key}"] = value
        return memory

    @contextmanager
    def _part(self, memory, part):
        """One of the methods, and its own part of the memory."""
        prefix = part + "."
        own = {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}
        yield self._both()[part == "rough"], own
        for key, value in own.items():
            memory[prefix + key] = value

    def plan(self, memory, steps, rows):
        memory["ahead"] = torch.where(rows, steps.to(memory["ahead"].dtype), memory["ahead"])
        # (A row may change over before its first step, by a clock that is of another call.)
        memory["progress"] = torch.where(rows, 0.0, memory["progress"])
        with self._part(memory, "smooth") as (smooth, own):
            smooth.plan(own, steps, rows & ~memory["changed"])
        with self._part(memory, "rough") as (rough, own):
            rough.plan(own, steps, rows & memory["changed"])

    def propose(self, memory, u, evaluation, lam, progress):
        changed = memory["changed"]
        # A clock that has gone back is that of another call.
        since = torch.where(progress < memory["since"], 0.0, memory["since"])
        memory["progress"], memory["since"] = progress, since
        with self._part(memory, "smooth") as (smooth, own):
            trial = smooth.propose(own, u, evaluation, lam, progress)
        if changed.any():
            left = ((progress - since) / (1 - since).clamp_min(1e-6)).clamp(0, 1)
            with self._part(memory, "rough") as (rough, own):
                step = rough.propose(own, u, evaluation, lam, left)
                # The others' turn has not come.
                rough.forget(own, ~changed)
            trial = torch.where(changed[:, None], step, trial)
        return trial

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        changed = memory["changed"]
        args = u, evaluation, trial, trial_evaluation, lam
        accept = torch.zeros_like(changed)
        if not changed.all():
            with self._part(memory, "smooth") as (smooth, own):
                accept = smooth.update(own, *args, ok & ~changed) & ~changed
                gave_up = smooth.gave_up(own) & ~changed
            self._hand_over(memory, gave_up)
        if changed.any():
            with self._part(memory, "rough") as (rough, own):
                accept = accept | (rough.update(own, *args, ok & changed) & changed)
        return accept

    def _hand_over(self, memory, rows):
        """From here on some rows are the rough part's."""
        memory["since"] = torch.where(rows, memory["progress"], memory["since"])
        memory["changed"] = memory["changed"] | rows
        left = memory["ahead"] * (1 - memory["progress"])
        if (planned := rows & left.isfinite()).any():
            with self._part(memory, "rough") as (rough, own):
                rough.plan(own, left, planned)

    def retarget(self, memory, u, evaluation, lam, rows):
        with self._part(memory, "smooth") as (smooth, own):
            smooth.retarget(own, u, evaluation, lam, rows & ~memory["changed"])
        with self._part(memory, "rough") as (rough, own):
            rough.retarget(own, u, evaluation, lam, rows & memory["changed"])

    def renew(self, memory):
        # (How often the smooth part failed is known: the kinks are those of the same flow.)
        with self._part(memory, "rough") as (rough, own):
            rough.renew(own)

    def forget(self, memory, rows):
        for part in ("smooth", "rough"):
            with self._part(memory, part) as (method, own):
                method.forget(own, rows)

    def soften(self, memory, rows):
        with self._part(memory, "smooth") as (smooth, own):
            smooth.soften(own, rows & ~memory["changed"])
        with self._part(memory, "rough") as (rough, own):
            rough.soften(own, rows & memory["changed"])

    def rough_rows(self, memory, like):
        _, rough = self._both()
        return memory["changed"] & rough.bears_noise

    def stalled(self, memory, idle):
        with self._part(memory, "smooth") as (smooth, own):
            stalled = smooth.stalled(own, idle) & ~memory["changed"]
            # A row that gives up at another lambda than it failed at has a budget yet to spend.
            handed = stalled if self._noisy else stalled & smooth.gave_up(own)
        if handed.any():
            self._hand_over(memory, handed)
        return stalled & ~handed
