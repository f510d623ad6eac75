"""One chunk of rows, from measurements to results: what runs in a worker."""

from dataclasses import dataclass, field, fields

import numpy as np
import torch

from skaipo._validation import to_numpy
from skaipo.objective import MAPObjective
from skaipo.solvers import STATUS, Method, Solution, continuation_path, minimize, mle_start

__all__ = ["Problem", "Reconstruction", "solve_chunk"]

# The paper's number of projected-gradient iterations for the MLE start.
_MLE_EVALS = 500


@dataclass(repr=False)
class Reconstruction:
    """The whole story of a batch of reconstructions.

    Attributes
    ----------
    x : ndarray or torch.Tensor of shape (n_samples, d) or (n_samples, *event_shape)
        Reconstructions, in the layout of the measurements.
    objective : ndarray of shape (n_samples,)
        ``misfit + lam * penalty`` at ``x``; for the default penalty,
        ``misfit - lam * log_prob``.
    misfit : ndarray of shape (n_samples,)
        ``nll(y, f(x))`` over the observed measurements.
    log_prob : ndarray of shape (n_samples,)
        ``log p_G(x)`` in nats.
    n_evals : ndarray of shape (n_samples,)
        Flow evaluations spent, the start included.
    n_observed : ndarray of shape (n_samples,)
        Measurements that were there.
    status : ndarray of str of shape (n_samples,)
        "converged", "budget" (ran out of evaluations), "stalled" (no step makes progress) or
        "diverged" (numbers overflowed and smaller steps did not help).
    lam : float
    lam_history, objective_history : list of ndarray, or None
        Per row: lambda, and the objective at that lambda, after each iteration of the solver; the
        start is not included. Only if asked for.
    """

    x: object
    objective: np.ndarray
    misfit: np.ndarray
    log_prob: np.ndarray
    n_evals: np.ndarray
    n_observed: np.ndarray
    status: np.ndarray
    lam: float
    lam_history: list | None = None
    objective_history: list | None = None

    def counts(self):
        """Number of rows per status, a dict in the order of ``skaipo.solvers.STATUS``."""
        return {name: int((self.status == name).sum()) for name in STATUS}

    def __repr__(self):
        counts = ", ".join(f"{k} {v}" for k, v in self.counts().items() if v)
        return (
            f"<Reconstruction of {len(self.status)} samples at lam={self.lam:g}: {counts}; "
            f"mean objective {np.mean(self.objective):.6g}, "
            f"mean evaluations {np.mean(self.n_evals):.0f}>"
        )

    def rows(self, index):
        """The reconstructions of some rows."""
        parts = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):
                value = [value[i] for i in index]
            elif isinstance(value, np.ndarray | torch.Tensor):
                value = value[index]
            parts[f.name] = value
        return Reconstruction(**parts)

    @classmethod
    def join(cls, parts, lam):
        """Concatenate the results of chunks, with ``x`` still a flat array."""
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]["arrays"]}
        arrays["status"] = np.array(STATUS)[arrays["status"]]
        histories = {}
        for key in ("lam_history", "objective_history"):
            if key in parts[0]:
                histories[key] = [row for part in parts for row in part[key]]
        return cls(lam=lam, **arrays, **histories)


@dataclass(frozen=True)
class Problem:
    """What all chunks share: the estimator's settings, resolved.

    Attributes
    ----------
    prior, op, noise
        Fitted prior, bound operator and noise model.
    method : Method
    schedule : LinearSchedule, GeometricSchedule or None
        None: fixed lambda.
    space, penalty : str
    lams : tuple of float
        Targets, ascending.
    max_evals : int
    tol : float
    history : bool
    """

    prior: object
    op: object
    noise: object
    method: Method
    schedule: object
    space: str
    penalty: str
    lams: tuple
    max_evals: int
    tol: float
    history: bool = field(default=False)


def solve_chunk(problem, y, start):
    """Solve for one chunk of rows at every target.

    Parameters
    ----------
    problem : Problem
    y : torch.Tensor of shape (n, m)
    start : "mle", "zero" or torch.Tensor of shape (n, d)
        A tensor holds latents.

    Returns
    -------
    results : list of dict
        Per target, numpy arrays, so that they can come back from another process.
    n_evals : int
        Evaluations of the whole chunk, all targets together.
    """
    # One frozen module serves everything; a worker unpacks it once per chunk.
    objective = MAPObjective(
        problem.prior.flow_, problem.op, problem.noise, y, problem.space, problem.penalty
    )
    history = [] if problem.history else None
    results, total = [], 0
    for lam, solution, n_evals, spent in _solutions(problem, objective, start, history):
        results.append(_result(objective, lam, solution, n_evals, history))
        total = spent
    return results, total


def _solutions(problem, objective, start, history):
    """Yield lambda, solution, evaluations on its way per row, and evaluations so far in all."""
    y, n = objective.y, len(objective)
    max_evals = problem.max_evals
    mle = isinstance(start, str) and start == "mle"
    if mle:
        # At most a third of the budget, and never more than the paper's number.
        limit = min(_MLE_EVALS, max(1, max_evals // 3))
        x0, x0_converged = mle_start(objective, max_evals=limit, tol=problem.tol)
        u0 = objective.variable(x0)
    else:
        z0 = y.new_zeros(n, objective.n_features) if isinstance(start, str) else start
        u0 = z0
        if objective.space == "image":
            u0 = objective.in_space("latent").image(z0)
            objective.n_evals += 1
    options = dict(max_evals=max_evals, tol=problem.tol, history=history)
    if problem.schedule is None:
        (lam,) = problem.lams
        solution = minimize(objective, u0, torch.full_like(y[:, 0], lam), problem.method, **options)
        yield lam, solution, objective.n_evals, int(objective.n_evals.sum())
        return
    lams = list(problem.lams)
    if lams and lams[0] == 0:
        # x(0) is the start itself: the misfit is zero there (least, where it cannot be zero).
        zero = torch.zeros_like(y[:, 0])
        before = objective.n_evals.clone()
        evaluation = objective.evaluate(u0)
        status = torch.where(x0_converged, STATUS.index("converged"), STATUS.index("budget"))
        status[~evaluation.finite()] = STATUS.index("diverged")
        yield (
            lams.pop(0),
            Solution(u0, evaluation, zero, status, {}),
            objective.n_evals.clone(),
            int(objective.n_evals.sum()),
        )
        objective.n_evals.copy_(before)
    # Where the continuation fails: the mode of the latent space.
    z0 = y.new_zeros(1, objective.n_features)
    fallback = objective.in_space("latent").image(z0) if objective.space == "image" else z0
    spent = 0
    for lam, (solution, n_evals, trunk) in zip(
        lams,
        continuation_path(
            objective,
            u0,
            lams,
            problem.method,
            problem.schedule,
            fallback=fallback.expand(n, -1),
            **options,
        ),
        strict=True,
    ):
        spent += int((n_evals - trunk).sum())
        yield lam, solution, n_evals, spent + int(trunk.sum())


def _result(objective, lam, solution, n_evals, history):
    best = solution.evaluation
    arrays = dict(
        x=best.x,
        objective=best.value(torch.full_like(best.data, lam)),
        misfit=best.data,
        log_prob=best.log_prob,
        n_evals=n_evals,
        n_observed=objective.observed.sum(1),
        status=solution.status,
    )
    result = {key: to_numpy(value) for key, value in arrays.items()}
    result["arrays"] = tuple(arrays)
    if history is not None:
        n = len(objective)
        lams, values = [[] for _ in range(n)], [[] for _ in range(n)]
        for rows, lam_now, value in history:
            for i, a, b in zip(rows.tolist(), lam_now.tolist(), value.tolist(), strict=True):
                lams[i].append(a)
                values[i].append(b)
        result["lam_history"] = [np.array(row) for row in lams]
        result["objective_history"] = [np.array(row) for row in values]
    return result
