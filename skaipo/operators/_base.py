"""What every operator shares: binding to an image shape, checks, the user's call, the repr."""

import html
import inspect
import math
import numbers
import operator
from abc import ABC, abstractmethod

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator

from skaipo._keywords import CheckedKeywords
from skaipo.operators._iterative import ConjugateGradientProjector, power_norm
from skaipo.operators._params import OneRow, RowParameters
from skaipo.operators._projector import AffineProjector, check_same_rows

__all__ = ["AffineProjector", "Operator", "ShortRepr", "check_same_rows", "describe"]


def describe(value):
    """One line for a parameter's value: the kind, shape and dtype of an array, not its numbers.

    Arrays, tensors and sparse matrices give ``<array (24, 64) float64>``, modules their class and
    size, long lists and tuples ``<list of 30>``, anything else its ``repr``.
    """
    if sp.issparse(value):
        return f"<sparse {value.shape} {value.dtype}, {value.nnz} stored>"
    if isinstance(value, np.ndarray | torch.Tensor):
        kind = "array" if isinstance(value, np.ndarray) else "tensor"
        return f"<{kind} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}>"
    if isinstance(value, torch.nn.Module):
        count = sum(parameter.numel() for parameter in value.parameters())
        return f"<{type(value).__name__}, {count} parameters>"
    plain = isinstance(value, list | tuple) and all(np.isscalar(item) for item in value)
    if isinstance(value, list | tuple) and not (plain and len(value) <= 4):
        return f"<{type(value).__name__} of {len(value)}>"
    return repr(value)


class ShortRepr(CheckedKeywords):
    """Mixin, before ``BaseEstimator``: a repr of what is not default, errors for misspelt names."""

    def _describe(self, value):
        return describe(value)

    def __repr__(self, N_CHAR_MAX=700):
        defaults = inspect.signature(type(self).__init__).parameters
        shown = [
            f"{name}={self._describe(value)}"
            for name, value in self.get_params(deep=False).items()
            if not _same(value, defaults[name].default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _html_repr(self):
        # scikit-learn's table of parameters would print the arrays.
        return f"<pre>{html.escape(repr(self))}</pre>"


class Operator(RowParameters, ShortRepr, BaseEstimator, ABC):
    """Base class of forward operators ``f``.

    A subclass stores its parameters in ``__init__`` and writes ``forward`` and the private hook
    ``_setup``: called on the bound copy once ``event_shape_`` and ``n_features_in_`` are known, it
    sets ``n_measurements_``, or ``measurement_shape_`` where a measurement is an image, and any
    arrays, or raises ``ValueError``.

    For a linear or affine ``f`` the rest follows: ``adjoint`` by automatic differentiation,
    ``projector`` by conjugate gradients, ``norm`` by Lanczos iterations. Write them as well where
    there is a formula.

    Attributes
    ----------
    is_linear : bool
        Class attribute, True when ``f`` is linear, or affine: linear but for a constant.
    takes_params : bool
        True where every row has parameters of its own (its kernel, its mask); see :meth:`given`.
    needs_params : bool
        True where nothing can be measured without them. The same as ``takes_params``, unless a
        class says otherwise.
    event_shape_ : tuple of int
        Shape of one image. This and the next ones exist on bound operators only.
    n_features_in_ : int
        Number of pixels ``d``, the product of ``event_shape_``.
    n_measurements_ : int
        Number of measurements ``m``.
    measurement_shape_ : tuple of int
        Shape of one measurement: what ``_setup`` says, else ``(m,)``.
    measured_ : ndarray of bool, shape (m,)
        Which entries of a measurement exist at all; the others are to be ignored.
    precision_ : torch.dtype
        Precision in which ``f`` is computed, whatever the images come in; float64 means theirs.
    """

    is_linear = True
    precision_ = torch.float64
    # Standard deviation of the noise that comes with a foreign operator.
    implied_sigma = None
    _keeps_shape = False

    def bind(self, event_shape):
        """Fix the image shape and make the arrays.

        Parameters
        ----------
        event_shape : tuple of int (or int)
            Shape of one image, that of the prior.

        Returns
        -------
        Operator
            A new, bound operator that shares this one's parameters; ``self`` where it is already
            bound to that shape with these parameters.

        Raises
        ------
        ValueError
            If the operator measures images of another size.
        """
        shape = (event_shape,) if isinstance(event_shape, numbers.Integral) else event_shape
        shape = tuple(operator.index(size) for size in shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"event_shape must hold positive sizes, got {shape}.")
        params = self.get_params()
        if self.__dict__.get("event_shape_") == shape:
            # set_params on a bound operator must not leave the old arrays in use.
            before = self._bound_params
            same = params.keys() == before.keys()
            if same and all(_same(value, before[name]) for name, value in params.items()):
                return self
        bound = type(self)(**self.get_params(deep=False))
        bound._bound_params = params
        bound.event_shape_ = shape
        bound.n_features_in_ = math.prod(shape)
        bound._setup()
        bound._settle_shape()
        if "measured_" not in bound.__dict__:
            bound.measured_ = np.ones(bound.n_measurements_, dtype=bool)
        return bound

    def _settle_shape(self):
        """Number and shape of the measurements, from what ``_setup`` has said of them."""
        name, said = type(self).__name__, self.__dict__
        if "measurement_shape_" in said:
            self.measurement_shape_ = tuple(operator.index(k) for k in self.measurement_shape_)
        elif self._keeps_shape:
            self.measurement_shape_ = self.event_shape_
        elif "n_measurements_" in said:
            self.measurement_shape_ = (self.n_measurements_,)
        else:
            raise AttributeError(
                f"{name}._setup must set n_measurements_, or measurement_shape_ where a "
                "measurement is an image."
            )
        m = math.prod(self.measurement_shape_)
        if said.setdefault("n_measurements_", m) != m or m < 1:
            raise ValueError(
                f"{name}._setup set n_measurements_ = {self.n_measurements_}, but measurements of "
                f"shape {self.measurement_shape_} have {m} entries."
            )

    @abstractmethod
    def _setup(self):
        """Set ``n_measurements_`` and the arrays, or raise ``ValueError``."""

    @abstractmethod
    def forward(self, x):
        """Measure: ``f(x)``, differentiable.

        Parameters
        ----------
        x : Tensor, shape (n, d)

        Returns
        -------
        Tensor, shape (n, m)
        """

    def linear(self, x):
        """The linear part: ``f(x) - f(0)``, which is ``f(x)`` unless ``f`` adds a constant.

        Parameters
        ----------
        x : Tensor, shape (n, d)

        Returns
        -------
        Tensor, shape (n, m)

        Raises
        ------
        TypeError
            If ``f`` is not linear.
        """
        self._check_linear("linear part")
        y = self.forward(x)
        origin = self._origin(y)
        return y if origin is None else y - origin

    def _origin(self, like):
        """``f(0)`` as (1, m), or (n, m) where rows have parameters; None where it is zero.

        In the dtype and on the device of ``like``.
        """

        def make():
            n = self.__dict__.get("_n_given", 1)
            zero = torch.zeros(n, self.n_features_in_, dtype=like.dtype, device=like.device)
            origin = self.forward(zero)
            return origin if bool(origin.any()) else None

        return self._cached(("origin", like.device, like.dtype), make)

    def adjoint(self, y):
        """Apply the transpose of the linear part: ``<f(x) - f(0), y> = <x, adjoint(y)>``.

        Unless a subclass has a formula, automatic differentiation of ``forward`` gives it.

        Parameters
        ----------
        y : Tensor, shape (n, m)

        Returns
        -------
        Tensor, shape (n, d)
            Differentiable.

        Raises
        ------
        TypeError
            If ``f`` is not linear, or ``forward`` is not written in differentiable torch.
        """
        self._check_linear("adjoint")
        self._check_y(y)
        twice = torch.is_grad_enabled() and y.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            y = y.clone() if y.is_inference() else y
            zero = torch.zeros(
                len(y), self.n_features_in_, dtype=y.dtype, device=y.device, requires_grad=True
            )
            try:
                out = self.forward(zero)
                reason = None
            except RuntimeError as error:
                # Torch's own advice, to detach, is of no help here.
                if "numpy()" not in str(error):
                    raise
                reason = error
            if reason is not None or not out.requires_grad:
                raise TypeError(
                    f"{type(self).__name__}.forward gives no gradient: write it in torch without "
                    "leaving torch (no numpy, no detach), or write adjoint as well."
                ) from reason
            (x,) = torch.autograd.grad(out, zero, y, create_graph=twice)
        return x

    def projector(self, y, observed=None):
        """Prepare the projection onto ``{x : f(x) = y}``; all factorisations happen here.

        Unless a subclass has a formula, conjugate gradients find it.

        Parameters
        ----------
        y : Tensor, shape (n, m)
            Measurements. Entries that are not observed are never read: they may be NaN.
        observed : Tensor of bool, shape (n, m), or None
            Which entries of ``y`` count. None: every one that the operator measures.

        Returns
        -------
        AffineProjector

        Raises
        ------
        TypeError
            If ``f`` is not linear.
        """
        self._check_linear("projection onto {x : f(x) = y}")
        return ConjugateGradientProjector(self, y, self._observed(y, observed))

    def project(self, x, y, observed=None):
        """Nearest image to ``x`` with ``f(x) = y``: ``projector(y, observed)(x)``."""
        return self.projector(y, observed)(x)

    def norm(self):
        """Spectral norm of the linear part of ``f``, computed in float64.

        Returns
        -------
        float

        Raises
        ------
        TypeError
            If ``f`` is not linear.
        """
        self._check_linear("spectral norm")
        n = self.__dict__.get("_n_given")
        if n is None:
            return float(self._cached("norm", lambda: power_norm(self)))
        return torch.tensor([power_norm(OneRow(self, i)) for i in range(n)], dtype=torch.float64)

    def _check_linear(self, what):
        if not self.is_linear:
            raise TypeError(f"{type(self).__name__} is not linear: it has no {what}.")

    def measured(self, like):
        """Which measurements exist: a bool tensor (1, m), or (n, m) where rows' parameters say so.

        Parameters
        ----------
        like : Tensor
            The result is on its device.
        """
        return self._cached(
            ("measured", like.device),
            lambda: torch.from_numpy(self.measured_)[None].to(like.device),
        )

    def __call__(self, X, params=None):
        """Simulate clean measurements ``f(X)``.

        Parameters
        ----------
        X : ndarray or Tensor, shape (n, d) or (n, *event_shape)
            Images. An operator that is not bound takes the image shape from here.
        params : array-like or Tensor, shape (n, ...), default=None
            Parameters of each row, for operators that take them.

        Returns
        -------
        ndarray or Tensor, shape (n, m)
            Same kind and float dtype as ``X`` (integers give float64), never sharing its memory,
            without gradient. Images ``(n, *event_shape)`` give ``(n, *measurement_shape_)``.

        Raises
        ------
        TypeError
            If ``X`` is not real-valued, or ``params`` is not wanted.
        ValueError
            If ``X`` has no sample axis, or its images are not of the operator's size, or ``params``
            is missing or wrong.
        """
        name = type(self).__name__
        if isinstance(X, torch.Tensor):
            if X.is_complex():
                raise TypeError(f"{name} measures real images, got a tensor of {X.dtype}.")
            out_dtype = None
            dtype = X.dtype if X.is_floating_point() else torch.float64
            x = X.detach().to(dtype, copy=True)
        else:
            X = np.asarray(X)
            if X.dtype.kind not in "biuf":
                raise TypeError(f"{name} measures real images, got an array of {X.dtype}.")
            out_dtype = X.dtype if X.dtype.kind == "f" else np.dtype(np.float64)
            x = np.array(X, dtype=np.float32 if X.dtype == np.float32 else np.float64, order="C")
            x = torch.from_numpy(x)
        if x.ndim < 2:
            raise ValueError(
                f"{name} expects a batch of shape (n, d) or (n, *shape), got {tuple(x.shape)}. "
                "For a single image use X[None]."
            )
        n, shape = x.shape[0], tuple(x.shape[1:])
        d = self.__dict__.get("n_features_in_", math.prod(shape))
        if math.prod(shape) != d:
            raise ValueError(
                f"This {name} is bound to images of {d} features {self.event_shape_}, got X of "
                f"shape {tuple(x.shape)}. Bind it to the new shape with bind({shape})."
            )
        bound = self.bind(self.__dict__.get("event_shape_", shape) if len(shape) == 1 else shape)
        bound = bound.given(bound.check_params(params, n, like=x))
        with torch.no_grad():
            out = bound.forward(x.reshape(n, d))
        if len(shape) > 1:
            out = out.reshape(n, *bound.measurement_shape_)
        return out if out_dtype is None else out.numpy().astype(out_dtype, copy=False)

    def _check(self, rows, size="n_features_in_", what="images"):
        """Refuse an unbound operator, and anything but flat rows of the right size."""
        self._check_ready()
        name, size = type(self).__name__, getattr(self, size)
        n = self.__dict__.get("_n_given")
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ValueError(
                f"{name} expects flat {what} of shape (n, {size}), got {tuple(rows.shape)}."
            )
        if n is not None and len(rows) != n:
            raise ValueError(f"This {name} was given the parameters of {n} rows, got {len(rows)}.")

    def _check_y(self, y):
        self._check(y, "n_measurements_", "measurements")

    def _observed(self, y, observed):
        """Entries of y that count, as a bool tensor that broadcasts to y; None means all."""
        self._check_y(y)
        if observed is not None:
            if observed.dtype != torch.bool or observed.shape != y.shape:
                raise ValueError(
                    f"observed must be a bool tensor of shape {tuple(y.shape)}, like y, got "
                    f"{observed.dtype} of shape {tuple(observed.shape)}."
                )
            if bool(observed.all()):
                observed = None
        if not self._measures_all():
            measured = self.measured(y)
            observed = measured if observed is None else observed & measured
        return observed

    def _measures_all(self):
        return bool(self.measured_.all())

    def _cached(self, key, make):
        """Things derived from the arrays, made once per device and dtype, never pickled."""
        cache = self.__dict__.setdefault("_cache", {})
        if key not in cache:
            # A tensor born in inference mode could never take part in autograd later.
            with torch.inference_mode(False), torch.no_grad():
                cache[key] = make()
        return cache[key]

    def __getstate__(self):
        state = dict(super().__getstate__())
        state.pop("_cache", None)
        return state

    def __sklearn_clone__(self):
        # clone() would deep-copy matrices and masks; nothing here ever writes to them.
        return type(self)(**self.get_params(deep=False))


def _same(a, b):
    """Same object, or equal plain values (arrays are compared by identity only)."""
    return a is b or (isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b)
