"""Operators with a matrix, and the projection that factorises its Gram matrix."""

import math
import numbers
import warnings
import weakref

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.base import BaseEstimator

from skaipo.operators._base import Operator, ShortRepr
from skaipo.operators._projector import CorrectingProjector, check_same_rows

__all__ = ["CompressedSensing", "LeastSquaresOperator", "MatrixOperator"]

# Squared pivot of the unit-diagonal Gram matrix, at which an eigen-decomposition takes over from
# Cholesky and decides which rows are dependent.
_SINGULAR_PIVOT = 1e-10
# Gram matrices factorised at once (their entries), so temporaries stay near 64 MB.
_GRAM_ENTRIES = 2**23
# Equal draws share memory for as long as somebody holds them: clones that bind again are free.
_DRAWN = weakref.WeakValueDictionary()


class _SparseProduct(torch.autograd.Function):
    """``x @ A.T`` for a sparse A; ``pair`` is (A, A.T), so the gradient is the adjoint."""

    @staticmethod
    def forward(x, pair):
        return (pair[0] @ x.T).T.contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pair = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _SparseProduct.apply(grad, ctx.pair[::-1]), None


class _LinearMap(Operator):
    """Operators with a matrix: ``_setup`` sets ``matrix_``, a float64 ndarray or CSR array."""

    def _tensors(self, like):
        """A, and A^T where sparse, in the dtype and on the device of ``like``."""

        def make():
            if not sp.issparse(self.matrix_):
                return (_to_tensor(self.matrix_).to(like.device, like.dtype),)
            return tuple(_to_csr(a, like) for a in (self.matrix_, self.matrix_.T.tocsr()))

        return self._cached(("matrix", like.device, like.dtype), make)

    offset_ = None

    def linear(self, x):
        """The linear part ``A x`` of ``f``; the same where there is no offset."""
        self._check(x)
        tensors = self._tensors(x)
        return _SparseProduct.apply(x, tensors) if len(tensors) == 2 else x @ tensors[0].T

    def _offset(self, like):
        return self._cached(
            ("offset", like.device, like.dtype),
            lambda: _to_tensor(self.offset_).to(like.device, like.dtype),
        )

    def forward(self, x):
        y = self.linear(x)
        return y if self.offset_ is None else y + self._offset(y)

    def adjoint(self, y):
        self._check_y(y)
        tensors = self._tensors(y)
        return _SparseProduct.apply(y, tensors[::-1]) if len(tensors) == 2 else y @ tensors[0]

    def projector(self, y, observed=None):
        observed = self._observed(y, observed)
        return _GramProjector(self, y if self.offset_ is None else y - self._offset(y), observed)

    def norm(self):
        def make():
            n = min(self.matrix_.shape)
            if n <= 512:
                largest = np.linalg.eigvalsh(self._gram())[-1]
            else:
                a = self.matrix_ if self._wide else self.matrix_.T
                gram = LinearOperator((n, n), matvec=lambda v: a @ (a.T @ v), dtype=np.float64)
                # An explicit start: the default one is random.
                start = np.random.default_rng(0).standard_normal(n)
                largest = eigsh(gram, k=1, v0=start, return_eigenvectors=False)[0]
            return math.sqrt(max(largest, 0.0))

        return float(self._cached("norm", make))

    @property
    def _wide(self):
        return self.matrix_.shape[0] <= self.matrix_.shape[1]

    def _gram(self, rows=None):
        """The smaller of A A^T (m <= d) and A^T A, dense; of some rows only, if given."""
        a = self.matrix_ if rows is None else self.matrix_[rows]
        gram = a @ a.T if self._wide else a.T @ a
        return gram.toarray() if sp.issparse(gram) else gram

    def _roots(self, device, patterns=None):
        """Roots of the inverse Gram matrices for patterns (p, m) of observed rows; None: all."""
        if patterns is None:
            return self._cached(("root", device), lambda: _inverse_root(self._gram_on(device)))
        if not self._wide:
            grams = np.stack([self._gram(rows) for rows in patterns.cpu().numpy()])
            return _inverse_root(torch.from_numpy(grams).to(device))
        gram = self._cached(("gram", device), lambda: self._gram_on(device))
        size = max(1, _GRAM_ENTRIES // gram[0].numel())
        return torch.cat([_inverse_root(gram, part) for part in patterns.split(size)])

    def _gram_on(self, device):
        return torch.from_numpy(self._gram())[None].to(device)


class _GramProjector(CorrectingProjector):
    """x - A^T (A A^T)^+ (A x - y) over the observed rows (for m > d: x - (A^T A)^+ A^T (A x - y)).

    The Gram systems are factorised and solved in float64 whatever the dtype of x. Each distinct
    pattern of observed rows has its own factor; rows that share one are solved together.
    """

    def __init__(self, op, y, observed):
        self._op, self._observed = op, observed
        # mps has no float64
        self._device = device = torch.device("cpu") if y.device.type == "mps" else y.device
        self._position = None
        with torch.inference_mode(False), torch.no_grad():
            self._zero = torch.zeros((), device=y.device)
            self._y = y.detach()
            if observed is None:
                self._roots = op._roots(device)[0]
                return
            patterns, inverse = torch.unique(observed.to(device), dim=0, return_inverse=True)
            if len(patterns) == 1:
                self._roots = op._roots(device, patterns)[0]
                return
            position, buckets = _bucket(inverse.cpu().numpy())
            self._position = torch.from_numpy(position).to(device)
            self._roots = [
                (torch.from_numpy(rows).to(device), op._roots(device, patterns[members]))
                for members, rows in buckets
            ]

    def _mask(self, values):
        if self._observed is None:
            return values
        return torch.where(self._observed, values, self._zero.to(values.dtype))

    def _solve(self, rhs):
        """Gram pseudo-inverse times each row of rhs."""
        r = rhs.to(self._device, torch.float64)
        if self._position is None:
            r = (r @ self._roots) @ self._roots.mT
        else:
            blocks = [(r[rows] @ root) @ root.mT for rows, root in self._roots]
            r = torch.cat([block.flatten(0, 1) for block in blocks])[self._position]
        return r.to(rhs)

    def _correct(self, x, y):
        check_same_rows(x, self._y)
        # The second time removes what rounding left: in float32, for a square Gaussian A, a
        # relative residual of 3e-5 becomes 3e-7, which is that of the rounded exact answer.
        for _ in range(2):
            residual = self._mask(self._op.linear(x) - y)
            if self._op._wide:
                x = x - self._op.adjoint(self._solve(residual))
            else:
                x = x - self._solve(self._op.adjoint(residual))
        return x


class CompressedSensing(_LinearMap):
    """Random projections ``A x`` with i.i.d. normal entries of variance ``1 / m``.

    Parameters
    ----------
    n_measurements : int
        Number of measurements ``m``, from 1 to the number of pixels ``d``.
    random_state : int, default=0
        Seed. The matrix is a function of ``(m, d, random_state)`` only, so that the operator that
        measured and the one that reconstructs are the same.

    Attributes
    ----------
    matrix_ : ndarray, shape (m, d)
        The matrix, float64 and read-only (bound operators only).

    Raises
    ------
    TypeError
        By ``bind``: ``n_measurements`` or ``random_state`` is not an integer.
    ValueError
        By ``bind``: ``n_measurements`` is below 1 or above ``d``, or the seed is negative.
    """

    def __init__(self, n_measurements, *, random_state=0):
        self.n_measurements = n_measurements
        self.random_state = random_state

    def _setup(self):
        m, d, seed = self.n_measurements, self.n_features_in_, self.random_state
        if not _is_int(m):
            raise TypeError(
                f"CompressedSensing(n_measurements) must be an integer, got {m!r}. For a fraction "
                f"of the {d} pixels use int(fraction * {d})."
            )
        if not _is_int(seed):
            raise TypeError(
                f"CompressedSensing(random_state) must be an integer, got {seed!r}. Measuring and "
                "reconstructing must use the same matrix, and only a fixed seed gives it again."
            )
        if seed < 0:
            raise ValueError(f"CompressedSensing(random_state) must be >= 0, got {seed}.")
        if m < 1:
            raise ValueError(f"CompressedSensing(n_measurements) must be at least 1, got {m}.")
        if m > d:
            raise ValueError(
                f"CompressedSensing(n_measurements={m}) asks for more measurements than the {d} "
                f"features of the images (the prior's, shape {self.event_shape_}). Use "
                f"n_measurements <= {d}, or MatrixOperator for an overdetermined system."
            )
        key = int(m), d, int(seed)
        self.n_measurements_ = key[0]
        self.matrix_ = _DRAWN.get(key)
        if self.matrix_ is None:
            matrix = np.random.default_rng(key[2]).standard_normal(key[:2])
            matrix /= math.sqrt(m)
            matrix.flags.writeable = False
            _DRAWN[key] = self.matrix_ = matrix


class MatrixOperator(_LinearMap):
    """Any linear operator ``A x``, given by its matrix.

    Parameters
    ----------
    A : array-like, scipy sparse matrix or array, or Tensor, shape (m, d)
        The matrix. Sparse stays sparse (but for the Gram matrix of the smaller side, which
        projections factorise). It is used in place where it is float64: do not change it later.

    offset : array-like, shape (m,), default=None
        Added to every measurement: ``f(x) = A x + offset``.

    Attributes
    ----------
    matrix_ : ndarray or scipy.sparse.csr_array, shape (m, d)
        The matrix in float64 (bound operators only).

    Raises
    ------
    TypeError
        By ``bind``: ``A`` is not real-valued.
    ValueError
        By ``bind``: ``A`` is not 2-D, is empty, has NaN or infinite entries, or its number of
        columns is not the number of pixels.

    Notes
    -----
    With dependent rows or ``m > d`` it may be that no x satisfies ``A x = y``; the projection is
    then the nearest minimiser of ``||A x - y||^2``. In that case singular values below about 1e-7
    of the largest count as zero.
    """

    def __init__(self, A, offset=None):
        self.A = A
        self.offset = offset

    def _setup(self):
        a = self.A
        if isinstance(a, torch.Tensor):
            a = _from_tensor(a)
        elif not sp.issparse(a):
            a = np.asarray(a)
        if a.dtype.kind not in "biuf":
            raise TypeError(
                f"MatrixOperator(A) needs a real matrix, got dtype {a.dtype}. For a complex one "
                "stack its real and imaginary parts."
            )
        if a.ndim != 2 or 0 in a.shape:
            raise ValueError(f"MatrixOperator(A) needs A of shape (m, d), got shape {a.shape}.")
        if a.shape[1] != self.n_features_in_:
            raise ValueError(
                f"MatrixOperator(A) has A of shape {a.shape}: it measures images of {a.shape[1]} "
                f"features, but the images (the prior's, shape {self.event_shape_}) have "
                f"{self.n_features_in_}. Give a matrix with {self.n_features_in_} columns, or "
                f"a prior of {a.shape[1]} features; did you mean A.T?"
            )
        if sp.issparse(a):
            # torch wants sorted, distinct columns; the copy keeps the caller's matrix as it is.
            self.matrix_ = sp.csr_array(a, dtype=np.float64, copy=True)
            self.matrix_.sum_duplicates()
            values = self.matrix_.data
        else:
            self.matrix_ = values = np.ascontiguousarray(a, dtype=np.float64)
        if not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise ValueError(f"MatrixOperator(A) has {bad} entries that are NaN or infinite.")
        self.n_measurements_ = int(a.shape[0])
        if self.offset is not None:
            self.offset_ = np.asarray(self.offset, dtype=np.float64)
            if self.offset_.shape != (a.shape[0],) or not np.isfinite(self.offset_).all():
                raise ValueError(
                    f"MatrixOperator(offset) must hold {a.shape[0]} finite numbers, one for each "
                    f"measurement; got shape {self.offset_.shape}."
                )


class LeastSquaresOperator(ShortRepr, BaseEstimator):
    """An affine operator that is learnt from pairs: for when nobody wrote down the physics.

    ``fit(Y, X_clean)`` of an estimator learns ``y = A x + offset`` by ridge regression and
    reconstructs with the ``MatrixOperator`` that comes of it.

    Parameters
    ----------
    ridge : float, default=1e-8
        Weight of ``||A||^2`` relative to the mean variance of a pixel times the number of pairs.
    """

    def __init__(self, ridge=1e-8):
        self.ridge = ridge

    def learn(self, X, Y):
        """Estimate the operator.

        Parameters
        ----------
        X : ndarray, shape (n, d)
            Clean images.
        Y : ndarray, shape (n, m)
            Their measurements; pairs whose value is NaN are left out of that value's regression.

        Returns
        -------
        MatrixOperator
        """
        if not (isinstance(self.ridge, numbers.Real) and self.ridge >= 0):
            raise ValueError(f"ridge must be a number >= 0, got {self.ridge!r}.")
        matrix, offset = np.zeros((Y.shape[1], X.shape[1])), np.zeros(Y.shape[1])
        seen = ~np.isnan(Y)
        patterns, which = np.unique(seen, axis=1, return_inverse=True)
        for index, pattern in enumerate(patterns.T):
            columns = np.flatnonzero(which.ravel() == index)
            if not pattern.any():
                raise ValueError(f"Y has {len(columns)} columns without a single value.")
            x, y = X[pattern], Y[np.ix_(pattern, columns)]
            x_mean, y_mean = x.mean(0), y.mean(0)
            x, y = x - x_mean, y - y_mean
            gram = x.T @ x
            gram[np.diag_indices_from(gram)] += self.ridge * np.trace(gram) / len(gram)
            matrix[columns] = np.linalg.lstsq(gram, x.T @ y, rcond=None)[0].T
            offset[columns] = y_mean - matrix[columns] @ x_mean
        return MatrixOperator(matrix, offset)


def _inverse_root(gram, keep=None):
    """B (p, s, s) with ``B B^T`` the pseudo-inverse of each Gram matrix (p, s, s).

    ``keep`` (p, s) restricts the one matrix to some rows and columns. What B holds in the others,
    and in zero rows, is arbitrary: it only ever meets zeros.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
    scale = torch.where(scale.isfinite(), scale, 1.0)
    if keep is not None:
        gram = gram * (keep[:, None, :] & keep[:, :, None])
    # Unit diagonal: rows of very different size are not taken for dependent ones.
    unit = gram * scale[:, None, :] * scale[:, :, None]
    unit.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, info = torch.linalg.cholesky_ex(unit)
    root = torch.linalg.solve_triangular(factor, torch.diag_embed(scale), upper=False).mT
    pivot = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    singular = (info > 0) | ~(pivot > _SINGULAR_PIVOT)
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(gram[singular])
        cutoff = 8 * gram.shape[-1] * torch.finfo(gram.dtype).eps
        real = values > cutoff * values[:, -1:].clamp_min(0)
        root[singular] = vectors * torch.where(real, values.rsqrt(), 0.0)[:, None, :]
    return root.contiguous()


def _bucket(inverse):
    """Gather rows by pattern into few rectangular blocks.

    Returns ``position`` (n,), where row i ends up in the concatenated flattened blocks, and a list
    of ``(patterns (p,), rows (p, g))``. Groups are padded to a power of two by repeating a row, so
    at most half of the work is wasted whatever the sizes of the groups.
    """
    counts = np.bincount(inverse)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(counts)
    width = 2 ** np.ceil(np.log2(counts)).astype(int)
    position = np.empty(len(inverse), dtype=np.int64)
    buckets, offset = [], 0
    for g in np.unique(width):
        members = np.flatnonzero(width == g)
        slot = np.minimum((ends - counts)[members, None] + np.arange(g), ends[members, None] - 1)
        rows = order[slot]
        position[rows] = offset + np.arange(rows.size).reshape(rows.shape)
        offset += rows.size
        buckets.append((members, rows))
    return position, buckets


def _to_tensor(array):
    """A CPU tensor that shares the memory of an array nobody writes to."""
    with warnings.catch_warnings():
        # Read-only arrays (shared draws, joblib's memmaps) are fine: the tensor is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _to_csr(array, like):
    parts = [_to_tensor(part) for part in (array.indptr, array.indices, array.data)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = torch.sparse_csr_tensor(*parts, size=array.shape, check_invariants=False)
        return csr.to(like.device, like.dtype)


def _from_tensor(tensor):
    """A numpy array, or a scipy one where the tensor is sparse."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    if tensor.layout == torch.strided:
        return tensor.numpy()
    if tensor.ndim != 2:
        raise ValueError(
            f"MatrixOperator(A) needs A of shape (m, d), got shape {tuple(tensor.shape)}."
        )
    coo = tensor.to_sparse_coo().coalesce()
    return sp.coo_array((coo.values().numpy(), coo.indices().numpy()), shape=tuple(coo.shape))


def _is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
