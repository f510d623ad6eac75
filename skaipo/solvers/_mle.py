"""The start of the continuation: the most probable image that explains the measurements."""

import torch

from skaipo.objective import Evaluation
from skaipo.solvers._base import CONVERGED, minimize
from skaipo.solvers._first_order import Adam

__all__ = ["mle_start"]


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


def mle_start(objective, *, max_evals=500, tol=1e-3, method=None):
    """Solve ``max_x log p_G(x)  subject to  f(x) = y`` (eq. 4 of Liu et al., 2023).

    Projected gradient with Adam steps: step along the null space of the observed measurements,
    project back, and keep the feasible iterate of highest density. Where the measurements leave
    no freedom (denoising) the answer is ``y`` and costs one evaluation.

    Parameters
    ----------
    objective : MAPObjective
        With a linear operator. Its counters are advanced.
    max_evals : int, default=500
        A row stops when ``objective.n_evals`` reaches it.
    tol : float, default=1e-3
        A row stops when its projected gradient is this small against the whole gradient.
    method : Method, default=None
        Default: Adam with a learning rate of 0.05 standard deviations of the data, falling to a
        tenth of it along half a cosine.

    Returns
    -------
    x : torch.Tensor of shape (n, d)
        Feasible to the projection's accuracy.
    converged : torch.Tensor of shape (n,), bool
    """
    feasible = _Feasible(objective)
    # From the mode of the latent space: the nearest feasible image to G(0).
    zero = objective.y.new_zeros(1, objective.n_features)
    with torch.no_grad():
        start = objective.flow.inverse(zero).flatten(1)
    solution = minimize(
        feasible,
        start.expand(len(objective), -1),
        torch.ones_like(objective.y[:, 0]),
        Adam(learning_rate=0.05, final_rate=0.1) if method is None else method,
        max_evals=max_evals,
        tol=tol,
    )
    return solution.evaluation.x, solution.status == CONVERGED
