"""Rounded and saturated measurements: the likelihood against scipy, and what it is good for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from skaipo import AIPORegressor, GaussianPrior
from skaipo.metrics import discrepancy_scorer
from skaipo.noise import CensoredGaussianNoise, GaussianNoise, QuantizationNoise
from skaipo.operators import Denoising


def reference(prediction, y, step, sigma, low, high):
    """log P(level) by the tail that is small, with scipy."""
    a = np.where(y <= (-np.inf if low is None else low), -np.inf, y - step / 2)
    b = np.where(y >= (np.inf if high is None else high), np.inf, y + step / 2)
    a, b = (a - prediction) / sigma, (b - prediction) / sigma
    flip = a + b > 0
    a, b = np.where(flip, -b, a), np.where(flip, -a, b)
    with np.errstate(divide="ignore"):
        upper, lower = norm.logcdf(b), norm.logcdf(a)
        return (upper + np.log1p(-np.exp(lower - upper)))[()]


@given(
    st.floats(-30, 30),
    st.integers(-4, 4),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([(None, None), (-2, None), (None, 2), (-2, 2)]),
)
def test_the_probability_of_a_level(prediction, k, sigma, ends):
    step = 0.5
    low, high = (None if e is None else e * step for e in ends)
    k = min(max(k, -99 if ends[0] is None else ends[0]), 99 if ends[1] is None else ends[1])
    noise = QuantizationNoise(step, sigma, low=low, high=high)
    x = torch.tensor([[prediction]]).double().requires_grad_()
    value = noise.nll(x, torch.tensor([[k * step]]).double())
    expected = float(-reference(prediction, k * step, step, sigma, low, high))
    # (torch's log_ndtr is good to about 1e-7 in the far tail.)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    h = 1e-4
    numeric = (
        reference(prediction - h, k * step, step, sigma, low, high)
        - reference(prediction + h, k * step, step, sigma, low, high)
    ) / (2 * h)
    assert gradient.item() == pytest.approx(float(numeric), rel=1e-4, abs=1e-4)


def test_fine_levels_are_gaussian_noise_and_the_two_forms_meet():
    x = torch.linspace(-6, 6, 25)[None].double()
    y = torch.zeros_like(x)
    gaussian = GaussianNoise(1.0).nll(x, y)
    fine = QuantizationNoise(1e-6, 1.0).nll(x, y)
    constant = 25 * (np.log(1e-6) - 0.5 * np.log(2 * np.pi))
    assert (fine + constant).item() == pytest.approx(gaussian.item(), rel=1e-9)
    below = QuantizationNoise(0.05 - 1e-9, 1.0).nll(x, y).item()
    above = QuantizationNoise(0.05 + 1e-9, 1.0).nll(x, y).item()
    assert below == pytest.approx(above, abs=1e-4)


@pytest.mark.parametrize("ends", [(None, None), (-1.0, 1.0)])
def test_curvature_is_bounded_and_the_nll_convex(ends):
    noise = QuantizationNoise(0.5, 0.7, *ends)
    for y in (-1.0, 0.5, 1.0):
        x = torch.linspace(-5, 5, 201).double().requires_grad_()
        nll = noise.nll(x[:, None], torch.full((201, 1), y).double()).sum()
        (first,) = torch.autograd.grad(nll, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert (second > -1e-9).all() and second.max() <= noise.max_curvature() * (1 + 1e-9)


def test_simulated_frequencies_are_the_probabilities():
    noise = QuantizationNoise(1.0, 0.8, low=-1.0, high=2.0)
    drawn = noise.add_noise(np.full((1, 200_000), 0.3), random_state=0)
    levels = np.arange(-1.0, 3.0)
    found = np.array([(drawn == level).mean() for level in levels])
    expected = np.exp(reference(0.3, levels, 1.0, 0.8, -1.0, 2.0))
    assert expected.sum() == pytest.approx(1.0)
    assert np.abs(found - expected).max() < 0.005


def test_a_converter_that_saturates_is_better_explained_by_its_likelihood():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    covariance = axes * np.geomspace(0.01, 4.0, 12) @ axes.T
    prior = GaussianPrior(np.zeros(12), covariance)
    X = rng.multivariate_normal(np.zeros(12), covariance, size=200)
    noise = QuantizationNoise(0.5, 0.1, low=-0.5, high=0.5)
    Y = noise.add_noise(X, random_state=1)
    right = AIPORegressor(Denoising(), prior=prior, noise=noise).predict(Y)
    # The Gaussian model gets the size of the whole error.
    wide = GaussianNoise(np.sqrt(np.mean((Y - X) ** 2)))
    gaussian = AIPORegressor(Denoising(), prior=prior, noise=wide).predict(Y)
    gain = ((gaussian - X) ** 2).mean(1) - ((right - X) ** 2).mean(1)
    assert gain.mean() > 2 * gain.std() / np.sqrt(len(gain))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0, 1.0), "step.* must be positive"),
        ((1.0, -1.0), "sigma.* must be positive"),
        ((1.0, 1.0, 0.3), "low.* must be a level, a multiple of step=1.0, got 0.3"),
        ((1.0, 1.0, 2.0, 1.0), "needs low < high, got 2.0 and 1.0"),
    ],
)
def test_wrong_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationNoise(*arguments).bind(3)


def test_measurements_that_are_no_levels():
    prior = GaussianPrior(np.zeros(2), np.eye(2))
    model = AIPORegressor(Denoising(), prior=prior, noise=QuantizationNoise(0.5, 1.0, high=1.0))
    with pytest.raises(ValueError, match="multiples of step=0.5.*got 0.3 in row 1"):
        model.predict(np.array([[0.5, 1.0], [np.nan, 0.3]]))
    with pytest.raises(ValueError, match="got 1.5 in row 0"):
        model.predict(np.array([[0.5, 1.5]]))


# -------------------------------------------------------------------------------- saturation


@given(st.floats(-30, 30), st.floats(-1, 2), st.sampled_from([0.3, 1.0]))
def test_the_likelihood_of_saturated_measurements(prediction, y, sigma):
    low, high = -0.5, 1.5
    y = min(max(y, low), high)
    noise = CensoredGaussianNoise(sigma, low, high)
    value = noise.nll(torch.tensor([[prediction]]).double(), torch.tensor([[y]]).double()).item()
    if y == low:
        expected = -norm.logcdf((low - prediction) / sigma)
    elif y == high:
        expected = -norm.logsf((high - prediction) / sigma)
    else:
        expected = (y - prediction) ** 2 / (2 * sigma**2)
    assert value == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_saturated_measurements_are_better_explained_by_their_likelihood():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    covariance = axes * np.geomspace(0.01, 4.0, 12) @ axes.T
    prior = GaussianPrior(np.zeros(12), covariance)
    X = rng.multivariate_normal(np.zeros(12), covariance, size=200)
    noise = CensoredGaussianNoise(0.2, -0.5, 0.5)
    Y = noise.add_noise(X, random_state=1)
    right = AIPORegressor(Denoising(), prior=prior, noise=noise).reconstruct(Y)
    assert (right.status == "converged").mean() > 0.95
    wide = GaussianNoise(np.sqrt(np.mean((Y - X) ** 2)))
    gaussian = AIPORegressor(Denoising(), prior=prior, noise=wide).predict(Y)
    gain = ((gaussian - X) ** 2).mean(1) - ((right.x - X) ** 2).mean(1)
    assert gain.mean() > 2 * gain.std() / np.sqrt(len(gain))


def test_saturation_has_ends_and_nothing_beyond_them():
    for arguments, message in (
        ((1.0,), "needs low, high or both"),
        ((1.0, 2.0, 1.0), "needs low < high, got 2.0 and 1.0"),
        ((-1.0, 0.0), "sigma.* must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            CensoredGaussianNoise(*arguments).bind(3)
    prior = GaussianPrior(np.zeros(2), np.eye(2))
    model = AIPORegressor(Denoising(), prior=prior, noise=CensoredGaussianNoise(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="between 0.0 and 1.0, got 1.5 in row 1"):
        model.predict(np.array([[0.0, 1.0], [0.5, 1.5]]))


def test_end_levels_are_known_to_rounding():
    prior = GaussianPrior(np.zeros(1), np.eye(1))
    noise = QuantizationNoise(0.1, 0.05, low=0.3)
    drawn = noise.add_noise(np.array([[-1.0]]), random_state=0)
    for y in (drawn, np.array([[0.3]])):
        x = AIPORegressor(Denoising(), prior=prior, noise=noise).predict(y)
        # What is read as the lowest level may be anything below it: the prior's mean will do.
        assert abs(x.item()) < 0.2


def test_saturation_in_small_units():
    prior = GaussianPrior(np.zeros(1), 1e-12 * np.eye(1))
    Y = np.array([[3e-7]])
    censored = CensoredGaussianNoise(1e-8, high=1e-6)
    x = AIPORegressor(Denoising(), prior=prior, noise=censored).predict(Y)
    plain = AIPORegressor(Denoising(), prior=prior, noise=GaussianNoise(1e-8)).predict(Y)
    assert x == pytest.approx(plain, rel=1e-3)


def test_their_misfit_is_no_discrepancy():
    prior = GaussianPrior(np.zeros(2), np.eye(2))
    for noise in (QuantizationNoise(0.5, 1.0), CensoredGaussianNoise(1.0, high=1.0)):
        model = AIPORegressor(Denoising(), prior=prior, noise=noise)
        with pytest.raises(ValueError, match="discrepancy_scorer needs"):
            discrepancy_scorer(model, np.zeros((2, 2)))
