"""The start of the continuation: the most probable image that explains the measurements."""

import torch

from skaipo._padding import padded, padded_size
from skaipo.noise import SquaredError
from skaipo.objective import Evaluation, check_choice
from skaipo.operators._nonlinear import Linearisation
from skaipo.solvers._base import CONVERGED, minimize
from skaipo.solvers._first_order import Adam
from skaipo.solvers._lbfgs import LBFGS

__all__ = ["MLE_SOLVERS", "infeasible", "misfit", "mle_start", "off_centre", "penalised"]

MLE_SOLVERS = ("pgd", "lbfgs")
# What counts as f(x) = y where no formula solves it: ||f(x) - y|| <= FEASIBLE * ||y||. Of what
# typical images measure it is a thousandth of that again, which is for y = 0.
FEASIBLE = 1e-3
# Linearisations on the way to the most probable image that fits.
_ROUNDS = 4
# Weight of the prior against the penalty, where 1 is about equal weight.
_STIFFNESS = 0.01


class _Feasible:
    """``-log p_G`` over ``{x : f(x) = y}`` as an objective that :func:`minimize` understands.

    The variable is any ``u``; the image is its projection. The "data" gradient is the multiplier
    term of the KKT conditions, minus the part of the prior's gradient across the feasible set: the
    sum of both is the projected gradient, and their quotient measures stationarity.
    """

    def __init__(self, objective, at=None):
        self._inner = objective.in_space("image", "density")
        # Padded like the flow's batches: a row's projection is the same bits in every batch.
        n = len(objective)
        rows = torch.arange(padded_size(n)).clamp_max(n - 1).to(objective.y.device)
        op = objective.operator(rows)
        op = op if at is None else Linearisation(op, at[rows])
        self._project = op.projector(objective.y[rows], objective.observed[rows])
        self._project.quiet = True  # these rows are not the caller's; see infeasible()
        self._u = objective.y.new_zeros(len(rows), objective.n_features)
        self.n_evals = objective.n_evals

    def __len__(self):
        return len(self._inner)

    @property
    def eps(self):
        return self._inner.eps

    def project(self, x):
        """The nearest feasible images to ``x`` (n, d)."""
        self._u[: len(x)] = x
        return self._project(self._u)[: len(x)]

    def projected(self):
        """Rows whose latest projection is what it should be, shape (n,)."""
        converged = self._project.converged
        if converged is None:
            return torch.ones(len(self), dtype=torch.bool, device=self._u.device)
        return converged[: len(self)]

    def scale(self):
        return self._inner.scale()

    def free(self):
        """Rows whose measurements leave a direction to move in, shape (n,)."""
        probe = torch.linspace(1, 2, self._u.shape[1]).to(self._u).expand_as(self._u)
        freedom = self._project.null(probe).norm(dim=1) / probe.norm(dim=1)
        return freedom[: len(self)] > 1e-4

    def evaluate(self, u, rows=None):
        # The projector belongs to the whole batch; projecting costs little beside the flow.
        rows = torch.arange(len(self), device=u.device) if rows is None else rows
        self._u[rows] = u
        inner = self._inner.evaluate(self._project(self._u)[rows], rows)
        full = torch.zeros_like(self._u)
        full[rows] = inner.grad_prior
        along = self._project.null(full)[rows]
        return Evaluation(
            x=inner.x,
            data=torch.zeros_like(inner.data),
            prior=inner.prior,
            log_prob=inner.log_prob,
            grad_data=along - inner.grad_prior,
            grad_prior=inner.grad_prior,
        )


def mle_start(objective, *, max_evals=500, tol=1e-3, solver="pgd", method=None):
    """Solve ``max_x log p_G(x)  subject to  f(x) = y`` (eq. 4 of Liu et al., 2023).

    Where the measurements leave no freedom (denoising) the answer is ``y`` and costs one
    evaluation, whatever the solver.

    Where ``f`` is not linear, half of the budget goes to the quadratic penalty in latent space, and
    the other half to rounds of the same problem with ``f`` linearised, each followed by steps of
    Gauss and Newton back to ``f(x) = y``, which evaluate no flow. Of the images that fit, the one
    of highest density is kept; where none fits to :data:`FEASIBLE`, that of least squares.

    Where the likelihood is not at its best at ``f(x) = y`` (counts, 1-bit measurements) the answer
    is the minimiser of the objective at a very small lambda, and all of the budget goes there.

    Parameters
    ----------
    objective : MAPObjective
        Its counters are advanced.
    max_evals : int, default=500
        A row stops when ``objective.n_evals`` reaches it.
    tol : float, default=1e-3
        A row stops when its projected gradient is this small against the whole gradient.
    solver : {"pgd", "lbfgs"}, default="pgd"
        "pgd" is the paper's projected gradient with Adam steps: step along the null space of the
        observed measurements, project back, and keep the feasible iterate of highest density.
        "lbfgs" spends half of the budget on the quadratic penalty in the latent space, where the
        prior is white, and the other half on L-BFGS in the null space: the same problem and
        feasibility, at about a tenth of the evaluations.
    method : Method, default=None
        Update rule of the steps along the null space. Default for "pgd": Adam with a learning
        rate of 0.05 standard deviations of the data, falling to a tenth of it along half a cosine.
        Default for "lbfgs": :class:`LBFGS`.

    Returns
    -------
    x : torch.Tensor of shape (n, d)
        Feasible to the projection's accuracy.
    converged : torch.Tensor of shape (n,), bool
    """
    check_choice("mle_solver", solver, MLE_SOLVERS)
    objective = objective.exactly()
    if method is None:
        method = LBFGS() if solver == "lbfgs" else Adam(learning_rate=0.05, final_rate=0.1)
    everyone = torch.arange(len(objective), device=objective.y.device)
    if not objective.noise.is_exact_fit:
        solution = penalised(objective, everyone, max_evals, objective.noise, tol)
        return solution.evaluation.x, solution.status == CONVERGED
    if not objective.op.is_linear:
        return _sequential(objective, everyone, max_evals, tol, method)
    feasible = _Feasible(objective)
    # From the mode of the latent space: the nearest feasible image to G(0).
    start = objective.centre()
    if solver == "lbfgs":
        free = feasible.free().nonzero().flatten()
        # (A flow without a latent space to search in begins in the null space.)
        if len(free) and max_evals > 2 and objective.flow.has_inverse:
            start[free] = penalised(objective, free, max_evals // 2).evaluation.x
    one = torch.ones_like(objective.y[:, 0])
    solution = minimize(feasible, start, one, method, max_evals=max_evals, tol=tol)
    return solution.evaluation.x, solution.status == CONVERGED


def infeasible(objective, x):
    """Images ``x`` (n, d) that leave some of ``y`` unexplained which others might explain, (n,).

    Where ``f`` is linear and a formula projects, none; where iterations do, rows in which they
    ended too early.
    """
    if not objective.op.is_linear:
        return misfit(objective, x) > FEASIBLE
    # (Where y is zero this asks for nothing left at all, and the projection says whether it is.)
    size = objective.y.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    bad = misfit(objective, x, size) > FEASIBLE
    if bool(bad.any()):
        rows = bad.nonzero().flatten()
        feasible = _Feasible(objective.select(rows))
        feasible.project(x[rows])
        bad[rows] = ~feasible.projected()
    return bad


def misfit(objective, x, size=None):
    """``||f(x) - y|| / ||y||`` over the observed measurements, shape (n,).

    Where ``y`` is zero, or next to it, relative to a thousandth of what typical images measure:
    nothing else tells what is small. ``size`` (n,), if given, is what it is relative to.
    """
    rows = torch.arange(len(objective), device=x.device)
    size = _size(objective) if size is None else size
    return padded(lambda x, rows: _residual(objective, x, rows), x, rows).norm(dim=1) / size


def _residual(objective, x, rows, y=None):
    y = objective.y[rows] if y is None else y
    with torch.no_grad():
        return torch.where(objective.observed[rows], objective.operator(rows).forward(x) - y, 0.0)


def _size(objective):
    """What a residual of each row is small against, shape (n,)."""
    y = objective.y
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(objective.n_features, generator=generator, dtype=torch.float64)
    # One image, the same for all rows, about as far from the centre as those of the prior.
    x = objective.centre() + objective.flow.data_scale() * noise.to(y)
    rows = torch.arange(len(objective), device=y.device)
    measured = padded(lambda x, rows: _residual(objective, x, rows, 0.0), x, rows).norm(dim=1)
    measured = torch.where(measured.isfinite(), measured, 0.0)
    size = torch.maximum(y.norm(dim=1), FEASIBLE * measured)
    return size.clamp_min(torch.finfo(y.dtype).tiny)


def _sequential(objective, rows, max_evals, tol, method):
    """Eq. 4 for an ``f`` that is not linear, by linearising it again and again."""
    x = penalised(objective, rows, max(1, max_evals // 2), tol=tol).evaluation.x
    size = _size(objective)
    best, converged = _closer(objective, x, size), torch.zeros_like(rows, dtype=torch.bool)
    away, lam = misfit(objective, best, size), torch.ones_like(objective.y[:, 0])
    density = torch.full_like(lam, -torch.inf)
    x = best
    for k in range(_ROUNDS):
        limit = objective.n_evals + (max_evals - objective.n_evals) // (_ROUNDS - k)
        if not bool((limit > objective.n_evals).any()):
            break
        solution = minimize(
            _Feasible(objective, at=x), x, lam, method, max_evals=limit, tol=tol, anneal=False
        )
        # What was found on the tangent is known to fit only after coming back from it.
        known = solution.evaluation.log_prob
        moved = (solution.u - x).norm(dim=1) > 1e-3 * x.norm(dim=1)
        x = _closer(objective, solution.evaluation.x, size)
        new = misfit(objective, x, size)
        fits, fitted = new <= FEASIBLE, away <= FEASIBLE
        better = torch.where(fits & fitted, known > density, new < away)
        best = torch.where(better[:, None], x, best)
        away, density = torch.where(better, new, away), torch.where(better, known, density)
        converged |= fits & (solution.status == CONVERGED) & ~moved
    return best, converged & (away <= FEASIBLE)


def _closer(objective, x, size, steps=20):
    """Gauss-Newton steps towards ``f(x) = y``, each the shortest; as long as they get closer."""
    away = misfit(objective, x, size)
    going = away > 0.1 * FEASIBLE
    for _ in range(steps):
        if not bool(going.any()):
            return x
        step = _Feasible(objective, at=x).project(x) - x
        before = away
        for length in (1.0, 0.5, 0.2, 0.05):
            trial = x + length * step
            new = misfit(objective, trial, size)
            lower = going & (new < away)
            x, away = torch.where(lower[:, None], trial, x), torch.where(lower, new, away)
        going = going & (away < 0.99 * before) & (away > 0.1 * FEASIBLE)
    return x


def off_centre(objective):
    """The mode of the latent space (n, d); a little beside it where ``f`` is not linear.

    What is symmetric about the mode, such as the magnitudes of data of mean zero, has no slope
    there, and no solver would ever leave. The same for all rows.
    """
    z = objective.y.new_zeros(len(objective), objective.n_features)
    if objective.op.is_linear:
        return z
    generator = torch.Generator().manual_seed(0)
    beside = torch.randn(objective.n_features, generator=generator, dtype=torch.float64)
    return z + 0.01 * beside.to(z)


def penalised(objective, rows, max_evals, noise=None, tol=0.01):
    """Images that nearly fit, of high density: eq. 4 with a penalty (in latent space, if any).

    (Multipliers, tried in rounds of the same total budget, ended lower in density.)
    """
    space = "latent" if objective.flow.has_inverse else "image"
    problem = objective.select(rows, space=space, penalty="density")
    y = problem.y
    lam = torch.full_like(y[:, 0], _STIFFNESS)
    if noise is None:
        problem.noise = SquaredError().bind(y.shape[1])
        lam *= 2.0 * objective.flow.data_scale() ** 2
    u = off_centre(problem) if space == "latent" else problem.centre()
    solution = minimize(problem, u, lam, LBFGS(), max_evals=max_evals, tol=tol, anneal=False)
    objective.n_evals[rows] = problem.n_evals
    return solution
