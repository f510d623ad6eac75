"""Measurements that saturate, or are rounded to levels."""

import math

import numpy as np
import torch

from skaipo.noise._base import Likelihood, refuse_rows

__all__ = ["CensoredGaussianNoise", "QuantizationNoise"]

# Widths of a level in standard deviations, below which the difference of two distribution
# functions is left to its Taylor series: there it would be lost in rounding.
_NARROW = 0.05


class _Saturating(Likelihood):
    """Gaussian noise and a range with ends, ``low`` and ``high``, beyond which nothing is read."""

    is_chi_square = False

    def _check_ends(self):
        name = type(self).__name__
        for end in ("low", "high"):
            if getattr(self, end) is not None:
                self._values(end, sign="any", per_entry=False)
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"{name} needs low < high, got {self.low} and {self.high}.")

    def _beyond(self, y, slack):
        """What lies beyond the ends by more than a function of the end allows, (n, m)."""
        bad = torch.zeros_like(y, dtype=torch.bool)
        if self.low is not None:
            bad |= y < self.low - slack(self.low)
        if self.high is not None:
            bad |= y > self.high + slack(self.high)
        return bad

    def max_curvature(self):
        return float(self._parameter("sigma").min() ** -2)


def _rounding(end):
    """What float32 makes of an end is the end."""
    return 1e-6 * abs(end)


class CensoredGaussianNoise(_Saturating):
    """Gaussian noise, then saturation: what is beyond the ends of the range is read as the ends.

    ``nll = (y - f)^2 / (2 sigma^2)`` inside the range, as for :class:`GaussianNoise`; at the upper
    end ``-log Phi((f - high) / sigma)``, the probability of being beyond it, and likewise at the
    lower one (Tobin, 1958). In nats, smooth and convex.

    Parameters
    ----------
    sigma : float or array-like of float, shape (m,)
        Standard deviation of the noise before the saturation.
    low, high : float or None, default=None
        Ends of the range; None: none. At least one is needed.

    Raises
    ------
    TypeError, ValueError
        By ``bind`` and ``add_noise``: sigma is not positive and finite or has another length than
        the measurements, no end is given, or ``low >= high``. By the estimators: measurements
        beyond the ends.

    References
    ----------
    Tobin, J., "Estimation of relationships for limited dependent variables", Econometrica 26, 1958.

    Examples
    --------
    >>> import torch
    >>> from skaipo.noise import CensoredGaussianNoise
    >>> noise = CensoredGaussianNoise(1.0, high=2.0)
    >>> noise.nll(torch.tensor([[2.0]]), torch.tensor([[2.0]]))  # -log(1/2)
    tensor([0.6931])
    """

    is_exact_fit = False

    def __init__(self, sigma, low=None, high=None):
        self.sigma = sigma
        self.low = low
        self.high = high

    def _check(self):
        self._parameter("sigma")
        if self.low is None and self.high is None:
            raise ValueError(
                "CensoredGaussianNoise needs low, high or both; without ends use GaussianNoise."
            )
        self._check_ends()

    def _ends(self, y):
        nowhere = torch.zeros_like(y, dtype=torch.bool)
        bottom = nowhere if self.low is None else y <= self.low + _rounding(self.low)
        top = nowhere if self.high is None else y >= self.high - _rounding(self.high)
        return bottom & ~top, top

    def check_measurements(self, y):
        """Refuse what is beyond the ends.

        See :meth:`NoiseModel.check_measurements`.
        """
        refuse_rows(
            self._beyond(y, _rounding),
            y,
            f"CensoredGaussianNoise expects measurements between {self.low} and {self.high}",
            hint=" Noise after the saturation is GaussianNoise, with the operator Clipping.",
        )

    def _terms(self, prediction, y):
        t = (y - prediction) / self._tensor("sigma", y)
        bottom, top = self._ends(y)
        open_end = bottom | top
        inside = torch.where(open_end, 0.0, t).square() / 2
        tail = torch.where(open_end, torch.where(top, -t, t), 0.0)
        return torch.where(open_end, -torch.special.log_ndtr(tail), inside)

    def gaussian_fit(self, y):
        """The measurements, with their variance.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        return y, self._tensor("sigma", y).square().reciprocal().expand_as(y)

    def _draw(self, clean, rng):
        noisy = clean + self._parameter("sigma") * rng.standard_normal(clean.shape)
        return np.clip(noisy, self.low, self.high)


class QuantizationNoise(_Saturating):
    """Gaussian noise, then rounding to multiples of ``step``: an analogue-digital converter.

    ``nll = -sum log[Phi((y + step/2 - f) / sigma) - Phi((y - step/2 - f) / sigma)]`` in nats: the
    probability that the noise carries ``f(x)`` into the level that was read. Nothing is lost by
    the rounding but what the level does not tell; a Gaussian likelihood would take the level's
    middle for the measurement. One-bit measurements are :class:`BernoulliNoise`.

    Parameters
    ----------
    step : float
        Distance of the levels, in the units of the measurements.
    sigma : float or array-like of float, shape (m,)
        Standard deviation of the noise before the rounding.
    low, high : float or None, default=None
        Lowest and highest level: what is beyond them is read as them. None: the converter does not
        saturate.

    Raises
    ------
    TypeError, ValueError
        By ``bind`` and ``add_noise``: a parameter is not a positive, finite number, sigma has
        another length than the measurements, or ``low`` or ``high`` are no levels or not in order.
        By the estimators: measurements that are not levels.

    References
    ----------
    Zymnis, A., Boyd, S. and Candes, E., "Compressed sensing with quantized measurements", IEEE
    Signal Process. Lett. 17, 2010.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.noise import QuantizationNoise
    >>> QuantizationNoise(step=2.0, sigma=0.01, high=4.0).add_noise(np.array([[1.2, 2.9, 9.0]]))
    array([[2., 2., 4.]])
    """

    def __init__(self, step, sigma, low=None, high=None):
        self.step = step
        self.sigma = sigma
        self.low = low
        self.high = high

    @property
    def is_exact_fit(self):
        """Whether the middle of a level is the likeliest: not where the end levels are open."""
        return self.low is None and self.high is None

    def _parameter(self, name):
        return self._values(name, per_entry=name == "sigma")

    def _check(self):
        self._parameter("step")
        self._parameter("sigma")
        self._check_ends()
        for name in ("low", "high"):
            end = getattr(self, name)
            if end is not None and abs(end / self.step - round(end / self.step)) > 1e-6:
                raise ValueError(
                    f"QuantizationNoise({name}) must be a level, a multiple of step={self.step}, "
                    f"got {end}."
                )

    def check_measurements(self, y):
        """Refuse what is not a level.

        See :meth:`NoiseModel.check_measurements`.
        """
        level = y / float(self.step)
        # (A float32 level of a few thousand steps is known to about 1e-4 of a step.)
        bad = (level - level.round()).abs() > 1e-3 * level.abs().clamp_min(1.0)
        bad |= self._beyond(y, lambda end: 1e-3 * self.step)
        ends = "" if self.is_exact_fit else f" between {self.low} and {self.high}"
        refuse_rows(
            bad, y, f"QuantizationNoise expects levels, multiples of step={self.step}{ends}"
        )

    def _terms(self, prediction, y):
        sigma = self._tensor("sigma", y)
        width = float(self.step) / sigma
        t = (y - prediction) / sigma
        # (A level is known to rounding only.)
        half = float(self.step) / 2
        top = torch.zeros_like(y, dtype=torch.bool) if self.high is None else y > self.high - half
        bottom = torch.zeros_like(top) if self.low is None else y < self.low + half
        # By symmetry the interval may be taken below zero, where both values are small and exact.
        centre = -torch.where(top | bottom, 0.0, t).abs()
        upper = torch.special.log_ndtr(centre + width / 2)
        lower = torch.special.log_ndtr(centre - width / 2)
        narrow = width < _NARROW
        gap = torch.where(narrow, -1.0, lower - upper)
        log_probability = upper + torch.log(-torch.expm1(gap))
        series = (
            -centre.square() / 2
            + (width / math.sqrt(2 * math.pi)).log()
            + torch.log1p(width.square() * (centre.square() - 1) / 24)
        )
        log_probability = torch.where(narrow, series, log_probability)
        # The end levels are open: beyond them nothing follows.
        up, down = torch.where(top, t, 0.0), torch.where(bottom, t, 0.0)
        log_probability = torch.where(top, torch.special.log_ndtr(width / 2 - up), log_probability)
        log_probability = torch.where(
            bottom, torch.special.log_ndtr(down + width / 2), log_probability
        )
        return -log_probability

    def gaussian_fit(self, y):
        """The level, with the variance of the noise and of a uniform error of one step.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        variance = self._tensor("sigma", y).square() + float(self.step) ** 2 / 12
        return y, (1 / variance).expand_as(y)

    def _draw(self, clean, rng):
        noisy = clean + self._parameter("sigma") * rng.standard_normal(clean.shape)
        levels = self.step * np.round(noisy / self.step)
        # (numpy < 2.1 wants at least one end.)
        if self.low is None and self.high is None:
            return levels
        return np.clip(levels, self.low, self.high)
