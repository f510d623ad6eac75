"""How lambda rises: along a fixed sequence, or as each row can follow."""

import math

import numpy as np
from sklearn.base import BaseEstimator

from skaipo._keywords import CheckedKeywords

__all__ = [
    "AdaptiveSchedule",
    "DirectSchedule",
    "GeometricSchedule",
    "LatticeSchedule",
    "LinearSchedule",
    "TheorySchedule",
    "lam_range",
]

# How much more than the mean the stages at the middle of a lattice get, and those at its ends less.
_TILT = 0.4
# The share of the way down that is its tail, and how much of that a stage there gets.
_TAIL, _SPARED = 0.3, 0.6


def _require(ok, schedule, needs):
    if not ok:
        raise ValueError(f"{type(schedule).__name__} needs {needs}, got {schedule!r}.")


def _anchor(noise, flow):
    """The lambda at which prior and data weigh about the same."""
    return noise.typical_curvature() * flow.data_scale() ** 2


class DirectSchedule(CheckedKeywords, BaseEstimator):
    """No continuation: the target from the first step."""

    tol = 0.0

    def stages(self, objective, target, max_evals):
        """No lambdas before the target."""
        return [], 1

    def last(self, max_evals):
        """Evaluations at the target: all of them."""
        return max_evals


class LinearSchedule(CheckedKeywords, BaseEstimator):
    """Equal steps, ``lam_k = k lam / n_stages``, as in Algorithm 1 of Liu et al. (2023).

    Parameters
    ----------
    n_stages : int, default=20
    share : float in (0, 1), default=0.5
        Share of the evaluations, without the third that the start may take, for the stages before
        the last.
    tol : float, default=0.1
        Relative gradient at which a stage is good enough for a row to wait for the next.
    """

    def __init__(self, n_stages=20, share=0.5, tol=0.1):
        self.n_stages = n_stages
        self.share = share
        self.tol = tol

    def stages(self, objective, target, max_evals):
        """Lambdas before the target, and evaluations per stage.

        Parameters
        ----------
        objective : MAPObjective
        target : float
        max_evals : int
            What the start and the stages may spend together.

        Returns
        -------
        lams : list of float
        per_stage : int
        """
        ok = self.n_stages >= 1 and 0 < self.share < 1 and self.tol >= 0
        _require(ok, self, "n_stages >= 1, 0 < share < 1 and tol >= 0")
        # By max_evals alone, not by what rows have spent: rows must not depend on each other.
        budget = self.share * (max_evals - max_evals // 3)
        # Fewer evaluations than stages: take larger steps, so that the last keeps its share.
        n_stages = max(1, min(self.n_stages, int(budget)))
        return [target * k / n_stages for k in range(1, n_stages)], max(1, int(budget / n_stages))

    def last(self, max_evals):
        """Evaluations of the last stage: all that is left."""
        return max_evals


class GeometricSchedule(CheckedKeywords, BaseEstimator):
    """Fixed lambdas in equal ratios, the trunk, from which every target branches off.

    The trunk does not depend on the target: it ends at the anchor, the lambda at which prior and
    data weigh about the same, which is the curvature of the noise's negative log-likelihood times
    the variance of the data. The solution at one target is therefore the same whether it is
    solved for alone or as a point of a path.

    Parameters
    ----------
    n_stages : int, default=9
        Stages from ``anchor / span`` to ``anchor``.
    span : float, default=1000
    share : float in (0, 1), default=0.975
        Share of ``max_evals`` that the start and the trunk up to the anchor may take. What is
        left is for the last stage, at the target.
    tol : float, default=0.02
        Relative gradient at which a stage is good enough for a row to wait for the next.
    """

    def __init__(self, n_stages=9, span=1000.0, share=0.975, tol=0.02):
        self.n_stages = n_stages
        self.span = span
        self.share = share
        self.tol = tol

    def trunk(self, objective):
        """The trunk's lambdas, ascending to the anchor."""
        ok = self.n_stages >= 1 and self.span > 1 and 0 < self.share < 1 and self.tol >= 0
        _require(ok, self, "n_stages >= 1, span > 1, 0 < share < 1 and tol >= 0")
        anchor = _anchor(objective.noise, objective.flow)
        return [anchor / s for s in np.geomspace(self.span, 1.0, self.n_stages)]

    def stages(self, objective, target, max_evals):
        """Lambdas of the trunk before the target, and evaluations per stage."""
        trunk = self.trunk(objective)
        budget = self.share * max_evals - max_evals // 3
        per_stage = max(1, math.floor(budget / self.n_stages))
        return [lam for lam in trunk if lam < target], per_stage

    def last(self, max_evals):
        """Evaluations of the last stage."""
        return max(2, math.ceil((1 - self.share) * max_evals))


class LatticeSchedule(CheckedKeywords, BaseEstimator):
    """Fixed lambdas in equal ratios, followed from their middle to both ends.

    In the middle the Gaussian start is good. From there a smaller lambda is approached from the
    smooth side, where a rising one, that starts from the measurement's own noise, would keep some
    of it. At the smallest lambdas that noise is where the minimum lies: the way down looks there
    first, and goes on from there where the objective is lower. Each stage is annealed and is the
    result at its lambda, so that a path along the whole lattice costs no more than ``max_evals``;
    it begins ahead of the last solution on the secant through the last two, predictor and corrector
    (Allgower & Georg, 1990, chapter 6).
    A target between two of its lambdas branches off from the one before it.

    Parameters
    ----------
    n_stages : int, default=20
        Lambdas from ``top / span`` to ``top``, at most one for every twelve of ``max_evals``. In
        the same ratio as many follow above, where a target asks for them; they come on top of
        ``max_evals`` for a path, not for one lambda.
    top, span, middle : float, default=None
        The largest lambda; its ratio to the smallest; and the first one as a share of the largest
        (the nearest of the lattice is taken). None: 1, 100 and 1, where the misfit is a negative
        log-likelihood in nats, so that the largest is the Bayesian one. The squared error of
        ``noise=None`` has no such scale: the lambda at which prior and data weigh about the same,
        its curvature times the variance of the data; 1000; and 0.1.
    share : float in (0, 1), default=0.2
        Share of ``max_evals``, of what the start has left of them, for the first stage. The others
        divide the rest, those near the middle taking more than those at the ends, and those at the
        smallest lambdas the least. A branch takes half of what the stage before it did, or, beyond
        an end of the lattice, all that is left.
    """

    def __init__(self, n_stages=20, top=None, span=None, middle=None, share=0.2):
        self.n_stages = n_stages
        self.top = top
        self.span = span
        self.middle = middle
        self.share = share

    def lattice(self, objective, max_evals):
        """The lambdas, ascending, and which of them is the first to be solved for."""
        given = {k: v for k in ("top", "span", "middle") if (v := getattr(self, k)) is not None}
        parts = lam_range(objective.noise, objective.flow) | given
        top, span, middle = (parts[k] for k in ("top", "span", "middle"))
        ok = self.n_stages >= 2 and top > 0 and span > 1 and middle > 0 and 0 < self.share < 1
        _require(ok, self, "n_stages >= 2, top > 0, span > 1, middle > 0 and 0 < share < 1")
        n = self._size(max_evals)
        lams = top * span ** (np.arange(1 - n, n) / (n - 1))
        return lams.tolist(), int(np.abs(np.log(lams[:n]) - math.log(middle * top)).argmin())

    def _size(self, max_evals):
        return max(2, min(self.n_stages, max_evals // 12))

    def low(self, middle, max_evals):
        """Which of the lambdas shows the low valley; None where that would be too dear."""
        k = 2 * self._size(max_evals) // 5
        # (What the first stage leaves after a start that took a third. The start of the look itself
        # asks nobody for some evaluations.)
        left = (1 - self.share) * (max_evals - max_evals // 3)
        return k if k < middle and max_evals >= 120 and left >= 12 else None

    def budgets(self, middle, max_evals, left):
        """Evaluations (n_rows,) of each stage, from the smallest lambda on.

        ``left`` (n_rows,) is what the start has left of ``max_evals``.
        """
        n = self._size(max_evals)
        first = (self.share * left).to(left.dtype).clamp_min(1)
        # The nearer to the middle, the more the solution changes from one lambda to the next.
        away = (abs(k - middle) / max(1, middle) for k in range(2 * n - 1))
        weights = [1 + _TILT * (1 - 2 * min(1.0, a)) for a in away]
        # At the smallest lambdas it hardly changes any more.
        weights = [w * _SPARED if k < _TAIL * middle else w for k, w in enumerate(weights)]
        # One more for the low valley, and half a one for a branch.
        total = sum(weights[:n]) - weights[middle] + 1.5
        budgets = [((left - first) * w / total).to(left.dtype).clamp_min(1) for w in weights]
        budgets[middle] = first
        return budgets

    def last(self, max_evals):
        """Evaluations of the last stage: all that is left."""
        return max_evals


def lam_range(noise, flow):
    """Where lambda is looked for by default: ``top``, ``span`` and ``middle`` of LatticeSchedule.

    Parameters
    ----------
    noise : NoiseModel
    flow : Flow

    Returns
    -------
    dict
    """
    if noise.is_likelihood:
        return dict(top=1.0, span=100.0, middle=1.0)
    return dict(top=_anchor(noise, flow), span=1000.0, middle=0.1)


class TheorySchedule(CheckedKeywords, BaseEstimator):
    """Algorithm 1 of Liu et al. (2023): stages and steps that reach the global minimiser.

    With gradient steps of length ``1 / L`` (``GradientDescent(lipschitz=L)``) the result is within
    ``epsilon`` of the minimiser at the target, if the assumptions hold and the start is within
    :attr:`radius` of the minimiser at lambda 0. ``docs/theory.md`` derives the constants.

    Parameters
    ----------
    L : float
        Assumption 3.2: the gradient of the objective is ``L``-Lipschitz for every lambda up to the
        target.
    sigma : float
        Assumption 3.3: ``||x - x*(lam)|| <= sigma ||gradient(x; lam)||`` in the ball of radius
        ``delta`` around ``x*(lam)``. At least ``1 / L``.
    delta : float
        Assumption 3.3: the radius of that ball.
    C : float
        Assumption 3.4: ``||x*(a) - x*(b)|| <= C |a - b|``.
    epsilon : float, default=1e-3
        Distance to the minimiser that is asked for.
    """

    # Every step is taken: no early exit, and nothing beside the algorithm.
    tol = 0.0
    exact = True

    def __init__(self, L, sigma, delta, C, epsilon=1e-3):
        self.L = L
        self.sigma = sigma
        self.delta = delta
        self.C = C
        self.epsilon = epsilon

    @property
    def mu(self):
        """Constant of the Polyak-Lojasiewicz inequality: ``1 / (L sigma^2)`` (3.2 and 3.3)."""
        return 1.0 / (self.L * self.sigma**2)

    @property
    def radius(self):
        """``delta_0 = delta sqrt(mu / L) / 2``: what a stage may be off, and lambda may move it.

        Two such distances keep the next start so close that descent never leaves the ball of
        Assumption 3.3: ``sqrt(L / mu) * 2 delta_0 = delta``.
        """
        return 0.5 * self.delta * math.sqrt(self.mu / self.L)

    def _steps(self, quotient):
        """Steps that shrink the bound by ``quotient``: the gap shrinks by 1 - mu / L in each."""
        if self.mu >= self.L:
            return 1  # perfectly conditioned: one step is exact
        return max(
            0, math.floor(2 * math.log(quotient) / math.log(self.L / (self.L - self.mu))) + 1
        )

    def n_stages(self, target):
        """``N = floor(C lam / delta_0) + 1``: each moves the minimiser by less than delta_0."""
        return math.floor(self.C * target / self.radius) + 1

    def stages(self, objective, target, max_evals):
        """Lambdas before the target, and gradient steps per stage."""
        for name in ("L", "sigma", "delta", "C", "epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (name == "C" and value == 0))):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if self.L * self.sigma < 1 - 1e-9:
            raise ValueError(
                f"L * sigma must be at least 1 (a gradient cannot be larger than L times the "
                f"distance), got L={self.L}, sigma={self.sigma}."
            )
        n, steps = self.n_stages(target), self._steps(2 * self.delta / self.radius)
        needed = (n - 1) * steps + self.last(max_evals)
        if needed > max_evals - max_evals // 3:
            raise ValueError(
                f"Algorithm 1 takes {needed} gradient steps here ({n} stages of {steps}); set "
                f"max_evals to at least {math.ceil(1.5 * needed) + 3} (a third is for the start), "
                f"or use another schedule."
            )
        return [target * k / n for k in range(1, n)], steps

    def last(self, max_evals):
        """Gradient steps of the last stage, which ends within epsilon."""
        return max(1, self._steps(2 * self.delta / self.epsilon))


class AdaptiveSchedule(CheckedKeywords, BaseEstimator):
    """Each row takes the steps in lambda that it can follow: predictor and corrector.

    The predictor is the secant through a row's last two solutions (Allgower & Georg, 1990, chapter
    6), kept where it lowers the objective; the corrector is the inner solver, for at most
    ``stage_evals`` evaluations. A step that the corrector mastered in half of them is followed by
    one four times as long, one that it mastered by one twice as long, one that it did not master
    by one half as long.

    Parameters
    ----------
    first : float in (0, 1], default=0.01
        First step, as a share of the target.
    stage_evals : int, default=8
        Evaluations that the corrector may spend on a step.
    share : float in (0, 1), default=0.5
        Share of the evaluations, without the third that the start may take, for the climb. When
        they are spent, lambda goes to the target at once.
    tol : float, default=0.1
        Relative gradient at which the corrector has mastered a step.
    """

    def __init__(self, first=0.01, stage_evals=8, share=0.5, tol=0.1):
        self.first = first
        self.stage_evals = stage_evals
        self.share = share
        self.tol = tol

    def climb(self, max_evals):
        """Evaluations that the climb may take."""
        ok = 0 < self.first <= 1 and self.stage_evals >= 1
        ok = ok and 0 < self.share < 1 and self.tol >= 0
        _require(ok, self, "0 < first <= 1, stage_evals >= 1, 0 < share < 1 and tol >= 0")
        return int(self.share * (max_evals - max_evals // 3))

    def last(self, max_evals):
        """Evaluations of the last stage: all that is left."""
        return max_evals
