"""What noise models share: binding, masks, parameters as tensors, simulation; the squared error."""

import math
import numbers
from abc import ABC, abstractmethod

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state

from skaipo._validation import named_rows
from skaipo.operators._base import ShortRepr

__all__ = ["Likelihood", "NoiseModel", "SquaredError", "as_noise", "known_gradient", "refuse_rows"]


def refuse_rows(bad, y, message, hint=""):
    """Raise a ValueError that names the rows if any entry of a mask (n, m) is set."""
    rows = bad.any(1).nonzero().flatten().tolist()
    if rows:
        first = y[rows[0]][bad[rows[0]]][0].item()
        raise ValueError(
            f"{message}, got {first:g} in row {rows[0]} ({len(rows)} rows: {named_rows(rows)})."
            f"{hint}"
        )


class NoiseModel(ShortRepr, BaseEstimator, ABC):
    """Base class of noise models; of those that add noise to each measurement by itself.

    A subclass stores its parameters in ``__init__`` and writes ``_penalty`` and ``max_curvature``,
    ``_check`` where its parameters need checking, and ``_draw`` if it can be simulated. (What is
    no sum over the entries of ``y - f(x)`` derives from :class:`Likelihood`.)

    Attributes
    ----------
    is_exact_fit : bool
        Class attribute, True when ``nll`` is least exactly where ``f(x) = y``.
    is_likelihood : bool
        Class attribute, True when ``nll`` is in nats, so that ``lam=1`` is the Bayesian one.
    is_estimated : bool
        True when a parameter is left to :meth:`estimate`, which the estimators' ``fit(Y)`` calls.
    n_measurements_ : int
        Number of measurements ``m`` (bound models only).
    """

    is_exact_fit = True
    is_likelihood = True
    is_estimated = False

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
        """Negative log-likelihood of each row, of its observed entries.

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
        model = self._bound_to(prediction.shape[1])
        if observed is not None:
            # Before any arithmetic: a NaN that is masked afterwards still poisons the gradient.
            zero = torch.zeros((), dtype=prediction.dtype, device=prediction.device)
            prediction = torch.where(observed, prediction, zero)
            y = torch.where(observed, y, zero)
        return model._nll(prediction, y, observed)

    def _bound_to(self, m):
        if self.__dict__.get("n_measurements_") == m:
            return self
        if "n_measurements_" in self.__dict__:
            raise ValueError(
                f"This {type(self).__name__} is bound to {self.n_measurements_} measurements, "
                f"got {m}. Bind it to the new size with bind({m})."
            )
        return self.bind(m)

    def _nll(self, prediction, y, observed):
        """``nll`` (n,) where what is not ``observed`` (None: nothing) holds zeros."""
        terms = self._terms(prediction, y)
        if observed is not None:
            terms = torch.where(observed, terms, 0.0)
        return terms.sum(dim=1)

    def _terms(self, prediction, y):
        """The negative log-likelihood of each entry (n, m)."""
        return self._penalty(y - prediction)

    @abstractmethod
    def _penalty(self, residual):
        """Negative log-likelihood of each entry of ``residual`` (n, m), differentiable."""

    @abstractmethod
    def max_curvature(self):
        """Largest second derivative of ``nll`` with respect to an entry of ``f(x)``.

        ``max_curvature() * op.norm()**2`` is a Lipschitz constant of the gradient in x.

        Returns
        -------
        float
            Infinite where there is no bound.
        """

    def typical_curvature(self):
        """A second derivative by which scales are chosen, such as those of a path of lambdas.

        Returns
        -------
        float
            Positive and finite: ``max_curvature()`` if it is, else that of the parabola with the
            value of ``nll`` at a unit residual.
        """
        largest = self.max_curvature()
        if math.isfinite(largest):
            return largest
        m = self.__dict__.get("n_measurements_", 1)
        return float(self._unit_curvature(torch.zeros(1, m, dtype=torch.float64)).max())

    def _unit_curvature(self, y):
        """Curvature of the parabola with the value of ``nll`` at a unit residual, for each entry"""
        zero = torch.zeros_like(y[:1])
        return 2 * (self._terms(zero + 1, zero) - self._terms(zero, zero))

    def gaussian_fit(self, y):
        """The Gaussian that stands in for the likelihood, as a function of ``f(x)``.

        The solvers' start and metric know of the noise by it. Here: around ``y``, with the
        curvature of ``nll`` there; where that is no parabola, with the curvature of the one that
        has the same value at a unit residual.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            Measurements, finite: zero where nothing was measured.

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
            largest = self._bound_to(y.shape[1])._unit_curvature(y)
        return y, torch.where(usable, second, largest).detach()

    def check_measurements(self, y):
        """Refuse measurements that this noise cannot have made; by default none.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            NaN where nothing was measured.

        Raises
        ------
        ValueError
            Names the rows.
        """

    def estimate(self, y, op):
        """Fill in the parameters that are to be estimated from measurements.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            NaN where nothing was measured.
        op : Operator
            Bound.

        Returns
        -------
        NoiseModel
            This one, where there is nothing to estimate.
        """
        return self

    def add_noise(self, Y, random_state=0):
        """Simulate noisy measurements.

        Parameters
        ----------
        Y : ndarray or Tensor, shape (n, m) or (n, *shape)
            Clean measurements; NaN stays NaN.
        random_state : int, RandomState instance or None, default=0
            The noise of the first rows does not depend on how many rows follow.

        Returns
        -------
        ndarray or Tensor
            A new array of the shape, kind and float dtype of ``Y`` (integers give float64).

        Raises
        ------
        TypeError, ValueError
            If ``Y`` is not a batch of real numbers, or a parameter does not suit it.
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
        rows = clean.reshape(clean.shape[0], math.prod(clean.shape[1:])).astype(np.float64)
        model = self.bind(rows.shape[1])
        missing = np.isnan(rows)
        noisy = model._draw(np.where(missing, 0.0, rows), check_random_state(random_state))
        noisy = np.where(missing, np.nan, noisy).reshape(clean.shape)
        if is_tensor:
            dtype = Y.dtype if Y.is_floating_point() else torch.float64
            return torch.from_numpy(noisy).to(Y.device, dtype)
        return noisy.astype(clean.dtype if clean.dtype.kind == "f" else np.float64, copy=False)

    def release_workspaces(self):
        """Let go of the memory that is kept for the next ``nll``; by default there is none."""

    def _draw(self, clean, rng):
        """Noisy measurements of clean ones (n, m), float64, from a ``RandomState``.

        Row by row from the generator, so that a row does not depend on those that follow.
        """
        raise TypeError(f"{type(self).__name__} cannot simulate noise: it does not define _draw.")

    def _check(self):
        """Refuse wrong parameters, given ``n_measurements_``; optional."""

    # ------------------------------------------------------------ parameters of a number or (m,)

    def _values(self, name, sign="positive", hint="", per_entry=True):
        """A parameter as a float64 array, () or (m,), checked.

        ``sign``: "positive", "non-negative" or "any".
        """
        given = getattr(self, name)
        what = f"{type(self).__name__}({name})"
        value = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else given
        value = np.asarray(value)
        if value.dtype.kind not in "iuf" or not (per_entry or value.ndim == 0):
            kinds = "a number or an array of shape (m,)" if per_entry else "a number"
            raise TypeError(f"{what} must be {kinds}, got {type(given).__name__} {given!r:.60}.")
        value = value.astype(np.float64)
        m = self.__dict__.get("n_measurements_")
        if value.ndim > 1 or (m is not None and value.ndim == 1 and len(value) != m):
            expected = "(m,)" if m is None else f"({m},)"
            raise ValueError(
                f"{what} has shape {value.shape}, expected a scalar or shape {expected}, one value "
                f"per measurement. Flatten an image of {name}s with ravel()."
            )
        allowed, rule = {
            "positive": (value > 0, "positive and "),
            "non-negative": (value >= 0, "at least 0 and "),
            "any": (~np.isnan(value), ""),
        }[sign]
        bad = ~(allowed & np.isfinite(value))
        if bad.any() or value.size == 0:
            got = f"{value[bad].flat[0]}" if bad.any() else "an empty array"
            raise ValueError(f"{what} must be {rule}finite, got {got}.{hint}")
        return value

    def _tensor(self, name, like):
        """A checked parameter as a tensor of the dtype and device of another one; cached."""
        cache = self.__dict__.setdefault("_cache", {})
        value = getattr(self, name)
        key = name, like.device, like.dtype, id(value)
        if key not in cache:
            # A tensor born in inference mode could never take part in autograd later.
            with torch.inference_mode(False):
                tensor = torch.from_numpy(self._parameter(name)).to(like.device, like.dtype)
                # The object is kept with it, so that its id cannot be given to another one.
                cache[key] = tensor, value
        return cache[key][0]

    def _parameter(self, name):
        """The array of a parameter, checked by the rules of the class."""
        return self._values(name)

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_cache", None)
        return state

    def __sklearn_clone__(self):
        # clone() would deep-copy an array of sigmas; nothing here ever writes to it.
        return type(self)(**self.get_params(deep=False))


class Likelihood(NoiseModel):
    """Base class of models that are no sum over the entries of the residual ``y - f(x)``.

    A subclass writes ``_terms(prediction, y)``, where the entries are independent given ``f(x)``,
    or ``_nll(prediction, y, observed)``, where they are not; ``max_curvature``; and
    ``gaussian_fit``, which has no sensible default here.
    """

    is_exact_fit = False

    def _penalty(self, residual):
        raise TypeError(f"{type(self).__name__} is no sum over the residual's entries.")

    def _terms(self, prediction, y):
        raise TypeError(
            f"{type(self).__name__} must define _terms(prediction, y), or _nll(prediction, y, "
            f"observed) where the entries are not independent."
        )

    @abstractmethod
    def gaussian_fit(self, y):
        """The Gaussian that stands in for the likelihood, as a function of ``f(x)``.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            Measurements, finite: zero where nothing was measured.

        Returns
        -------
        location : Tensor, shape (n, m)
            Its mean, in the units of ``f(x)``.
        weight : Tensor, shape (n, m)
            Its inverse variance, positive and finite.
        """


class SquaredError(NoiseModel):
    """``nll = ||y - f(x)||^2``, what ``noise=None`` means; squared pixel units, not nats."""

    is_likelihood = False

    def _penalty(self, residual):
        return residual.square()

    def max_curvature(self):
        return 2.0

    def _draw(self, clean, rng):
        raise TypeError(
            "The squared error does not know the size of the noise: simulate with "
            "GaussianNoise(sigma).add_noise(Y)."
        )


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


def known_gradient(x, value, gradient):
    """``value`` (n,) as a function of ``x`` (n, d) to autograd, once, with this gradient (n, d).

    What computes both at a time need not wait for the way back.
    """
    return _KnownGradient.apply(x, value, gradient)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return grad[:, None] * gradient, None, None
