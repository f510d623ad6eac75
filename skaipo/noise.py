"""Noise models: ``nll = -log p_e(y - f(x))`` per row, up to a constant."""

import math
import numbers
from abc import ABC, abstractmethod

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from skaipo.operators._base import ShortRepr

__all__ = ["GaussianNoise", "NoiseModel", "SquaredError", "as_noise"]


class NoiseModel(ShortRepr, BaseEstimator, ABC):
    """Base class of noise models.

    A subclass stores its parameters in ``__init__`` and writes ``_penalty`` and ``max_curvature``,
    and ``_check`` where its parameters need checking.

    Attributes
    ----------
    is_exact_fit : bool
        Class attribute, True when ``nll`` is least exactly where ``f(x) = y``.
    n_measurements_ : int
        Number of measurements ``m`` (bound models only).
    """

    is_exact_fit = True

    def bind(self, n_measurements):
        """Check the parameters against the number of measurements.

        Parameters
        ----------
        n_measurements : int
            Number of entries ``m`` of one measurement.

        Returns
        -------
        NoiseModel
            A new, bound model that shares this one's parameters.

        Raises
        ------
        ValueError, TypeError
            If a parameter is not valid for that size.
        """
        bound = self.__sklearn_clone__()
        bound.n_measurements_ = int(n_measurements)
        bound._check()
        return bound

    def nll(self, prediction, y, observed=None):
        """Negative log-likelihood of each row, summed over its observed entries.

        Parameters
        ----------
        prediction : Tensor, shape (n, m)
            Clean measurements ``f(x)``.
        y : Tensor, shape (n, m)
            Measurements. Entries that are not observed are never read: they may be NaN.
        observed : Tensor of bool, shape (n, m) (or one that broadcasts to it), or None
            Which entries count. None: all.

        Returns
        -------
        Tensor, shape (n,)
            Differentiable with respect to ``prediction``.

        Raises
        ------
        ValueError
            If the shapes disagree.
        """
        if prediction.ndim != 2 or prediction.shape != y.shape:
            raise ValueError(
                "prediction and y must both have shape (n, m), got "
                f"{tuple(prediction.shape)} and {tuple(y.shape)}."
            )
        m = prediction.shape[1]
        model = self
        if self.__dict__.get("n_measurements_") != m:
            if "n_measurements_" in self.__dict__:
                raise ValueError(
                    f"This {type(self).__name__} is bound to {self.n_measurements_} measurements, "
                    f"got {m}. Bind it to the new size with bind({m})."
                )
            model = self.bind(m)
        if observed is not None:
            # Before any arithmetic: a NaN that is masked afterwards still poisons the gradient.
            zero = torch.zeros((), dtype=prediction.dtype, device=prediction.device)
            prediction = torch.where(observed, prediction, zero)
            y = torch.where(observed, y, zero)
        return model._penalty(y - prediction).sum(dim=1)

    @abstractmethod
    def max_curvature(self):
        """Largest second derivative of ``nll`` with respect to an entry of ``f(x)``.

        ``max_curvature() * op.norm()**2`` is a Lipschitz constant of the gradient in x.

        Returns
        -------
        float
        """

    def gaussian_fit(self, y):
        """The Gaussian that stands in for the likelihood, as a function of ``f(x)``.

        The solvers' start and metric know of the noise by it. Here: around ``y``, with the
        curvature of ``nll`` there; where that is no parabola, with the curvature of the one that
        has the same value at a unit residual.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            Measurements, finite: any number where nothing was measured.

        Returns
        -------
        location : Tensor, shape (n, m)
            Its mean, in the units of ``f(x)``.
        weight : Tensor, shape (n, m)
            Its inverse variance, positive and finite.
        """
        with torch.enable_grad():
            prediction = y.detach().clone().requires_grad_()
            nll = self.nll(prediction, y).sum()
            (first,) = torch.autograd.grad(nll, prediction, create_graph=True)
            second = torch.zeros_like(y)
            if first.requires_grad:
                (second,) = torch.autograd.grad(first.sum(), prediction)
        usable = second.isfinite() & (second > 0)
        largest = self.max_curvature()
        if not math.isfinite(largest):
            # A kink has no curvature.
            units = torch.eye(y.shape[1]).to(y)
            largest = 2 * self.nll(units, torch.zeros_like(units))
        return y, torch.where(usable, second, largest).detach()

    @abstractmethod
    def _penalty(self, residual):
        """Negative log-likelihood of each entry of ``residual`` (n, m), differentiable."""

    def _check(self):
        """Refuse wrong parameters, given ``n_measurements_``; optional."""

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_cache", None)
        return state

    def __sklearn_clone__(self):
        # clone() would deep-copy an array of sigmas; nothing here ever writes to it.
        return type(self)(**self.get_params(deep=False))


class SquaredError(NoiseModel):
    """``nll = ||y - f(x)||^2``, what ``noise=None`` means; squared pixel units, not nats."""

    def _penalty(self, residual):
        return residual.square()

    def max_curvature(self):
        return 2.0


class GaussianNoise(NoiseModel):
    """White Gaussian noise: ``nll = ||y - f(x)||^2 / (2 sigma^2)``, in nats.

    The constant ``m/2 log(2 pi) + sum(log sigma)`` is left out: it does not depend on x.

    Parameters
    ----------
    sigma : float or array-like of float, shape (m,)
        Standard deviation in the units of the measurements, one for all entries or one per entry.

    Raises
    ------
    TypeError
        By ``bind`` and ``add_noise``: sigma does not hold real numbers.
    ValueError
        By ``bind`` and ``add_noise``: sigma is not positive and finite, or has another length than
        the measurements.
    """

    def __init__(self, sigma):
        self.sigma = sigma

    def _sigma(self, m=None):
        """Sigma as a float64 array, () or (m,), checked."""
        sigma = self.sigma
        sigma = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else sigma
        sigma = np.asarray(sigma)
        if sigma.dtype.kind not in "iuf":
            raise TypeError(
                "GaussianNoise(sigma) must be a number or an array of shape (m,), got "
                f"{type(self.sigma).__name__} {self.sigma!r:.60}."
            )
        sigma = sigma.astype(np.float64)
        if sigma.ndim > 1 or (m is not None and sigma.ndim == 1 and len(sigma) != m):
            expected = "(m,)" if m is None else f"({m},)"
            raise ValueError(
                f"GaussianNoise(sigma) has shape {sigma.shape}, expected a scalar or shape "
                f"{expected}, one value per measurement. Flatten an image of sigmas with ravel()."
            )
        bad = ~((sigma > 0) & np.isfinite(sigma))
        if bad.any() or sigma.size == 0:
            got = f"{sigma[bad].flat[0]}" if bad.any() else "an empty array"
            raise ValueError(
                f"GaussianNoise(sigma) must be positive and finite, got {got}. For noiseless "
                "measurements use a small sigma, or noise=None."
            )
        return sigma

    def _check(self):
        self._sigma(self.n_measurements_)

    def _penalty(self, residual):
        cache = self.__dict__.setdefault("_cache", {})
        key = residual.device, residual.dtype, id(self.sigma)
        if key not in cache:
            # A tensor born in inference mode could never take part in autograd later.
            with torch.inference_mode(False):
                sigma = torch.from_numpy(self._sigma(residual.shape[1]))
                # The object is kept with it, so that its id cannot be given to another one.
                cache[key] = sigma.to(residual.device, residual.dtype), self.sigma
        return (residual / cache[key][0]).square() / 2

    def max_curvature(self):
        return float(self._sigma().min() ** -2)

    def add_noise(self, Y, random_state=0):
        """Simulate noisy measurements.

        Parameters
        ----------
        Y : ndarray or Tensor, shape (n, m) or (n, *shape)
            Clean measurements.
        random_state : int, RandomState instance or None, default=0
            The noise of the first rows does not depend on how many rows follow.

        Returns
        -------
        ndarray or Tensor
            A new array of the shape, kind and float dtype of ``Y`` (integers give float64).
        """
        is_tensor = isinstance(Y, torch.Tensor)
        clean = Y.detach().cpu().double().numpy() if is_tensor else np.asarray(Y)
        if clean.dtype.kind not in "biuf":
            raise TypeError(f"add_noise expects real measurements, got dtype {clean.dtype}.")
        if clean.ndim < 2:
            raise ValueError(
                f"add_noise expects a batch of shape (n, m) or (n, *shape), got {clean.shape}. "
                "For a single measurement use Y[None]."
            )
        rows = (clean.shape[0], math.prod(clean.shape[1:]))
        noise = self._sigma(rows[1]) * check_random_state(random_state).standard_normal(rows)
        noisy = clean + noise.reshape(clean.shape)
        if is_tensor:
            dtype = Y.dtype if Y.is_floating_point() else torch.float64
            return torch.from_numpy(noisy).to(Y.device, dtype)
        return noisy.astype(clean.dtype if clean.dtype.kind == "f" else np.float64, copy=False)


def as_noise(noise):
    """Turn what users pass as ``noise`` into a NoiseModel.

    Parameters
    ----------
    noise : NoiseModel or None

    Returns
    -------
    NoiseModel
        ``noise`` itself; ``SquaredError()`` for None.

    Raises
    ------
    TypeError
        For anything else.
    """
    if noise is None:
        return SquaredError()
    if isinstance(noise, NoiseModel):
        return noise
    if isinstance(noise, numbers.Real) and not isinstance(noise, bool):
        raise TypeError(
            f"noise must be a noise model or None, got the number {noise}. If it is the standard "
            f"deviation, use noise=GaussianNoise({noise})."
        )
    what = type(noise).__name__
    if isinstance(noise, type) and issubclass(noise, NoiseModel):
        what = f"the class {noise.__name__}; did you mean {noise.__name__}(...)"
    raise TypeError(
        "noise must be None (squared error), GaussianNoise(sigma) or another NoiseModel; got "
        f"{what}."
    )
