"""Solvers of the MAP problem: update rules, the loop that runs them, and the continuation."""

from skaipo.solvers._base import STATUS, Method, Solution, minimize
from skaipo.solvers._continuation import continuation, continuation_path, lattice_path
from skaipo.solvers._first_order import Adam, GradientDescent
from skaipo.solvers._gauss_newton import gauss_newton_start
from skaipo.solvers._gaussian import GaussianMetric, GaussianSurrogate, gaussian_start, surrogate_of
from skaipo.solvers._hybrid import Hybrid
from skaipo.solvers._lbfgs import LBFGS
from skaipo.solvers._mle import MLE_SOLVERS, infeasible, misfit, mle_start, off_centre
from skaipo.solvers._schedules import (
    AdaptiveSchedule,
    DirectSchedule,
    GeometricSchedule,
    LatticeSchedule,
    LinearSchedule,
    TheorySchedule,
    lam_range,
)

__all__ = [
    "LBFGS",
    "MLE_SOLVERS",
    "STATUS",
    "Adam",
    "AdaptiveSchedule",
    "DirectSchedule",
    "GaussianMetric",
    "GaussianSurrogate",
    "GeometricSchedule",
    "GradientDescent",
    "Hybrid",
    "LatticeSchedule",
    "LinearSchedule",
    "Method",
    "Solution",
    "TheorySchedule",
    "continuation",
    "continuation_path",
    "gauss_newton_start",
    "gaussian_start",
    "infeasible",
    "lam_range",
    "lattice_path",
    "minimize",
    "misfit",
    "mle_start",
    "off_centre",
    "surrogate_of",
]
