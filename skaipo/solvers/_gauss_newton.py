"""Operators that are not linear: the solution under a Gaussian prior, by linearising again."""

import torch

from skaipo._padding import padded
from skaipo.operators._nonlinear import Linearisation
from skaipo.solvers._gaussian import _FACTORS, better, conjugate_gradients, lowest
from skaipo.solvers._mle import penalised

__all__ = ["gauss_newton_start"]

# Images at which the iteration starts: the surrogate's mean, and samples of it, the same for all
# rows. Of several minima the lowest counts; the iteration itself costs no flow evaluation.
_STARTS = 4
_SEED_EVALS = 40
_STEPS = 10
_CG_STEPS = 30
_LENGTHS = (1.0, 0.5, 0.2, 0.05)


def gauss_newton_start(surrogate, objective, lam, max_evals=None):
    """Start from what the solution would be if the prior were Gaussian; see gaussian_start.

    Parameters
    ----------
    surrogate : GaussianSurrogate
    objective : MAPObjective
    lam : torch.Tensor of shape (n,)
        Target.
    max_evals : int, default=None
        As in :func:`gaussian_start`.

    Returns
    -------
    u : torch.Tensor of shape (n, d)
        In the objective's space.
    """
    gaussian, image = surrogate.to(objective.y), objective.in_space("image")
    n = len(objective)
    limit = _SEED_EVALS + len(_FACTORS) if max_evals is None else max_evals
    # The last step into latent space is an evaluation as well.
    limit -= objective.space == "latent"
    starts = [one.expand(n, -1) for one in (gaussian.mean[None], *gaussian.sample(_STARTS - 1))]
    # And the flow's own idea of an image that fits. Where signs or phases are lost, none of the
    # others need lie in the right valley.
    seed = min(_SEED_EVALS, limit - len(_FACTORS))
    seed = seed if seed > 1 else 0
    if seed:
        noise = None if objective.noise.is_exact_fit else objective.noise
        everyone = torch.arange(n, device=objective.y.device)
        starts.append(penalised(objective.exactly(), everyone, seed, noise).evaluation.x)
    middle = _FACTORS[len(_FACTORS) // 2] * lam
    x, value = _gauss_newton(gaussian, image, middle, starts[0], _STEPS)
    for start in starts[1:]:
        x, value = better(*_gauss_newton(gaussian, image, middle, start, _STEPS), x, value)
    factors = _FACTORS[: max(1, limit - seed)]
    refined = (_gauss_newton(gaussian, image, factor * lam, x, _STEPS)[0] for factor in factors)
    return lowest(objective, lam, refined)


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
        return _newton_step(affine, surrogate, location[rows], weight[rows], lam, x)

    value = evaluate(x)
    going = value.isfinite()
    for _ in range(steps):
        if not bool(going.any()):
            break
        step = padded(solve, x, lam, rows)
        before = value
        for length in _LENGTHS:
            trial = x + length * step
            # A row that has stopped stays where it is, whatever the others do.
            new = torch.where(going, evaluate(trial), torch.inf)
            x, value = better(trial, new, x, value)
        going = going & (value < before - 1e-3 * before.abs())
    return x, value


def _newton_step(affine, surrogate, y, weight, lam, x):
    """The step from ``x`` to the minimiser under the surrogate, for an affine operator.

    By conjugate gradients in the coordinates in which the surrogate is white; a few steps do for a
    direction.
    """
    misfit = torch.where(weight > 0, y - affine.forward(x), 0.0)
    prior = surrogate.precise(x - surrogate.mean)
    return conjugate_gradients(
        lambda v: affine.adjoint(weight * affine.linear(v)) + lam[:, None] * surrogate.precise(v),
        surrogate.cover,
        torch.zeros_like(x),
        affine.adjoint(weight * misfit) - lam[:, None] * prior,
        _CG_STEPS,
        # What is left below this is rounding that grows.
        lambda size: 1e-6 * size,
    )
