"""Noise models: ``nll = -log p(y | f(x))`` per row, in nats, up to a constant."""

from skaipo.noise._base import Likelihood, NoiseModel, SquaredError, as_noise
from skaipo.noise._counts import BernoulliNoise, PoissonNoise
from skaipo.noise._flow import FlowNoise
from skaipo.noise._gaussian import CorrelatedGaussianNoise, GaussianNoise
from skaipo.noise._heavy import LaplaceNoise, StudentTNoise
from skaipo.noise._quantization import CensoredGaussianNoise, QuantizationNoise

__all__ = [
    "BernoulliNoise",
    "CensoredGaussianNoise",
    "CorrelatedGaussianNoise",
    "FlowNoise",
    "GaussianNoise",
    "LaplaceNoise",
    "Likelihood",
    "NoiseModel",
    "PoissonNoise",
    "QuantizationNoise",
    "SquaredError",
    "StudentTNoise",
    "as_noise",
]
