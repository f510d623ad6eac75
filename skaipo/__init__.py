"""Reconstruct images and signals from corrupted measurements with a normalizing flow as prior."""

from skaipo.estimators import AIPORegressor, FixedLambdaMAP, Reconstruction
from skaipo.priors import FlowPrior, GaussianPrior

__version__ = "0.1.0"

__all__ = [
    "AIPORegressor",
    "FixedLambdaMAP",
    "FlowPrior",
    "GaussianPrior",
    "Reconstruction",
]
