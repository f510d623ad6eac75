"""The estimators."""

from skaipo.estimators._estimators import AIPORegressor, AIPOTransformer, FixedLambdaMAP

__all__ = ["AIPORegressor", "AIPOTransformer", "FixedLambdaMAP"]
