"""Projection and norm of a linear operator that is known by its products alone, no matrix."""

import math
import warnings

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.exceptions import ConvergenceWarning

from skaipo._padding import padded
from skaipo._validation import named_rows
from skaipo.operators._projector import AffineProjector, check_same_rows

__all__ = ["ConjugateGradientProjector", "power_norm"]

# Conjugate gradients find the k-th distinct singular value in about the k-th step.
_MAX_STEPS = 500
# Singular values below this much of the largest count as zero: of them float64 knows five digits.
_CUTOFF = 1e-10
# What is left of a residual, relative to the measurements, that is worth a warning.
_NOTICED = 1e-6
# Gradients that are kept per row, in numbers (2 MiB), for later ones to be orthogonal to.
_KEPT = 2**18
# Up to this size all singular values come from the matrix, by way of unit vectors.
_SMALL = 64


class ConjugateGradientProjector(AffineProjector):
    """``x + A^+ (y - f(x))`` over the observed entries, by conjugate gradients in float64.

    The iteration is CGLS (Hestenes and Stiefel, 1952): conjugate gradients for ``A A^T`` written
    such that they also converge, to the least-squares solution, where the rows of A are dependent
    and the measurements contradict each other. From zero the correction stays in the range of A^T:
    it is the smallest that does it.

    Each row stops by itself, when what is left of its residual, or the part of it that any image
    could explain, is rounding, and goes on as if the others were not there. Singular values below
    1e-10 of the largest (more where ``op`` computes in float32) count as zero. Gradients are kept
    orthogonal to the earlier ones, as many as fit into 2 MiB for each row: rounding would otherwise
    make ill-conditioned problems take many more steps than there are dimensions.

    Where 500 steps (or ``2 min(m, d) + 16``) are not enough, and more than a millionth of the
    measurements is left, a ``ConvergenceWarning`` names the rows, once.

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
    converged : Tensor of bool, shape (n,)
        Rows of the latest projection that are what they should be, to a millionth.
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
        self._tol, self._cutoff = 64 * eps, max(_CUTOFF, 1024 * eps)
        self._noticed = max(_NOTICED, 16 * self._tol)
        self._max_steps = min(_MAX_STEPS, 2 * min(op.n_measurements_, op.n_features_in_) + 16)
        self.n_steps = torch.zeros(len(y), dtype=torch.long, device=y.device)
        self.converged = torch.ones(len(y), dtype=torch.bool, device=y.device)
        self._left = torch.zeros(len(y), device=y.device)
        self._known_scale = None

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
        return self._told(_Projection.apply(x, self, True))

    def null(self, v):
        return self._told(_Projection.apply(v, self, False))

    def _correct(self, x, measured):
        self._op._check(x)
        check_same_rows(x, self._y)
        out = x.detach().to(self._dtype)
        if len(out) == 0:
            return x.clone()
        target = self._y if measured else torch.zeros_like(self._y)
        self.n_steps.zero_()
        size = torch.zeros_like(target[:, 0])
        # The second time removes what rounding left of the first.
        for _ in range(2):
            product = self._mask(self._product(self._op.linear, out))
            residual = target - product
            # (That of the first time, if it was larger: all of the second may be rounding.)
            size = torch.maximum(size, target.norm(dim=1) + product.norm(dim=1))
            noise = self._tol * (size + self._scale() * out.norm(dim=1))
            step, left = self._solve(residual, self._tol * size, noise)
            out = out + step
        self._left = left / size
        self.converged = ~(self._left > self._noticed) & out.isfinite().all(1)
        return out.to(x.dtype)

    def _told(self, projected):
        """What was projected, after a warning that names the rows that ran out of steps."""
        rows = (self._left > self._noticed).nonzero().flatten().tolist()
        if self.quiet or not rows:
            return projected
        self.quiet = True
        warnings.warn(
            f"The projection onto the images that explain the measurements did not converge in "
            f"{self._max_steps} steps of conjugate gradients for {len(rows)} of "
            f"{len(self._left)} rows ({named_rows(rows)}): of the measurements up to "
            f"{float(self._left[rows].max()):.1e} is left. {type(self._op).__name__} is too "
            f"ill-conditioned to be solved by products alone: use its matrix, MatrixOperator(A), "
            f"write a projector, or leave out what it hardly measures.",
            ConvergenceWarning,
            stacklevel=3,
        )
        return projected

    def _scale(self):
        """About the norm of A, for each row: what ``A^T s`` and ``A p`` are small against.

        By two power iterations. (The products of a solve do not tell it: those of a residual that
        is explained but for weak directions are all small.)
        """
        if self._known_scale is None:
            d, n = self._op.n_features_in_, len(self._y)
            v = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            v = v.to(self._y).expand(n, d)
            for _ in range(2):
                v = v / v.norm(dim=1, keepdim=True)
                measured = self._mask(self._product(self._op.linear, v))
                size = measured.norm(dim=1)
                v = self._product(self._op.adjoint, measured / size[:, None])
            # (No number where nothing is measured.)
            size = torch.maximum(size, v.norm(dim=1))
            self._known_scale = torch.where(size.isfinite(), size, 0.0)
        return self._known_scale

    def _solve(self, residual, rounding, noise):
        """The smallest u that minimises ``||A u - residual||``, row by row.

        A row is done when no more than ``rounding`` (n,) is left of it, and is left alone where its
        residual seems to hold nothing to be explained but ``noise`` (n,).

        Also returns what is left of the residual where that took more steps than there are, else
        zero.
        """
        n, d = len(residual), self._op.n_features_in_
        s, g = residual, self._product(self._op.adjoint, residual)
        p, gamma = g, g.square().sum(1)
        # Numbers that overflowed have no solution, and must not pass for solved.
        u = torch.where(gamma.isfinite()[:, None], residual.new_zeros(n, d), torch.nan)
        solution, unsolved, scale = u.clone(), torch.zeros_like(gamma), self._scale()
        rows = torch.arange(n, device=residual.device)
        least = scale * torch.minimum(noise, self._cutoff * residual.norm(dim=1))
        rounding = torch.where(gamma.sqrt() <= least, torch.inf, rounding)
        earlier = _Earlier(n, d, min(self._max_steps, _KEPT // d), residual)
        for _ in range(self._max_steps):
            left = s.norm(dim=1)
            # (Written such that NaN stops.)
            going = (left > rounding) & (gamma.sqrt() > self._tol * scale * left)
            if not bool(going.all()):
                solution[rows[~going]] = u[~going]
                rows, rounding, left = rows[going], rounding[going], left[going]
                if len(rows) == 0:
                    return solution, unsolved
                s, g, u, p, gamma, scale = (t[going] for t in (s, g, u, p, gamma, scale))
                earlier.keep(going)
            q = self._mask(self._product(self._op.linear, p, rows), rows)
            step = q.square().sum(1)
            measured = (step / p.square().sum(1)).sqrt()
            scale = torch.maximum(scale, measured)
            # A direction that is hardly measured is none, and the end if little else is left.
            none = measured <= self._cutoff * scale
            none &= gamma.sqrt() <= self._noticed * scale * left
            none |= step == 0
            rounding = torch.where(none, torch.inf, rounding)
            alpha = torch.where(none, 0.0, gamma / step)[:, None]
            u, s = u + alpha * p, s - alpha * q
            earlier.add(g / gamma.sqrt()[:, None])
            g = earlier.remove_from(self._product(self._op.adjoint, s, rows))
            before, gamma = gamma, g.square().sum(1)
            p = g + (gamma / before)[:, None] * p
            self.n_steps[rows] += 1
        left = s.norm(dim=1)
        going = (left > rounding) & (gamma.sqrt() > self._tol * scale * left)
        solution[rows], unsolved[rows] = u, torch.where(going, left, 0.0)
        return solution, unsolved


class _Earlier:
    """Unit vectors of each row, (n, d) at a time, which later vectors are made orthogonal to.

    Only the first ``most`` are kept: the operator's largest singular values are found first, and it
    is they that come back by rounding.
    """

    def __init__(self, n, d, most, like):
        # (Memory that nobody writes to costs nothing.)
        self._count, self._vectors = 0, like.new_empty(n, most, d)

    def keep(self, rows):
        known = self._vectors[:, : self._count][rows]
        self._vectors = known.new_empty(len(known), *self._vectors.shape[1:])
        self._vectors[:, : self._count] = known

    def add(self, vectors):
        if self._count < self._vectors.shape[1]:
            self._vectors[:, self._count] = vectors
            self._count += 1

    def remove_from(self, g):
        """Rows ``g`` (n, d), less what they have of the earlier vectors."""
        known = self._vectors[:, : self._count]
        rest = self._once(g, known)
        # Where little was left of a row, rounding is much of it.
        again = rest.square().sum(1) < 0.5 * g.square().sum(1)
        if bool(again.any()):
            rest[again] = self._once(rest[again], known[again])
        return rest

    @staticmethod
    def _once(g, known):
        return g - torch.bmm(torch.bmm(g[:, None], known.mT), known)[:, 0]


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
