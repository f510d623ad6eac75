"""The start of the continuation: the most probable image that explains the measurements."""

import torch

from skaipo.noise import SquaredError
from skaipo.objective import Evaluation, check_choice
from skaipo.solvers._base import CONVERGED, minimize
from skaipo.solvers._first_order import Adam
from skaipo.solvers._lbfgs import LBFGS

__all__ = ["MLE_SOLVERS", "mle_start"]

MLE_SOLVERS = ("pgd", "lbfgs")
# Weight of the prior against the penalty, where 1 is about equal weight.
_STIFFNESS = 0.01


class _Feasible:
    """``-log p_G`` over ``{x : f(x) = y}`` as an objective that :func:`minimize` understands.

    The variable is any ``u``; the image is its projection. The "data" gradient is the multiplier
    term of the KKT conditions, minus the part of the prior's gradient across the feasible set: the
    sum of both is the projected gradient, and their quotient measures stationarity.
    """

    def __init__(self, objective):
        self._inner = objective.in_space("image", "density")
        # Padded like the flow's batches: a row's projection is the same bits in every batch.
        n = len(objective)
        rows = torch.arange(n + max(16 - n, -n % 8)).clamp_max(n - 1).to(objective.y.device)
        self._project = objective.op.projector(objective.y[rows], objective.observed[rows])
        self._u = objective.y.new_zeros(len(rows), objective.n_features)
        self.n_evals = objective.n_evals

    def __len__(self):
        return len(self._inner)

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

    Parameters
    ----------
    objective : MAPObjective
        With a linear operator. Its counters are advanced.
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
    feasible = _Feasible(objective)
    # From the mode of the latent space: the nearest feasible image to G(0).
    start = objective.centre()
    if solver == "lbfgs":
        method = LBFGS() if method is None else method
        free = feasible.free().nonzero().flatten()
        # (A flow without a latent space to search in begins in the null space.)
        if len(free) and max_evals > 2 and objective.flow.has_inverse:
            start[free] = _penalised(objective, free, max_evals // 2)
    elif method is None:
        method = Adam(learning_rate=0.05, final_rate=0.1)
    solution = minimize(
        feasible, start, torch.ones_like(objective.y[:, 0]), method, max_evals=max_evals, tol=tol
    )
    return solution.evaluation.x, solution.status == CONVERGED


def _penalised(objective, rows, max_evals):
    """Images that nearly fit, of high density: eq. 4 with a quadratic penalty, in latent space.

    (Multipliers, tried in rounds of the same total budget, ended lower in density.)
    """
    penalised = objective.select(rows, space="latent", penalty="density")
    penalised.noise = SquaredError().bind(objective.y.shape[1])
    y = penalised.y
    lam = torch.full_like(y[:, 0], _STIFFNESS * 2.0 * objective.flow.data_scale() ** 2)
    z = y.new_zeros(len(y), objective.n_features)
    solution = minimize(penalised, z, lam, LBFGS(), max_evals=max_evals, tol=0.01, anneal=False)
    objective.n_evals[rows] = penalised.n_evals
    return solution.evaluation.x
