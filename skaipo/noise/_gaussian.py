"""Gaussian noise: one standard deviation, one for each measurement, or a whole covariance."""

import math

import numpy as np
import torch

from skaipo._padding import padded
from skaipo.noise._base import Likelihood, NoiseModel, known_gradient
from skaipo.noise._estimate import estimate_sigma

__all__ = ["CorrelatedGaussianNoise", "GaussianNoise"]


class GaussianNoise(NoiseModel):
    """White Gaussian noise: ``nll = ||y - f(x)||^2 / (2 sigma^2)``, in nats.

    The constant ``m/2 log(2 pi) + sum(log sigma)`` is left out: it does not depend on x.

    Parameters
    ----------
    sigma : float, array-like of float, shape (m,), or "estimate"
        Standard deviation in the units of the measurements, one for all entries or one per entry.
        "estimate": one for all, estimated when the estimator's ``fit(Y)`` sees measurements, and
        kept as its ``noise_``. Where the operator is linear and measures more than there is to
        reconstruct, by the residual of the least-squares fit; otherwise, where the measurements
        are images, by their finest diagonal Haar wavelets: the median absolute value of either,
        over 0.6745 (Donoho and Johnstone, 1994). Details of the images pass for noise where there
        is little of it: ``docs/guide/noise.md`` has figures.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: sigma does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: sigma is not positive and finite, or has another length than
        the measurements; or it is still to be estimated.

    References
    ----------
    Donoho, D. L. and Johnstone, I. M., "Ideal spatial adaptation by wavelet shrinkage",
    Biometrika 81, 1994.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.noise import GaussianNoise
    >>> GaussianNoise(0.5).add_noise(np.zeros((2, 3))).shape
    (2, 3)
    """

    def __init__(self, sigma):
        self.sigma = sigma

    @property
    def is_estimated(self):
        """Whether sigma is left to :meth:`estimate`."""
        return isinstance(self.sigma, str) and self.sigma == "estimate"

    def estimate(self, y, op):
        """Estimate sigma from measurements, if that was asked for.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            NaN where nothing was measured.
        op : Operator
            Bound.

        Returns
        -------
        GaussianNoise
            With a number for its sigma.

        Raises
        ------
        ValueError
            If neither way of estimating is open; the message says why.
        """
        return GaussianNoise(estimate_sigma(y, op)) if self.is_estimated else self

    def _check(self):
        self._parameter("sigma")

    def _parameter(self, name):
        if self.is_estimated:
            raise ValueError(
                "GaussianNoise(sigma='estimate') has not been estimated yet: call the estimator's "
                "fit(Y) with measurements, or pass a number."
            )
        hint = " For noiseless measurements use a small sigma, or noise=None."
        return self._values(name, hint=hint)

    def _penalty(self, residual):
        return (residual / self._tensor("sigma", residual)).square() / 2

    def max_curvature(self):
        return float(self._parameter("sigma").min() ** -2)

    def _draw(self, clean, rng):
        return clean + self._parameter("sigma") * rng.standard_normal(clean.shape)


# Whitening matrices of patterns of missing entries: what is kept of them, and how many are worked
# on at once, in bytes.
_KEPT, _AT_ONCE = 2**28, 2**23
# Their sizes, and the rows that share one, go up to a multiple of this: what is computed for a row
# is then the same, whichever other patterns and rows there are (see skaipo._padding).
_STEP = 16


class CorrelatedGaussianNoise(Likelihood):
    """Gaussian noise with a whole covariance ``C``: ``nll = r^T C^-1 r / 2`` with ``r = y - f(x)``.

    In nats, without the constant ``(m log(2 pi) + log det C) / 2``. ``C^-1`` is applied through the
    inverse of its Cholesky factor. Where measurements are missing it is the marginal of those that
    are there: the part of ``C`` that belongs to them is factorised, once for each pattern of
    missing entries, many patterns at a time. (Up to 256 MB of factors are kept; others are made
    again.)

    Parameters
    ----------
    covariance : array-like of float, shape (m, m)
        Symmetric and positive definite, in the squared units of the measurements.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: the covariance does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: the covariance is not a finite, symmetric and positive
        definite matrix of the size of the measurements.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.noise import CorrelatedGaussianNoise
    >>> noise = CorrelatedGaussianNoise([[2.0, 1.0], [1.0, 2.0]])
    >>> noise.add_noise(np.zeros((3, 2))).shape
    (3, 2)
    """

    is_exact_fit = True

    def __init__(self, covariance):
        self.covariance = covariance

    def _matrix(self):
        """The covariance as a checked float64 array (m, m), and its Cholesky factor."""
        cache = self.__dict__.setdefault("_cache", {})
        if "matrix" not in cache or cache["matrix"][0] is not self.covariance:
            given = self.covariance
            array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
            array = np.asarray(array)
            if array.dtype.kind not in "iuf":
                raise TypeError(
                    f"CorrelatedGaussianNoise(covariance) must be an array of shape (m, m), got "
                    f"{type(given).__name__} {given!r:.60}."
                )
            m = self.__dict__.get("n_measurements_", len(array) if array.ndim else 0)
            if array.shape != (m, m):
                raise ValueError(
                    f"CorrelatedGaussianNoise(covariance) has shape {array.shape}, expected "
                    f"({m}, {m}) for {m} measurements. For independent noise use "
                    f"GaussianNoise(sigma)."
                )
            array = array.astype(np.float64)
            if not np.isfinite(array).all():
                raise ValueError("CorrelatedGaussianNoise(covariance) must be finite.")
            largest = np.abs(array - array.T).max(initial=0.0)
            if largest > 1e-8 * np.abs(array).max(initial=0.0):
                raise ValueError(
                    f"CorrelatedGaussianNoise(covariance) must be symmetric, but differs from its "
                    f"transpose by up to {largest:.3g}."
                )
            array = (array + array.T) / 2
            try:
                factor = np.linalg.cholesky(array)
            except np.linalg.LinAlgError:
                raise ValueError(
                    f"CorrelatedGaussianNoise(covariance) must be positive definite, but its least "
                    f"eigenvalue is {np.linalg.eigvalsh(array)[0]:.3g}. Add the variance of the "
                    f"noise that is independent to its diagonal."
                ) from None
            cache.clear()
            cache["matrix"] = given, array, factor
        return cache["matrix"][1:]

    @property
    def covariance_(self):
        """Ndarray of shape (m, m), float64: the covariance, checked."""
        return self._matrix()[0]

    def _check(self):
        self._matrix()

    def _whitener(self, like):
        """``W`` with ``W^T W`` the inverse covariance."""
        factor = self._matrix()[1]
        # Where the covariance was replaced, _matrix has emptied it.
        key = like.device, like.dtype
        if key not in self._cache:
            with torch.inference_mode(False):
                whitener = torch.from_numpy(np.tril(np.linalg.inv(factor)))
                self._cache[key] = _without_dust(whitener, like)
        return self._cache[key]

    def _whiteners(self, patterns, size, like):
        """``W`` (p, s, s) of the entries in patterns (p, m) of at most ``size`` observed ones."""
        self._matrix()
        # What is known of each pattern: the batch that it was made in, and its place there.
        known = self._cache.setdefault(("patterns", size, like.device, like.dtype), {})
        names = [np.packbits(pattern).tobytes() for pattern in patterns]
        found = dict(known)
        new = [k for k, name in enumerate(names) if name not in known]
        if new:
            made = self._make_whiteners(patterns[new], size, like)
            found |= {names[k]: (made, i) for i, k in enumerate(new)}
            kept = self._cache.get("kept", 0) + made.nbytes
            if kept <= _KEPT:
                self._cache["kept"] = kept
                known |= found
        batches, places = zip(*(found[name] for name in names), strict=True)
        first = places[0]
        together = all(batch is batches[0] for batch in batches)
        if together and places == tuple(range(first, first + len(places))):
            return batches[0][first : first + len(places)]
        return torch.stack([batch[i] for batch, i in zip(batches, places, strict=True)])

    def _make_whiteners(self, patterns, size, like):
        # mps has no float64
        device = "cpu" if like.device.type == "mps" else like.device
        with torch.inference_mode(False), torch.no_grad():
            columns = torch.from_numpy(_columns(patterns, size)).to(device)
            matrix = torch.from_numpy(self._matrix()[0]).to(device)
            # Beyond the observed entries an identity, which only ever meets zeros.
            matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
            part = matrix[columns[:, :, None], columns[:, None, :]]
            part.diagonal(dim1=1, dim2=2).add_(columns == len(matrix) - 1)
            eye = torch.eye(size, dtype=part.dtype, device=device).expand_as(part)
            factor = torch.linalg.cholesky(part)
            whiteners = torch.linalg.solve_triangular(factor, eye, upper=False)
            return _without_dust(whiteners, like)

    def _blocks(self, observed, like):
        """Rows of alike patterns of observed entries (n, m), as blocks of patterns to work on.

        Yields ``(rows, once, columns, whiteners)``: pattern i has ``rows[i]`` (g,), some of them
        repeatedly but ``once``, and its observed entries are ``columns[i]`` (s,).
        """
        observed = observed.cpu().numpy()
        _, which, counts = np.unique(
            np.packbits(observed, axis=1), axis=0, return_inverse=True, return_counts=True
        )
        order, ends = np.argsort(which.reshape(-1), kind="stable"), np.cumsum(counts)
        starts = ends - counts
        patterns = observed[order[starts]]
        sizes = _STEP * np.maximum(1, -(-patterns.sum(1) // _STEP))
        widths = np.maximum(_STEP, 2 ** np.ceil(np.log2(counts)).astype(int))
        for size, width in sorted(set(zip(sizes.tolist(), widths.tolist(), strict=True))):
            members = np.flatnonzero((sizes == size) & (widths == width))
            at_once = max(1, _AT_ONCE // (size**2 * like.element_size()))
            for part in np.split(members, range(at_once, len(members), at_once)):
                slot = np.arange(width)
                rows = order[np.minimum(starts[part, None] + slot, ends[part, None] - 1)]
                once = slot < counts[part, None]
                columns = _columns(patterns[part], size)
                tensors = (torch.from_numpy(t).to(like.device) for t in (rows, once, columns))
                yield *tensors, self._whiteners(patterns[part], size, like)

    def _nll(self, prediction, y, observed):
        residual = y - prediction
        if observed is None or bool(observed.all()):
            whitener = self._whitener(residual)
            return padded(lambda r: (r @ whitener.T).square().sum(1) / 2, residual)
        return self._marginal(residual, observed.expand_as(residual))

    def _marginal(self, residual, observed):
        """``|W r|^2 / 2`` (n,) of the observed entries of each row ``r``."""
        with torch.no_grad():
            value = torch.zeros_like(residual[:, 0])
            # The last column stands in for what some patterns have less than others.
            filled = torch.nn.functional.pad(residual, (0, 1))
            gradient = torch.zeros_like(filled)
            for rows, once, columns, whiteners in self._blocks(observed, residual):
                white = torch.bmm(filled[rows[:, :, None], columns[:, None, :]], whiteners.mT)
                value[rows[once]] = white.square().sum(2)[once] / 2
                if residual.requires_grad:
                    where = rows[once][:, None], columns[once.nonzero()[:, 0]]
                    gradient[where] = torch.bmm(white, whiteners)[once]
        return known_gradient(residual, value, gradient[:, :-1])

    def max_curvature(self):
        # (The marginals' are no larger.)
        return float(1 / np.linalg.eigvalsh(self.covariance_)[0])

    def gaussian_fit(self, y):
        """Independent noise in its stead: of the same conditional variances.

        ``y``, and the diagonal of ``C^-1``; see :meth:`NoiseModel.gaussian_fit`.
        """
        whitener = self._bound_to(y.shape[1])._whitener(y)
        return y, whitener.square().sum(0).expand_as(y)

    def _draw(self, clean, rng):
        return clean + rng.standard_normal(clean.shape) @ self._matrix()[1].T


def _without_dust(whiteners, like):
    """In the dtype and on the device of ``like``, with zeros where nothing is but underflow.

    Far from its diagonal a whitening matrix often decays to numbers on which processors are ten
    times slower.
    """
    dust = math.sqrt(torch.finfo(like.dtype).tiny) * float(whiteners.abs().max())
    return whiteners.masked_fill(whiteners.abs() < dust, 0.0).to(like.device, like.dtype)


def _columns(patterns, size):
    """Indices (p, size) of the entries observed in patterns (p, m), filled up with ``m``."""
    order = np.argsort(~patterns, axis=1, kind="stable")
    order[np.take_along_axis(~patterns, order, axis=1)] = patterns.shape[1]
    filled = np.full((len(patterns), size), patterns.shape[1])
    width = min(size, patterns.shape[1])
    filled[:, :width] = order[:, :width]
    return filled
