"""Projection and norm of a linear operator that is known by its products alone, no matrix."""

import math

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from skaipo._padding import padded
from skaipo.operators._projector import AffineProjector, check_same_rows

__all__ = ["ConjugateGradientProjector", "power_norm"]

# Conjugate gradients find the k-th distinct singular value in about the k-th step; beyond, more
# steps only chase directions that the operator hardly measures.
_MAX_STEPS = 500
# Up to this size all singular values come from the matrix, by way of unit vectors.
_SMALL = 64


class ConjugateGradientProjector(AffineProjector):
    """``x + A^+ (y - f(x))`` over the observed entries, by conjugate gradients in float64.

    The iteration is CGLS (Hestenes and Stiefel, 1952): conjugate gradients for ``A A^T`` written
    such that they also converge, to the least-squares solution, where the rows of A are dependent
    and the measurements contradict each other. From zero the correction stays in the range of A^T:
    it is the smallest that does it.

    Each row stops by itself, when what is left of its residual, or the part of it that any image
    could explain, is rounding (or after 500 steps, or ``2 min(m, d) + 16``), and goes on as if the
    others were not there.

    Parameters
    ----------
    op : Operator
        Bound; ``linear`` and ``adjoint`` are used, in the precision that ``op`` computes in.
    y : Tensor, shape (n, m)
        Measurements; what is not observed may be NaN.
    observed : Tensor of bool, shape (n, m) or one that broadcasts to it, or None
        Which entries count; None: all that the operator measures.

    Attributes
    ----------
    n_steps : Tensor of int, shape (n,)
        Steps that each row took in the latest projection.
    """

    def __init__(self, op, y, observed=None):
        self._op, self._observed = op, observed
        with torch.inference_mode(False), torch.no_grad():
            # mps has no float64
            self._dtype = torch.float32 if y.device.type == "mps" else torch.float64
            self._zero = torch.zeros((), dtype=self._dtype, device=y.device)
            y = y.detach().to(self._dtype)
            origin = op._origin(y)
            self._y = self._mask(y if origin is None else y - origin)
        eps = max(torch.finfo(self._dtype).eps, torch.finfo(op.precision_).eps)
        self._tol = 64 * eps
        self._max_steps = min(_MAX_STEPS, 2 * min(op.n_measurements_, op.n_features_in_) + 16)
        self.n_steps = torch.zeros(len(y), dtype=torch.long, device=y.device)

    def _mask(self, values, rows=None):
        if self._observed is None:
            return values
        observed = self._observed.expand(len(self._y) if rows is not None else len(values), -1)
        observed = observed if rows is None else observed[rows]
        return torch.where(observed, values, self._zero)

    def _product(self, product, values, rows=None):
        n = self._op.__dict__.get("_n_given")
        if n is None:
            return padded(product, values)
        if len(values) == n:
            return product(values)
        # An operator that was given the parameters of its rows takes all of them.
        full = values.new_zeros(n, values.shape[1])
        full[rows] = values
        return product(full)[rows]

    def __call__(self, x):
        return _Projection.apply(x, self, True)

    def null(self, v):
        return _Projection.apply(v, self, False)

    def _correct(self, x, measured):
        self._op._check(x)
        check_same_rows(x, self._y)
        out = x.detach().to(self._dtype)
        if len(out) == 0:
            return x.clone()
        target = self._y if measured else torch.zeros_like(self._y)
        self.n_steps.zero_()
        # The second time removes what rounding left of the first.
        for _ in range(2):
            product = self._mask(self._product(self._op.linear, out))
            residual = target - product
            size = target.norm(dim=1) + product.norm(dim=1)
            out = out + self._solve(residual, self._tol * size)
        return out.to(x.dtype)

    def _solve(self, residual, rounding):
        """The smallest u that minimises ``||A u - residual||``, row by row."""
        n, d = len(residual), self._op.n_features_in_
        s, g = residual, self._product(self._op.adjoint, residual)
        p, gamma = g, g.square().sum(1)
        # Numbers that overflowed have no solution, and must not pass for solved.
        u = torch.where(gamma.isfinite()[:, None], residual.new_zeros(n, d), torch.nan)
        solution = u.clone()
        # How A^T s compares with s if nothing of s can be explained: the norm of A, as far as the
        # first products tell. It only has to be right to a factor.
        scale = torch.zeros_like(gamma)
        rows = torch.arange(n, device=residual.device)
        for _ in range(self._max_steps):
            left = s.norm(dim=1)
            # (Written such that NaN stops.)
            going = (left > rounding) & (gamma.sqrt() > self._tol * scale * left)
            if not bool(going.all()):
                solution[rows[~going]] = u[~going]
                rows, rounding = rows[going], rounding[going]
                if len(rows) == 0:
                    return solution
                s, u, p, gamma, scale = (t[going] for t in (s, u, p, gamma, scale))
            q = self._mask(self._product(self._op.linear, p, rows), rows)
            step = q.square().sum(1)
            scale = torch.maximum(scale, (step / p.square().sum(1)).sqrt())
            # A direction that is not measured at all is no direction.
            alpha = torch.where(step > 0, gamma / step, 0.0)[:, None]
            u, s = u + alpha * p, s - alpha * q
            g = self._product(self._op.adjoint, s, rows)
            before, gamma = gamma, g.square().sum(1)
            p = g + (gamma / before)[:, None] * p
            self.n_steps[rows] += 1
        solution[rows] = u
        return solution


class _Projection(torch.autograd.Function):
    """A projection in autograd: its derivative is the projection of directions, its own adjoint."""

    @staticmethod
    def forward(x, projector, measured):
        return projector._correct(x, measured)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.projector = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return _Projection.apply(grad, ctx.projector, False), None, None


def power_norm(op):
    """Largest singular value of the linear part of an operator, in float64.

    Lanczos iterations, which are power iterations that forget nothing, on the smaller of ``A A^T``
    and ``A^T A``, to a relative 1e-6 or better; small operators (up to 64 pixels or measurements)
    exactly.

    Parameters
    ----------
    op : Operator
        Bound, linear or affine.

    Returns
    -------
    float
    """
    wide = op.n_measurements_ <= op.n_features_in_
    n = op.n_measurements_ if wide else op.n_features_in_
    first, second = (op.adjoint, op.linear) if wide else (op.linear, op.adjoint)
    with torch.inference_mode(False), torch.no_grad():
        if n <= _SMALL:
            rows = first(torch.eye(n, dtype=torch.float64))
            return float(torch.linalg.matrix_norm(rows, 2))

        def gram(vector):
            rows = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64)).reshape(1, n)
            return second(first(rows)).numpy().reshape(-1)

        # An explicit start: the default one is random.
        start = np.random.default_rng(0).standard_normal(n)
        if not gram(start).any():
            return 0.0
        product = LinearOperator((n, n), matvec=gram, dtype=np.float64)
        largest = eigsh(product, k=1, v0=start, tol=1e-6, return_eigenvectors=False)[0]
    return math.sqrt(max(float(largest), 0.0))
