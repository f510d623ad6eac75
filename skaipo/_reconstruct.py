"""One chunk of rows, from measurements to results: what runs in a worker."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from skaipo._validation import to_numpy
from skaipo.objective import MAPObjective
from skaipo.solvers import (
    STATUS,
    GaussianMetric,
    Method,
    Solution,
    continuation_path,
    gauss_newton_start,
    gaussian_start,
    infeasible,
    lattice_path,
    minimize,
    mle_start,
    off_centre,
)

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
        ``misfit - lam * log_prob``, also where the solver looked at it with ``smoothing``.
    misfit : ndarray of shape (n_samples,)
        ``nll(y, f(x))`` over the observed measurements.
    log_prob : ndarray of shape (n_samples,)
        ``log p_G(x)`` in nats.
    n_evals : ndarray of shape (n_samples,)
        Flow evaluations spent, the start included.
    n_observed : ndarray of shape (n_samples,)
        Measurements that were there.
    status : ndarray of str of shape (n_samples,)
        "converged", "budget" (ran out of evaluations), "stalled" (no step makes progress),
        "diverged" (numbers overflowed and smaller steps did not help) or, at ``lam=0`` and with an
        operator that is not linear, or too ill-conditioned to be solved by its products,
        "infeasible" (no image was found that explains the measurement; the one that comes closest
        is returned).
    lam : float
    disagreement : ndarray of shape (n_samples,), or None
        With several starts: root mean square over the pixels, in their units, of the difference
        between ``x`` and the farthest of the other starts' results. Large against the noise: the
        reconstruction is not unique, or ``max_evals`` too small.
    smoothed : ndarray of bool of shape (n_samples,), or None
        Rows solved by an average of the density over noise (``smoothing``), from the start or, with
        "auto", from where it turned out to be too rough. They are never called converged.
    lam_history, objective_history : list of ndarray, or None
        Per row: lambda, and the objective at that lambda, after each iteration of the solver; the
        start is not included; of several starts, the best. With ``smoothing`` as the solver saw it.
        Only if asked for.
    """

    x: object
    objective: np.ndarray
    misfit: np.ndarray
    log_prob: np.ndarray
    n_evals: np.ndarray
    n_observed: np.ndarray
    status: np.ndarray
    lam: float
    disagreement: np.ndarray | None = None
    smoothed: np.ndarray | None = None
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
            f"mean evaluations {np.mean(self.n_evals):.0f}"
            + (
                ""
                if self.disagreement is None
                else f", median disagreement of starts {np.median(self.disagreement):.3g}"
            )
            + ">"
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
    schedule : schedule object or None
        Of those in :mod:`skaipo.solvers`: direct, linear, geometric, lattice, adaptive or theory,
        or one of their kind. None: fixed lambda.
    space, penalty : str
    lams : tuple of float
        Targets, ascending.
    smoothing : float
    rough_only : bool
        Smooth where the objective turns out to be rough, and not elsewhere.
    max_evals : int
    tol : float
    mle_solver : str
    surrogate : GaussianSurrogate or None
        Where the method or the start can use it.
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
    smoothing: float
    rough_only: bool
    max_evals: int
    tol: float
    mle_solver: str
    surrogate: object = None
    history: bool = False


def solve_chunk(problem, y, starts, params=None):
    """Solve for one chunk of rows at every target.

    Parameters
    ----------
    problem : Problem
    y : torch.Tensor of shape (n, m)
    starts : list of "gaussian", "mle", "zero" or torch.Tensor of shape (n, d)
        A tensor holds latents; "gaussian" needs the problem's surrogate. Several starts share
        the budget, and the best result is kept.
    params : torch.Tensor of shape (n, ...), default=None
        What the operator takes per row.

    Returns
    -------
    results : list of dict
        Per target, numpy arrays, so that they can come back from another process.
    n_evals : int
        Evaluations of the whole chunk, all targets and starts together.
    """
    try:
        return _solve_rows(problem, y, starts, params)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if len(y) == 1:
            raise MemoryError(
                f"There is not enough memory to reconstruct even a single row on "
                f"{problem.prior.flow_.loc.device}: {error}"
            ) from error
    finally:
        problem.prior.flow_.release_workspaces()
        problem.noise.release_workspaces()
    # Out here the failed attempt's tensors are gone. Rows do not depend on each other: two halves
    # give what the whole would have.
    if y.is_cuda:
        torch.cuda.empty_cache()
    half = (len(y) + 1) // 2
    halves = [
        solve_chunk(
            problem,
            y[rows],
            [start[rows] if isinstance(start, torch.Tensor) else start for start in starts],
            None if params is None else params[rows],
        )
        for rows in (slice(half), slice(half, None))
    ]
    (first, n_first), (second, n_second) = halves
    return [_concatenated(a, b) for a, b in zip(first, second, strict=True)], n_first + n_second


def _out_of_memory(error):
    # torch raises a plain RuntimeError on the CPU, and where CUDA or cuBLAS says so.
    told = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in told)


def _concatenated(first, second):
    """The results of two groups of rows as one."""
    result = {"arrays": first["arrays"]}
    for key in first.keys() - {"arrays"}:
        a, b = first[key], second[key]
        result[key] = a + b if isinstance(a, list) else np.concatenate((a, b))
    return result


def _solve_rows(problem, y, starts, params):
    if len(starts) > 1:
        problem = replace(problem, max_evals=problem.max_evals // len(starts))
    runs, total, metric = [], 0, None
    smooths_all = problem.smoothing > 0 and not problem.rough_only
    looks = 0 if not smooths_all else 1 if len(starts) == 1 else 3
    for start in starts:
        # One frozen module serves everything; a worker unpacks it once per chunk.
        objective = MAPObjective(
            problem.prior.flow_,
            problem.op,
            problem.noise,
            y,
            problem.space,
            problem.penalty,
            params,
            problem.smoothing,
            problem.rough_only,
        )
        if problem.surrogate is not None and problem.op.is_linear:
            # The same for every start: it knows of the measurements, not of the iterates.
            metric = GaussianMetric(problem.surrogate, objective) if metric is None else metric
            objective.metric = metric
        history = [] if problem.history else None
        # Looks at the result that are made at the end are booked at the beginning.
        objective.n_evals += looks
        results, spent = {}, 0
        for lam, solution, n_evals, so_far in _solutions(problem, objective, start, history):
            value = None
            if looks:
                solution, value = _seen_exactly(objective, lam, solution, len(starts) > 1)
            results[lam] = _result(
                objective, lam, solution, n_evals, _smoothed(problem, solution, lam), history
            )
            if value is not None:
                results[lam]["rank"] = to_numpy(value)
            spent = so_far
        # (Booked once; each lambda has its own.)
        total += spent + looks * len(y) * (len(results) - 1)
        # (Along a lattice they come from its middle outwards.)
        runs.append([results[lam] for lam in problem.lams])
    return [_best(list(results)) for results in zip(*runs, strict=True)], total


def _seen_exactly(objective, lam, solution, smoothed):
    """A solution with the numbers of the objective without smoothing.

    With ``smoothed`` also the value with it, by one pair of opposite perturbations that is the same
    for every start: by the exact one those would win that end in a peak.
    """
    exact = objective.exactly()
    exact.n_evals = torch.zeros_like(objective.n_evals)
    evaluation = exact.evaluate(solution.u)
    status = solution.status.clone()
    status[~evaluation.finite()] = STATUS.index("diverged")
    value = None
    if smoothed:
        again = objective.in_space(objective.space)
        again.n_evals = exact.n_evals.zero_()
        lams = torch.full_like(evaluation.data, lam)
        value = (
            again.evaluate(solution.u).value(lams) + again.evaluate(solution.u).value(lams)
        ) / 2
    return replace(solution, evaluation=evaluation, status=status), value


def _best(results):
    """Row by row the result of lowest objective, and how far the others are from it."""
    if len(results) == 1:
        return results[0]
    values = np.stack([r.pop("rank", r["objective"]) for r in results])
    values = np.where(np.isfinite(values), values, np.inf)
    winner = values.argmin(0)
    rows = np.arange(len(winner))
    best = {}
    for key in results[0]:
        if key in ("arrays", "n_evals"):
            continue
        columns = [r[key] for r in results]
        if isinstance(columns[0], list):
            best[key] = [columns[w][i] for i, w in enumerate(winner)]
        else:
            best[key] = np.stack(columns)[winner, rows]
    best["n_evals"] = np.sum([r["n_evals"] for r in results], axis=0)
    distance = np.stack([np.sqrt(np.mean((r["x"] - best["x"]) ** 2, axis=1)) for r in results])
    best["disagreement"] = np.where(np.isfinite(distance), distance, np.inf).max(0)
    best["arrays"] = (*results[0]["arrays"], "disagreement")
    return best


def _solutions(problem, objective, start, history):
    """Yield lambda, solution, evaluations on its way per row, and evaluations so far in all."""
    y, aside, booked = objective.y, 0, objective.n_evals.clone()
    max_evals, lams = problem.max_evals, list(problem.lams)
    options = dict(max_evals=max_evals, tol=problem.tol, history=history)
    mle = isinstance(start, str) and start == "mle"
    at_zero = problem.schedule is not None and lams[0] == 0
    if mle or at_zero:
        # At most a third of the budget, and never more than the paper's number.
        limit = min(_MLE_EVALS, max(1, max_evals // 3))
        x0, converged = mle_start(
            objective, max_evals=limit, tol=problem.tol, solver=problem.mle_solver
        )
        u0 = objective.variable(x0)
    if at_zero:
        # x(0) is eq. 4's solution: the misfit is zero there (least, where it cannot be zero).
        before = objective.n_evals.clone()
        evaluation = objective.exactly().evaluate(u0)
        status = torch.where(converged, STATUS.index("converged"), STATUS.index("budget"))
        if objective.noise.is_exact_fit:
            status[infeasible(objective, x0)] = STATUS.index("infeasible")
        status[~evaluation.finite()] = STATUS.index("diverged")
        solution = Solution(u0, evaluation, torch.zeros_like(y[:, 0]), status, {})
        n_evals = objective.n_evals.clone()
        yield lams.pop(0), solution, n_evals, int(n_evals.sum())
        if not lams:
            return
        # What was for lambda 0 alone is not on the way to the others, but it was spent.
        objective.n_evals.copy_(before if mle else booked)
        aside = int((n_evals - objective.n_evals).sum())
    z0 = off_centre(objective)
    # Where a start fails: the mode of the latent space. (Not for a random one, which it would
    # replace nearly always: it is another start for the sake of being another.)
    fallback = None
    if isinstance(start, str) and start != "zero":
        fallback = objective.centre() if objective.space == "image" else z0
    low = (lambda lam: u0) if mle else None
    if isinstance(start, str) and start == "gaussian":
        # Where a path has a trunk the start is that of the trunk, whatever the targets.
        target = torch.full_like(y[:, 0], _first(problem, objective, lams))
        if objective.op.is_linear:
            u0 = gaussian_start(objective, target, max_evals=max_evals // 3)

            def low(lam):
                return gaussian_start(objective, torch.full_like(target, lam))
        else:
            u0 = gauss_newton_start(problem.surrogate, objective, target, max_evals=max_evals // 3)
    elif not mle:
        u0 = z0 if isinstance(start, str) else start
        if objective.space == "image":
            if objective.flow.has_inverse:
                u0 = objective.in_space("latent").image(u0)
            else:
                u0 = objective.centre()
            objective.n_evals += 1
    if problem.surrogate is not None and objective.metric is None and objective.space == "image":
        # The curvature of an operator that is not linear, where the solver begins.
        objective.metric = GaussianMetric(problem.surrogate, objective, at=u0)
    if problem.schedule is None:
        (lam,) = lams
        solution = minimize(objective, u0, torch.full_like(y[:, 0], lam), problem.method, **options)
        yield lam, solution, objective.n_evals, int(objective.n_evals.sum())
        return
    options["fallback"] = fallback
    if hasattr(problem.schedule, "lattice"):
        for position, solution, n_evals, so_far in lattice_path(
            objective, u0, lams, problem.method, problem.schedule, low=low, **options
        ):
            yield lams[position], solution, n_evals, aside + int(so_far.sum())
        return
    spent = aside
    for lam, (solution, n_evals, trunk) in zip(
        lams,
        continuation_path(
            objective,
            u0,
            lams,
            problem.method,
            problem.schedule,
            **options,
        ),
        strict=True,
    ):
        spent += int((n_evals - trunk).sum())
        yield lam, solution, n_evals, spent + int(trunk.sum())


def _first(problem, objective, lams):
    """The first lambda on the way, whatever the targets where there is a trunk or a lattice."""
    if hasattr(problem.schedule, "lattice"):
        lattice, middle = problem.schedule.lattice(objective, problem.max_evals)
        return lattice[middle]
    return problem.schedule.trunk(objective)[0] if hasattr(problem.schedule, "trunk") else lams[0]


def _smoothed(problem, solution, lam):
    """Rows (n,), bool, whose density was averaged on the way to the solution."""
    like = solution.status
    if lam == 0 or problem.smoothing == 0:
        return torch.zeros_like(like, dtype=torch.bool)
    if not problem.rough_only:
        return torch.ones_like(like, dtype=torch.bool)
    # (Some were there before the first average.)
    rough = problem.method.rough_rows(solution.memory, like)
    return rough & (like != STATUS.index("converged"))


def _result(objective, lam, solution, n_evals, smoothed, history):
    best = solution.evaluation
    arrays = dict(
        x=best.x,
        objective=best.value(torch.full_like(best.data, lam)),
        misfit=best.data,
        log_prob=best.log_prob,
        n_evals=n_evals,
        n_observed=objective.observed.sum(1),
        status=solution.status,
        smoothed=smoothed,
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
