"""Solvers of the MAP problem: update rules, the loop that runs them, and the continuation."""

from skaipo.solvers._base import STATUS, Method, Solution, minimize
from skaipo.solvers._continuation import continuation, continuation_path
from skaipo.solvers._first_order import Adam, GradientDescent
from skaipo.solvers._gaussian import GaussianMetric, GaussianSurrogate, gaussian_start, surrogate_of
from skaipo.solvers._hybrid import Hybrid
from skaipo.solvers._lbfgs import LBFGS
from skaipo.solvers._mle import MLE_SOLVERS, mle_start
from skaipo.solvers._schedules import (
    AdaptiveSchedule,
    DirectSchedule,
    GeometricSchedule,
    LinearSchedule,
    TheorySchedule,
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
    "LinearSchedule",
    "Method",
    "Solution",
    "TheorySchedule",
    "continuation",
    "continuation_path",
    "gaussian_start",
    "minimize",
    "mle_start",
    "surrogate_of",
]
