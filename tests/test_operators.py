"""Operators against numpy: adjoint, projection, norm, and what they refuse."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from skaipo.operators import (
    CompressedSensing,
    Denoising,
    Inpainting,
    MatrixOperator,
    Operator,
    as_operator,
)
from skaipo.operators._linear import _bucket

SHAPE = (3, 4)
D = 12
MASK = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0], dtype=bool)


def random_matrix(m, d, seed=0):
    return np.random.default_rng(seed).standard_normal((m, d))


def sparse_matrix(m, d):
    a = random_matrix(m, d, seed=3)
    a[np.random.default_rng(4).random((m, d)) < 0.5] = 0
    return sp.csr_array(a)


def dependent_matrix(m, d, rank, seed=0):
    return random_matrix(m, rank, seed) @ random_matrix(rank, d, seed + 1)


OPERATORS = {
    "denoising": Denoising(),
    "inpainting": Inpainting(MASK),
    "per-row inpainting": Inpainting(),
    "compressed sensing": CompressedSensing(5, random_state=1),
    "square": CompressedSensing(D, random_state=1),
    "matrix": MatrixOperator(random_matrix(5, D)),
    "tall": MatrixOperator(random_matrix(20, D)),
    "dependent rows": MatrixOperator(dependent_matrix(7, D, 4)),
    "zero row": MatrixOperator(np.r_[random_matrix(4, D), np.zeros((1, D))]),
    "sparse": MatrixOperator(sparse_matrix(6, D)),
    "tall sparse": MatrixOperator(sparse_matrix(17, D)),
    "dependent sparse": MatrixOperator(sp.vstack([sparse_matrix(4, D)] * 2)),
}
MATRICES = {k: v for k, v in OPERATORS.items() if isinstance(v, MatrixOperator)}


@pytest.fixture(params=OPERATORS, ids=str)
def op(request):
    return OPERATORS[request.param].bind(SHAPE)


def dense(op):
    """The matrix of a bound operator, made without its tensor methods."""
    if isinstance(op, Denoising):
        return np.eye(D)
    if isinstance(op, Inpainting):
        return np.diag(op.measured_.astype(float))
    return op.matrix_.toarray() if sp.issparse(op.matrix_) else op.matrix_


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def random_observed(op, n):
    """Random masks, with repeats, a full one and an empty one among them."""
    observed = torch.rand(n, op.n_measurements_) < 0.6
    observed[1], observed[2], observed[3], observed[-1] = True, False, observed[0], observed[0]
    return observed


def pinv_projection(op, x, y, observed=None):
    """The oracle, row by row and by the SVD of numpy."""
    out = np.empty(x.shape)
    for i in range(len(x)):
        keep = op.measured_ if observed is None else op.measured_ & observed[i].numpy()
        a = dense(op)[keep]
        inverse = np.linalg.pinv(a, rcond=1e-9) if len(a) else np.zeros((D, 0))
        out[i] = x[i].numpy() - inverse @ (a @ x[i].numpy() - y[i].numpy()[keep])
    return out


# ------------------------------------------------------------------------- forward, adjoint


def test_bound_attributes(op):
    assert op.event_shape_ == SHAPE and op.n_features_in_ == D
    assert dense(op).shape == (op.n_measurements_, D)
    assert op.measured_.shape == (op.n_measurements_,) and op.measured_.dtype == bool
    keeps = isinstance(op, Denoising | Inpainting)
    assert op.measurement_shape_ == (SHAPE if keeps else (op.n_measurements_,))
    assert op.is_linear


def test_forward_is_the_matrix_product(op):
    x = randn(4, D)
    np.testing.assert_allclose(op.forward(x).numpy(), x.numpy() @ dense(op).T, atol=1e-13)


def test_adjoint_identity(op):
    x, y = randn(4, D), randn(4, op.n_measurements_)
    left = (op.forward(x) * y).sum(dim=1)
    torch.testing.assert_close(left, (x * op.adjoint(y)).sum(dim=1))
    assert left.abs().min() > 1e-3


def test_gradient_of_forward_is_the_adjoint_and_vice_versa(op):
    x = randn(4, D).requires_grad_()
    y = randn(4, op.n_measurements_).requires_grad_()
    (grad_x,) = torch.autograd.grad(op.forward(x), x, y.detach())
    torch.testing.assert_close(grad_x, op.adjoint(y.detach()))
    (grad_y,) = torch.autograd.grad(op.adjoint(y), y, x.detach())
    torch.testing.assert_close(grad_y, op.forward(x.detach()))
    assert grad_x.abs().max() > 0.1 and grad_y.abs().max() > 0.1


def test_second_derivatives(op):
    x = randn(2, D).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: (op.forward(v) ** 3).sum(), x)


def test_autograd_after_first_use_in_inference_mode(op):
    op = clone(op).bind(SHAPE)
    x = randn(2, D)
    with torch.inference_mode():
        op.forward(x)
        projector = op.projector(op.forward(x))
        projector(x)
    v = x.clone().requires_grad_()
    (op.forward(projector(v)) + op.forward(v)).square().sum().backward()
    assert v.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(op, dtype):
    x = randn(3, D, dtype=dtype)
    y = op.forward(x)
    assert y.dtype == op.adjoint(y).dtype == op.project(x, y).dtype == dtype


def test_norm_is_the_spectral_norm(op):
    assert op.norm() == pytest.approx(np.linalg.norm(dense(op), 2), rel=1e-12)
    assert type(op.norm()) is float


@pytest.mark.parametrize("wrap", [np.asarray, sp.csr_array])
@pytest.mark.parametrize("shape", [(530, 600), (600, 530)])
def test_norm_of_a_large_matrix(wrap, shape):
    a = random_matrix(*shape)
    op = MatrixOperator(wrap(a)).bind(shape[1])
    assert op.norm() == pytest.approx(np.linalg.norm(a, 2), rel=1e-8)


def test_sparse_equals_dense():
    a = sparse_matrix(6, D)
    x, x0, y = randn(9, D), randn(9, D), randn(9, 6)
    observed = torch.rand(9, 6) < 0.6
    want = MatrixOperator(a.toarray()).bind(D)
    coo = torch.from_numpy(a.toarray()).to_sparse_coo()
    # Duplicate entries are summed, in any order.
    i, j = a.nonzero()
    parts = a.data * 0.25, a.data * 0.75
    double = sp.coo_array((np.concatenate(parts), (np.r_[i, i], np.r_[j, j])), shape=a.shape)
    for other in (a, a.tocsc(), sp.csr_matrix(a), double, coo, coo.to_sparse_csr()):
        got = MatrixOperator(other).bind(D)
        assert sp.issparse(got.matrix_)
        torch.testing.assert_close(got.forward(x), want.forward(x))
        torch.testing.assert_close(got.adjoint(y), want.adjoint(y))
        torch.testing.assert_close(got.project(x0, y, observed), want.project(x0, y, observed))


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.tolist(),
        torch.from_numpy,
        lambda a: torch.from_numpy(a).requires_grad_(),
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(int),
        lambda a: torch.from_numpy(a).to(torch.bfloat16),
        lambda a: a[::-1][::-1],
    ],
)
def test_matrix_kinds(convert):
    a = np.random.default_rng(0).integers(-3, 4, (5, D)).astype(float)
    x = randn(3, D)
    op = MatrixOperator(convert(a)).bind(D)
    np.testing.assert_allclose(op.forward(x).numpy(), x.numpy() @ a.T, atol=1e-12)


# ---------------------------------------------------------------------------- projection


def test_projection_matches_the_pseudo_inverse(op):
    x, y = randn(6, D), randn(6, op.n_measurements_)
    got = op.project(x, y)
    np.testing.assert_allclose(got.numpy(), pinv_projection(op, x, y), atol=1e-10)
    assert (got - x).abs().max() > 0.1


def test_projection_with_masks_per_row_matches_the_pseudo_inverse(op):
    x, y = randn(23, D), randn(23, op.n_measurements_)
    observed = random_observed(op, 23)
    y = torch.where(observed, y, torch.nan)
    got = op.project(x, y, observed)
    np.testing.assert_allclose(got.numpy(), pinv_projection(op, x, y, observed), atol=1e-9)
    torch.testing.assert_close(got[2], x[2])


def test_one_mask_shared_by_all_rows(op):
    x, y = randn(5, D), randn(5, op.n_measurements_)
    observed = (torch.arange(op.n_measurements_) % 3 > 0).expand(5, -1)
    got = op.project(x, y, observed)
    np.testing.assert_allclose(got.numpy(), pinv_projection(op, x, y, observed), atol=1e-10)


def test_projection_is_feasible_and_nearest(op):
    """f(x') = y where that can be, and x' - x is orthogonal to the null space."""
    x, truth = randn(8, D), randn(8, D)
    observed = random_observed(op, 8)
    y = op.forward(truth)
    projector = op.projector(torch.where(observed, y, torch.nan), observed)
    got = projector(x)
    error = torch.where(observed, op.forward(got) - y, 0.0)
    assert error.abs().max() < 1e-11
    null = projector.null(randn(8, D))
    assert torch.where(observed, op.forward(null), 0.0).abs().max() < 1e-11
    assert ((got - x) * null).sum(dim=1).abs().max() < 1e-11
    torch.testing.assert_close(projector.null(null), null)
    torch.testing.assert_close(projector(got), got)
    torch.testing.assert_close(projector(got + null), got + null)


def test_null_is_the_projection_for_zero_measurements(op):
    v, y = randn(7, D), randn(7, op.n_measurements_)
    observed = random_observed(op, 7)
    want = pinv_projection(op, v, torch.zeros_like(y), observed)
    np.testing.assert_allclose(op.projector(y, observed).null(v).numpy(), want, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_float32_is_feasible_to_rounding(op, masked):
    x, truth = randn(16, D, dtype=torch.float32), randn(16, D, dtype=torch.float32)
    y = op.forward(truth)
    observed = random_observed(op, 16) if masked else torch.ones(y.shape, dtype=torch.bool)
    got = op.project(x, y, observed)
    error = torch.where(observed & torch.from_numpy(op.measured_), op.forward(got) - y, 0.0)
    bound = 4 * torch.finfo(torch.float32).eps * op.norm()
    assert (error.norm(dim=1) <= bound * (got.norm(dim=1) + x.norm(dim=1))).all()


def test_badly_scaled_rows_are_not_taken_for_dependent_ones():
    scale = 10.0 ** -np.arange(0, 12, 2)
    a = random_matrix(6, D) * scale[:, None]
    op = MatrixOperator(a).bind(D)
    x, truth = randn(5, D), randn(5, D)
    observed = torch.rand(5, 6) < 0.7
    observed[0] = True
    got = op.project(x, op.forward(truth), observed)
    error = torch.where(observed, op.forward(got - truth), 0.0) / torch.from_numpy(scale)
    assert error.abs().max() < 1e-9


def test_tiny_and_huge_matrices():
    for size in (1e-9, 1e9):
        op = MatrixOperator(size * dependent_matrix(7, D, 4)).bind(D)
        x, y = randn(5, D), randn(5, 7) * size
        observed = random_observed(op, 5)
        want = pinv_projection(op, x, y, observed)
        np.testing.assert_allclose(op.project(x, y, observed).numpy(), want, atol=1e-8)


def test_nearly_dependent_rows_stay_feasible():
    a = random_matrix(5, D)
    for gap in (1e-3, 1e-4, 1e-5, 1e-6):
        b = np.r_[a, a[:1] + gap * random_matrix(1, D, seed=9)]
        op = MatrixOperator(b).bind(D)
        x, truth = randn(4, D), randn(4, D)
        y = op.forward(truth)
        assert (op.forward(op.project(x, y)) - y).abs().max() < 1e-8


def test_many_distinct_masks_in_chunks(monkeypatch):
    monkeypatch.setattr("skaipo.operators._linear._GRAM_ENTRIES", 3 * 25)
    op = MatrixOperator(random_matrix(5, D)).bind(D)
    x, y, observed = randn(60, D), randn(60, 5), torch.rand(60, 5) < 0.5
    want = pinv_projection(op, x, y, observed)
    np.testing.assert_allclose(op.project(x, y, observed).numpy(), want, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    d=st.integers(1, 9),
    rank=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_projection_property(n, m, d, rank, seed):
    """For any shape, rank and masks: idempotent, a minimiser, and no feasible point is nearer."""
    rng = np.random.default_rng(seed)
    # Small integers: whatever the mask, no singular value is small without being zero.
    a = rng.integers(-2, 3, (m, min(rank, m, d))) @ rng.integers(-2, 3, (min(rank, m, d), d))
    op = MatrixOperator(a).bind(d)
    x, y = torch.from_numpy(rng.standard_normal((n, d))), torch.from_numpy(rng.random((n, m)))
    observed = torch.from_numpy(rng.random((n, m)) < 0.7)
    projector = op.projector(torch.where(observed, y, torch.nan), observed)
    got = projector(x)
    torch.testing.assert_close(projector(got), got, atol=1e-9, rtol=0)
    for i in range(n):
        rows = a[observed[i].numpy()].astype(float)
        # The normal equations, and a step within the row space: together they determine x'.
        residual = rows @ got[i].numpy() - y[i][observed[i]].numpy()
        np.testing.assert_allclose(rows.T @ residual, 0, atol=1e-8)
        step = (got[i] - x[i]).numpy()
        if len(rows):
            step = step - np.linalg.pinv(rows, rcond=1e-9) @ (rows @ step)
        np.testing.assert_allclose(step, 0, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_buckets_hold_every_row_once_with_its_pattern(labels):
    _, inverse = np.unique(labels, return_inverse=True)
    position, buckets = _bucket(inverse)
    flat_rows = np.concatenate([rows.ravel() for _, rows in buckets])
    flat_patterns = np.concatenate([np.repeat(p, rows.shape[1]) for p, rows in buckets])
    np.testing.assert_array_equal(flat_rows[position], np.arange(len(labels)))
    np.testing.assert_array_equal(flat_patterns[position], inverse)
    assert len(flat_rows) < 2 * len(labels)


# ---------------------------------------------------------------- rows, NaN, no side effects


def test_a_row_alone_equals_the_row_in_a_batch(op):
    x, y = randn(13, D), randn(13, op.n_measurements_)
    observed = random_observed(op, 13)
    x[5] = torch.nan  # a broken neighbour
    forward, adjoint = op.forward(x), op.adjoint(y)
    projected, null = op.project(x, y, observed), op.projector(y, observed).null(x)
    everything = op.project(x, y)
    for i in (0, 1, 4, 12):
        row, mask = slice(i, i + 1), observed[i : i + 1]
        torch.testing.assert_close(op.forward(x[row]), forward[row], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(op.adjoint(y[row]), adjoint[row], rtol=1e-13, atol=1e-13)
        alone = op.projector(y[row], mask)
        torch.testing.assert_close(alone(x[row]), projected[row], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(alone.null(x[row]), null[row], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(op.project(x[row], y[row]), everything[row])


def test_what_is_not_observed_never_matters(op):
    x, y = randn(6, D), randn(6, op.n_measurements_)
    observed = random_observed(op, 6)
    counted = observed & torch.from_numpy(op.measured_)
    want = op.project(x, torch.where(counted, y, 0.0), observed)
    for junk in (torch.nan, torch.inf, 1e300):
        v = x.clone().requires_grad_()
        projector = op.projector(torch.where(counted, y, junk), observed)
        got = projector(v)
        assert torch.equal(got.detach(), want)
        (grad,) = torch.autograd.grad(got.square().sum(), v)
        assert grad.isfinite().all()
        assert projector.null(x).isfinite().all()


def test_nan_under_the_fixed_mask_is_ignored_without_observed():
    op = Inpainting(MASK).bind(SHAPE)
    x, y = randn(3, D), randn(3, D)
    y[:, ~MASK] = torch.nan
    got = op.project(x, y)
    np.testing.assert_array_equal(got[:, MASK], y[:, MASK])
    np.testing.assert_array_equal(got[:, ~MASK], x[:, ~MASK])
    x[:, ~MASK] = torch.nan
    assert (op.forward(x)[:, ~MASK] == 0).all()


def test_gradient_through_the_projection_is_null(op):
    """The projection is affine with a symmetric linear part: that is its gradient."""
    x, v = randn(4, D).requires_grad_(), randn(4, D)
    projector = op.projector(randn(4, op.n_measurements_), random_observed(op, 4))
    (grad,) = torch.autograd.grad(projector(x), x, v)
    torch.testing.assert_close(grad, projector.null(v), atol=1e-10, rtol=0)


def test_inputs_are_not_changed(op):
    x, y = randn(5, D), randn(5, op.n_measurements_)
    observed = random_observed(op, 5)
    before = x.clone(), y.clone(), observed.clone(), dense(op).copy()
    projector = op.projector(y, observed)
    results = [op.forward(x), op.adjoint(y), projector(x), projector.null(x), op.project(x, y)]
    for result in results[2:]:
        result.zero_()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert torch.equal(observed, before[2])
    np.testing.assert_array_equal(dense(op), before[3])


# ------------------------------------------------------------------------- the user's call


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("bound", [False, True])
def test_call_on_numpy(name, bound):
    op = OPERATORS[name].bind(SHAPE) if bound else OPERATORS[name]
    a = dense(OPERATORS[name].bind(SHAPE))
    X = np.random.default_rng(0).standard_normal((4, *SHAPE))
    X.flags.writeable = False
    want = X.reshape(4, D) @ a.T
    keeps = isinstance(op, Denoising | Inpainting)
    got = op(X)
    assert got.shape == (X.shape if keeps else want.shape) and got.dtype == np.float64
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-13)
    flat = op(X.reshape(4, D))
    assert flat.shape == want.shape
    np.testing.assert_array_equal(flat, got.reshape(want.shape))
    assert not np.shares_memory(flat, X)
    single = op(X.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single.reshape(want.shape), want, rtol=1e-4, atol=1e-5)
    assert op(X.astype(np.float16)).dtype == np.float16
    whole = op(np.ones((2, D), dtype=int))
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole, np.ones((2, D)) @ a.T, atol=1e-13)
    assert op(np.empty((0, D))).shape == (0, want.shape[1])
    np.testing.assert_array_equal(op(X.reshape(4, D).tolist()), flat)


@pytest.mark.parametrize("name", OPERATORS)
def test_call_on_tensors(name):
    op, x = OPERATORS[name], randn(4, *SHAPE).requires_grad_()
    got = op(x)
    want = op(x.detach().numpy())
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float64
    assert not got.requires_grad
    np.testing.assert_array_equal(got.numpy(), want)
    got.zero_()
    assert x.detach().abs().min() > 0
    assert op(x.detach().float()).dtype == torch.float32
    assert op(torch.ones(2, D, dtype=torch.int64)).dtype == torch.float64


def test_compressed_sensing_depends_on_sizes_and_seed_only():
    a = CompressedSensing(5, random_state=3).bind((3, 4)).matrix_
    b = CompressedSensing(np.int64(5), random_state=np.int32(3)).bind(12).matrix_
    np.testing.assert_array_equal(a, b)
    want = np.random.default_rng(3).standard_normal((5, 12)) / np.sqrt(5)
    np.testing.assert_allclose(a, want, rtol=1e-15)
    assert a.dtype == np.float64 and not a.flags.writeable
    assert not np.array_equal(a, CompressedSensing(5, random_state=4).bind(12).matrix_)
    big = CompressedSensing(200).bind(1000).matrix_
    assert np.var(big) == pytest.approx(1 / 200, rel=0.01)


# ---------------------------------------------------------------- bind, clone, pickle, repr


def test_bind_makes_a_new_operator_and_leaves_the_recipe_alone():
    for op in OPERATORS.values():
        before = vars(op).copy()
        bound = op.bind(SHAPE)
        assert bound is not op and vars(op) == before
        assert bound.bind(SHAPE) is bound and bound.bind(list(SHAPE)) is bound
        flat = bound.bind(D)
        assert flat is not bound and flat.event_shape_ == (D,) and bound.event_shape_ == SHAPE
        np.testing.assert_array_equal(dense(flat), dense(bound))


def test_bind_after_set_params_uses_the_new_ones():
    bound = CompressedSensing(5).bind(D)
    bound.set_params(n_measurements=6)
    assert bound.bind(D).matrix_.shape == (6, D)
    assert bound(np.ones((1, D))).shape == (1, 6)
    inpainting = Inpainting(MASK).bind(D).set_params(mask=~MASK)
    np.testing.assert_array_equal(inpainting.bind(D).measured_, ~MASK)


def test_clone_shares_arrays_and_drops_caches(op):
    op.project(randn(2, D), randn(2, op.n_measurements_))
    copied = clone(op)
    assert type(copied) is type(op) and copied is not op
    for name, value in op.get_params(deep=False).items():
        assert getattr(copied, name) is value
    assert vars(copied).keys() == op.get_params(deep=False).keys()
    again = copied.bind(SHAPE)
    assert not again.__dict__.get("_cache")
    if isinstance(op, CompressedSensing):
        assert again.matrix_ is op.matrix_


@pytest.mark.parametrize("duplicate", [lambda op: pickle.loads(pickle.dumps(op)), copy.copy])
def test_pickle_and_copy(op, duplicate):
    x, y = randn(3, D), randn(3, op.n_measurements_)
    want = op.project(x, y)
    assert "_cache" in vars(op) or isinstance(op, Denoising | Inpainting)
    other = duplicate(op)
    assert "_cache" not in vars(other)
    assert other.bind(SHAPE) is other
    torch.testing.assert_close(other.project(x, y), want, rtol=0, atol=0)
    unbound = duplicate(clone(op))
    torch.testing.assert_close(unbound.bind(SHAPE).project(x, y), want, rtol=0, atol=0)


def test_read_only_and_sparse_matrices_do_not_warn():
    a = random_matrix(5, D)
    a.flags.writeable = False
    b = sparse_matrix(5, D)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns once per process: another test may have been first
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for matrix in (a, b):
                op = MatrixOperator(matrix).bind(D)
                op.project(randn(2, D), randn(2, 5), torch.rand(2, 5) < 0.5)
                op.norm()
    finally:
        torch.set_warn_always(always)


def test_sparse_input_is_not_changed():
    a = sp.csr_array((np.ones(3), np.array([2, 0, 2]), np.array([0, 2, 3])), shape=(2, 3))
    indices = a.indices.copy()
    op = MatrixOperator(a).bind(3)
    np.testing.assert_array_equal(op(np.array([[1.0, 2.0, 3.0]])), [[4.0, 3.0]])
    assert op.matrix_.has_canonical_format
    np.testing.assert_array_equal(a.indices, indices)


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Denoising(), "Denoising()"),
        (CompressedSensing(24), "CompressedSensing(n_measurements=24)"),
        (
            CompressedSensing(24, random_state=7),
            "CompressedSensing(n_measurements=24, random_state=7)",
        ),
        (
            Inpainting(np.arange(64).reshape(8, 8) % 2 == 0),
            "Inpainting(mask=<array (8, 8) bool, 32 observed>)",
        ),
        (Inpainting(), "Inpainting()"),
        (MatrixOperator(np.ones((24, 64))), "MatrixOperator(A=<array (24, 64) float64>)"),
        (MatrixOperator(torch.ones(2, 3)), "MatrixOperator(A=<tensor (2, 3) float32>)"),
        (
            MatrixOperator(sp.csr_array(np.eye(3))),
            "MatrixOperator(A=<sparse (3, 3) float64, 3 stored>)",
        ),
        (MatrixOperator([[1.0, 2.0]]), "MatrixOperator(A=<list of 1>)"),
    ],
)
def test_repr_has_no_arrays(op, text):
    assert repr(op) == str(op) == text
    html = op._repr_mimebundle_()["text/html"]
    assert text.replace("<", "&lt;").replace(">", "&gt;") in html
    assert len(html) < len(text) + 100


def test_set_params_round_trip():
    op = CompressedSensing(5).set_params(n_measurements=7, random_state=2)
    assert op.get_params() == {"n_measurements": 7, "random_state": 2}


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("op", "error", "message"),
    [
        (CompressedSensing(13), ValueError, r"n_measurements=13\).*12 features.*<= 12"),
        (CompressedSensing(0), ValueError, "n_measurements.* at least 1, got 0"),
        (CompressedSensing(0.5), TypeError, r"n_measurements.* integer, got 0.5.*fraction \* 12"),
        (CompressedSensing(True), TypeError, "n_measurements.* integer, got True"),
        (CompressedSensing("5"), TypeError, "n_measurements.* integer, got '5'"),
        (CompressedSensing(5, random_state=None), TypeError, "None.*same matrix"),
        (
            CompressedSensing(5, random_state=np.random.RandomState(0)),
            TypeError,
            "random_state.* integer, got RandomState.*same matrix",
        ),
        (CompressedSensing(5, random_state=-1), ValueError, "random_state.*>= 0, got -1"),
        (Inpainting(MASK[:5]), ValueError, r"mask of shape \(5,\).*shape \(3, 4\) \(12 features\)"),
        (Inpainting(MASK.reshape(4, 3)), ValueError, r"\(4, 3\).*\(3, 4\).*broadcast_to"),
        (Inpainting(np.zeros(D, bool)), ValueError, "False everywhere.*~mask"),
        (Inpainting(np.full(D, 0.5)), ValueError, "boolean.*float64.*mask > 0.5"),
        (Inpainting(np.where(MASK, 1, np.nan)), ValueError, "boolean.*isnan"),
        (Inpainting(["a"] * D), ValueError, "boolean.*dtype <U1"),
        (MatrixOperator(np.ones((5, 7))), ValueError, r"\(5, 7\).*7 features.*12.*A\.T"),
        (MatrixOperator(sp.csr_array(np.eye(7))), ValueError, r"\(7, 7\).*7 features.*12 columns"),
        (MatrixOperator(np.ones(D)), ValueError, r"shape \(m, d\), got shape \(12,\)"),
        (MatrixOperator(torch.ones(1, 2, D)), ValueError, r"got shape \(1, 2, 12\)"),
        (MatrixOperator(torch.ones(D).to_sparse()), ValueError, r"got shape \(12,\)"),
        (MatrixOperator(np.ones((0, D))), ValueError, r"got shape \(0, 12\)"),
        (MatrixOperator(1j * np.ones((2, D))), TypeError, "real matrix, got dtype complex128"),
        (MatrixOperator(torch.ones(2, D) * 1j), TypeError, "real matrix, got dtype complex64"),
        (MatrixOperator([["a"] * D]), TypeError, "real matrix, got dtype <U1"),
        (MatrixOperator(np.full((2, D), np.nan)), ValueError, "24 entries that are NaN or inf"),
        (
            MatrixOperator(sp.csr_array(([np.inf], ([0], [1])), shape=(2, D))),
            ValueError,
            "1 entries that are NaN or infinite",
        ),
    ],
)
def test_bind_errors(op, error, message):
    with pytest.raises(error, match=message):
        op.bind(SHAPE)


@pytest.mark.parametrize("shape", [(), (3, 0), (-1,), 0])
def test_bind_refuses_bad_shapes(shape):
    with pytest.raises(ValueError, match="event_shape must hold positive sizes"):
        Denoising().bind(shape)


def test_mask_layouts_that_are_accepted():
    for mask in (MASK.tolist(), MASK.astype(float), torch.from_numpy(MASK), MASK.reshape(SHAPE)):
        np.testing.assert_array_equal(Inpainting(mask).bind(SHAPE).measured_, MASK)
    image = MASK.reshape(SHAPE)
    np.testing.assert_array_equal(Inpainting(image).bind(D).measured_, MASK)
    np.testing.assert_array_equal(Inpainting(image).bind((1, *SHAPE)).measured_, MASK)
    with pytest.raises(ValueError, match=r"broadcast_to\(mask, \(2, 3, 4\)\)"):
        Inpainting(image).bind((2, *SHAPE))


def test_unbound_operators_say_so():
    with pytest.raises(NotFittedError, match="call bind"):
        Denoising().forward(randn(2, D))
    with pytest.raises(NotFittedError, match="CompressedSensing does not know the image shape"):
        CompressedSensing(3).projector(randn(2, 3))


def test_tensors_of_the_wrong_shape(op):
    m = op.n_measurements_
    with pytest.raises(ValueError, match=r"flat images of shape \(n, 12\), got \(2, 3, 4\)"):
        op.forward(randn(2, *SHAPE))
    with pytest.raises(ValueError, match=rf"measurements of shape \(n, {m}\), got \(2, 30\)"):
        op.adjoint(randn(2, 30))
    with pytest.raises(ValueError, match=rf"measurements of shape \(n, {m}\), got \({m},\)"):
        op.projector(randn(m))
    with pytest.raises(ValueError, match=r"observed must be a bool tensor.* torch.float64"):
        op.projector(randn(2, m), randn(2, m))
    with pytest.raises(ValueError, match=r"observed must be a bool tensor of shape \(2"):
        op.projector(randn(2, m), torch.ones(3, m, dtype=torch.bool))
    with pytest.raises(ValueError, match="made for 2 measurements, got 3 images"):
        op.project(randn(3, D), randn(2, m))
    with pytest.raises(ValueError, match="flat images"):
        op.projector(randn(2, m)).null(randn(2, D + 1))


def test_call_errors():
    with pytest.raises(ValueError, match=r"batch of shape \(n, d\).*got \(12,\).*X\[None\]"):
        Denoising()(np.ones(D))
    with pytest.raises(TypeError, match="real images, got an array of complex128"):
        Denoising()(np.ones((2, D)) * 1j)
    with pytest.raises(TypeError, match="real images, got a tensor of torch.complex64"):
        Denoising()(torch.ones(2, D) * 1j)
    with pytest.raises(TypeError, match="real images, got an array of <U1"):
        Denoising()([["a"]])
    bound = CompressedSensing(5).bind(SHAPE)
    with pytest.raises(ValueError, match=r"bound to images of 12 features \(3, 4\).*\(2, 13\)"):
        bound(np.ones((2, 13)))


def test_base_class_names_what_is_missing():
    class Mine(Operator):
        def _setup(self):
            self.n_measurements_ = 1

    with pytest.raises(TypeError, match="abstract class Operator .*_setup.*"):
        Operator()
    with pytest.raises(TypeError, match="abstract class Mine .*forward"):
        Mine()


def test_as_operator():
    op = Denoising()
    assert as_operator(op) is op
    for matrix in (
        np.ones((2, 3)),
        sp.csr_array(np.eye(3)),
        sp.csr_matrix((2, 3)),
        torch.ones(2, 3),
    ):
        made = as_operator(matrix)
        assert isinstance(made, MatrixOperator) and made.A is matrix


@pytest.mark.parametrize(
    ("op", "what"),
    [
        (None, "NoneType"),
        ("denoising", "str"),
        (np.ones(3), r"ndarray of shape (3,)"),
        (torch.ones(2, 3, 4), r"Tensor of shape (2, 3, 4)"),
        (object(), "object"),
        (Denoising, "the class Denoising; did you mean Denoising(...)"),
        ([1.0], "list"),
    ],
)
def test_as_operator_errors(op, what):
    with pytest.raises(TypeError, match=f"op must be an operator.* got {re.escape(what)}"):
        as_operator(op)
