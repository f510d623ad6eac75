"""Noise models against scipy, finite differences, and what they refuse."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.base import clone

from skaipo.noise import GaussianNoise, NoiseModel, SquaredError, as_noise

M = 6
SIGMAS = np.array([0.1, 0.5, 1.0, 2.0, 3.0, 0.7])
MODELS = {
    "squared error": SquaredError(),
    "scalar": GaussianNoise(0.3),
    "per entry": GaussianNoise(SIGMAS),
}


@pytest.fixture(params=MODELS)
def noise(request):
    return MODELS[request.param].bind(M)


@pytest.fixture
def data():
    prediction, y = torch.randn(2, 9, M, dtype=torch.float64)
    observed = torch.rand(9, M) < 0.6
    observed[0], observed[1] = True, False
    return prediction, y, observed


def curvature(noise):
    """Second derivative for each entry, made without the code under test."""
    return 2.0 * np.ones(M) if isinstance(noise, SquaredError) else np.ones(M) / noise.sigma**2


# ---------------------------------------------------------------------------------- values


@pytest.mark.parametrize("sigma", [0.3, SIGMAS, SIGMAS.tolist(), torch.from_numpy(SIGMAS)])
def test_gaussian_is_scipys_density_up_to_the_constant(sigma, data):
    prediction, y, observed = data
    logpdf = stats.norm.logpdf(y.numpy(), prediction.numpy(), np.asarray(sigma))
    constant = stats.norm.logpdf(0, 0, np.asarray(sigma))
    terms = constant - logpdf
    noise = GaussianNoise(sigma).bind(M)
    got = noise.nll(prediction, y)
    assert got.shape == (9,) and got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), terms.sum(axis=1), rtol=1e-12)
    got = noise.nll(prediction, y, observed)
    want = (terms * observed.numpy()).sum(axis=1)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    assert got[1] == 0


def test_squared_error_is_the_squared_distance(data):
    prediction, y, observed = data
    square = (prediction - y).numpy() ** 2
    np.testing.assert_allclose(SquaredError().nll(prediction, y).numpy(), square.sum(axis=1))
    got = SquaredError().nll(prediction, y, observed)
    np.testing.assert_allclose(got.numpy(), (square * observed.numpy()).sum(axis=1))


def test_gaussian_is_a_scaled_squared_error(data):
    prediction, y, observed = data
    want = SquaredError().nll(prediction, y, observed) / (2 * 0.3**2)
    torch.testing.assert_close(GaussianNoise(0.3).nll(prediction, y, observed), want)


@settings(deadline=None)
@given(
    sigma=st.floats(1e-3, 1e3),
    pairs=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1),
)
def test_gaussian_property(sigma, pairs):
    """Values of any size; the mean is the minimum; symmetric in the residual."""
    prediction, y = torch.tensor(pairs, dtype=torch.float64).T[:, :, None]
    noise = GaussianNoise(sigma)
    got = noise.nll(prediction, y)
    want = (prediction - y)[:, 0] ** 2 / (2 * sigma**2)
    torch.testing.assert_close(got, want)
    assert torch.equal(got, noise.nll(y, prediction))
    assert (noise.nll(y, y) == 0).all()


def test_a_row_alone_equals_the_row_in_a_batch(noise, data):
    prediction, y, observed = data
    prediction[4] = torch.nan  # a broken neighbour
    want = noise.nll(prediction, y, observed)
    for i in (0, 3, 8):
        row = slice(i, i + 1)
        got = noise.nll(prediction[row], y[row], observed[row])
        torch.testing.assert_close(got, want[row], rtol=1e-14, atol=0)
    assert want[4].isnan() and want.isnan().sum() == 1


def test_float32(noise, data):
    prediction, y, observed = data
    want = noise.nll(prediction, y, observed)
    got = noise.nll(prediction.float(), y.float(), observed)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- gradients


def test_gradient_against_finite_differences(noise, data):
    prediction, y, observed = data
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: noise.nll(p, y, observed), prediction)
    (grad,) = torch.autograd.grad(noise.nll(prediction, y, observed).sum(), prediction)
    want = (prediction.detach() - y).numpy() * curvature(noise) * observed.numpy()
    np.testing.assert_allclose(grad.numpy(), want, rtol=1e-12)


def test_max_curvature_bounds_the_second_derivative(noise, data):
    prediction, y, _ = data
    hessian = torch.autograd.functional.hessian(
        lambda p: noise.nll(p[None], y[:1]).sum(), prediction[0]
    )
    assert noise.max_curvature() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item())
    assert type(noise.max_curvature()) is float


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e300])
def test_what_is_not_observed_never_matters(noise, data, junk):
    prediction, y, observed = data
    want = noise.nll(prediction, y, observed)
    y = torch.where(observed, y, junk)
    dirty = torch.where(observed, prediction, junk).requires_grad_()
    got = noise.nll(dirty, y, observed)
    assert torch.equal(got.detach(), want)
    (grad,) = torch.autograd.grad(got.sum(), dirty)
    assert (grad[~observed] == 0).all()
    assert grad.isfinite().all() and (grad[observed] != 0).all()


def test_a_mask_shared_by_all_rows_broadcasts(noise, data):
    prediction, y, observed = data
    mask = observed[3]
    want = noise.nll(prediction, y, mask.expand(9, M))
    assert torch.equal(noise.nll(prediction, y, mask), want)


def test_autograd_after_first_use_in_inference_mode(data):
    prediction, y, _ = data
    noise = GaussianNoise(SIGMAS).bind(M)
    with torch.inference_mode():
        noise.nll(prediction, y)
    p = prediction.clone().requires_grad_()
    noise.nll(p, y).sum().backward()
    assert p.grad.abs().max() > 0


def test_inputs_are_not_changed(noise, data):
    before = [t.clone() for t in data]
    noise.nll(*data)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))


# ---------------------------------------------------------------------- bind, clone, pickle


def test_bind_clone_and_pickle(noise, data):
    want = noise.nll(*data)
    copied = clone(noise)
    assert vars(copied).keys() == copied.get_params().keys()
    for name, value in noise.get_params().items():
        assert getattr(copied, name) is value
    for other in (copied.bind(M), pickle.loads(pickle.dumps(noise)), copied):
        assert "_cache" not in vars(other)
        assert torch.equal(other.nll(*data), want)
    assert noise.bind(M) is not noise and noise.n_measurements_ == M
    assert not hasattr(copied, "n_measurements_")


def test_set_params_after_use(data):
    prediction, y, _ = data
    noise = GaussianNoise(0.5).bind(M)
    noise.nll(prediction, y)
    noise.set_params(sigma=2.0)
    torch.testing.assert_close(noise.nll(prediction, y), GaussianNoise(2.0).nll(prediction, y))
    assert noise.max_curvature() == 0.25


# --------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sigma", [0.3, SIGMAS])
def test_add_noise_has_the_right_distribution(sigma):
    Y = np.random.default_rng(0).standard_normal((4000, M))
    noise = (GaussianNoise(sigma).add_noise(Y, random_state=0) - Y) / sigma
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(M)).max() < 0.08


def test_add_noise_layouts_and_dtypes():
    model = GaussianNoise(SIGMAS)
    Y = np.random.default_rng(0).standard_normal((5, 2, 3))
    before = Y.copy()
    want = model.add_noise(Y, random_state=3)
    np.testing.assert_array_equal(Y, before)
    assert want.shape == Y.shape and want.dtype == np.float64 and not np.allclose(want, Y)
    flat = model.add_noise(Y.reshape(5, M), random_state=3)
    np.testing.assert_array_equal(flat, want.reshape(5, M))
    np.testing.assert_array_equal(model.add_noise(Y[:2], random_state=3), want[:2])
    assert not np.array_equal(model.add_noise(Y, random_state=4), want)
    single = model.add_noise(Y.astype(np.float32), random_state=3)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, want, rtol=1e-5, atol=1e-6)
    assert model.add_noise(np.zeros((1, M), dtype=int)).dtype == np.float64
    tensor = model.add_noise(torch.from_numpy(Y), random_state=3)
    np.testing.assert_array_equal(tensor.numpy(), want)
    assert model.add_noise(torch.from_numpy(Y).float()).dtype == torch.float32
    Y[0, 0, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(model.add_noise(Y)), np.isnan(Y))


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sigma", "error", "message"),
    [
        (0, ValueError, r"positive and finite, got 0\.0.*small sigma, or noise=None"),
        (-0.1, ValueError, r"positive and finite, got -0\.1"),
        (np.nan, ValueError, "positive and finite, got nan"),
        (np.inf, ValueError, "positive and finite, got inf"),
        (np.where(SIGMAS > 2, 0, SIGMAS), ValueError, r"positive and finite, got 0\.0"),
        (np.ones(4), ValueError, r"shape \(4,\), expected a scalar or shape \(6,\)"),
        (np.ones((2, 3)), ValueError, r"shape \(2, 3\), expected .*ravel"),
        (None, TypeError, "must be a number or an array.* got NoneType None"),
        ("0.1", TypeError, "got str '0.1'"),
        (True, TypeError, "got bool True"),
        (0.1j, TypeError, "got complex"),
    ],
)
def test_sigma_errors(sigma, error, message):
    with pytest.raises(error, match=message):
        GaussianNoise(sigma).bind(M)
    with pytest.raises(error, match=message):
        GaussianNoise(sigma).add_noise(np.ones((2, M)))


def test_empty_sigma():
    with pytest.raises(ValueError, match="got an empty array"):
        GaussianNoise([]).bind(0)


def test_nll_shape_errors(data):
    prediction, y, _ = data
    with pytest.raises(ValueError, match=r"both have shape \(n, m\), got \(9, 6\) and \(9, 5\)"):
        SquaredError().nll(prediction, y[:, :5])
    with pytest.raises(ValueError, match=r"got \(6,\) and \(6,\)"):
        SquaredError().nll(prediction[0], y[0])
    with pytest.raises(ValueError, match=r"bound to 5 measurements, got 6.*bind\(6\)"):
        SquaredError().bind(5).nll(prediction, y)
    with pytest.raises(ValueError, match=r"shape \(5,\), expected a scalar or shape \(6,\)"):
        GaussianNoise(np.ones(5)).nll(prediction, y)


def test_add_noise_errors():
    with pytest.raises(ValueError, match=r"batch of shape.*got \(6,\).*Y\[None\]"):
        GaussianNoise(0.1).add_noise(np.ones(M))
    with pytest.raises(TypeError, match="real measurements, got dtype complex128"):
        GaussianNoise(0.1).add_noise(np.ones((2, M)) * 1j)


def test_base_class_names_what_is_missing():
    class Mine(NoiseModel):
        pass

    with pytest.raises(TypeError, match="abstract class Mine .*_penalty.*max_curvature"):
        Mine()


def test_as_noise():
    noise = GaussianNoise(0.1)
    assert as_noise(noise) is noise
    assert isinstance(as_noise(None), SquaredError)
    for number in (0.1, 2, np.float64(0.1)):
        with pytest.raises(TypeError, match=rf"noise=GaussianNoise\({float(number):g}\)"):
            as_noise(number)
    with pytest.raises(TypeError, match="must be None .*got str"):
        as_noise("gaussian")
    with pytest.raises(TypeError, match="got bool"):
        as_noise(True)
    with pytest.raises(TypeError, match=r"class GaussianNoise; did you mean GaussianNoise\(...\)"):
        as_noise(GaussianNoise)
