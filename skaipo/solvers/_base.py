"""The loop that all solvers share: every row has its own lambda, step, budget and status."""

import copy
from dataclasses import dataclass

import torch
from sklearn.base import BaseEstimator

from skaipo._keywords import CheckedKeywords
from skaipo.objective import Evaluation, check_choice

__all__ = ["STATUS", "Method", "Solution", "minimize"]

# Index = code in Solution.status.
STATUS = ("converged", "budget", "stalled", "diverged", "infeasible")
_RUNNING = -1
CONVERGED, BUDGET, STALLED, DIVERGED, INFEASIBLE = range(5)


@dataclass
class Solution:
    """What a solver returns for a batch.

    Attributes
    ----------
    u : torch.Tensor of shape (n, d)
        The variable, in the objective's space.
    evaluation : Evaluation
        The objective's terms at ``u``.
    lam : torch.Tensor of shape (n,)
    status : torch.Tensor of shape (n,)
        Indices into ``STATUS``.
    memory : dict of torch.Tensor
        What the method learnt, for a later call at another lambda.
    """

    u: torch.Tensor
    evaluation: Evaluation
    lam: torch.Tensor
    status: torch.Tensor
    memory: dict


class Method(CheckedKeywords, BaseEstimator):
    """An update rule: proposes trial points row by row and learns from what they gave.

    Its memory is a dictionary of tensors whose first dimension runs over the active rows, so that
    the loop can drop the rows that are done.
    """

    # Evaluations without a decrease after which a row has stalled; None: never, for methods that
    # do not go downhill all the time.
    patience = None

    @property
    def wants_metric(self):
        """Whether the method can use a :class:`GaussianMetric`."""
        return getattr(self, "preconditioner", None) == "gaussian"

    def prepare(self, objective):
        """The method to use for this objective: itself, or a copy that knows more about it."""
        return self

    def start(self, objective, u, evaluation, lam):
        """Return the memory for a batch that starts at ``u``."""
        raise TypeError(f"{type(self).__name__} does not implement start.")

    def plan(self, memory, steps, rows):
        """Told, in the rows of a boolean mask, how many steps (n,) the budget allows from here."""

    def propose(self, memory, u, evaluation, lam, progress):
        """Return trial points (n, d). ``progress`` (n,) in [0, 1]: share of the budget spent."""
        raise TypeError(f"{type(self).__name__} does not implement propose.")

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        """Learn from the trials, in place; return which rows move to them. ``ok``: finite rows."""
        raise TypeError(f"{type(self).__name__} does not implement update.")

    def retarget(self, memory, u, evaluation, lam, rows):
        """Lambda or the point has changed for the rows of a boolean mask."""

    def renew(self, memory):
        """A new stage begins, at another lambda, with steps as long as in the first."""

    def forget(self, memory, rows):
        """Drop what was learnt in the rows of a boolean mask: they go on from another point."""

    def soften(self, memory, rows):
        """Forget the past and take smaller steps in the rows of a boolean mask."""

    # Whether it can do with gradients that have noise in them.
    bears_noise = False

    def rough_rows(self, memory, like):
        """Rows (n,), bool, whose objective turned out to be too rough to go by its gradients.

        Once rough, a row stays so. Where the objective allows it (``smooths_rough``) it is
        evaluated as an average there from now on, so that the row is never called converged.
        """
        return torch.zeros_like(like, dtype=torch.bool)

    def stalled(self, memory, idle):
        """Rows that will not get any further, shape (n,). ``idle``: evaluations without decrease"""
        if self.patience is None:
            return torch.zeros_like(idle, dtype=torch.bool)
        return idle >= self.patience


def with_metric(method, objective):
    """A method that steps in the objective's metric, if it asks for one and there is one."""
    if check_choice("preconditioner", method.preconditioner, ("gaussian", None)) is None:
        return method
    prepared = copy.copy(method)
    prepared._metric = getattr(objective, "metric", None)
    return prepared


def averaged_rows(objective, method, memory, like):
    """Rows (n,), bool, in which the density is averaged: values cannot be compared there."""
    if getattr(objective, "smooths_rough", False):
        return method.rough_rows(memory, like)
    return torch.full_like(like, getattr(objective, "smooths_all", False), dtype=torch.bool)


def minimize(
    objective,
    u,
    lam,
    method,
    *,
    max_evals,
    tol=1e-4,
    evaluation=None,
    memory=None,
    anneal=True,
    history=None,
    max_failures=8,
):
    """Minimise ``data + lam * prior`` for every row, each by itself.

    Parameters
    ----------
    objective : MAPObjective
    u : torch.Tensor of shape (n, d)
        Start.
    lam : torch.Tensor of shape (n,)
    method : Method
    max_evals : int or torch.Tensor of shape (n,)
        A row stops when ``objective.n_evals`` reaches it; what was spent before counts.
    tol : float or torch.Tensor of shape (n,)
        A row has converged when its relative gradient is at most this.
    evaluation : Evaluation, default=None
        The objective at ``u`` where it is known already, from an earlier call.
    memory : dict, default=None
        What the method learnt in an earlier call, at another lambda.
    anneal : bool, default=True
        Let a method with a learning rate lower it towards the end of the budget.
    history : list, default=None
        Gets ``(rows, lam, objective)`` tensors appended, one triple per iteration.
    max_failures : int, default=8
        How often a row is rolled back from non-finite numbers before it is given up.

    Returns
    -------
    solution : Solution
        The converged iterate where there is one, otherwise the best that was seen. In rows whose
        objective is smoothed the last iterate that has not run away: values cannot be compared
        there, nor gradients trusted to vanish, so that no such row is ever called converged.
    """
    n = len(objective)
    method = method.prepare(objective)
    start = objective.n_evals.clone()
    budget = torch.zeros_like(start) + max_evals
    smooths_all = getattr(objective, "smooths_all", False)
    smooths_rough = getattr(objective, "smooths_rough", False)

    def smoothed():
        """Which of the active rows see the density averaged in the next trial."""
        return averaged_rows(objective, method, memory, rows)

    if evaluation is None:
        evaluation = objective.evaluate(u)
    if memory is None:
        memory = method.start(objective, u, evaluation, lam)
    else:
        method.retarget(memory, u, evaluation, lam, torch.ones_like(lam, dtype=torch.bool))
    if anneal:
        steps = (budget - objective.n_evals).clamp_min(0)
        method.plan(memory, steps, torch.ones_like(lam, dtype=torch.bool))
    status = torch.full((n,), _RUNNING, dtype=torch.long, device=u.device)
    # A start that cannot be evaluated leaves nothing to roll back to.
    status[~evaluation.finite(lam)] = DIVERGED

    rows = torch.arange(n, device=u.device)
    active = dict(
        u=u,
        best_u=u,
        lam=lam,
        start=start,
        budget=budget,
        tol=torch.zeros_like(lam) + tol,
        failures=torch.zeros_like(rows),
        restarts=torch.zeros_like(rows),
        reference=evaluation.value(lam),
        lowest=evaluation.value(lam),
        idle=torch.zeros_like(rows),
        # Whether the density was averaged in the evaluations of this point, and of the best.
        averaged=torch.full_like(rows, smooths_all, dtype=torch.bool),
        best_averaged=torch.full_like(rows, smooths_all, dtype=torch.bool),
    )
    best = evaluation
    final = Solution(
        u.clone(),
        evaluation.rows(rows),
        lam,
        status,
        {key: value.clone() for key, value in memory.items()},
    )

    def go_back(mask):
        """Return to the best point with smaller steps, in the rows of a mask."""
        nonlocal evaluation
        active["u"] = torch.where(mask[:, None], active["best_u"], active["u"])
        active["averaged"] = torch.where(mask, active["best_averaged"], active["averaged"])
        evaluation = evaluation.where(mask, best)
        method.soften(memory, mask)
        method.retarget(memory, active["u"], evaluation, active["lam"], mask)

    def settle():
        """Take the finished rows out of the batch."""
        nonlocal rows, evaluation, best
        done = status[rows] != _RUNNING
        if not done.any():
            return
        # A converged row returns its own iterate, every other row the best that it has seen.
        stationary = status[rows] == CONVERGED
        chosen = best.where(stationary, evaluation)
        again = done & ~stationary & active["best_averaged"]
        if smooths_rough and again.any():
            # What is told of the point is exact: one evaluation of the budget was kept for it.
            exact = objective.evaluate(active["best_u"][again], rows[again])
            status[rows[again][~exact.finite(active["lam"][again])]] = DIVERGED
            for name, values in vars(chosen).items():
                values[again] = getattr(exact, name)
        finished, keep = rows[done], ~done
        final.u[finished] = torch.where(stationary[:, None], active["u"], active["best_u"])[done]
        for name, values in vars(final.evaluation).items():
            values[finished] = getattr(chosen, name)[done]
        for key, values in memory.items():
            final.memory[key][finished] = values[done]
        rows, evaluation, best = rows[keep], evaluation.rows(keep), best.rows(keep)
        for store in (active, memory):
            for key, value in store.items():
                store[key] = value[keep]

    memory = dict(memory)
    while True:
        # 1. Stop what is done.
        flat = evaluation.relative_gradient(active["lam"]) <= active["tol"]
        flat &= (status[rows] == _RUNNING) & ~active["averaged"]
        # Stationary, but a better point was seen: go back there and take smaller steps.
        worse = flat & (
            evaluation.value(active["lam"])
            > best.value(active["lam"]) + best.rounding(active["lam"], objective.eps)
        )
        status[rows[flat & ~worse]] = CONVERGED
        hopeless = worse & (active["restarts"] >= 3)
        status[rows[hopeless]] = STALLED
        worse &= ~hopeless
        if worse.any():
            active["restarts"] += worse
            go_back(worse)
        running = status[rows] == _RUNNING
        status[rows[running & (objective.n_evals[rows] >= active["budget"])]] = BUDGET
        running = status[rows] == _RUNNING
        status[rows[running & method.stalled(memory, active["idle"])]] = STALLED
        if smooths_rough:
            # (Which may just have handed rows over.)
            running = (status[rows] == _RUNNING) & smoothed()
            status[rows[running & (objective.n_evals[rows] + 1 >= active["budget"])]] = BUDGET
        settle()
        if len(rows) == 0:
            return final

        # 2. One trial for every row.
        if anneal:
            spent = (objective.n_evals[rows] - active["start"]).to(u.dtype)
            progress = spent / (active["budget"] - active["start"]).clamp_min(1).to(u.dtype)
        else:
            progress = torch.zeros_like(active["lam"])
        trial = method.propose(memory, active["u"], evaluation, active["lam"], progress)
        noisy = smoothed()
        where = (noisy,) if smooths_rough else ()
        trial_evaluation = objective.evaluate(trial, rows, *where)
        ok = trial_evaluation.finite(active["lam"])
        accept = ok & method.update(
            memory, active["u"], evaluation, trial, trial_evaluation, active["lam"], ok
        )
        active["u"] = torch.where(accept[:, None], trial, active["u"])
        evaluation = evaluation.where(accept, trial_evaluation)
        active["averaged"] = torch.where(accept, noisy, active["averaged"])
        value = trial_evaluation.value(active["lam"])
        better = ok & (value < best.value(active["lam"]))
        active["lowest"] = torch.where(ok, active["lowest"].minimum(value), active["lowest"])
        if noisy.any():
            # The last one, unless it has run away: noise is a matter of some nats per dimension.
            noise = 10 * active["lam"] * (1 + u.shape[1])
            last = accept & (value <= active["lowest"] + active["lowest"].abs() + noise)
            better = torch.where(noisy, last, better)
        active["best_averaged"] = torch.where(better, noisy, active["best_averaged"])
        best = best.where(better, trial_evaluation)
        active["best_u"] = torch.where(better[:, None], trial, active["best_u"])
        # Decreases add up until they are more than rounding.
        value = best.value(active["lam"])
        lower = value < active["reference"] - best.rounding(active["lam"], objective.eps)
        active["reference"] = torch.where(lower, value, active["reference"])
        active["idle"] = torch.where(lower, 0, active["idle"] + 1)
        if history is not None:
            history.append((rows, active["lam"], evaluation.value(active["lam"])))

        # 3. Roll non-finite rows back to the best point and retry with a smaller step.
        if not ok.all():
            active["failures"] += ~ok
            go_back(~ok)
            status[rows[active["failures"] > max_failures]] = DIVERGED
