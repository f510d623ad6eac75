"""Priors: densities of clean data, as scikit-learn transformers and density estimators."""

from skaipo.priors._flow import FlowPrior
from skaipo.priors._gaussian import GaussianPrior

__all__ = ["FlowPrior", "GaussianPrior"]
