"""Reconstruct images and signals from corrupted measurements with a normalizing flow as prior."""

from skaipo._reconstruct import Reconstruction
from skaipo.estimators import AIPORegressor, AIPOTransformer, FixedLambdaMAP
from skaipo.model_selection import AIPORegressorCV, aipo_path
from skaipo.priors import FlowPrior, GaussianPrior

__version__ = "0.1.0"

__all__ = [
    "AIPORegressor",
    "AIPORegressorCV",
    "AIPOTransformer",
    "FixedLambdaMAP",
    "FlowPrior",
    "GaussianPrior",
    "Reconstruction",
    "aipo_path",
]
