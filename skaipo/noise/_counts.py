"""Measurements that are counted: photons, and signs."""

import math
import warnings

import numpy as np
import torch

from skaipo.noise._base import Likelihood, refuse_rows

__all__ = ["BernoulliNoise", "PoissonNoise"]


# Fractional measurements from which on it is no accident that they are whole after scaling.
_ENOUGH = 8


class PoissonNoise(Likelihood):
    """Counts: ``y ~ Poisson(gain * f(x) + background)``.

    With the rate ``r = gain * f(x) + background``, ``nll = sum r - y - y log(r / y)``, which is
    ``-log p(y | r)`` in nats up to a constant, and zero where ``r = y``. The measurements are the
    counts themselves; divide them by ``gain`` for a look in the units of the image.

    Numbers that are not whole are taken as they are: the nll is defined for them as well. Its
    weight is right where they are counts but for a small error. For counts that were divided by
    something it is not, since the variance of those is not their mean: multiply them by it again
    (sums of k exposures, not means, with ``k * gain`` and ``k * background``). Where all
    measurements times ``gain`` are whole, the background added or not, and the measurements are
    not, a warning says so.

    A rate cannot be negative, but an iterate's may be. Below ``floor`` the nll goes on as its
    second-order Taylor expansion there, with ``1 / floor`` added to the curvature: finite
    everywhere, with a continuous slope, and for ``y = 0`` least at a rate of zero. A minimiser with
    all of its rates above ``floor`` is that of the exact nll; for ``y = 0`` the two differ by at
    most ``floor / 2`` nats.

    Parameters
    ----------
    gain : float or array-like of float, shape (m,), default=1.0
        Counts per unit of ``f(x)``.
    background : float or array-like of float, shape (m,), default=0.0
        Counts that would be there without a signal, >= 0.
    floor : float, default=0.01
        Rate below which the nll is extended, in counts.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: a parameter does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: gain or floor is not positive and finite, background is
        negative, or one has another length than the measurements. By the estimators: negative
        measurements. By ``add_noise``: negative rates.

    References
    ----------
    Shepp, L. A. and Vardi, Y., "Maximum likelihood reconstruction for emission tomography", IEEE
    Trans. Med. Imaging 1, 1982.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.noise import PoissonNoise
    >>> PoissonNoise(gain=100.0).add_noise(np.zeros((1, 3)))
    array([[0., 0., 0.]])
    """

    def __init__(self, gain=1.0, background=0.0, floor=0.01):
        self.gain = gain
        self.background = background
        self.floor = floor

    def _check(self):
        for name in ("gain", "background", "floor"):
            self._parameter(name)

    def _parameter(self, name):
        sign = "non-negative" if name == "background" else "positive"
        return self._values(name, sign=sign, per_entry=name != "floor")

    def check_measurements(self, y):
        """Refuse negative counts; warn of counts that were divided by the gain.

        See :meth:`NoiseModel.check_measurements`.
        """
        hint = " If a background was subtracted leave it in, and say PoissonNoise(background=...)."
        refuse_rows(y < 0, y, "PoissonNoise expects counts, which are at least 0", hint)
        gain, background = self._tensor("gain", y), self._tensor("background", y)
        for scaled, how in (
            (y * gain, "Y * gain"),
            (y * gain + background, "Y * gain + background"),
        ):
            if self._were_counts(y, scaled):
                warnings.warn(
                    f"PoissonNoise expects the counts themselves. These measurements are not whole "
                    f"numbers (the largest is {float(y[~y.isnan()].max()):g}), but {how} are, with "
                    f"gain={float(gain.mean()):g}: if they were counted, pass {how}.",
                    UserWarning,
                    stacklevel=2,
                )
                return

    @staticmethod
    def _were_counts(y, scaled):
        """Whether all of ``scaled`` are whole numbers, to single precision, and ``y`` are not."""
        error = 4 * torch.finfo(torch.float32).eps * scaled.abs()
        telling = (error < 0.05) & (y != y.round())
        whole = (scaled - scaled.round()).abs() <= error
        seen = ~y.isnan() & (error < 0.05)
        return int((telling & seen).sum()) >= _ENOUGH and bool(whole[seen].all())

    def _terms(self, prediction, y):
        rate = self._tensor("gain", y) * prediction + self._tensor("background", y)
        floor = float(self.floor)
        inside = rate.clamp_min(floor)
        # Zero inside; where it is not, `inside` is constant and gives no gradient.
        below = (rate - floor).clamp_max(0.0)
        terms = inside - y - torch.xlogy(y, inside) + torch.xlogy(y, y)
        curvature = y / floor**2 + 1 / floor
        return terms + (1 - y / floor) * below + curvature / 2 * below.square()

    def max_curvature(self):
        return math.inf

    def typical_curvature(self):
        """Fisher information at a rate of one count, ``gain^2``."""
        return float(self._parameter("gain").max() ** 2)

    def gaussian_fit(self, y):
        """Mean ``y`` and variance ``y + 1/2`` of the rate, in the units of ``f(x)``.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        gain = self._tensor("gain", y)
        weight = gain.square() / (y.clamp_min(0.0) + 0.5)
        return (y - self._tensor("background", y)) / gain, weight

    def _draw(self, clean, rng):
        rate = self._parameter("gain") * clean + self._parameter("background")
        rows = np.flatnonzero((rate < 0).any(1))
        if len(rows):
            raise ValueError(
                f"PoissonNoise.add_noise needs gain * Y + background >= 0, got {rate.min():g} in "
                f"{len(rows)} of {len(rate)} rows, the first of them {rows[0]}. Clip the clean "
                f"measurements: np.clip(Y, 0, None)."
            )
        return rng.poisson(rate).astype(np.float64)


_LINKS = ("probit", "logistic")


class BernoulliNoise(Likelihood):
    """One bit for each measurement: whether ``f(x)`` plus noise was above a threshold.

    With ``t = (f(x) - threshold) / scale``, ``P(y = 1) = Phi(t)`` (link "probit", Gaussian noise of
    standard deviation ``scale`` before the quantiser) or ``1 / (1 + exp(-t))`` (link "logistic",
    logistic noise), and ``nll = -sum log P(y)`` in nats. Both are evaluated in a form that neither
    overflows nor loses the tail.

    Parameters
    ----------
    scale : float or array-like of float, shape (m,), default=1.0
        Of the noise before the quantiser, in the units of ``f(x)``.
    threshold : float or array-like of float, shape (m,), default=0.0
        In the units of ``f(x)``. Thresholds that differ from entry to entry (dither) let bits tell
        of brightness.
    link : {"probit", "logistic"}, default="probit"

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: a parameter does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: scale is not positive and finite, a parameter has another
        length than the measurements, or the link is unknown. By the estimators: measurements that
        are not bits, 0 and 1 or -1 and +1.

    References
    ----------
    Zymnis, A., Boyd, S. and Candes, E., "Compressed sensing with quantized measurements", IEEE
    Signal Process. Lett. 17, 2010.

    Examples
    --------
    >>> import torch
    >>> from skaipo.noise import BernoulliNoise
    >>> BernoulliNoise().nll(torch.tensor([[0.0, 40.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([805.3016])
    """

    def __init__(self, scale=1.0, threshold=0.0, link="probit"):
        self.scale = scale
        self.threshold = threshold
        self.link = link

    def _check(self):
        self._parameter("scale")
        self._parameter("threshold")
        if self.link not in _LINKS:
            raise ValueError(
                f"link must be one of {', '.join(map(repr, _LINKS))}, got {self.link!r}."
            )

    def _parameter(self, name):
        return self._values(name, sign="any" if name == "threshold" else "positive")

    def check_measurements(self, y):
        """Refuse what is not a bit.

        See :meth:`NoiseModel.check_measurements`.
        """
        bits = (y == 0) | (y.abs() == 1) | y.isnan()
        refuse_rows(~bits, y, "BernoulliNoise expects bits, 0 and 1 or -1 and +1")
        mixed = (y == 0) & (y == -1).any(1, keepdim=True)
        refuse_rows(mixed, y, "BernoulliNoise expects bits, either 0 and 1 or -1 and +1 in a row")

    def _terms(self, prediction, y):
        t = (prediction - self._tensor("threshold", y)) / self._tensor("scale", y)
        t = torch.where(y > 0, t, -t)
        if self.link == "logistic":
            return torch.nn.functional.softplus(-t)
        return -torch.special.log_ndtr(t)

    def max_curvature(self):
        largest = 1.0 if self.link == "probit" else 0.25
        return float(largest * self._parameter("scale").min() ** -2)

    def gaussian_fit(self, y):
        """What a Newton step from the threshold says, of noise as wide as the thresholds spread.

        A bit tells little of how far above its threshold a measurement is. Thresholds are put where
        measurements are expected, so that their spread stands in for that of the measurements:
        the noise is taken to have the variance ``scale^2`` plus that of the thresholds.

        See :meth:`NoiseModel.gaussian_fit`.
        """
        slope, curvature = (math.sqrt(2 / math.pi), 2 / math.pi)
        if self.link == "logistic":
            slope, curvature = 0.5, 0.25
        threshold = self._tensor("threshold", y)
        width = (self._tensor("scale", y).square() + threshold.var(correction=0)).sqrt()
        step = torch.where(y > 0, width, -width) * (slope / curvature)
        return threshold + step, (curvature / width.square()).expand_as(y)

    def _draw(self, clean, rng):
        t = (clean - self._parameter("threshold")) / self._parameter("scale")
        noise = (
            rng.standard_normal(t.shape) if self.link == "probit" else rng.logistic(size=t.shape)
        )
        return (t + noise > 0).astype(np.float64)
