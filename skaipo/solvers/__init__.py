"""Solvers of the MAP problem: update rules, the loop that runs them, and the continuation."""

from skaipo.solvers._base import STATUS, FixedLambda, Method, Solution, minimize
from skaipo.solvers._continuation import LinearSchedule
from skaipo.solvers._first_order import Adam, GradientDescent
from skaipo.solvers._lbfgs import LBFGS
from skaipo.solvers._mle import mle_start

__all__ = [
    "LBFGS",
    "STATUS",
    "Adam",
    "FixedLambda",
    "GradientDescent",
    "LinearSchedule",
    "Method",
    "Solution",
    "minimize",
    "mle_start",
]
