"""Blur, Downsampling, MaskedFourier, Compose, Stack and per-row operators against numpy, scipy."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import scipy.ndimage as ndi
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from skaipo import AIPORegressor, GaussianPrior
from skaipo.noise import GaussianNoise
from skaipo.operators import (
    Blur,
    Compose,
    CompressedSensing,
    Denoising,
    Downsampling,
    Inpainting,
    MaskedFourier,
    MatrixOperator,
    Operator,
    PerSampleMatrix,
    Stack,
    gaussian_kernel,
)
from skaipo.operators._iterative import ConjugateGradientProjector

SHAPE = (2, 6, 4)
D = 48
rng = np.random.default_rng(0)
KERNEL = rng.random((3, 3)) + 2 * np.eye(3)
MASK = rng.random((6, 4)) < 0.4
PIXELS = rng.random(SHAPE) < 0.6
SCIPY = {
    "periodic": "grid-wrap",
    "zero": "constant",
    "reflect": "reflect",
    "mirror": "mirror",
    "nearest": "nearest",
}


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def convolved(X, kernel, mode):
    return np.stack([[ndi.convolve(channel, kernel, mode=mode) for channel in x] for x in X])


# Operators and, made without them, their matrices.
OPERATORS = {
    "blur": Blur(KERNEL),
    "blur, even sizes": Blur(rng.standard_normal((2, 4))),
    "blur that kills": Blur(np.full((3, 2), 1 / 6)),
    "blur, zero": Blur(KERNEL, "zero"),
    "blur, reflect": Blur(KERNEL, "reflect"),
    "blur, mirror": Blur(KERNEL, "mirror"),
    "blur, nearest": Blur(KERNEL, "nearest"),
    "separable blur": Blur(np.outer([1, 2, 0.5], [2.0, 1.0]), "reflect"),
    "separable blur that kills": Blur(np.full((3, 2), 1 / 6), "zero"),
    "downsampling": Downsampling(2),
    "decimation": Downsampling((3, 2), kernel=[[1]]),
    "downsampling, blurred": Downsampling((2, 1), kernel=gaussian_kernel(0.5)),
    "fourier": MaskedFourier(MASK),
    "fourier, whole": MaskedFourier(np.ones((6, 4))),
    "pixels of a blur": Compose(Inpainting(PIXELS), Blur(KERNEL, "reflect")),
    "random sums of a coarse image": Compose(CompressedSensing(5), Downsampling(2)),
    "blur of a blur": Compose(Blur(KERNEL), Compose(Denoising(), Blur(KERNEL[:2]))),
    "two blurs": Stack([Blur(np.ones((1, 3)) / 3), Blur(np.ones((3, 1)) / 3)]),
    "coarse and some pixels": Stack([Downsampling(2), Inpainting(PIXELS), CompressedSensing(3)]),
}


def unit_images():
    return np.eye(D).reshape(D, *SHAPE)


def fourier_matrix(mask):
    """Transform of each unit image by numpy, real parts before imaginary ones."""
    spectra = np.fft.fft2(unit_images(), norm="ortho") * mask
    return np.concatenate((spectra.real, spectra.imag), 1).reshape(D, -1).T


def matrix(name):
    """Columns are the measurements of unit images, by numpy and scipy."""
    images = unit_images()
    flat = images.reshape(D, D)
    random = lambda m, d: np.random.default_rng(0).standard_normal((m, d)) / np.sqrt(m)  # noqa: E731
    op = OPERATORS[name]
    if isinstance(op, Blur):
        out = convolved(images, op.kernel, SCIPY[op.boundary])
    elif name == "downsampling":
        out = images.reshape(D, 2, 3, 2, 2, 2).mean((3, 5))
    elif name == "decimation":
        out = images[:, :, 1::3, 0::2]
    elif name == "downsampling, blurred":
        out = convolved(images, gaussian_kernel(0.5), "grid-wrap")[:, :, ::2]
    elif name == "fourier":
        return fourier_matrix(MASK)
    elif name == "fourier, whole":
        return fourier_matrix(np.ones((6, 4)))
    elif name == "pixels of a blur":
        out = convolved(images, KERNEL, "reflect") * PIXELS
    elif name == "random sums of a coarse image":
        return random(5, 12) @ matrix("downsampling")
    elif name == "blur of a blur":
        out = convolved(convolved(images, KERNEL[:2], "grid-wrap"), KERNEL, "grid-wrap")
    elif name == "two blurs":
        lines = np.ones((1, 3)) / 3, np.ones((3, 1)) / 3
        return np.vstack([convolved(images, k, "grid-wrap").reshape(D, D).T for k in lines])
    elif name == "coarse and some pixels":
        return np.vstack([matrix("downsampling"), np.diag(1.0 * PIXELS.ravel()), random(3, D)])
    return out.reshape(len(flat), -1).T


@pytest.fixture(params=OPERATORS)
def name(request):
    return request.param


@pytest.fixture
def op(name):
    return OPERATORS[name].bind(SHAPE)


def random_observed(op, n):
    observed = torch.rand(n, op.n_measurements_) < 0.6
    observed[1], observed[2], observed[3] = True, False, observed[0]
    return observed


def pinv_projection(a, x, y, observed):
    out = np.empty(x.shape)
    for i, keep in enumerate(observed.numpy()):
        rows = a[keep]
        inverse = np.linalg.pinv(rows, rcond=1e-9) if len(rows) else np.zeros((a.shape[1], 0))
        out[i] = x[i].numpy() - inverse @ (rows @ x[i].numpy() - y[i].numpy()[keep])
    return out


# ---------------------------------------------------------------------- what all of them must do


def test_forward_and_adjoint_are_those_of_the_matrix(op, name):
    a, x, y = matrix(name), randn(5, D), randn(5, op.n_measurements_)
    assert op.is_linear and a.shape == (op.n_measurements_, D)
    assert_allclose(op.forward(x), x.numpy() @ a.T, atol=1e-12)
    assert_allclose(op.linear(x), x.numpy() @ a.T, atol=1e-12)
    assert_allclose(op.adjoint(y), y.numpy() @ a, atol=1e-12)
    assert_array_equal(np.abs(a[~op.measured_]).max(initial=0.0), 0.0)


def test_gradients(op):
    x = randn(3, D).requires_grad_()
    y = randn(3, op.n_measurements_).requires_grad_()
    (grad_x,) = torch.autograd.grad(op.forward(x), x, y.detach())
    torch.testing.assert_close(grad_x, op.adjoint(y.detach()))
    (grad_y,) = torch.autograd.grad(op.adjoint(y), y, x.detach())
    torch.testing.assert_close(grad_y, op.forward(x.detach()))
    projector = op.projector(y.detach(), random_observed(op, 4)[:3])
    v = randn(3, D)
    (grad,) = torch.autograd.grad(projector(x), x, v)
    torch.testing.assert_close(grad, projector.null(v), atol=1e-8, rtol=0)


def test_norm(op, name):
    assert type(op.norm()) is float
    assert op.norm() == pytest.approx(np.linalg.norm(matrix(name), 2), rel=1e-10)


@pytest.mark.parametrize("seen", ["all", "some", "mixed"])
def test_projection_matches_the_pseudo_inverse(op, name, seen):
    a, x, y = matrix(name), randn(7, D), randn(7, op.n_measurements_)
    observed = random_observed(op, 7)
    if seen == "all":
        observed[:] = True
    elif seen == "some":
        observed[1] = observed[0]
    want = pinv_projection(a, x, y, observed & torch.from_numpy(op.measured_))
    hidden = torch.where(observed, y, torch.nan)
    projector = op.projector(hidden, None if seen == "all" else observed)
    size = np.abs(want).max()
    assert_allclose(projector(x), want, atol=1e-7 * size)
    assert np.abs(want - x.numpy()).max() > 0.1
    want = pinv_projection(a, x, 0 * y, observed & torch.from_numpy(op.measured_))
    assert_allclose(projector.null(x), want, atol=1e-7 * max(1.0, np.abs(want).max()))
    with pytest.raises(ValueError, match="made for 7 measurements, got 2 images"):
        projector(x[:2])


def test_projection_explains_what_can_be_explained(op):
    x, y = randn(6, D), op.forward(randn(6, D))
    observed = random_observed(op, 6)
    got = op.project(x, torch.where(observed, y, torch.nan), observed)
    assert torch.where(observed, op.forward(got) - y, 0.0).abs().max() < 1e-9
    single = op.project(x.float(), y.float())
    assert single.dtype == torch.float32
    assert (op.forward(single) - y).abs().max() < 1e-4


def test_rows_do_not_depend_on_their_batch_mates(op):
    x, y = randn(9, D), randn(9, op.n_measurements_)
    observed = random_observed(op, 9)
    whole = op.forward(x), op.adjoint(y), op.project(x, y, observed)
    for i in (0, 2, 3, 8):
        row = slice(i, i + 1)
        alone = op.forward(x[row]), op.adjoint(y[row]), op.project(x[row], y[row], observed[row])
        for a, b in zip(alone, whole, strict=True):
            assert_allclose(a, b[row], rtol=0, atol=1e-12 * float(b[row].abs().max()))


def test_float32(op):
    x, y = randn(3, D), randn(3, op.n_measurements_)
    for method, value in ((op.forward, x), (op.adjoint, y)):
        assert method(value.float()).dtype == torch.float32
        assert_allclose(method(value.float()), method(value), atol=1e-5)


def test_call_gives_measurements_their_shape(op):
    X = rng.standard_normal((2, *SHAPE))
    got = op(X)
    assert got.shape == (2, *op.measurement_shape_) and got.dtype == np.float64
    assert_allclose(op(X.reshape(2, D)).ravel(), got.ravel())


def test_clone_pickle_and_bind(op, name):
    x, y = randn(2, D), randn(2, op.n_measurements_)
    want = op.project(x, y)
    copied = clone(OPERATORS[name])
    for key, value in copied.get_params().items():
        if isinstance(value, np.ndarray):
            assert value is OPERATORS[name].get_params()[key]
    for other in (copied.bind(SHAPE), pickle.loads(pickle.dumps(op)), copy.copy(op)):
        assert_array_equal(other.project(x, y), want)
    assert op.bind(SHAPE) is op
    assert len(repr(op)) < 250


@pytest.fixture(scope="module")
def prior():
    """Smooth random images."""
    ratio = np.subtract.outer(np.arange(6), np.arange(6)) ** 2 / 4.0
    line = np.exp(-ratio)
    covariance = np.kron(np.eye(2), np.kron(line, line[:4, :4])) + 0.05 * np.eye(D)
    return GaussianPrior(np.full(D, 0.5), covariance, event_shape=SHAPE)


def starting(names):
    """Starts in turn: operators of one kind stand together, and each kind gets both."""
    return pytest.mark.parametrize("name, init", list(zip(names, itertools.cycle(["auto", "mle"]))))


@starting(OPERATORS)
def test_reconstruction_agrees_with_the_matrix(name, init, op, prior):
    noise = GaussianNoise(0.05)
    X = prior.sample(3, random_state=0).reshape(3, *SHAPE)
    Y = noise.add_noise(op(X), random_state=0).reshape(3, -1)
    Y[:, ~op.measured_] = np.nan
    Y[0, op.measured_.argmax()] = np.nan
    options = dict(noise=noise, init=init, max_evals=80, tol=1e-6)
    got = AIPORegressor(OPERATORS[name], 1.0, prior=prior, **options).predict(Y)
    want = prior.map_estimate(Y, MatrixOperator(matrix(name)), noise=noise, lam=1.0)
    assert_allclose(got.reshape(3, D), want.reshape(3, D), atol=1e-5)


# ----------------------------------------------------------------------------------------- blurs


@settings(max_examples=80, deadline=None)
@given(
    boundary=st.sampled_from(list(SCIPY)),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_blur_is_scipys_convolution(boundary, size, kernel, seed):
    """Kernels of odd and even sizes, also larger than the image."""
    random = np.random.default_rng(seed)
    X, k = random.standard_normal((2, 1, *size)), random.standard_normal(kernel)
    op = Blur(k, boundary)
    assert_allclose(op(X), convolved(X, k, SCIPY[boundary]), atol=1e-11)
    bound = op.bind((1, *size))
    x, y = randn(2, bound.n_features_in_), randn(2, bound.n_features_in_)
    torch.testing.assert_close((bound.forward(x) * y).sum(1), (x * bound.adjoint(y)).sum(1))


@pytest.mark.parametrize("boundary", SCIPY)
def test_blur_of_signals(boundary):
    X, k = rng.standard_normal((3, 11)), rng.standard_normal(4)
    want = ndi.convolve1d(X, k, mode=SCIPY[boundary].removeprefix("grid-"), axis=1)
    assert_allclose(Blur(k, boundary)(X), want, atol=1e-12)
    images = X.reshape(1, 3, 11)
    assert_allclose(Blur(k[None], boundary)(images)[0], want, atol=1e-12)


def test_kernel_kinds():
    X = rng.standard_normal((2, *SHAPE))
    k = np.array([[0, 1, 0], [2, 3, 2], [0, 1, 0]])
    want = convolved(X, k, "grid-wrap")
    for kernel in (k, k.tolist(), torch.from_numpy(k), k.astype(np.float32), k.astype(bool) * k):
        assert_allclose(Blur(kernel)(X), want, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    boundary=st.sampled_from(list(SCIPY)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_separable_blur_by_formula_is_that_of_the_matrix(boundary, size, kernel, seed):
    random = np.random.default_rng(seed)
    k = np.outer(*(random.integers(-2, 3, n) + 0.25 for n in kernel))
    op = Blur(k, boundary).bind(size)
    d = op.n_features_in_
    a = convolved(np.eye(d).reshape(d, 1, *size), k, SCIPY[boundary]).reshape(d, d).T
    assert op.norm() == pytest.approx(np.linalg.norm(a, 2), rel=1e-9)
    values = np.linalg.svd(a, compute_uv=False)
    if np.all((values > 1e-3 * values[0]) | (values < 1e-10 * values[0])):
        x, y = randn(2, d), randn(2, d)
        projector = op.projector(y)
        assert not isinstance(projector, ConjugateGradientProjector)
        want = pinv_projection(a, x, y, torch.ones(y.shape, dtype=torch.bool))
        assert_allclose(projector(x), want, atol=1e-9 * max(1, np.abs(want).max()))


def test_frequencies_that_the_kernel_kills_stay_as_they_are():
    op = Blur([0.5, 0.5, 0.0]).bind(8)  # a moving average of two: it does not see +-+-+-+-
    x = randn(1, 8)
    alternating = torch.tensor([1.0, -1.0]).repeat(4).double()
    got = op.project(x, op.forward(randn(1, 8)) + alternating)
    assert float((got - x) @ alternating) == pytest.approx(0, abs=1e-12)
    assert_allclose(op.projector(x).null(x), (x @ alternating)[:, None] * alternating / 8)


def test_gaussian_kernel():
    k = gaussian_kernel(1.3)
    assert k.shape == (11, 11) and k.sum() == pytest.approx(1) and k.argmax() == k.size // 2
    impulse = np.zeros((31, 31))
    impulse[15, 15] = 1
    assert_allclose(k, ndi.gaussian_filter(impulse, 1.3, truncate=4)[10:21, 10:21], atol=1e-12)
    assert_allclose(np.outer(line := gaussian_kernel(0.7, ndim=1), line), gaussian_kernel(0.7))
    for bad in (dict(sigma=0), dict(sigma=np.nan), dict(sigma=1, truncate=0)):
        with pytest.raises(ValueError, match="sigma > 0 and truncate > 0"):
            gaussian_kernel(**bad)
    with pytest.raises(ValueError, match="ndim 1 or 2, got 3"):
        gaussian_kernel(1, ndim=3)


# ---------------------------------------------------------------------------------- downsampling


def test_downsampling_of_signals_and_grey_images():
    X = rng.standard_normal((2, 12))
    assert_allclose(Downsampling(3)(X), X.reshape(2, 4, 3).mean(2))
    assert_allclose(Downsampling(3, kernel=[1])(X), X[:, 1::3], atol=1e-12)
    images = X.reshape(2, 2, 6)
    assert_allclose(Downsampling((1, 2))(images), images.reshape(2, 2, 3, 2).mean(3))
    assert Downsampling(2).bind((4, 6)).measurement_shape_ == (2, 3)
    assert Downsampling(np.int64(1)).bind(5).norm() == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(
    low=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    factor=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_downsampling_by_formula_is_that_of_the_matrix(low, factor, kernel, seed):
    random = np.random.default_rng(seed)
    shape = low[0] * factor[0], low[1] * factor[1]
    k = random.integers(-2, 3, kernel) + (np.arange(kernel[1]) == kernel[1] // 2) * 0.5
    op = Downsampling(factor, k).bind(shape)
    d = op.n_features_in_
    blurred = convolved(np.eye(d).reshape(d, 1, *shape), k, "grid-wrap")
    o = [(f - 1) // 2 for f in factor]
    a = blurred[:, 0, o[0] :: factor[0], o[1] :: factor[1]].reshape(d, -1).T
    x, y = randn(2, d), randn(2, len(a))
    assert_allclose(op.forward(x), x.numpy() @ a.T, atol=1e-11)
    assert op.norm() == pytest.approx(np.linalg.norm(a, 2), rel=1e-9, abs=1e-12)
    values = np.linalg.svd(a, compute_uv=False)
    if np.all((values > 1e-3 * values[0]) | (values < 1e-10 * values[0])):
        want = pinv_projection(a, x, y, torch.ones(y.shape, dtype=torch.bool))
        assert_allclose(op.project(x, y), want, atol=1e-9)


# --------------------------------------------------------------------------------------- fourier


@settings(max_examples=60, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5)),
    ),
    seed=st.integers(0, 999),
)
def test_masked_fourier_by_formula_is_that_of_the_matrix(shape, seed):
    """Also where one of two conjugate values is missing, or half of a complex number."""
    random = np.random.default_rng(seed)
    mask = random.random(shape[-2:]) < random.uniform(0.2, 1)
    mask.flat[0] |= not mask.any()
    op = MaskedFourier(mask).bind(shape)
    d = op.n_features_in_
    axes = tuple(range(-min(2, len(shape)), 0))
    channels = shape[0] if len(shape) == 3 else 1
    image = (channels, *shape[-2:])
    spectra = np.fft.fftn(np.eye(d).reshape(d, *image), axes=axes, norm="ortho") * mask
    a = np.concatenate((spectra.real, spectra.imag), 1).reshape(d, -1).T
    x, y = randn(4, d), randn(4, len(a))
    assert_allclose(op.forward(x), x.numpy() @ a.T, atol=1e-13)
    assert_allclose(op.adjoint(y), y.numpy() @ a, atol=1e-13)
    assert op.norm() == pytest.approx(np.linalg.norm(a, 2), rel=1e-12)
    observed = torch.rand(y.shape) < 0.7
    observed[0] = True
    want = pinv_projection(a, x, y, observed & torch.from_numpy(op.measured_))
    assert_allclose(op.project(x, torch.where(observed, y, torch.nan), observed), want, atol=1e-12)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("shape", [(3, 2, 6, 4), (3, 6, 4), (3, 5)])
def test_complex_layout(convert, shape):
    X = rng.standard_normal(shape)
    axes = (-2, -1) if len(shape) > 2 else (-1,)
    kspace = np.fft.fftn(X, axes=axes, norm="ortho")
    Y = MaskedFourier.to_real(convert(kspace))
    assert isinstance(Y, np.ndarray) == (convert is np.asarray)
    op = MaskedFourier(np.ones(shape[1:][-2:], bool)).bind(shape[1:])
    assert_allclose(np.asarray(Y).reshape(3, -1), op(X).reshape(3, -1), atol=1e-12)
    back = np.asarray(MaskedFourier.to_complex(Y))
    assert_allclose(back.reshape(kspace.shape), kspace, atol=1e-12)
    assert_allclose(MaskedFourier.to_complex(op(X)).reshape(kspace.shape), kspace, atol=1e-12)


def test_complex_layout_errors():
    with pytest.raises(ValueError, match=r"to_real takes complex values.* got \(3,\)"):
        MaskedFourier.to_real(np.ones(3, complex))
    with pytest.raises(ValueError, match=r"axis 1 holds real and imaginary parts.* \(2, 3, 4, 4\)"):
        MaskedFourier.to_complex(np.ones((2, 3, 4, 4)))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_lies_outside_of_the_frequency_mask_is_ignored(prior):
    op = MaskedFourier(MASK).bind(SHAPE)
    x, y = randn(2, D), randn(2, 2 * D)
    y[:, ~op.measured_] = torch.nan
    assert op.project(x, y).isfinite().all()
    y = op(prior.sample(2, random_state=0)).reshape(2, -1)
    wild = np.where(op.measured_, y, 1e6)
    model = AIPORegressor(MaskedFourier(MASK), prior=prior, max_evals=20)
    assert_array_equal(model.predict(y), model.predict(wild))


# ------------------------------------------------------------------------------ compose and stack


def test_offsets_and_linear_parts():
    A, B = rng.standard_normal((5, 4)), rng.standard_normal((4, 6))
    a, b = np.arange(5.0), np.arange(4.0) - 1
    x = rng.standard_normal((3, 6))
    composed = Compose(MatrixOperator(A, a), MatrixOperator(B, b)).bind(6)
    assert_allclose(composed(x), (x @ B.T + b) @ A.T + a)
    assert_allclose(composed.linear(torch.from_numpy(x)), x @ B.T @ A.T)
    y = composed.forward(randn(3, 6))
    torch.testing.assert_close(composed.forward(composed.project(torch.from_numpy(x), y)), y)
    stacked = Stack([MatrixOperator(B, b), Denoising()]).bind(6)
    assert_allclose(stacked(x), np.hstack([x @ B.T + b, x]))
    assert_allclose(stacked.linear(torch.from_numpy(x)), np.hstack([x @ B.T, x]))


class Squared(Operator):
    is_linear = False

    def _setup(self):
        self.measurement_shape_ = self.event_shape_

    def forward(self, x):
        self._check(x)
        return x.square()


def test_non_linear_parts():
    x = rng.standard_normal((3, 6))
    for op in (Compose(Squared(), Blur([0.5, 0.5])), Compose(Blur([0.5, 0.5]), Squared())):
        assert not op.is_linear and not op.bind(6).is_linear
        for call in (op.bind(6).linear, op.bind(6).adjoint, op.bind(6).projector):
            with pytest.raises(TypeError, match="Compose is not linear"):
                call(randn(2, 6))
    blurred = Blur([0.5, 0.5])(x)
    assert_allclose(Compose(Squared(), Blur([0.5, 0.5]))(x), blurred**2)
    assert_allclose(Stack([Squared(), Denoising()])(x), np.hstack([x**2, x]))
    assert not Stack([Squared(), Denoising()]).is_linear


def test_shortcuts_of_compose():
    """A mask over a matrix keeps the closed form of the matrix, one before it that of the other."""
    inner = MatrixOperator(rng.standard_normal((5, 9)))
    mask = np.array([True, False, True, True, False])
    op = Compose(Inpainting(mask), inner).bind(9)
    x, y = randn(4, 9), randn(4, 5)
    observed = torch.rand(4, 5) < 0.7
    got = op.projector(y, observed)
    assert type(got) is type(inner.bind(9).projector(y))
    keep = observed & torch.from_numpy(mask)
    assert_allclose(got(x), pinv_projection(inner.A, x, y, keep), atol=1e-12)
    assert type(Compose(inner, Denoising()).bind(9).projector(y)) is type(got)
    assert type(Stack([inner]).bind(9).projector(y)) is type(got)


def test_parts_may_be_matrices_and_functions():
    A = rng.standard_normal((4, 6))
    x = rng.standard_normal((3, 6))
    op = Compose(A, lambda x: x.cumsum(-1))
    assert_allclose(op(x), x.cumsum(1) @ A.T)
    assert_allclose(op.bind(6).adjoint(torch.eye(4).double()), np.cumsum(A[:, ::-1], 1)[:, ::-1])
    assert clone(op).outer is A
    stack = Stack([A, torch.square])
    assert_allclose(stack(x), np.hstack([x @ A.T, x**2]))
    assert not stack.bind(6).is_linear
    assert_array_equal(clone(stack).ops[0], A)


def test_parts_in_searches():
    kernel = gaussian_kernel(0.5, ndim=1)
    op = Compose(Inpainting([True] * 5), Blur(kernel))
    assert op.get_params()["inner__kernel"] is kernel
    copied = clone(op)
    assert copied.inner is not op.inner and copied.inner.kernel is kernel
    copied.set_params(inner__boundary="zero", outer=Denoising())
    assert op.inner.boundary == "periodic" and isinstance(op.outer, Inpainting)
    stack = Stack([Blur(kernel), CompressedSensing(3)])
    assert stack.get_params()["op1__n_measurements"] == 3
    copied = clone(stack).set_params(op1__n_measurements=2, op0=Denoising())
    assert stack.ops[1].n_measurements == 3 and isinstance(stack.ops[0], Blur)
    assert copied.bind(5).n_measurements_ == 7
    assert clone(stack).set_params(ops=[Denoising()]).bind(5).n_measurements_ == 5
    with pytest.raises(ValueError, match="Invalid parameter 'op7'"):
        clone(stack).set_params(op7=Denoising())


def test_bound_parts_are_bound_again_when_their_recipes_change():
    recipe = Stack([CompressedSensing(2), Denoising()])
    bound = recipe.bind(5)
    assert bound.bind(5) is bound
    recipe.set_params(op0__n_measurements=3)
    assert recipe.bind(5).n_measurements_ == 8 and bound.bind(5).n_measurements_ == 8
    composed = Compose(CompressedSensing(2), Denoising()).bind(5)
    composed.set_params(outer__random_state=1)
    assert_array_equal(
        composed(np.eye(5)), CompressedSensing(2, random_state=1)(np.eye(5)), strict=True
    )


def test_join_and_split():
    op = Stack([Downsampling(2), Denoising()])
    X = rng.standard_normal((3, *SHAPE))
    parts = [Downsampling(2)(X), X]
    Y = op.join(parts)
    assert_array_equal(Y, op(X))
    for a, b in zip(op.bind(SHAPE).split(Y), parts, strict=True):
        assert_array_equal(a, b, strict=True)
    with pytest.raises(ValueError, match=r"as many rows from each part, got \[3, 2\]"):
        op.join([X, X[:2]])
    with pytest.raises(ValueError, match=r"shape \(n, 60\), got \(3, 59\)"):
        op.bind(SHAPE).split(Y[:, 1:])
    with pytest.raises(NotFittedError, match="call bind"):
        op.split(Y)


def test_reprs():
    op = Stack([Downsampling(2), Compose(Denoising(), Blur(KERNEL, "zero"))])
    assert repr(op) == (
        "Stack(ops=[Downsampling(factor=2), "
        "Compose(inner=Blur(boundary='zero', kernel=<array (3, 3) float64>), outer=Denoising())])"
    )


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_grid_search_over_a_part():
    prior = GaussianPrior(np.zeros(8), np.eye(8) * 0.9 + 0.1)
    X = prior.sample(12, random_state=0)
    sharp, wide = gaussian_kernel(0.4, ndim=1), gaussian_kernel(1.2, ndim=1)
    Y = Blur(sharp)(X)
    model = AIPORegressor(Compose(Denoising(), Blur(wide)), 0.01, prior=prior, max_evals=40)
    search = GridSearchCV(
        model, {"op__inner__kernel": [sharp, wide]}, cv=2, scoring="neg_mean_squared_error"
    ).fit(Y, X)
    assert search.best_params_["op__inner__kernel"] is sharp
    assert model.op.inner.kernel is wide


# ------------------------------------------------------------------------- parameters of each row

N = 5
ROWS = {
    "kernels": (Blur(), rng.standard_normal((N, 3, 2)) + 3 * np.eye(3, 2)),
    "kernels, reflect": (Blur(boundary="reflect"), rng.random((N, 1, 3)) + [0, 3, 0]),
    "kernels, zero": (Blur(boundary="zero"), rng.random((N, 3, 1)) + [[0], [3], [0]]),
    "masks": (Inpainting(), rng.random((N, *SHAPE)) < 0.6),
    "flat masks": (Inpainting(), (rng.random((N, D)) < 0.6).astype(int)),
    "matrices": (PerSampleMatrix(4), rng.standard_normal((N, 4, D))),
    "tall matrices": (PerSampleMatrix(50), rng.standard_normal((N, 50, D))),
    "pixels of kernels": (Compose(Inpainting(PIXELS), Blur()), rng.random((N, 2, 2))),
    "masks of a blur": (Compose(Inpainting(), Blur(KERNEL)), rng.random((N, *SHAPE)) < 0.6),
    "stack": (Stack([Downsampling(2), Blur()]), rng.random((N, 2, 2))),
}


def fixed(name, i):
    """The ordinary operator of row i."""
    op, params = ROWS[name]
    value = params[i]
    if name.startswith("kernels"):
        return Blur(value, op.boundary)
    return {
        "masks": lambda: Inpainting(value),
        "flat masks": lambda: Inpainting(value),
        "matrices": lambda: MatrixOperator(value),
        "tall matrices": lambda: MatrixOperator(value),
        "pixels of kernels": lambda: Compose(Inpainting(PIXELS), Blur(value)),
        "masks of a blur": lambda: Compose(Inpainting(value), Blur(KERNEL)),
        "stack": lambda: Stack([Downsampling(2), Blur(value)]),
    }[name]()


@pytest.fixture(params=ROWS)
def rows(request):
    op, params = ROWS[request.param]
    bound = op.bind(SHAPE)
    checked = bound.check_params(params, N)
    return bound, checked, [fixed(request.param, i).bind(SHAPE) for i in range(N)]


@pytest.mark.parametrize("index", [range(3), [3], [4, 0, 0]])
def test_each_row_is_measured_with_its_own(rows, index):
    op, params, alone = rows
    index = list(index)
    op = op.given(params[index])
    n, m = len(index), op.n_measurements_
    x, y = randn(n, D), randn(n, m)
    observed = torch.rand(n, m) < 0.8
    observed[0] = True
    got = {
        "forward": op.forward(x),
        "linear": op.linear(x),
        "adjoint": op.adjoint(y),
        "project": op.project(x, y),
        "observed": op.project(x, torch.where(observed, y, torch.nan), observed),
        "null": op.projector(y, observed).null(x),
        "measured": op.measured(x).expand(n, -1),
        "norm": op.norm(),
    }
    assert got["norm"].shape == (n,)
    for k, i in enumerate(index):
        row = slice(k, k + 1)
        other = alone[i]
        want = {
            "forward": other.forward(x[row]),
            "linear": other.linear(x[row]),
            "adjoint": other.adjoint(y[row]),
            "project": other.project(x[row], y[row]),
            "observed": other.project(x[row], y[row], observed[row]),
            "null": other.projector(y[row], observed[row]).null(x[row]),
            "measured": other.measured(x),
            "norm": torch.tensor([other.norm()], dtype=torch.float64),
        }
        for key, value in want.items():
            size = max(1.0, float(value.double().abs().max()))
            assert_allclose(got[key][row], value, rtol=0, atol=1e-8 * size, err_msg=key)


def test_gradients_and_copies_of_a_given_operator(rows):
    op, params, _ = rows
    bound, op = op, op.given(params)
    x, v = randn(N, D).requires_grad_(), randn(N, op.n_measurements_)
    (grad,) = torch.autograd.grad(op.forward(x), x, v)
    torch.testing.assert_close(grad, op.adjoint(v))
    x = x.detach()
    other = pickle.loads(pickle.dumps(op))
    assert_array_equal(other.forward(x), op.forward(x))
    assert "_n_given" not in vars(bound) and bound.given(None) is bound
    with pytest.raises(ValueError, match=rf"given the parameters of {N} rows, got 2"):
        op.forward(x[:2])
    assert op.forward(x.float()).dtype == torch.float32


def test_calling_with_parameters(rows):
    op, params, alone = rows
    X = rng.standard_normal((N, *SHAPE))
    want = np.concatenate([other(X[i : i + 1]) for i, other in enumerate(alone)])
    assert_allclose(op(X, params=params.numpy()), want, atol=1e-11)
    assert_allclose(op(X, params=params), want, atol=1e-11)
    assert op(torch.from_numpy(X).float(), params=params).dtype == torch.float32


@starting(ROWS)
def test_reconstruction_is_that_of_each_rows_own_operator(name, init, prior):
    op, params = ROWS[name]
    X = prior.sample(N, random_state=0).reshape(N, *SHAPE)
    noise = GaussianNoise(0.1)
    Y = noise.add_noise(op.bind(SHAPE)(X, params=params), random_state=0).reshape(N, -1)
    Y[1, Y.shape[1] // 2 :] = np.nan
    options = dict(noise=noise, init=init, max_evals=80, tol=1e-6)
    got = AIPORegressor(op, 1.0, prior=prior, **options).predict(Y, op_params=params)
    for i in range(N):
        want = prior.map_estimate(Y[i : i + 1], fixed(name, i), noise=noise, lam=1.0)
        assert_allclose(got[i].ravel(), want.ravel(), atol=1e-5)


class Exposure(Operator):
    """What a user writes at least: no adjoint, projection or norm."""

    takes_params = True

    def _setup(self):
        self.measurement_shape_ = self.event_shape_

    def _given(self, params):
        self.times = params.reshape(-1, 1)

    def forward(self, x):
        self._check(x)
        return self.times.to(x) * x + 1


def test_defaults_of_a_class_with_parameters():
    times = np.array([1.0, 2.0, -0.5, 0.0])
    op = Exposure().bind(6)
    op = op.given(op.check_params(times, 4))
    x, y = randn(4, 6), randn(4, 6)
    column = torch.from_numpy(times)[:, None]
    assert_allclose(op.linear(x), column * x, atol=1e-12)
    assert_allclose(op.adjoint(y), column * y, atol=1e-12)
    assert_allclose(op.norm(), np.abs(times))
    observed = torch.rand(4, 6) < 0.7
    want = torch.where(observed & (column != 0), (y - 1) / column, x)
    assert_allclose(op.project(x, torch.where(observed, y, torch.nan), observed), want, atol=1e-9)


def test_masks_are_optional_and_kernels_are_not():
    X = rng.standard_normal((2, *SHAPE))
    assert_array_equal(Inpainting()(X), X)
    bound = Inpainting().bind(SHAPE)
    assert bound.check_params(None, 2) is None and not bound.needs_params
    assert Blur().needs_params and not Blur(KERNEL).takes_params
    for op in (Blur(), PerSampleMatrix(3), Compose(Denoising(), Blur()), Stack([Blur()])):
        with pytest.raises(ValueError, match="needs parameters for each row, .* shape.* got none"):
            op(X)
        with pytest.raises(ValueError, match="use the operator that given"):
            op.bind(SHAPE).forward(randn(2, D))
        with pytest.raises(ValueError, match="use the operator that given"):
            op.bind(SHAPE).norm()
    for op in (Denoising(), Inpainting(PIXELS), Blur(KERNEL), Compose(Blur(KERNEL), Denoising())):
        with pytest.raises(TypeError, match="takes no parameters for each row"):
            op(X, params=X)
        with pytest.raises(TypeError, match="takes no parameters for each row"):
            op.bind(SHAPE).given(randn(2, 3))


def test_one_array_of_parameters_has_one_reader():
    with pytest.raises(ValueError, match=r"2 operators that need parameters.*\(Blur, Blur\)"):
        Compose(Blur(), Blur()).bind(SHAPE)
    assert Compose(Inpainting(), Blur()).takes_params  # Blur needs them, Inpainting may go without
    both = Stack([Inpainting(), Inpainting()])
    assert not both.takes_params and not both.needs_params
    assert both.bind(SHAPE).forward(randn(2, D)).shape == (2, 2 * D)


@pytest.mark.parametrize(
    ("op", "params", "error", "message"),
    [
        (Blur(), np.ones((3, 2, 2)), ValueError, r"expected 2 of them, got shape \(3, 2, 2\)"),
        (Blur(), np.ones((2, 3)), ValueError, r"kernels of shape \(n, kh, kw\), got shape \(2, 3"),
        (Blur(), np.full((2, 1, 1), np.nan), ValueError, r"of 2 row\(s\) are not finite.* row 0"),
        (Blur(), np.zeros((2, 1, 1)), ValueError, "zero everywhere"),
        (Blur(), np.ones((2, 1, 1)) * 1j, TypeError, "real parameters, got dtype complex128"),
        (Blur(), torch.ones(2, 1, 1) * 1j, TypeError, "real parameters, got dtype torch.complex"),
        (Blur(), 3.0, ValueError, r"expected 2 of them, got shape \(\)"),
        (Inpainting(), np.ones((2, 3)), ValueError, r"masks of shape \(n, 48\)"),
        (Inpainting(), np.full((2, D), 0.5), ValueError, "True and False"),
        (Inpainting(), np.arange(2)[:, None] * np.ones(D), ValueError, "row 0.*~mask"),
        (PerSampleMatrix(3), np.ones((2, 4, D)), ValueError, r"\(n, 3, 48\), got shape \(2, 4"),
    ],
)
def test_parameter_errors(op, params, error, message):
    with pytest.raises(error, match=message):
        op.bind(SHAPE).check_params(params, 2)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("op", "error", "message"),
    [
        (Blur(np.ones(3)), ValueError, r"shape \(3,\).* \(2, 6, 4\).* 2 axes, \(kh, kw\)"),
        (Blur(np.ones((0, 3))), ValueError, r"has shape \(0, 3\)"),
        (Blur(np.zeros((3, 3))), ValueError, "zero everywhere"),
        (Blur([[np.inf]]), ValueError, "NaN or infinite"),
        (Blur([[1j]]), TypeError, "real numbers, got dtype complex128"),
        (Blur(KERNEL, "wrap"), ValueError, "must be one of 'periodic'.* got 'wrap'"),
        (Blur(KERNEL, None), ValueError, "must be one of 'periodic'.* got None"),
        (Downsampling(5), ValueError, r"multiples of it.* \(2, 6, 4\)"),
        (Downsampling((4, 2)), ValueError, "multiples"),
        (Downsampling(0), ValueError, r"at least 1.* got 0"),
        (Downsampling(2.0), TypeError, r"integer of at least 1.* got 2.0"),
        (Downsampling((2, 2, 2)), TypeError, r"got \(2, 2, 2\)"),
        (Downsampling(2, np.ones(2)), ValueError, r"Downsampling\(kernel\) has shape \(2,\)"),
        (MaskedFourier(np.ones((4, 6))), ValueError, r"\(4, 6\).* \(2, 6, 4\).* \(6, 4\)"),
        (MaskedFourier(np.zeros((6, 4))), ValueError, "MaskedFourier.*False everywhere"),
        (MaskedFourier(np.full((6, 4), 0.5)), ValueError, "MaskedFourier.*boolean"),
        (Compose(Denoising(), "blur"), TypeError, "op must be an operator.* got str"),
        (Compose(Downsampling(4), Downsampling(2)), ValueError, r"outer operator.*\(2, 3, 2\)"),
        (Stack([]), TypeError, r"needs a list of operators.* got \[\]"),
        (Stack(Denoising()), TypeError, r"needs a list of operators.* got Denoising\(\)"),
        (Stack([np.ones(3)]), TypeError, "op must be an operator.* got ndarray of shape"),
        (PerSampleMatrix(0), ValueError, "at least 1, got 0"),
        (PerSampleMatrix(np.eye(3)), TypeError, "must be an integer.*params"),
    ],
)
def test_bind_errors(op, error, message):
    with pytest.raises(error, match=message):
        op.bind(SHAPE)


@pytest.mark.parametrize("op", [Blur(KERNEL), Downsampling(2), MaskedFourier(MASK)])
def test_four_axes_are_too_many(op):
    with pytest.raises(ValueError, match=r"images \(C, H, W\) or \(H, W\), or signals \(d,\), got"):
        op.bind((2, 2, 6, 4))


def test_a_kernel_of_images_for_a_flat_prior():
    with pytest.raises(ValueError, match=r"1 axes, \(k,\).*give the prior their shape"):
        Blur(KERNEL).bind(48)


def test_unbound_and_misshaped():
    for op in (Blur(KERNEL), MaskedFourier(MASK), Compose(Denoising(), Denoising())):
        with pytest.raises(NotFittedError, match="call bind"):
            op.forward(randn(2, D))
        bound = op.bind(SHAPE)
        with pytest.raises(ValueError, match=r"flat images of shape \(n, 48\), got \(2, 47\)"):
            bound.forward(randn(2, 47))
        with pytest.raises(ValueError, match="flat measurements"):
            bound.adjoint(randn(2, 5))
        with pytest.raises(ValueError, match="flat images"):
            bound.projector(randn(2, bound.n_measurements_)).null(randn(2, 47))
