"""Operators of PyLops and deepinv, by what is particular to each; skipped where it is missing."""

import pickle
import re
import warnings
from pathlib import Path

import deepinv_here
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from skaipo import AIPORegressor, GaussianPrior
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.noise import GaussianNoise
from skaipo.operators import MatrixOperator, as_operator

SHAPE = (1, 8, 8)
D = 64


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def check(op, measure, x, tolerance=1e-10):
    """An operator against the library's own results, and its adjoint against autograd's rule."""
    y = op.forward(x)
    assert_allclose(y, measure(x), atol=tolerance)
    w = randn(*y.shape)
    left, right = (op.linear(x) * w).sum(1), (x * op.adjoint(w)).sum(1)
    assert_allclose(left, right, atol=1e3 * tolerance, rtol=1e-6)
    found = op.project(torch.zeros_like(x), y)
    assert_allclose(op.forward(found), y, atol=1e-6)


def gaussian_prior():
    i = np.arange(D)
    covariance = np.exp(-np.abs(i[:, None] // 8 - i[None] // 8) / 2) * np.exp(
        -np.abs(i[:, None] % 8 - i[None] % 8) / 2
    )
    return GaussianPrior(np.zeros(D), covariance, event_shape=SHAPE)


# ----------------------------------------------------------------------------------------- PyLops


@pytest.fixture
def pylops():
    return pytest.importorskip("pylops")


def test_pylops_sums_products_and_stacks(pylops):
    blur = pylops.signalprocessing.Convolve2D((8, 8), h=np.ones((3, 3)) / 9, offset=(1, 1))
    keep = pylops.Restriction((8, 8), np.arange(0, 8, 2), axis=0)
    x = randn(5, D)
    for library in (
        keep @ blur,
        2.0 * blur - pylops.Identity(D),
        pylops.VStack([blur, pylops.FirstDerivative((8, 8), axis=0)]),
        blur.T,
    ):
        op = as_operator(library).bind(SHAPE)
        check(op, lambda x, library=library: np.stack([library @ row for row in x.numpy()]), x)
        again = pickle.loads(pickle.dumps(op))
        assert torch.equal(again.forward(x), op.forward(x))


def test_pylops_dims_are_the_layout(pylops):
    op = as_operator(pylops.Restriction((8, 8), np.arange(0, 8, 2), axis=0)).bind(SHAPE)
    assert op.measurement_shape_ == (4, 8)
    X = np.ones((2, *SHAPE))
    assert op(X).shape == (2, 4, 8)
    model = AIPORegressor(op.obj, prior=gaussian_prior(), max_evals=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model.predict(op(X)).shape == (2, *SHAPE)


def test_pylops_precision(pylops):
    single = pylops.MatrixMult(np.random.default_rng(0).standard_normal((5, D)), dtype="float32")
    op = as_operator(single).bind(SHAPE)
    assert op.precision_ == torch.float32
    assert op.forward(randn(2, D)).dtype == torch.float64


def test_pylops_complex_is_refused(pylops):
    with pytest.raises(TypeError, match="is complex .*MaskedFourier"):
        as_operator(pylops.signalprocessing.FFT(D)).bind(SHAPE)


# ---------------------------------------------------------------------------------------- deepinv


@pytest.fixture
def physics():
    return deepinv_here.import_deepinv().physics


def filtered(physics):
    return torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))


PHYSICS = {
    "Denoising": lambda p: p.Denoising(p.GaussianNoise(0.1)),
    "Inpainting": lambda p: p.Inpainting(img_size=SHAPE, mask=0.5),
    "Blur, circular": lambda p: p.Blur(filter=filtered(p), padding="circular"),
    "Blur, valid": lambda p: p.Blur(filter=filtered(p), padding="valid"),
    "BlurFFT": lambda p: p.BlurFFT(img_size=SHAPE, filter=filtered(p)),
    "Downsampling": lambda p: p.Downsampling(img_size=SHAPE, factor=2, filter="gaussian"),
    "CompressedSensing": lambda p: p.CompressedSensing(m=10, img_size=SHAPE),
    "Tomography": lambda p: p.Tomography(angles=6, img_width=8, normalize=True),
    "lambda": lambda p: p.LinearPhysics(A=lambda x, **kwargs: x[..., 1:] - x[..., :-1]),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_physics(physics, name):
    made = PHYSICS[name](physics)
    before = {key: value.clone() for key, value in made.state_dict().items()}

    def measure(x):
        return made.A(x.float().reshape(-1, *SHAPE)).flatten(1).double()

    with warnings.catch_warnings():
        # torch warns where complex weights lose their imaginary part.
        warnings.filterwarnings("error", message="Casting complex values")
        op = as_operator(made).bind(SHAPE)
        check(op, measure, randn(3, D), tolerance=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    again = pickle.loads(pickle.dumps(op))
    x = randn(2, D)
    assert torch.equal(again.forward(x), op.forward(x))
    assert again.implied_sigma == op.implied_sigma


def test_physics_of_two_channels(physics):
    mask = (torch.arange(8) % 2 == 0).float().expand(8, 8)
    made = physics.MRI(mask=mask, img_size=(2, 8, 8))
    op = as_operator(made).bind((2, 8, 8))
    x = randn(2, 128)
    y = made.A(x.float().reshape(2, 2, 8, 8)).flatten(1).double()
    assert_allclose(op.forward(x), y, atol=1e-5)


def test_physics_that_are_not_linear(physics):
    made = physics.Physics(
        A=lambda x, **kwargs: x.square(), noise_model=physics.GaussianNoise(sigma=0.5)
    )
    op = as_operator(made).bind(SHAPE)
    assert not op.is_linear and op.implied_sigma == 0.5
    x = randn(2, D)
    assert_allclose(op.forward(x), x.square())


def test_several_physics_at_once_are_refused(physics):
    stacked = physics.StackedLinearPhysics([physics.Denoising(), physics.Denoising()])
    with pytest.raises(TypeError, match="returned TensorList, not a tensor"):
        as_operator(stacked).bind(SHAPE)


@pytest.mark.parametrize("noise", ["PoissonNoise", "UniformNoise"])
def test_noise_that_is_not_gaussian_is_not_implied(physics, noise):
    made = physics.Denoising(getattr(physics, noise)())
    assert as_operator(made).bind(SHAPE).implied_sigma is None


def test_reconstruction_by_physics_is_that_of_the_matrix(physics):
    made = physics.Blur(
        filter=filtered(physics), padding="valid", noise_model=physics.GaussianNoise(sigma=0.2)
    )
    prior = gaussian_prior()
    X = torch.from_numpy(prior.sample(4, random_state=0)).float().reshape(4, *SHAPE)
    torch.manual_seed(0)
    Y = made(X).flatten(1).double().numpy()
    units = torch.eye(D).reshape(D, *SHAPE)
    matrix = MatrixOperator(made.A(units).reshape(D, -1).T.numpy())
    expected = AIPORegressor(
        matrix, prior=prior, noise=GaussianNoise(float(np.float32(0.2))), tol=1e-9
    ).predict(Y)
    assert_allclose(AIPORegressor(made, prior=prior, tol=1e-9).predict(Y), expected, atol=1e-4)


def test_the_page_of_the_guide(physics):
    """Its block for deepinv, which the tests of the documentation leave out."""
    page = Path(__file__).resolve().parents[1] / "docs" / "guide" / "which_operator.md"
    (block,) = re.findall(r"```{code-block} python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {
        "torch": torch,
        "AIPORegressor": AIPORegressor,
        "clean": load_digits_split()[1][:2],
        "prior": load_digits_prior(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(block, names)
    assert names["X"].shape == (2, *SHAPE)
