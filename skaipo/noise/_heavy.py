"""Noise with heavier tails than a Gaussian's: outliers, impulses, dead pixels."""

import numpy as np
import torch

from skaipo.noise._base import NoiseModel

__all__ = ["LaplaceNoise", "StudentTNoise"]


class LaplaceNoise(NoiseModel):
    """Laplace noise: ``nll = sum |y - f(x)| / scale``, in nats, without ``m log(2 scale)``.

    The absolute value has a kink at zero, at which many residuals of a MAP estimate come to lie
    and on which quasi-Newton methods stall. Within ``smoothing * scale`` of zero it is therefore
    replaced by a parabola that meets it with the same slope (Huber, 1964). The objective is then
    too small by at most ``smoothing / 2`` nats per measurement, and its minimiser has an exact
    objective within ``m * smoothing / 2`` nats of the least one.

    Parameters
    ----------
    scale : float or array-like of float, shape (m,)
        Mean absolute value of the noise, in the units of the measurements; its standard deviation
        is ``sqrt(2) * scale``.
    smoothing : float, default=0.001
        Half the width of the parabola, in scales. 0: none, the exact Laplace density.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: a parameter does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: scale is not positive and finite, or has another length than
        the measurements; smoothing is negative.

    References
    ----------
    Huber, P. J., "Robust estimation of a location parameter", Ann. Math. Statist. 35, 1964.

    Examples
    --------
    >>> import torch
    >>> from skaipo.noise import LaplaceNoise
    >>> LaplaceNoise(2.0, smoothing=0).nll(torch.zeros(1, 2), torch.tensor([[1.0, -5.0]]))
    tensor([3.])
    """

    def __init__(self, scale, smoothing=0.001):
        self.scale = scale
        self.smoothing = smoothing

    def _check(self):
        self._parameter("scale")
        self._parameter("smoothing")

    def _parameter(self, name):
        if name == "smoothing":
            return self._values(name, sign="non-negative", per_entry=False)
        return self._values(name)

    def _penalty(self, residual):
        size = (residual / self._tensor("scale", residual)).abs()
        width = float(self.smoothing)
        if width == 0:
            return size
        return torch.where(size < width, size.square() / (2 * width), size - width / 2)

    def max_curvature(self):
        width = float(self._parameter("smoothing"))
        return float(self._parameter("scale").min() ** -2 / width) if width > 0 else np.inf

    def typical_curvature(self):
        """Curvature of the Gaussian of the same variance, ``1 / (2 scale^2)``; the largest one."""
        return float(self._parameter("scale").min() ** -2 / 2)

    def gaussian_fit(self, y):
        """The Gaussian of the same variance, ``2 scale^2``.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        return y, (self._tensor("scale", y) ** -2 / 2).expand_as(y)

    def _draw(self, clean, rng):
        return clean + self._parameter("scale") * rng.laplace(size=clean.shape)


class StudentTNoise(NoiseModel):
    """Student's t: ``nll = (df + 1) / 2 * sum log(1 + r^2 / (df scale^2))``, ``r = y - f(x)``.

    In nats, without the density's constant. What lies far out hardly pulls at the image; the
    smaller ``df``, the less. It is not convex: where measurements contradict each other there may
    be several minima, and ``n_starts`` tells.

    Parameters
    ----------
    scale : float or array-like of float, shape (m,)
        In the units of the measurements: about the standard deviation of the good ones.
    df : float, default=2.0
        Degrees of freedom, > 0. 1 is Cauchy's distribution; a Gaussian is approached as it grows.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: a parameter does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: a parameter is not positive and finite, or scale has another
        length than the measurements.

    References
    ----------
    Lange, K. L., Little, R. J. A. and Taylor, J. M. G., "Robust statistical modeling using the t
    distribution", JASA 84, 1989.

    Examples
    --------
    >>> import torch
    >>> from skaipo.noise import StudentTNoise
    >>> StudentTNoise(1.0, df=1.0).nll(torch.zeros(1, 1), torch.tensor([[1.0]]))
    tensor([0.6931])
    """

    def __init__(self, scale, df=2.0):
        self.scale = scale
        self.df = df

    def _check(self):
        self._parameter("scale")
        self._parameter("df")

    def _parameter(self, name):
        return self._values(name, per_entry=name != "df")

    def _penalty(self, residual):
        df = float(self.df)
        t = residual / self._tensor("scale", residual)
        return (df + 1) / 2 * torch.log1p(t.square() / df)

    def max_curvature(self):
        df = float(self._parameter("df"))
        return float((df + 1) / df * self._parameter("scale").min() ** -2)

    def gaussian_fit(self, y):
        """The Gaussian of the same Fisher information, ``(df + 1) / ((df + 3) scale^2)``.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        df = float(self.df)
        return y, ((df + 1) / (df + 3) * self._tensor("scale", y) ** -2).expand_as(y)

    def _draw(self, clean, rng):
        noise = rng.standard_t(self._parameter("df"), size=clean.shape)
        return clean + self._parameter("scale") * noise
