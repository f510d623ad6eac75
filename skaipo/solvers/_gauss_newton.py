"""Operators that are not linear: the solution under a Gaussian prior, by linearising again."""

import torch

from skaipo._padding import padded
from skaipo.solvers._gaussian import GaussianMetric

__all__ = ["gauss_newton_start"]

# Images at which the iteration starts: the surrogate's mean, and samples of it, the same for all
# rows. Of several minima the lowest counts; none of it costs a flow evaluation.
_STARTS = 4
_STEPS = 15
_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02)


def gauss_newton_start(surrogate, objective, lam, factors=(1.0, 3.0, 10.0), max_evals=None):
    """Start from what the solution would be if the prior were Gaussian; see gaussian_start.

    The objective's metric is then that of the operator's linearisation at the start.

    Parameters
    ----------
    surrogate : GaussianSurrogate
    objective : MAPObjective
    lam : torch.Tensor of shape (n,)
        Target.
    factors : tuple of float
    max_evals : int, default=None
        As in :func:`gaussian_start`.

    Returns
    -------
    u : torch.Tensor of shape (n, d)
        In the objective's space.
    """
    gaussian, image = surrogate.to(objective.y), objective.in_space("image")
    n = len(objective)
    starts = torch.cat((gaussian.mean[None], gaussian.sample(_STARTS - 1)))
    middle = factors[len(factors) // 2] * lam
    x = lowest = None
    for start in starts:
        found, value = _gauss_newton(surrogate, image, middle, start.expand(n, -1))
        x = found if x is None else torch.where((value < lowest)[:, None], found, x)
        lowest = value if lowest is None else torch.minimum(value, lowest)
    best = value = None
    for factor in factors if max_evals is None else factors[: max(1, max_evals)]:
        found, _ = _gauss_newton(surrogate, image, factor * lam, x)
        evaluation = image.evaluate(found)
        new = torch.where(evaluation.finite(), evaluation.value(lam), torch.inf)
        best = found if best is None else torch.where((new < value)[:, None], found, best)
        value = new if value is None else torch.minimum(new, value)
    objective.metric = GaussianMetric(surrogate, objective, at=best)
    return objective.variable(best)


def _gauss_newton(surrogate, objective, lam, x):
    """Minimise the objective with the surrogate for the prior, from images ``x`` on.

    Gauss-Newton steps (Nocedal & Wright, 2006, section 10.3): each solves the problem with the
    operator linearised, and goes as far towards its solution as lowers the objective most. A row
    stops where none of the lengths does.

    Parameters
    ----------
    surrogate : GaussianSurrogate
    objective : MAPObjective
    lam : torch.Tensor of shape (n,)
    x : torch.Tensor of shape (n, d)

    Returns
    -------
    x : torch.Tensor of shape (n, d)
    value : torch.Tensor of shape (n,)
        The objective there.
    """
    rows = torch.arange(len(objective), device=x.device)
    gaussian = surrogate.to(x)

    def evaluate(x):
        value = objective.misfit(x, rows) + 0.5 * lam * padded(
            gaussian.quadratic, x - gaussian.mean
        )
        return torch.where(value.isfinite(), value, torch.inf)

    value = evaluate(x)
    for _ in range(_STEPS):
        step = GaussianMetric(surrogate, objective, at=x).start(lam) - x
        before = value
        for length in _LENGTHS:
            trial = x + length * step
            new = evaluate(trial)
            lower = new < value
            x, value = torch.where(lower[:, None], trial, x), torch.where(lower, new, value)
        if bool((value >= before - 1e-4 * before.abs()).all()):
            break
    return x, value
