"""Operators that only know how to measure: adjoint, projection and norm against the matrix's."""

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_allclose
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor, GaussianPrior
from skaipo.operators import MatrixOperator, Operator, _iterative
from skaipo.operators._iterative import ConjugateGradientProjector, power_norm

D = 12
rng = np.random.default_rng(0)
FULL = rng.standard_normal((5, D))
LOW_RANK = rng.standard_normal((7, 4)) @ rng.standard_normal((4, D))
TALL = rng.standard_normal((20, D))
MATRICES = {
    "wide": FULL,
    "square": rng.standard_normal((D, D)),
    "tall": TALL,
    "dependent rows": LOW_RANK,
    "zero row": np.r_[FULL, np.zeros((1, D))],
    "one number": FULL[:1],
    "scaled": FULL * np.array([[1e-3], [1e3], [1], [1], [1]]),
    "tiny": 1e-40 * FULL,
    "nothing": np.zeros((3, D)),
}


class Product(Operator):
    """Only what a user must write."""

    def __init__(self, matrix, offset=None, shape=None):
        self.matrix = matrix
        self.offset = offset
        self.shape = shape

    def _setup(self):
        if self.shape is None:
            self.n_measurements_ = len(self.matrix)
        else:
            self.measurement_shape_ = self.shape

    def forward(self, x):
        y = x @ torch.from_numpy(self.matrix).to(x).T
        return y if self.offset is None else y + torch.from_numpy(self.offset).to(x)


class Clipped(Operator):
    is_linear = False

    def _setup(self):
        self.n_measurements_ = self.n_features_in_

    def forward(self, x):
        return x.clamp(0, 1)


def pair(name, affine=False):
    matrix = MATRICES[name]
    offset = np.linspace(1, 2, len(matrix)) if affine else None
    return Product(matrix, offset).bind((D,)), MatrixOperator(matrix, offset).bind((D,))


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def random_observed(n, m):
    observed = torch.rand(n, m) < 0.6
    observed[0], observed[1] = True, False
    return observed


def pinv_projection(matrix, x, y, observed):
    out = np.empty(x.shape)
    for i, keep in enumerate(observed.numpy()):
        a = matrix[keep]
        inverse = np.linalg.pinv(a, rcond=1e-9) if len(a) else np.zeros((D, 0))
        out[i] = x[i].numpy() - inverse @ (a @ x[i].numpy() - y[i].numpy()[keep])
    return out


def close(actual, expected, rtol=1e-8):
    expected = torch.as_tensor(expected)
    assert float((actual - expected).norm() / expected.norm().clamp_min(1e-300)) < rtol


# ------------------------------------------------------------------------------ the adjoint


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_adjoint_and_linear_part(name, affine):
    op, dense = pair(name, affine)
    x, y = randn(4, D), randn(4, op.n_measurements_)
    assert_allclose(op.adjoint(y), y.numpy() @ MATRICES[name], rtol=1e-12, atol=1e-12)
    size = max(np.abs(MATRICES[name]).max(), 1.0 if affine else 0.0)
    assert_allclose(op.linear(x), dense.linear(x), rtol=1e-12, atol=1e-13 * size)
    assert_allclose(op.forward(x), dense.forward(x), rtol=1e-12, atol=1e-13 * size)


def test_adjoint_is_differentiable_and_leaves_modes_alone():
    op, _ = pair("wide", affine=True)
    y = randn(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(op.adjoint, y)
    assert torch.autograd.gradgradcheck(lambda v: op.adjoint(v) ** 3, y)
    with torch.no_grad():
        assert not op.adjoint(y).requires_grad
    with torch.inference_mode():
        assert_allclose(op.adjoint(randn(2, 5)).shape, (2, D))
    assert_allclose(op.adjoint(y.detach().float()), (y.detach() @ torch.tensor(FULL)), rtol=1e-4)


def test_adjoint_without_gradient_says_what_to_do():
    class Numpy(Product):
        def forward(self, x):
            return torch.from_numpy(x.detach().numpy() @ self.matrix.T)

    with pytest.raises(TypeError, match="Numpy.forward gives no gradient: write it in torch"):
        Numpy(FULL).bind((D,)).adjoint(randn(1, 5))


# --------------------------------------------------------------------------- the projection


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_projection_is_that_of_the_matrix(name, affine):
    op, dense = pair(name, affine)
    x, y, v = randn(6, D), randn(6, op.n_measurements_), randn(6, D)
    if name == "tiny":
        if affine:
            pytest.skip("an offset of 1 leaves no digit of 1e-40")
        y *= 1e-40
    # Random y contradicts itself where rows depend on each other.
    assert isinstance(op.projector(y), ConjugateGradientProjector)
    close(op.project(x, y), dense.project(x, y))
    close(op.projector(y).null(v) + x, dense.projector(y).null(v) + x)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", ["wide", "square", "tall", "dependent rows", "zero row"])
def test_projection_with_missing_measurements(name, affine):
    op, _ = pair(name, affine)
    x, y = randn(8, D), randn(8, op.n_measurements_)
    observed = random_observed(8, op.n_measurements_)
    clean = y if op.offset is None else y - torch.from_numpy(op.offset)
    expected = pinv_projection(op.matrix, x, clean, observed)
    out = op.project(x, torch.where(observed, y, torch.nan), observed)
    close(out, expected)
    assert torch.equal(out[1], x[1])  # nothing was measured


def test_projection_explains_and_is_orthogonal():
    op, _ = pair("wide")
    x, v, y = randn(5, D), randn(5, D), randn(5, 5)
    project = op.projector(y)
    close(op.forward(project(x)), y, 1e-11)
    assert float(op.forward(project.null(v)).abs().max()) < 1e-11
    inner = (x - project(x)) * project.null(v)
    assert float(inner.sum(1).abs().max()) < 1e-11
    close(project(project(x)), project(x), 1e-11)


def test_contradicting_rows_go_to_the_nearest_least_squares_solution():
    twice = np.r_[FULL[:2], FULL[:2]]
    op = Product(twice).bind((D,))
    x, y = randn(3, D), randn(3, 4)
    middle = (y[:, :2] + y[:, 2:]) / 2
    close(op.project(x, y), Product(FULL[:2]).bind((D,)).project(x, middle), 1e-10)


@pytest.mark.parametrize("name", ["wide", "tall", "dependent rows"])
def test_a_row_does_not_know_its_batch_mates(name):
    op, _ = pair(name)
    x, y = randn(9, D), randn(9, op.n_measurements_)
    observed = random_observed(9, op.n_measurements_)
    x[4] *= 1e8
    together = op.project(x, y, observed)
    for i in range(9):
        alone = op.project(x[i : i + 1], y[i : i + 1], observed[i : i + 1])
        assert_allclose(alone[0], together[i], rtol=1e-12, atol=1e-12 * x[i].norm())


def test_a_bad_row_harms_no_other():
    op, _ = pair("wide")
    x, y = randn(4, D), randn(4, 5)
    good = op.project(x, y)
    x[1], y[2] = torch.nan, torch.inf
    out = op.project(x, y)
    assert out[1].isnan().all() and out[2].isnan().all()
    assert_allclose(out[[0, 3]], good[[0, 3]], rtol=1e-12, atol=1e-12)


def test_every_row_stops_by_itself():
    a = np.diag(np.linspace(1, 5, D))
    op = Product(a).bind((D,))
    x = torch.zeros(3, D, dtype=torch.float64)
    y = torch.zeros(3, D, dtype=torch.float64)
    y[1, 3] = 2.0  # along one singular vector: one step
    y[2] = 1.0
    project = op.projector(y)
    project(x)
    assert project.n_steps[0] == 0 and 1 <= project.n_steps[1] <= 2
    assert D - 2 <= project.n_steps[2] <= 2 * D
    both = Product(np.diag(np.r_[np.ones(D // 2), 2 * np.ones(D // 2)])).bind((D,)).projector(y)
    both(x)
    assert 2 <= both.n_steps[2] <= 3  # as many as distinct singular values


def test_float32_images_are_projected_in_float64():
    op, dense = pair("square")
    x, y = randn(4, D), randn(4, D)
    out = op.project(x.float(), y.float())
    assert out.dtype == torch.float32
    close(out.double(), dense.project(x.float().double(), y.float().double()), 1e-6)


def test_operators_in_single_precision_stop_at_theirs():
    class Single(Product):
        precision_ = torch.float32

        def forward(self, x):
            return (x.float() @ torch.from_numpy(self.matrix).float().T).to(x.dtype)

    op = Single(LOW_RANK).bind((D,))
    x, y = randn(4, D), randn(4, 7)
    project = op.projector(y)
    close(project(x), MatrixOperator(LOW_RANK).bind((D,)).project(x, y), 1e-3)
    assert int(project.n_steps.max()) < 15


def test_gradient_of_the_projection_is_that_of_the_null_space():
    op, _ = pair("dependent rows")
    y, x = randn(2, 7), randn(2, D).requires_grad_()
    project = op.projector(y)
    assert torch.autograd.gradcheck(project, x)
    (gradient,) = torch.autograd.grad(project(x).square().sum(), x)
    close(gradient, 2 * project.null(project(x.detach())), 1e-8)


def test_empty_batches_and_wrong_ones():
    op, _ = pair("wide")
    assert op.project(randn(0, D), randn(0, 5)).shape == (0, D)
    with pytest.raises(ValueError, match="made for 2 measurements, got 3 images"):
        op.project(randn(3, D), randn(2, 5))
    with pytest.raises(ValueError, match=r"flat images of shape \(n, 12\)"):
        op.project(randn(2, 6), randn(2, 5))


def test_large_and_ill_conditioned():
    """A Gaussian blur of 400 pixels, condition 2e3, against the factorised Gram matrix."""
    i = np.arange(400)
    matrix = np.exp(-0.5 * ((i[:, None] - i[None]) / 1.2) ** 2)[::2]
    op, dense = Product(matrix).bind((400,)), MatrixOperator(matrix).bind((400,))
    x = randn(3, 400)
    y = dense.forward(randn(3, 400))
    close(op.project(x, y), dense.project(x, y), 1e-6)
    close(op.forward(op.project(x, y)), y, 1e-10)


# ------------------------------------------------------------------------- ill-conditioned


def with_spectrum(m, d, values, seed=7):
    """A matrix of shape (m, d) with these singular values."""
    generator = np.random.default_rng(seed)
    left, right = (
        np.linalg.qr(generator.standard_normal((size, len(values))))[0] for size in (m, d)
    )
    return (left * values) @ right.T


def by_pinv(matrix, x, y, cutoff):
    inverse = torch.from_numpy(np.linalg.pinv(matrix, rcond=cutoff))
    return x - (x @ torch.from_numpy(matrix).T - y) @ inverse.T


@pytest.mark.parametrize("explained", [True, False], ids=["explained", "any y"])
@pytest.mark.parametrize("shape", [(30, 40), (40, 40), (60, 40), (120, 160)])
def test_condition_1e8_against_the_pseudo_inverse(shape, explained):
    """Where there are no more than 2 min(m, d) + 16 steps, rounding must not cost any."""
    m, d = shape
    matrix = with_spectrum(m, d, np.logspace(0, -8, min(m, d)))
    op = Product(matrix).bind((d,))
    x, x0 = randn(3, d), randn(3, d)
    y = op.forward(x0) if explained else randn(3, m)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project = op.projector(y)
        out = project(x)
    close(out, by_pinv(matrix, x, y, 1e-10), 1e-5)
    assert project.converged.all()
    if explained:
        close(op.forward(out), y, 1e-12)


@pytest.mark.parametrize("dust", [0.0, 1e-12])
@pytest.mark.parametrize("shape", [(60, 80), (80, 60)])
def test_dependent_rows_that_are_ill_conditioned(shape, dust):
    """Singular values that are rounding count as zero, whatever the measurements say of them."""
    values = np.r_[np.logspace(0, -4, 20), dust * np.ones(40)]
    matrix = with_spectrum(*shape, values)
    op = Product(matrix).bind(shape[1:])
    x, y = randn(3, shape[1]), randn(3, shape[0])
    project, expected = op.projector(y), by_pinv(matrix, x, y, 1e-10)
    out = project(x)
    close(out, expected, 1e-6)
    assert project.converged.all()
    # Nor does the noise grow when what is projected goes on from there.
    moved = project(out + 1e-3 * project.null(randn(*out.shape)))
    assert float((moved - out).norm()) < 1e-2 * float(out.norm())
    measured = (moved - out) @ torch.from_numpy(matrix).T
    assert float(measured.norm()) < 1e-6 * float(y.norm())


def test_units_that_differ_are_no_rounding():
    """Two instruments, one of which measures in units 1e8 times as large."""
    matrix = np.r_[FULL[:3], 1e-8 * FULL[3:]]
    op = Product(matrix).bind((D,))
    x, y = randn(4, D), op.forward(randn(4, D))
    out = op.project(x, y)
    close(out, Product(FULL).bind((D,)).project(x, y * torch.tensor([1.0] * 3 + [1e8] * 2)), 1e-5)
    close(op.projector(y).null(x), MatrixOperator(FULL).bind((D,)).projector(y).null(x), 1e-5)


def test_rows_that_do_not_converge_are_named(monkeypatch):
    monkeypatch.setattr(_iterative, "_MAX_STEPS", 5)
    matrix = with_spectrum(40, 50, np.logspace(0, -6, 40))
    op = Product(matrix).bind((50,))
    x = randn(4, 50)
    y = op.forward(x)
    y[1], y[3] = op.forward(randn(2, 50))
    project = op.projector(y)
    with pytest.warns(ConvergenceWarning) as told:
        out = project(x)
    assert project.converged.tolist() == [True, False, True, False]
    left = (op.forward(out) - y).norm(dim=1) / (2 * y.norm(dim=1))
    message = str(told[0].message)
    assert "in 5 steps of conjugate gradients for 2 of 4 rows (1, 3)" in message
    # What it says is left is what is left (relative to all that was added up).
    said = float(message.split("up to ")[1].split(" of")[0].split(" is")[0])
    assert 0.3 < said / float(left.max()) < 3
    assert "MatrixOperator(A)" in message and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project(x)  # once is enough
        op.projector(op.forward(x))(x)  # and nothing is said where there is nothing to say


def test_an_mle_that_the_projection_did_not_reach_is_infeasible(monkeypatch):
    d = 24
    matrix = with_spectrum(16, d, np.logspace(0, -4, 16))
    prior = GaussianPrior(np.zeros(d), np.eye(d))
    Y = np.random.default_rng(0).standard_normal((3, d)) @ matrix.T
    Y[1] = 0.0
    model = AIPORegressor(Product(matrix), 0.0, prior=prior, max_evals=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (model.reconstruct(Y).status == "converged").all()
    monkeypatch.setattr(_iterative, "_MAX_STEPS", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the status tells, and row numbers of chunks would not
        result = model.reconstruct(Y)
    assert result.status.tolist() == ["infeasible", "converged", "infeasible"]
    with pytest.warns(ConvergenceWarning, match="explains the measurements of 2 of 3 rows"):
        model.predict(Y)


# --------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_norm_of_small_operators(name, affine):
    op, dense = pair(name, affine)
    assert op.norm() == pytest.approx(np.linalg.norm(MATRICES[name], 2), rel=1e-9, abs=1e-300)
    assert op.norm() == pytest.approx(dense.norm(), rel=1e-6, abs=1e-160)


@pytest.mark.parametrize("shape", [(90, 300), (300, 90), (200, 200)])
def test_norm_of_large_operators(shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    op = Product(matrix).bind((shape[1],))
    assert power_norm(op) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
    assert Product(np.zeros(shape)).bind((shape[1],)).norm() == 0.0
    assert op.norm() == op.norm()
    # Equal largest singular values, on which power iterations are slow.
    q = np.linalg.qr(np.random.default_rng(2).standard_normal((200, 200)))[0]
    assert Product(q).bind((200,)).norm() == pytest.approx(1.0, rel=1e-6)


# ------------------------------------------------------------------------------- the shapes


def test_setup_may_give_the_shape_of_a_measurement():
    op = Product(MATRICES["square"][:6], shape=(1, 2, 3)).bind((1, 3, 4))
    assert op.measurement_shape_ == (1, 2, 3) and op.n_measurements_ == 6
    assert op(np.ones((2, 1, 3, 4))).shape == (2, 1, 2, 3)
    assert op(np.ones((2, 12))).shape == (2, 6)
    prior = GaussianPrior(np.zeros(12), np.eye(12), event_shape=(1, 3, 4))
    out = AIPORegressor(op, 0.1, prior=prior).predict(np.ones((2, 1, 2, 3)))
    assert out.shape == (2, 1, 3, 4)


def test_setup_must_say_something_that_fits():
    class Silent(Product):
        def _setup(self):
            pass

    class Wrong(Product):
        def _setup(self):
            self.measurement_shape_, self.n_measurements_ = (2, 3), 5

    with pytest.raises(AttributeError, match="Silent._setup must set n_measurements_"):
        Silent(FULL).bind((D,))
    with pytest.raises(ValueError, match=r"n_measurements_ = 5, but .* \(2, 3\) have 6"):
        Wrong(FULL).bind((D,))


def test_operators_that_are_not_linear_have_none_of_it():
    op = Clipped().bind((D,))
    y = randn(2, D)
    for what, call in {
        "adjoint": lambda: op.adjoint(y),
        "linear part": lambda: op.linear(y),
        "projection": lambda: op.projector(y),
        "spectral norm": op.norm,
    }.items():
        with pytest.raises(TypeError, match=f"Clipped is not linear: it has no {what}"):
            call()


def test_reconstruction_is_that_of_the_matrix():
    prior = GaussianPrior(np.zeros(D), np.eye(D) + 0.5)
    Y = np.random.default_rng(3).standard_normal((5, 7))
    Y[0, 2] = np.nan
    for init in ("mle", "gaussian"):
        images = [
            AIPORegressor(op, 0.1, prior=prior, init=init, tol=1e-8).predict(Y)
            for op in (Product(LOW_RANK), sp.csr_array(LOW_RANK))
        ]
        assert_allclose(*images, atol=1e-6)
