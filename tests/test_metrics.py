"""Errors and scorers against their formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skaipo.metrics import (
    ReconstructionScorer,
    discrepancy_scorer,
    psnr_score,
    psnr_scorer,
    reconstruction_error,
    reconstruction_error_scorer,
)
from skaipo.noise import GaussianNoise


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    true = rng.uniform(3, 11, (5, 12))
    return true, true + rng.normal(size=true.shape) * np.arange(1, 6)[:, None]


class Model:
    """As much of an estimator as a scorer looks at."""

    def __init__(self, prediction=None, noise=None, misfit=None, n_observed=None):
        self.prediction = prediction
        self.noise = noise
        self.result = SimpleNamespace(misfit=misfit, n_observed=n_observed)
        self.seen = None

    def fit(self, X, y=None):
        return self

    def predict(self, Y):
        self.seen = Y
        return self.prediction

    def reconstruct(self, Y):
        self.seen = Y
        return self.result


# ---------------------------------------------------------------------------------- errors


def test_reconstruction_error_is_the_mean_over_all_pixels(pair):
    true, predicted = pair
    total = sum((a - b) ** 2 for a, b in zip(true.ravel(), predicted.ravel(), strict=True))
    assert reconstruction_error(true, predicted) == pytest.approx(total / 60, rel=1e-13)
    assert isinstance(reconstruction_error(true, predicted), float)
    weight = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
    assert reconstruction_error(true, predicted, sample_weight=weight) == pytest.approx(
        mean_squared_error(true, predicted, sample_weight=weight), rel=1e-12
    )
    assert reconstruction_error(true, true) == 0


def test_psnr_is_the_mean_of_each_images(pair):
    true, predicted = pair
    for data_range in (None, 16.0, 255):
        peak = true.max() - true.min() if data_range is None else data_range
        expected = [
            10 * math.log10(peak**2 / np.mean((a - b) ** 2))
            for a, b in zip(true, predicted, strict=True)
        ]
        np.testing.assert_allclose(
            psnr_score(true, predicted, data_range=data_range, per_image=True), expected, rtol=1e-12
        )
        assert psnr_score(true, predicted, data_range=data_range) == pytest.approx(
            np.mean(expected), rel=1e-12
        )
    # 20 dB is a tenth of the range in root mean square.
    assert psnr_score([[0.0, 10.0]], [[1.0, 9.0]]) == pytest.approx(20)


def test_a_perfect_image_is_infinitely_good_without_a_warning(pair, recwarn):
    true, predicted = pair
    predicted[1] = true[1]
    scores = psnr_score(true, predicted, per_image=True)
    assert scores[1] == math.inf and np.isfinite(np.delete(scores, 1)).all()
    assert psnr_score(true, predicted) == math.inf
    assert not recwarn.list


def test_layouts_and_dtypes_agree(pair):
    true, predicted = pair
    images = true.reshape(5, 3, 2, 2)
    for metric in (reconstruction_error, psnr_score):
        reference = metric(true, predicted)
        assert metric(images, predicted) == reference
        assert metric(true, predicted.reshape(5, 1, 3, 4)) == reference
        assert metric(true.tolist(), predicted.tolist()) == reference
    # Unsigned bytes must not wrap around.
    a, b = np.array([[10, 200]], dtype=np.uint8), np.array([[20, 190]], dtype=np.uint8)
    assert reconstruction_error(a, b) == 100
    assert psnr_score(a, b, data_range=255) == pytest.approx(20 * math.log10(25.5))


@pytest.mark.parametrize("metric", [reconstruction_error, psnr_score])
def test_shapes_that_do_not_match(pair, metric):
    true, predicted = pair
    message = r"must hold the same images, got shapes \(5, 12\) and \(5, 11\)"
    with pytest.raises(ValueError, match=message):
        metric(true, predicted[:, :11])
    with pytest.raises(ValueError, match=r"got shapes \(4, 12\) and \(5, 12\)"):
        metric(true[:4], predicted)
    # As many numbers, but not as many images.
    with pytest.raises(ValueError, match="same images"):
        metric(true, predicted.reshape(10, 6))


@pytest.mark.parametrize("data_range", [0, -1.0, np.nan])
def test_psnr_needs_a_range(pair, data_range):
    with pytest.raises(ValueError, match="data_range must be positive, got .* pass it explicitly"):
        psnr_score(*pair, data_range=data_range)
    with pytest.raises(ValueError, match="data_range must be positive, got 0.0"):
        psnr_score(np.ones((2, 3)), np.zeros((2, 3)))


# ---------------------------------------------------------------------------------- scorers


def test_scorers_are_higher_for_better(pair):
    true, predicted = pair
    better = true + 0.1 * (predicted - true)
    for scorer in (reconstruction_error_scorer, psnr_scorer):
        assert scorer(Model(better), None, true) > scorer(Model(predicted), None, true)
    assert reconstruction_error_scorer(Model(predicted), None, true) == -reconstruction_error(
        true, predicted
    )
    assert psnr_scorer(Model(predicted), None, true) == psnr_score(true, predicted)
    weight = np.arange(5.0)
    assert reconstruction_error_scorer(
        Model(predicted), None, true, sample_weight=weight
    ) == -reconstruction_error(true, predicted, weight)


def test_scorers_predict_from_what_they_are_given(pair):
    true, predicted = pair
    model = Model(predicted)
    Y = object()
    psnr_scorer(model, Y, true)
    assert model.seen is Y
    reconstruction_error_scorer(model, Y, true)
    assert model.seen is Y


def test_discrepancy_is_zero_where_the_residual_is_the_noise():
    n_observed = np.array([10, 4, 7])
    # The misfit is ||y - f(x)||^2 / (2 sigma^2): half of the number of measurements.
    model = Model(noise=GaussianNoise(0.3), misfit=n_observed / 2, n_observed=n_observed)
    assert discrepancy_scorer(model, "Y") == 0
    assert model.seen == "Y"
    model.result.misfit = n_observed / 2 * np.array([math.e, math.exp(-2), 1])
    assert discrepancy_scorer(model, "Y", y=None) == pytest.approx(-(1 + 2 + 0) / 3)
    # Over- and under-fitting are equally bad, and a perfect fit is not infinitely good.
    model.result.misfit = np.zeros(3)
    assert -1e4 < discrepancy_scorer(model, "Y") < -10


def test_discrepancy_in_a_pipeline():
    model = Model(noise=GaussianNoise(0.3), misfit=np.ones(2), n_observed=np.full(2, 2))
    double = make_pipeline(FunctionTransformer(lambda Y: 2 * Y), model)
    assert discrepancy_scorer(double, np.ones((2, 3))) == 0
    np.testing.assert_array_equal(model.seen, np.full((2, 3), 2.0))
    alone = make_pipeline(model)
    assert discrepancy_scorer(alone, np.ones((2, 3))) == 0
    np.testing.assert_array_equal(model.seen, np.ones((2, 3)))


def test_one_range_makes_folds_comparable(pair):
    true, predicted = pair
    scorer = ReconstructionScorer("psnr", data_range=16)
    assert scorer(Model(predicted), None, true) == psnr_score(true, predicted, data_range=16)
    # The same error in dark images and in bright ones.
    dark, bright = np.array([[0.0, 1.0]]), np.array([[0.0, 10.0]])
    scores = [scorer(Model(x + 1), None, x) for x in (dark, bright)]
    assert scores[0] == scores[1] == pytest.approx(20 * math.log10(16))
    assert psnr_scorer(Model(dark + 1), None, dark) < psnr_scorer(Model(bright + 1), None, bright)
    assert clone(scorer).get_params() == {"metric": "psnr", "data_range": 16}


def test_scorers_weigh_images(pair):
    true, predicted = pair
    weight = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
    predicted[1] = true[1]  # infinitely good, but of no weight
    each = psnr_score(true, predicted, per_image=True)[weight > 0]
    assert psnr_scorer(Model(predicted), None, true, sample_weight=weight) == pytest.approx(
        np.average(each, weights=weight[weight > 0]), rel=1e-12
    )
    model = Model(noise=GaussianNoise(1.0), misfit=np.array([0.5, 5.0]), n_observed=np.ones(2))
    assert discrepancy_scorer(model, "Y", sample_weight=[1.0, 0.0]) == 0
    assert discrepancy_scorer(model, "Y", sample_weight=[0.0, 1.0]) == pytest.approx(-math.log(10))


def test_scorers_hand_masks_and_parameters_on(pair):
    true, predicted = pair

    class Masked(Model):
        def predict(self, Y, **params):
            self.params = params
            return self.prediction

    model = Masked(predicted)
    psnr_scorer(model, None, true)
    assert model.params == {}
    reconstruction_error_scorer(model, None, true, mask="mask", op_params="kernels")
    assert model.params == {"mask": "mask", "op_params": "kernels"}


def test_a_metric_of_ones_own(pair):
    true, predicted = pair

    def worst(X_true, X_pred, sample_weight=None):
        assert sample_weight is None
        return -float(np.abs(X_true - X_pred).max())

    assert ReconstructionScorer(worst)(Model(predicted), None, true) == worst(true, predicted)
    assert ReconstructionScorer(mean_squared_error)(
        Model(predicted), None, true, sample_weight=np.arange(5)
    ) == mean_squared_error(true, predicted, sample_weight=np.arange(5))


def test_tensors_are_images(pair):
    true, predicted = pair
    tensor = torch.tensor(predicted, requires_grad=True)
    assert psnr_score(true, tensor) == psnr_score(true, predicted)


def test_bad_scorers_are_explained(pair):
    true, predicted = pair
    model = Model(predicted)
    with pytest.raises(ValueError, match="metric must be 'psnr', .* callable, got 'ssim'"):
        ReconstructionScorer("ssim")(model, None, true)
    with pytest.raises(ValueError, match="compares with clean images, and got none"):
        psnr_scorer(model, None)
    with pytest.raises(ValueError, match="data_range=16 is for metric='psnr'"):
        ReconstructionScorer("error", data_range=16)(model, None, true)


def test_discrepancy_needs_the_noise():
    with pytest.raises(
        ValueError, match=r"set noise=GaussianNoise\(sigma\) on the estimator, got noise="
    ):
        discrepancy_scorer(Model(misfit=np.ones(2), n_observed=np.ones(2)), "Y")
