"""Gaussian noise: one standard deviation, one for each measurement, or a whole covariance."""

import numpy as np
import torch

from skaipo._padding import padded
from skaipo.noise._base import Likelihood, NoiseModel
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


# Whitening matrices of patterns of missing entries that are kept, in bytes.
_KEPT = 2**28


class CorrelatedGaussianNoise(Likelihood):
    """Gaussian noise with a whole covariance ``C``: ``nll = r^T C^-1 r / 2`` with ``r = y - f(x)``.

    In nats, without the constant ``(m log(2 pi) + log det C) / 2``. ``C^-1`` is applied through the
    inverse of its Cholesky factor. Where measurements are missing it is the marginal of those that
    are there: the part of ``C`` that belongs to them is factorised by itself, once for each pattern
    of missing entries.

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

    def _whitener(self, seen, like):
        """``W`` with ``W^T W`` the inverse covariance of the entries of a mask (None: all)."""
        matrix, factor = self._matrix()
        # Where the covariance was replaced, _matrix has emptied it.
        cache = self._cache
        key = None if seen is None else seen.tobytes(), like.device, like.dtype
        if key not in cache:
            if seen is not None:
                factor = np.linalg.cholesky(matrix[np.ix_(seen, seen)])
            inverse = np.linalg.inv(factor) if len(factor) else factor
            with torch.inference_mode(False):
                whitener = torch.from_numpy(np.tril(inverse)).to(like.device, like.dtype)
            size = whitener.nbytes + sum(w.nbytes for w in cache.values() if torch.is_tensor(w))
            if seen is not None and size > _KEPT:
                return whitener
            cache[key] = whitener
        return cache[key]

    def _nll(self, prediction, y, observed):
        residual = y - prediction
        if observed is None or bool(observed.all()):
            return _half_square(residual, self._whitener(None, residual))
        patterns, group = torch.unique(
            observed.expand_as(residual), dim=0, return_inverse=True, sorted=True
        )
        rows, values = [], []
        for k, seen in enumerate(patterns):
            index = (group == k).nonzero().flatten()
            whitener = self._whitener(seen.cpu().numpy(), residual)
            rows.append(index)
            values.append(_half_square(residual[index][:, seen], whitener))
        return torch.cat(values)[torch.cat(rows).argsort()]

    def max_curvature(self):
        # (The marginals' are no larger.)
        return float(1 / np.linalg.eigvalsh(self.covariance_)[0])

    def gaussian_fit(self, y):
        """Independent noise in its stead: of the same conditional variances.

        ``y``, and the diagonal of ``C^-1``; see :meth:`NoiseModel.gaussian_fit`.
        """
        whitener = self._bound_to(y.shape[1])._whitener(None, y)
        return y, whitener.square().sum(0).expand_as(y)

    def _draw(self, clean, rng):
        return clean + rng.standard_normal(clean.shape) @ self._matrix()[1].T


def _half_square(residual, whitener):
    """``||W r||^2 / 2`` of each row, by itself."""
    return padded(lambda r: (r @ whitener.T).square().sum(1) / 2, residual)
