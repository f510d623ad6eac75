"""The loop that all solvers share: every row has its own lambda, step, budget and status."""

from dataclasses import dataclass, field

import torch
from sklearn.base import BaseEstimator

from skaipo.objective import Evaluation

__all__ = ["STATUS", "FixedLambda", "Method", "Solution", "minimize"]

# Index = code in Solution.status.
STATUS = ("converged", "budget", "stalled", "diverged")
_RUNNING = -1
CONVERGED, BUDGET, STALLED, DIVERGED = range(4)


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
    history : list of (rows, n_evals, lam, objective) tensors
        One entry per iteration, if asked for.
    """

    u: torch.Tensor
    evaluation: Evaluation
    lam: torch.Tensor
    status: torch.Tensor
    history: list = field(default_factory=list)


class Method(BaseEstimator):
    """An update rule: proposes trial points row by row and learns from what they gave.

    Its memory is a dictionary of tensors whose first dimension runs over the active rows, so that
    the loop can drop the rows that are done.
    """

    def start(self, objective, u, evaluation, lam):
        """Return the memory for a batch that starts at ``u``."""
        raise TypeError(f"{type(self).__name__} does not implement start.")

    def propose(self, memory, u, evaluation, lam, progress):
        """Return trial points (n, d). ``progress`` in [0, 1]: share of the final stage's budget."""
        raise TypeError(f"{type(self).__name__} does not implement propose.")

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        """Learn from the trials, in place; return which rows move to them. ``ok``: finite rows."""
        raise TypeError(f"{type(self).__name__} does not implement update.")

    def retarget(self, memory, u, evaluation, lam, rows):
        """Lambda or the point has changed for the rows of a boolean mask."""

    def forget(self, memory, rows):
        """Drop what was learnt in the rows of a boolean mask: they go on from another point."""

    def soften(self, memory, rows):
        """Forget the past and take smaller steps in the rows of a boolean mask."""

    def stalled(self, memory, u):
        """Rows whose steps have become too small to matter, shape (n,)."""
        return torch.zeros(len(u), dtype=torch.bool, device=u.device)


class FixedLambda:
    """The schedule without continuation: the target lambda from the first step."""

    def begin(self, target, budget):
        return target.clone(), {}

    def advance(self, state, lam, target, relative_gradient):
        return lam


def minimize(
    objective,
    u,
    lam,
    method,
    schedule=None,
    *,
    max_evals,
    tol=1e-4,
    fallback=None,
    history=False,
    max_failures=8,
    callback=None,
):
    """Minimise ``data + lam * prior`` for every row, each by itself.

    Parameters
    ----------
    objective : MAPObjective
    u : torch.Tensor of shape (n, d)
        Start.
    lam : torch.Tensor of shape (n,)
        Target.
    method : Method
    schedule : object with begin and advance, default=None
        How lambda rises to the target; default: it is there at once.
    max_evals : int
        A row stops when ``objective.n_evals`` reaches it; what was spent before counts.
    tol : float
        A row at its target lambda has converged when its relative gradient is at most this.
    fallback : torch.Tensor of shape (n, d), default=None
        Another start, for rows where the continuation fails: a row whose best objective, when
        its lambda arrives at the target, is still above the one here goes on from here. (A
        measurement far outside of the prior's support can lie where the flow's log-density is
        astronomically low and its gradient useless.) Costs one evaluation per row.
    history : bool, default=False
    max_failures : int, default=8
        How often a row is rolled back from non-finite numbers before it is given up.
    callback : callable, default=None
        Called with the number of rows still active after each iteration.

    Returns
    -------
    solution : Solution
        The converged iterate where there is one, otherwise the best seen, by the objective at the
        target lambda.
    """
    schedule = FixedLambda() if schedule is None else schedule
    n = len(objective)
    evaluation = objective.evaluate(u)
    spare = None
    if fallback is not None:
        spare = objective.evaluate(fallback)
        lost = ~evaluation.finite() & spare.finite()
        u = torch.where(lost[:, None], fallback, u)
        evaluation = evaluation.where(lost, spare)
    target = lam.clone()
    status = torch.full((n,), _RUNNING, dtype=torch.long, device=u.device)
    final_u, final = u.clone(), evaluation
    rows = torch.arange(n, device=u.device)
    # A start that cannot be evaluated leaves nothing to roll back to.
    status[~evaluation.finite()] = DIVERGED

    lam, state = schedule.begin(target, (max_evals - objective.n_evals).clamp_min(1))
    active = dict(
        u=u.clone(),
        lam=lam,
        target=target,
        failures=torch.zeros_like(rows),
        restarts=torch.zeros_like(rows),
        final_start=objective.n_evals.clone(),
        best_u=u.clone(),
    )
    if fallback is not None:
        active["spare_u"] = fallback.clone()
        spare.prior[~spare.finite()] = torch.inf
    best = evaluation
    memory = method.start(objective, u, evaluation, lam)
    records = []

    def compact(keep):
        nonlocal rows, evaluation, best, spare
        rows, evaluation, best = rows[keep], evaluation.rows(keep), best.rows(keep)
        spare = None if spare is None else spare.rows(keep)
        for store in (active, memory, state):
            for key, value in store.items():
                store[key] = value[keep]

    def settle():
        """Take the finished rows out of the batch."""
        done = status[rows] != _RUNNING
        if not done.any():
            return
        # A converged row returns its own iterate, every other row the best that it has seen.
        chosen = best.where(status[rows] == CONVERGED, evaluation)
        stationary = (status[rows] == CONVERGED)[:, None]
        chosen_u = torch.where(stationary, active["u"], active["best_u"])
        finished = rows[done]
        for name, values in vars(final).items():
            values[finished] = getattr(chosen, name)[done]
        final_u[finished] = chosen_u[done]
        compact(~done)

    final = Evaluation(**{k: v.clone() for k, v in vars(evaluation).items()})
    while True:
        # 1. Stop what is done, at the target lambda only.
        at_target = active["lam"] == active["target"]
        relative = evaluation.relative_gradient(active["lam"])
        flat = at_target & (relative <= tol) & (status[rows] == _RUNNING)
        # Stationary, but a better point was seen: go back there and take smaller steps.
        value, best_value = evaluation.value(active["target"]), best.value(active["target"])
        slack = (
            64
            * torch.finfo(u.dtype).eps
            * (best.data.abs() + (best.prior * active["target"]).abs())
        )
        worse = flat & (value > best_value + slack)
        status[rows[flat & ~worse]] = CONVERGED
        hopeless = worse & (active["restarts"] >= 3)
        status[rows[hopeless]] = STALLED
        worse &= ~hopeless
        if worse.any():
            active["restarts"] += worse
            active["u"] = torch.where(worse[:, None], active["best_u"], active["u"])
            evaluation = evaluation.where(worse, best)
            method.soften(memory, worse)
            method.retarget(memory, active["u"], evaluation, active["lam"], worse)
        running = status[rows] == _RUNNING
        status[rows[running & (objective.n_evals[rows] >= max_evals)]] = BUDGET
        running = status[rows] == _RUNNING
        stuck = running & method.stalled(memory, active["u"])
        status[rows[stuck & at_target]] = STALLED
        settle()
        if len(rows) == 0:
            break

        # 2. One trial for every row.
        spent = (objective.n_evals[rows] - active["final_start"]).to(u.dtype)
        left = (max_evals - active["final_start"]).clamp_min(1).to(u.dtype)
        at_target = active["lam"] == active["target"]
        progress = torch.where(at_target, spent / left, 0.0).clamp(0, 1)
        trial = method.propose(memory, active["u"], evaluation, active["lam"], progress)
        trial_evaluation = objective.evaluate(trial, rows)
        ok = trial_evaluation.finite()
        accept = method.update(
            memory, active["u"], evaluation, trial, trial_evaluation, active["lam"], ok
        )
        accept = accept & ok
        active["u"] = torch.where(accept[:, None], trial, active["u"])
        evaluation = evaluation.where(accept, trial_evaluation)
        better = ok & (trial_evaluation.value(active["target"]) < best.value(active["target"]))
        best = best.where(better, trial_evaluation)
        active["best_u"] = torch.where(better[:, None], trial, active["best_u"])
        if history:
            records.append(
                (
                    rows.clone(),
                    objective.n_evals[rows].clone(),
                    active["lam"].clone(),
                    evaluation.value(active["lam"]),
                )
            )

        # 3. Roll non-finite rows back to the best point and retry with a smaller step.
        bad = ~ok
        if bad.any():
            active["failures"] += bad
            active["u"] = torch.where(bad[:, None], active["best_u"], active["u"])
            evaluation = evaluation.where(bad, best)
            method.soften(memory, bad)
            method.retarget(memory, active["u"], evaluation, active["lam"], bad)
            status[rows[active["failures"] > max_failures]] = DIVERGED

        # 4. Continuation: let lambda rise where the schedule says so.
        relative = evaluation.relative_gradient(active["lam"])
        raised = schedule.advance(state, active["lam"], active["target"], relative)
        changed = raised != active["lam"]
        if changed.any():
            active["lam"] = raised
            active["final_start"] = torch.where(
                changed, objective.n_evals[rows], active["final_start"]
            )
            if spare is not None:
                arrived = changed & (raised == active["target"])
                failed = arrived & (best.value(raised) > spare.value(raised))
                if failed.any():
                    active["u"] = torch.where(failed[:, None], active["spare_u"], active["u"])
                    active["best_u"] = torch.where(
                        failed[:, None], active["spare_u"], active["best_u"]
                    )
                    evaluation, best = evaluation.where(failed, spare), best.where(failed, spare)
                    method.forget(memory, failed)
            method.retarget(memory, active["u"], evaluation, raised, changed)
        if callback is not None:
            callback(len(rows))
    return Solution(final_u, final, target, status, records)
