"""A Gaussian that stands in for the prior: a start, and a metric for the solver's steps.

No prior of natural data is Gaussian, but two moments know the scale of every direction, and
together with the operator and the noise they give the curvature of the MAP objective up to what
the flow adds. All of it is linear algebra: the flow is sampled once per prior.
"""

import math
from collections import OrderedDict

import numpy as np
import torch

from skaipo._fingerprint import fingerprint
from skaipo._padding import padded
from skaipo._validation import to_tensor
from skaipo.flows._base import without_outliers
from skaipo.operators._nonlinear import Linearisation

__all__ = ["GaussianMetric", "GaussianSurrogate", "gaussian_start", "surrogate_of"]

# Digest of the flow -> surrogate: clones and unpickled copies of a prior share it.
_CACHE = OrderedDict()
_CACHE_SIZE = 8
_N_SAMPLES = 1024
# Up to this dimension the covariance is kept whole.
_WHOLE = 256
# The surrogate is wider than the prior around any one image: more weight than lambda often fits
# better.
_FACTORS = (1.0, 3.0, 10.0)
_CG_STEPS = 32


def _cosines(n):
    """Orthonormal DCT-II matrix (n, n)."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


class GaussianSurrogate:
    """Mean and precision of a distribution, from its first two moments.

    The principal components ``U`` have their variances ``e``; what is left has variances ``p``
    in a fixed orthonormal basis ``F``: the cosine transform of images, whose pixels correlate with
    their neighbours, and the canonical basis of vectors. The precision is
    ``U diag(1/e) U^T + Q F^T diag(1/p) F Q`` with ``Q = I - U U^T``.

    Attributes
    ----------
    mean : torch.Tensor of shape (d,)
    basis : torch.Tensor of shape (d, k)
        ``U``.
    variances : torch.Tensor of shape (k,)
        ``e``.
    residual : torch.Tensor of shape (d,), or None
        ``p``; None if the components are all there is.
    axes : list of torch.Tensor
        One orthonormal matrix per axis of an image, the first of them to colours that do not
        correlate; ``F`` is their Kronecker product. Empty for vectors: the canonical basis.
    """

    def __init__(self, mean, basis, variances, residual, axes):
        self.mean = mean
        self.basis = basis
        self.variances = variances
        self.residual = residual
        self.axes = axes

    def to(self, like):
        """A copy of the dtype and device of a tensor."""
        residual = None if self.residual is None else self.residual.to(like)
        return GaussianSurrogate(
            self.mean.to(like),
            self.basis.to(like),
            self.variances.to(like),
            residual,
            [axis.to(like) for axis in self.axes],
        )

    @classmethod
    def from_samples(cls, x, event_shape):
        """Moments of samples (n, d), but for those that are not finite or far outside the rest."""
        x = x[x.isfinite().all(1)].double()
        if len(x) < 4:
            # Of a flow that gives nothing but overflow nothing is known: white.
            d = x.shape[1]
            one = torch.ones(d, dtype=x.dtype)
            return cls(0 * one, torch.eye(d, 1, dtype=x.dtype), one[:1], one, [])
        x = without_outliers(x)
        n, d = x.shape
        is_image = len(event_shape) == 3 and d > _WHOLE
        k = d if d <= min(_WHOLE, n // 4) else min(32 if is_image else _WHOLE, n // 4)
        mean = x.mean(0)
        centred = x - mean
        _, singular, components = torch.linalg.svd(centred, full_matrices=False)
        variances = singular.square()[:k] / n
        floor = max(1e-9 * float(centred.square().mean()), torch.finfo(torch.float32).tiny)
        basis = components[:k].T.contiguous()
        surrogate = cls(mean, basis, variances.clamp_min(floor), None, [])
        rest = centred - (centred @ basis) @ basis.T if k < d else centred
        if len(event_shape) == 3:
            colours = rest.reshape(n, *event_shape).transpose(0, 1).flatten(1)
            _, rotation = torch.linalg.eigh(colours @ colours.T)
            _, height, width = event_shape
            surrogate.axes = [rotation.T.contiguous(), _cosines(height), _cosines(width)]
        if k < d:
            spread = surrogate.analyse(rest).square().mean(0) * (d / (d - k))
            surrogate.residual = spread.clamp_min(floor)
        return surrogate

    def analyse(self, v):
        """``F v`` for rows (n, d)."""
        return self._transform(v, self.axes)

    def synthesise(self, c):
        """``F^T c`` for rows (n, d)."""
        return self._transform(c, [axis.T for axis in self.axes])

    def split(self, v):
        """Coefficients of rows (n, d) along the components, and in ``F`` of what is left."""
        along = v @ self.basis
        if self.residual is None:
            return along, None
        return along, self.analyse(v - along @ self.basis.T)

    def join(self, along, across):
        """Rows (n, d) from coefficients along the components, and in ``F`` apart from them."""
        if across is None:
            return along @ self.basis.T
        across = self.synthesise(across)
        return across + (along - across @ self.basis) @ self.basis.T

    def to_colours(self, v):
        """Images (n, d) in the colours, in place of channels, that do not correlate."""
        return self._transform(v, self.axes[:1])

    def to_channels(self, v):
        """The inverse of :meth:`to_colours`."""
        return self._transform(v, [axis.T for axis in self.axes[:1]])

    def precise(self, v):
        """``S v`` for rows (n, d), with the precision ``S``."""
        return self._spectral(v, 1 / self.variances, lambda p: 1 / p)

    def cover(self, v):
        """``S^-1 v`` for rows (n, d), with the covariance ``S^-1``."""
        return self._spectral(v, self.variances, lambda p: p)

    def _spectral(self, v, inner, outer):
        along, across = self.split(v)
        return self.join(along * inner, None if across is None else across * outer(self.residual))

    def quadratic(self, v):
        """``v^T S v`` for rows (n, d)."""
        along, across = self.split(v)
        size = (along.square() / self.variances).sum(1)
        return size if across is None else size + (across.square() / self.residual).sum(1)

    def sample(self, n, seed=0):
        """Draw images (n, d)."""
        generator = torch.Generator().manual_seed(seed)
        k, d = self.basis.shape[1], len(self.mean)
        noise = torch.randn(n, k + d, generator=generator, dtype=torch.float64).to(self.mean)
        across = None if self.residual is None else noise[:, k:] * self.residual.sqrt()
        return self.mean + self.join(noise[:, :k] * self.variances.sqrt(), across)

    @staticmethod
    def _transform(v, axes):
        if not axes:
            return v
        n, d = v.shape
        colours, *lengths = axes
        if lengths:
            rows, columns = lengths
            v = v.reshape(n * len(colours), len(rows), len(columns))
            v = torch.matmul(torch.matmul(rows, v), columns.T)
        return torch.matmul(colours, v.reshape(n, len(colours), -1)).reshape(n, d)


def surrogate_of(flow):
    """The surrogate of a flow, from its samples or clean data; cached by what the flow holds."""
    try:
        key = fingerprint(flow)
    except Exception:  # Pickling runs the objects' own code; a flow that does not pickle is itself.
        key = flow, fingerprint(dict(flow.state_dict()))
    if key not in _CACHE:
        x = flow.typical(_N_SAMPLES).cpu()
        _CACHE[key] = GaussianSurrogate.from_samples(x, flow.event_shape)
        while len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def gaussian_start(objective, lam, max_evals=None):
    """Start from what the solution would be if the prior were Gaussian.

    Of some multiples of ``lam`` each row takes the one whose image has the lowest objective, at one
    evaluation for each.

    Parameters
    ----------
    objective : MAPObjective
        With a metric.
    lam : torch.Tensor of shape (n,)
        Target.
    max_evals : int, default=None
        Try no more multiples than that, but the first in any case.

    Returns
    -------
    u : torch.Tensor of shape (n, d)
        In the objective's space.
    """
    metric = objective.in_space("image").metric
    factors = _FACTORS if max_evals is None else _FACTORS[: max(1, max_evals)]
    return lowest(objective, lam, (metric.start(factor * lam) for factor in factors))


def lowest(objective, lam, candidates):
    """Of images (n, d) each row's of lowest objective, in the objective's space."""
    image = objective.in_space("image")
    best = value = None
    for x in candidates:
        evaluation = image.evaluate(x)
        new = torch.where(evaluation.finite(), evaluation.value(lam), torch.inf)
        best, value = (x, new) if best is None else better(x, new, best, value)
    return objective.variable(best)


def better(x, new, best, value):
    """Row by row whichever of two points has the lower value; the second, if they are equal."""
    lower = new < value
    return torch.where(lower[:, None], x, best), torch.where(lower, new, value)


def conjugate_gradients(product, precondition, x, residual, steps, least):
    """Solve ``H (result - x) = residual`` row by row, with products ``H v`` alone.

    Preconditioned, algorithm 5.3 of Nocedal & Wright (2006). A row stands still once the
    preconditioned square of its residual is at most ``least`` (n,), as a function of the first.
    """
    p = z = precondition(residual)
    size = (residual * z).sum(1)
    least = least(size)
    for _ in range(steps):
        if not bool((size > least).any()):
            break
        hp = product(p)
        curvature = (p * hp).sum(1)
        alpha = torch.where((curvature > 0) & (size > least), size / curvature, 0.0)[:, None]
        x = torch.addcmul(x, alpha, p)
        residual = torch.addcmul(residual, -alpha, hp)
        z = precondition(residual)
        new = (residual * z).sum(1)
        p = torch.addcmul(z, torch.where(size > 0, new / size, 0.0)[:, None], p)
        size = new
    return x


class GaussianMetric:
    """Curvature of the MAP objective in image space, if the prior were its Gaussian surrogate.

    ``H(lam) = A^T W A + lam S`` with the operator ``A``, the noise's curvature ``W`` (zero where
    nothing was measured) and the surrogate's precision ``S``.

    An operator that is not linear, or differs by row, has its linearisation for ``A``.

    Parameters
    ----------
    surrogate : GaussianSurrogate
    objective : MAPObjective
    at : torch.Tensor of shape (n, d), default=None
        Images at which the operator is linearised; None: the surrogate's mean.
    """

    def __init__(self, surrogate, objective, at=None):
        # What the likelihood looks like to f(x), not what was measured: counts have other units.
        y, weight = objective.noise.gaussian_fit(objective.y)
        self.surrogate = surrogate.to(y)
        self.y = y
        weight = torch.where(objective.observed, weight, 0.0)
        basis, spread = self.surrogate.basis, self.surrogate.variances.sqrt()
        # Fixed random signs, for Hutchinson's estimator of a diagonal.
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (16, basis.shape[0]))
        signs = to_tensor(signs).to(y)
        self._shared, self._at = None, None
        if objective.op.is_linear and objective.params is None:
            self._shared = objective.op
            # Rows with the same weights share the small matrices.
            self.weight, self.group = torch.unique(weight, dim=0, return_inverse=True)
            columns = self._shared.linear(basis.T)
            small = torch.stack([(columns * w) @ columns.T for w in self.weight])
            size = self._shared.linear(signs).square().mean(0)
        else:
            self._objective = objective
            self._at = self.surrogate.mean.expand(len(y), -1) if at is None else at.detach()
            self.weight, self.group = weight, torch.arange(len(y), device=y.device)

            def images(group):
                """What each row makes of the components and of the signs: (n, k + 16, m)."""
                affine = self._map(group)
                v = torch.cat((basis.T, signs))
                return torch.stack([affine.linear(one.expand(len(group), -1)) for one in v], 1)

            columns, size = padded(images, self.group).split((basis.shape[1], len(signs)), 1)
            small = torch.bmm(columns * weight[:, None], columns.mT)
            size = size.square().mean(1)
        small = spread[:, None] * small * spread
        # A row whose numbers overflow does without: eigh would refuse the whole batch.
        usable = small.isfinite().all(2).all(1)
        small = torch.where(usable[:, None, None], small, 0.0)
        curvature, rotation = torch.linalg.eigh(small.double())
        self.curvature = curvature.clamp_min(0).to(y)
        self.rotation = rotation.to(y)
        self.spread = spread
        # Mean of the diagonal of A^T W A.
        level = (self.weight * size).sum(1) / basis.shape[0]
        self.level = torch.where(level.isfinite(), level, 0.0)

    def _map(self, group):
        """The operator, as an affine one, for the rows of some groups."""
        if self._shared is not None:
            return self._shared
        return Linearisation(self._objective.operator(group), self._at[group])

    def _scales(self, lam, group):
        """Standard deviations of the Gaussian posterior along its coordinates."""
        s = self.surrogate
        # Without the prior there is no step along what was not measured, but for rounding.
        curvature = self.curvature[group]
        eps = curvature.shape[1] * torch.finfo(curvature.dtype).eps
        least = torch.where(lam > 0, 0.0, eps * curvature.amax(1))[:, None]
        inner = _inverse_root(curvature + lam[:, None], least)
        if s.residual is None:
            return inner, None
        return inner, _inverse_root(self.level[group, None] + lam[:, None] / s.residual, 0.0)

    def _scaled(self, v, lam, group, before, after, times=1):
        """``v`` divided by the root of the curvature, once or twice, mode by mode.

        The modes are those of the Gaussian posterior: the components, scaled by ``before`` and
        rotated, and rotated back and scaled by ``after``; and apart from them those of the basis
        of what is left, as if ``A^T W A`` were even there.
        """
        s, rotation = self.surrogate, self.rotation[group]
        inner, outer = self._scales(lam, group)
        along, across = s.split(v)
        along = torch.bmm((along * before)[:, None], rotation)[:, 0]
        for _ in range(times):
            along = along * inner
            across = None if across is None else across * outer
        along = torch.bmm(rotation, along[:, :, None])[:, :, 0] * after
        return s.join(along, across)

    def _block(self, g, lam, group):
        """Inverse of ``H``, but for what mixes the components with the rest, or is uneven there."""
        return self._scaled(g, lam, group, self.spread, self.spread, times=2)

    def _whiten(self, g, lam, group):
        return self.surrogate.to_colours(self._scaled(g, lam, group, self.spread, 1.0))

    def _colour(self, c, lam, group):
        return self._scaled(self.surrogate.to_channels(c), lam, group, 1.0, self.spread)

    def _apply(self, v, lam, group, affine=None):
        """``H(lam) v``."""
        affine = self._map(group) if affine is None else affine
        prior = self.surrogate.precise(v)
        return affine.adjoint(affine.linear(v) * self.weight[group]) + lam[:, None] * prior

    def solve(self, g, lam, rows):
        """Approximate ``H(lam)^-1 g`` for gradients (k, d) of some rows, each by itself."""
        return padded(self._block, g, lam, self.group[rows])

    def whiten(self, g, lam, rows):
        """Gradients (k, d) of some rows with respect to coordinates in which ``H`` is about 1.

        Of all such coordinates, which differ by a rotation, these are those nearest to pixels (as
        in "zero-phase" whitening), in colours that do not correlate. What is scaled coordinate by
        coordinate, as by Adam, is then scaled place by place: where the prior is how stiff, at an
        edge or in a flat part, is what the Gaussian does not know.
        """
        return padded(self._whiten, g, lam, self.group[rows])

    def colour(self, c, lam, rows):
        """Steps (k, d) in image space from steps (k, d) in the coordinates of :meth:`whiten`."""
        return padded(self._colour, c, lam, self.group[rows])

    def start(self, lam):
        """The minimiser if the prior were Gaussian, (n, d): for that noise, the Wiener filter.

        By conjugate gradients, preconditioned by :meth:`solve`, each row by itself.
        """
        return padded(self._conjugate_gradients, self.y, lam, self.group)

    def _conjugate_gradients(self, y, lam, group):
        weight, x = self.weight[group], self.surrogate.mean.expand(len(y), -1)
        affine = self._map(group)
        misfit = torch.where(weight > 0, y - affine.forward(x), 0.0)
        # Without the prior H may be singular, and what is left below this is rounding that grows.
        eps = torch.finfo(y.dtype).eps
        return conjugate_gradients(
            lambda v: self._apply(v, lam, group, affine),
            lambda r: self._block(r, lam, group),
            x,
            affine.adjoint(weight * misfit),
            _CG_STEPS,
            lambda size: torch.where(lam > 0, 0.0, eps**2 * size),
        )

    def prior_ratio(self, step, change):
        """Curvature of the prior over the surrogate's along steps (k, d), ``s^T y / s^T S s``.

        ``change`` is that of the prior's gradient. NaN where the prior is not convex.
        """
        curvature = (step * change).sum(1)
        ratio = curvature / padded(self.surrogate.quadratic, step)
        return torch.where(curvature > 0, ratio, torch.nan)


def _inverse_root(curvature, least):
    """``curvature ** -0.5``; zero where it is not above the least that counts."""
    return torch.where(curvature > least, curvature.rsqrt(), 0.0)
