"""Every kind of operator, own and foreign, through what all of them must do.

To add one, add a line to ``KINDS``: how to make it, and its matrix, found in another way.
"""

import pickle
from dataclasses import dataclass

import cloudpickle
import deepinv_here
import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import convolve
from scipy.sparse.linalg import LinearOperator
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn

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
    Stack,
    as_operator,
)

SHAPE = (1, 4, 4)
D = 16
rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((6, D))
DEPENDENT = rng.standard_normal((7, 4)) @ rng.standard_normal((4, D))
SPARSE = sp.random_array((8, D), density=0.3, rng=rng, format="csr")
OFFSET = np.linspace(-1, 1, 6)
MASK = np.arange(D) % 3 != 1
KERNEL = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.4, 0.1], [0.2, 0.0, 0.0]], dtype=torch.float64)


# ---------------------------------------------------------------- what people come with


class Conv(nn.Module):
    """A layer in single precision, as layers are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        with torch.no_grad():
            self.conv.weight[:] = torch.stack([KERNEL, KERNEL.T])[:, None]

    def forward(self, x):
        return self.conv(x)


class Product:
    """An object with forward and adjoint, which autograd could not see through."""

    def __init__(self, matrix):
        self.matrix = torch.from_numpy(matrix)

    def forward(self, x):
        with torch.no_grad():
            return x.flatten(1) @ self.matrix.to(x).T

    def adjoint(self, y):
        with torch.no_grad():
            return (y @ self.matrix.to(y)).reshape(-1, *SHAPE)


class Minimal(Operator):
    """All that a user has to write."""

    def _setup(self):
        self.measurement_shape_ = (1, 3, 4)

    def forward(self, x):
        return x.reshape(-1, 4, 4).diff(dim=1).flatten(1)


def integrate(x):
    return x.cumsum(-1)[..., 1:]


def shift_and_add(x):
    return (x.flatten(1) + x.flatten(1).roll(1, 1))[:, :9] + 2.0


def scipy_products(matrix, dtype=np.float64):
    matrix = np.asarray(matrix, dtype)
    return LinearOperator(
        matrix.shape, matvec=lambda x: matrix @ x, rmatvec=lambda y: matrix.T @ y, dtype=dtype
    )


def pylops(name, *args, **kwargs):
    module = pytest.importorskip("pylops")
    for part in name.split("."):
        module = getattr(module, part)
    return module(*args, **kwargs)


def deepinv(name, **kwargs):
    physics = deepinv_here.import_deepinv().physics
    noise = physics.GaussianNoise(sigma=0.2)
    return getattr(physics, name)(noise_model=noise, **kwargs)


# ------------------------------------------------------------------ their matrices, otherwise


def columns(function, shape=SHAPE):
    """The matrix of a linear function of images, by unit vectors, in double precision."""
    units = torch.eye(D, dtype=torch.float64).reshape(D, *shape)
    return (function(units) - function(torch.zeros_like(units))).reshape(D, -1).T.numpy()


def conv2d(x, **kwargs):
    kernels = torch.stack([KERNEL, KERNEL.T])[:, None]
    return nn.functional.conv2d(x, kernels.float().double(), **kwargs)


def differences(shape, axis):
    return np.diff(np.eye(D).reshape(*shape, D), axis=axis).reshape(-1, D)


def blurred(mode):
    images = np.eye(D).reshape(D, 4, 4)
    return np.stack([convolve(image, KERNEL.numpy(), mode=mode).ravel() for image in images], 1)


def frequencies(mask):
    spectra = np.fft.fft2(np.eye(D).reshape(D, 4, 4), norm="ortho").reshape(D, D) * mask
    return np.hstack([spectra.real, spectra.imag]).T


def circular_blur(x):
    # deepinv convolves: with the kernel turned around.
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    return nn.functional.conv2d(padded, KERNEL.float().double().flip(0, 1)[None, None])


@dataclass(frozen=True)
class Kind:
    """How to make what a user passes as ``op``, and its matrix (m, d)."""

    make: object
    matrix: object
    offset: object = 0.0


KINDS = {
    "denoising": Kind(Denoising, lambda: np.eye(D)),
    "inpainting": Kind(lambda: Inpainting(MASK), lambda: np.diag(MASK.astype(float))),
    "compressed sensing": Kind(
        lambda: CompressedSensing(6, random_state=1),
        lambda: np.random.default_rng(1).standard_normal((6, D)) / np.sqrt(6),
    ),
    "blur": Kind(lambda: Blur(KERNEL), lambda: blurred("grid-wrap")),
    "blur, reflected": Kind(lambda: Blur(KERNEL, "reflect"), lambda: blurred("reflect")),
    "downsampling": Kind(
        lambda: Downsampling(2),
        lambda: np.eye(D).reshape(2, 2, 2, 2, D).mean((1, 3)).reshape(4, D),
    ),
    "masked Fourier": Kind(lambda: MaskedFourier(MASK.reshape(4, 4)), lambda: frequencies(MASK)),
    "pixels of a blur": Kind(
        lambda: Compose(Inpainting(MASK), Blur(KERNEL)),
        lambda: MASK[:, None] * blurred("grid-wrap"),
    ),
    "matrix after blur": Kind(
        lambda: Compose(MatrixOperator(MATRIX, OFFSET), Blur(KERNEL, "zero")),
        lambda: MATRIX @ blurred("constant"),
        OFFSET,
    ),
    "stack": Kind(
        lambda: Stack([Downsampling((4, 1)), Inpainting(MASK), MatrixOperator(MATRIX, OFFSET)]),
        lambda: np.vstack([np.tile(np.eye(4) / 4, 4), np.diag(1.0 * MASK), MATRIX]),
        np.concatenate([np.zeros(4 + D), OFFSET]),
    ),
    "array": Kind(lambda: MATRIX, lambda: MATRIX),
    "scipy sparse": Kind(lambda: SPARSE, lambda: SPARSE.toarray()),
    "torch tensor": Kind(lambda: torch.from_numpy(MATRIX), lambda: MATRIX),
    "torch sparse": Kind(
        lambda: torch.from_numpy(SPARSE.toarray()).to_sparse(), lambda: SPARSE.toarray()
    ),
    "dependent rows": Kind(lambda: MatrixOperator(DEPENDENT), lambda: DEPENDENT),
    "affine": Kind(lambda: MatrixOperator(MATRIX, OFFSET), lambda: MATRIX, OFFSET),
    "forward alone": Kind(Minimal, lambda: differences((4, 4), 0)),
    "scipy LinearOperator": Kind(lambda: scipy_products(MATRIX), lambda: MATRIX),
    "scipy LinearOperator, dependent": Kind(lambda: scipy_products(DEPENDENT), lambda: DEPENDENT),
    "scipy LinearOperator, float32": Kind(
        lambda: scipy_products(MATRIX, np.float32), lambda: MATRIX.astype(np.float32)
    ),
    "PyLops FirstDerivative": Kind(
        lambda: pylops("FirstDerivative", (4, 4), axis=1, kind="forward"),
        lambda: np.concatenate(
            [
                np.r_[row.reshape(3, D), np.zeros((1, D))]
                for row in np.split(differences((4, 4), 1), 4)
            ]
        ),
    ),
    "PyLops Convolve2D": Kind(
        lambda: pylops("signalprocessing.Convolve2D", (4, 4), h=KERNEL.numpy(), offset=(1, 1)),
        lambda: columns(
            lambda x: nn.functional.conv2d(x, KERNEL.flip(0, 1)[None, None], padding=1)
        ),
    ),
    "PyLops Restriction": Kind(
        lambda: pylops("Restriction", D, np.flatnonzero(MASK)), lambda: np.eye(D)[MASK]
    ),
    "torch module": Kind(Conv, lambda: columns(conv2d)),
    "torch function": Kind(lambda: integrate, lambda: columns(integrate)),
    "torch function, affine": Kind(lambda: shift_and_add, lambda: columns(shift_and_add), 2.0),
    "lambda": Kind(
        lambda: lambda x: 3 * x[:, :, ::2], lambda: 3 * np.eye(D)[[*range(4), *range(8, 12)]]
    ),
    "object with forward and adjoint": Kind(lambda: Product(MATRIX), lambda: MATRIX),
    "deepinv Blur": Kind(
        lambda: deepinv("Blur", filter=KERNEL.float()[None, None], padding="circular"),
        lambda: columns(circular_blur),
    ),
    "deepinv Inpainting": Kind(
        lambda: deepinv(
            "Inpainting", img_size=SHAPE, mask=torch.from_numpy(MASK).reshape(SHAPE).float()
        ),
        lambda: np.diag(MASK.astype(float)),
    ),
    "deepinv LinearPhysics": Kind(
        lambda: deepinv("LinearPhysics", A=lambda x, **kwargs: integrate(x)),
        lambda: columns(integrate),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def obj(kind):
    return kind.make()


@pytest.fixture
def op(obj):
    return as_operator(obj).bind(SHAPE)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def rounding(op):
    return 1e-10 if op.precision_ == torch.float64 else 2e-5


MEAN = np.linspace(0, 1, D)
COVARIANCE = np.exp(-np.abs(np.subtract.outer(np.arange(D), np.arange(D))) / 4)


def prior():
    return GaussianPrior(MEAN, COVARIANCE, event_shape=SHAPE)


def measurements(kind, n=6, seed=1):
    """Noisy measurements of draws of the prior, by the matrix."""
    X = prior().sample(n, random_state=seed).reshape(n, D)
    clean = X @ kind.matrix().T
    Y = clean + kind.offset + 0.1 * np.random.default_rng(seed).standard_normal(clean.shape)
    # (What a mask hides is not measured: a row of zeros says nothing, whatever Y holds.)
    return X, np.where(np.abs(kind.matrix()).sum(1) > 0, Y, kind.offset)


def model(op, **kwargs):
    return AIPORegressor(op, 0.5, prior=prior(), noise=GaussianNoise(0.1), tol=1e-9, **kwargs)


# ------------------------------------------------------------------------------- the operator


def test_forward_is_the_matrix(kind, op):
    x = randn(5, D)
    assert op.is_linear and op.n_measurements_ == len(kind.matrix())
    y = op.forward(x)
    assert_allclose(y, x.numpy() @ kind.matrix().T + kind.offset, atol=rounding(op))
    for dtype in (torch.float32, torch.float64):
        assert op.forward(x.to(dtype)).dtype == dtype == op.adjoint(y.to(dtype)).dtype
    images = op(x.numpy().reshape(5, *SHAPE))
    assert images.shape == (5, *op.measurement_shape_)
    assert_allclose(images.reshape(5, -1), y, atol=rounding(op))


def test_adjoint(kind, op):
    x, y = randn(5, D), randn(5, op.n_measurements_)
    back = op.adjoint(y)
    assert_allclose(back, y.numpy() @ kind.matrix(), atol=rounding(op))
    assert_allclose((op.linear(x) * y).sum(1), (x * back).sum(1), atol=10 * rounding(op))
    assert op.norm() == pytest.approx(np.linalg.norm(kind.matrix(), 2), rel=1e-5)


def test_gradient(op):
    x = randn(3, D).requires_grad_()
    y = randn(3, op.n_measurements_)
    (gradient,) = torch.autograd.grad(op.forward(x), x, y)
    assert_allclose(gradient, op.adjoint(y), atol=rounding(op))
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(op.adjoint(y), y, x.detach())
    assert_allclose(gradient, op.linear(x.detach()), atol=rounding(op))


def test_projection(kind, op):
    matrix = kind.matrix()
    x, v = randn(4, D), randn(4, D)
    y = op.forward(randn(4, D))
    project = op.projector(y)
    found = project(x)
    tolerance = 1e3 * rounding(op)
    assert_allclose(op.forward(found), y, atol=tolerance)
    null = project.null(v)
    assert_allclose(op.linear(null), torch.zeros_like(y), atol=tolerance)
    assert_allclose(((x - found) * null).sum(1), np.zeros(4), atol=10 * tolerance)
    expected = (
        x.numpy() - (x.numpy() @ matrix.T + kind.offset - y.numpy()) @ np.linalg.pinv(matrix).T
    )
    assert_allclose(found, expected, atol=tolerance)


def test_projection_with_missing_measurements(kind, op):
    x = randn(3, D)
    y = op.forward(randn(3, D))
    observed = torch.rand(y.shape) < 0.5
    observed[0] = False
    found = op.project(x, torch.where(observed, y, torch.nan), observed)
    tolerance = 1e3 * rounding(op)
    keep = observed & torch.from_numpy(op.measured_)
    assert_allclose(torch.where(keep, op.forward(found) - y, 0.0), 0 * y, atol=tolerance)
    assert_allclose(found[0], x[0], atol=tolerance)


def test_rows_do_not_know_each_other(op):
    x = randn(5, D)
    x[3] *= 1e6
    y = op.forward(x)
    back = op.adjoint(y)
    for i in range(5):
        size = float(y[i].abs().max())
        assert_allclose(op.forward(x[i : i + 1])[0], y[i], atol=rounding(op) * size)
        alone = op.adjoint(y[i : i + 1])[0]
        assert_allclose(alone, back[i], atol=rounding(op) * float(back[i].abs().max()))
    x[1] = torch.nan
    assert_allclose(op.forward(x)[[0, 2, 3, 4]], y[[0, 2, 3, 4]], rtol=1e-5)


def test_pickle(op):
    x = randn(2, D)
    again = pickle.loads(pickle.dumps(op))
    assert torch.equal(again.forward(x), op.forward(x))
    assert again.bind(SHAPE) is again
    recipe = pickle.loads(pickle.dumps(clone(op))).bind(SHAPE)
    assert_allclose(recipe.forward(x), op.forward(x), atol=rounding(op))


# ------------------------------------------------------------------------------ the estimators


def plain_params(op):
    """Its parameters and those of its parts, but not the parts, which are cloned."""
    params = op.get_params().items()
    return {name: value for name, value in params if not isinstance(value, Operator | list)}


def test_clone_copies_no_array(obj):
    op = as_operator(obj)
    other = clone(op)
    assert other is not op
    for name, value in plain_params(op).items():
        assert other.get_params()[name] is value
    copied = clone(model(obj))
    if isinstance(obj, Operator):
        for name, value in plain_params(obj).items():
            assert copied.op.get_params()[name] is value
    else:
        assert copied.op is obj


def test_reconstruction_is_that_of_the_matrix(kind, obj):
    _, Y = measurements(kind)
    Y[0, 0] = np.nan
    found = model(obj).predict(Y)
    assert found.shape == (6, D)
    for x, y in zip(found, Y, strict=True):
        # The mode of a normal posterior, in closed form.
        seen = ~np.isnan(y)
        a = kind.matrix()[seen]
        data = a @ COVARIANCE @ a.T + 0.5 * 0.1**2 * np.eye(len(a))
        residual = (y - kind.offset)[seen] - a @ MEAN
        assert_allclose(x, MEAN + COVARIANCE @ a.T @ np.linalg.solve(data, residual), atol=1e-4)


def test_an_operator_of_less_precision_than_the_prior_converges():
    """What its rounding does to the objective is no kink to be averaged over."""
    kind = KINDS["scipy LinearOperator, float32"]
    _, Y = measurements(kind)
    expected = model(MatrixOperator(kind.matrix())).predict(Y)
    result = model(kind.make()).set_params(tol=1e-4).reconstruct(Y)
    assert (result.status == "converged").all() and result.n_evals.max() < 30
    # No tolerance makes rounding of the operator's go away: rows say so, soon, where they arrived.
    result = model(kind.make()).reconstruct(Y)
    assert (result.status == "stalled").all() and result.n_evals.max() < 100
    assert_allclose(result.x, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_are_reconstructed_alone_and_by_pickles(kind, obj):
    _, Y = measurements(kind, n=3)
    together = model(obj, max_evals=6).reconstruct(Y).x
    # By what would go to another process.
    sent = cloudpickle.loads(cloudpickle.dumps(model(obj, max_evals=6)))
    alone = sent.reconstruct(Y[1:2]).x
    assert_allclose(alone, together[1:2], atol=rounding(as_operator(obj).bind(SHAPE)) * 1e2)


# Of each way to travel one: own ones, a class of a test's, and each library's objects.
TRAVELLERS = [
    "stack",
    "forward alone",
    "scipy LinearOperator",
    "PyLops FirstDerivative",
    "torch module",
    "lambda",
    "object with forward and adjoint",
    "deepinv LinearPhysics",
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", TRAVELLERS, indirect=True)
def test_grid_search_in_two_processes(kind, obj):
    X, Y = measurements(kind, n=4)
    # A task for each process.
    params = dict(param_grid={"lam": [0.5, 50.0]}, cv=[([0, 1], [2, 3])], error_score="raise")
    searches = [GridSearchCV(model(obj, max_evals=6), n_jobs=n, **params) for n in (1, 2)]
    # The same function for every kind: the workers then live from one test to the next.
    start = {"initializer": _start_worker} if deepinv_here.INSTALLED else {}
    with joblib.parallel_config("loky", **start):
        scores = [search.fit(Y, X).cv_results_["mean_test_score"] for search in searches]
    assert_allclose(*scores, rtol=1e-5)
    assert scores[0][0] != scores[0][1]
    if not isinstance(obj, Operator):
        assert searches[1].best_estimator_.op is obj


def _start_worker():
    deepinv_here.import_deepinv()
