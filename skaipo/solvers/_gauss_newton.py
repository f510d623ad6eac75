"""Operators that are not linear: the solution under a Gaussian prior, by linearising again."""

import torch

from skaipo._padding import padded
from skaipo.operators._nonlinear import Linearisation
from skaipo.solvers._gaussian import GaussianMetric
from skaipo.solvers._mle import penalised

__all__ = ["gauss_newton_start"]

# Images at which the iteration starts: the surrogate's mean, and samples of it, the same for all
# rows. Of several minima the lowest counts; the iteration itself costs no flow evaluation.
_STARTS = 4
_SEED_EVALS = 40
_STEPS = 10
_CG_STEPS = 30
_LENGTHS = (1.0, 0.5, 0.2, 0.05)


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
    limit = _SEED_EVALS + len(factors) if max_evals is None else max_evals
    # The last step into latent space is an evaluation as well.
    limit -= objective.space == "latent"
    starts = [one.expand(n, -1) for one in (gaussian.mean[None], *gaussian.sample(_STARTS - 1))]
    # And the flow's own idea of an image that fits. Where signs or phases are lost, none of the
    # others need lie in the right valley.
    seed = min(_SEED_EVALS, limit - len(factors))
    seed = seed if seed > 1 else 0
    if seed:
        noise = None if objective.noise.is_exact_fit else objective.noise
        everyone = torch.arange(n, device=objective.y.device)
        starts.append(penalised(objective, everyone, seed, noise).evaluation.x)
    middle = factors[len(factors) // 2] * lam
    x = lowest = None
    for start in starts:
        found, value = _gauss_newton(gaussian, image, middle, start, _STEPS)
        x = found if x is None else torch.where((value < lowest)[:, None], found, x)
        lowest = value if lowest is None else torch.minimum(value, lowest)
    best = value = None
    for factor in factors[: max(1, limit - seed)]:
        found, _ = _gauss_newton(gaussian, image, factor * lam, x, _STEPS)
        evaluation = image.evaluate(found)
        new = torch.where(evaluation.finite(), evaluation.value(lam), torch.inf)
        best = found if best is None else torch.where((new < value)[:, None], found, best)
        value = new if value is None else torch.minimum(new, value)
    objective.metric = GaussianMetric(surrogate, objective, at=best)
    return objective.variable(best)


def _gauss_newton(surrogate, objective, lam, x, steps):
    """Minimise the objective with the surrogate for the prior, from images ``x`` on.

    Gauss-Newton steps (Nocedal & Wright, 2006, section 10.3): each solves the problem with the
    operator linearised, and goes as far towards its solution as lowers the objective most.

    Parameters
    ----------
    surrogate : GaussianSurrogate
    objective : MAPObjective
    lam : torch.Tensor of shape (n,)
    x : torch.Tensor of shape (n, d)
    steps : int

    Returns
    -------
    x : torch.Tensor of shape (n, d)
    value : torch.Tensor of shape (n,)
        The objective there.
    """
    rows = torch.arange(len(objective), device=x.device)
    location, weight = objective.noise.gaussian_fit(objective.y)
    weight = torch.where(objective.observed, weight, 0.0)

    def evaluate(x):
        prior = padded(surrogate.quadratic, x - surrogate.mean)
        value = objective.misfit(x, rows) + 0.5 * lam * prior
        return torch.where(value.isfinite(), value, torch.inf)

    def solve(x, lam, rows):
        affine = Linearisation(objective.operator(rows), x)
        return _conjugate_gradients(affine, surrogate, location[rows], weight[rows], lam, x)

    value = evaluate(x)
    going = value.isfinite()
    for _ in range(steps):
        if not bool(going.any()):
            break
        step = padded(solve, x, lam, rows)
        before = value
        for length in _LENGTHS:
            trial = x + length * step
            new = evaluate(trial)
            # A row that has stopped stays where it is, whatever the others do.
            lower = going & (new < value)
            x, value = torch.where(lower[:, None], trial, x), torch.where(lower, new, value)
        going = going & (value < before - 1e-3 * before.abs())
    return x, value


def _conjugate_gradients(affine, surrogate, y, weight, lam, x):
    """The step from ``x`` to the minimiser under the surrogate, for an affine operator.

    By conjugate gradients in the coordinates in which the surrogate is white (Nocedal & Wright,
    2006, algorithm 5.3, with its covariance for preconditioner); a few steps do for a direction.
    """
    misfit = torch.where(weight > 0, y - affine.forward(x), 0.0)
    prior = surrogate.precise(x - surrogate.mean)
    residual = affine.adjoint(weight * misfit) - lam[:, None] * prior
    step = torch.zeros_like(x)
    p = z = surrogate.cover(residual)
    size = first = (residual * z).sum(1)
    for _ in range(_CG_STEPS):
        hp = affine.adjoint(weight * affine.linear(p)) + lam[:, None] * surrogate.precise(p)
        curvature = (p * hp).sum(1)
        # What is left below this is rounding that grows.
        going = (curvature > 0) & (size > 1e-6 * first)
        if not bool(going.any()):
            break
        alpha = torch.where(going, size / curvature, 0.0)[:, None]
        step = torch.addcmul(step, alpha, p)
        residual = torch.addcmul(residual, -alpha, hp)
        z = surrogate.cover(residual)
        new = (residual * z).sum(1)
        p = torch.addcmul(z, torch.where(size > 0, new / size, 0.0)[:, None], p)
        size = new
    return step
