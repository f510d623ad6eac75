"""Operators that are not linear, and the linear one that stands in for them near a point."""

import copy
import math
import numbers

import numpy as np
import torch
from torch import nn

from skaipo.operators._base import Operator
from skaipo.operators._checks import layout_hint, refuse_numpy

__all__ = ["Clipping", "Linearisation", "NonlinearOperator"]


class NonlinearOperator(Operator):
    """Any differentiable ``f``, given as a function of torch tensors.

    Gradients come from autograd. There is no adjoint and no projection; where the solvers need
    one they use that of the linearisation at a point.

    Parameters
    ----------
    fn : callable or torch.nn.Module
        ``fn(x) -> y`` for images ``x`` of shape ``(n, *event_shape)``, in the solver's dtype and
        on its device; ``y`` has shape ``(n, *measurement_shape)``. No row may depend on another
        one. Define it at the top level of a module if it is to be pickled (``n_jobs``,
        ``checkpoint``). A module is used in evaluation mode, as a frozen copy.
    out_shape : tuple of int, default=None
        Shape of one measurement; None: what ``fn`` returns in a dry run.
    takes_params : bool, default=False
        Whether the operator differs by row: then ``fn(x, params)``, with what ``predict(Y,
        op_params=params)`` got for these rows, shape ``(n, ...)``. Needs ``out_shape``.

    Attributes
    ----------
    measurement_shape_ : tuple of int
        Bound operators only.

    Raises
    ------
    TypeError
        By ``bind``: ``fn`` is not callable, or returns something else than a real tensor.
    ValueError
        By ``bind``: ``fn`` loses rows, mixes them, or cannot be differentiated.

    Examples
    --------
    >>> import torch
    >>> from skaipo.operators import NonlinearOperator
    >>> op = NonlinearOperator(torch.sin)
    >>> op(torch.zeros(1, 4)).shape
    torch.Size([1, 4])
    """

    is_linear = False

    def __init__(self, fn, *, out_shape=None, takes_params=False):
        self.fn = fn
        self.out_shape = out_shape
        self.takes_params = takes_params

    def _setup(self):
        if not callable(self.fn):
            raise TypeError(
                f"{type(self).__name__}(fn) must be a function of a tensor of images "
                f"(n, *event_shape), got {type(self.fn).__name__}."
            )
        refuse_numpy(f"{type(self).__name__}(fn)", self.fn)
        shape = self.out_shape
        if shape is None and self.takes_params:
            raise ValueError(
                f"{type(self).__name__}(takes_params=True) needs out_shape, the shape of one "
                f"measurement: there are no parameters yet to try fn with."
            )
        if shape is None:
            self.measurement_shape_ = self._tried()
        else:
            shape = (shape,) if isinstance(shape, numbers.Integral) else tuple(shape)
            if not shape or not all(isinstance(s, numbers.Integral) and s > 0 for s in shape):
                raise ValueError(
                    f"{type(self).__name__}(out_shape) must hold positive sizes, got "
                    f"{self.out_shape!r}."
                )
            self.measurement_shape_ = tuple(int(s) for s in shape)
            if not self.takes_params:
                found = self._tried()
                if math.prod(found) != math.prod(shape):
                    raise ValueError(
                        f"{type(self).__name__}: fn makes measurements of shape {found}, but "
                        f"out_shape is {self.out_shape!r}."
                    )

    def _given(self, params):
        # (The parameters are kept by the base class.)
        pass

    def _tried(self):
        with torch.inference_mode(False):  # in which nothing would have a gradient
            return self._dry_run()

    def _dry_run(self):
        """The shape of a measurement, by a call with two images."""
        name = type(self).__name__
        # (Any values will do for shapes; of integers between 0 and 1 few functions make NaN.)
        values = np.random.default_rng(0).uniform(0.25, 0.75, (2, self.n_features_in_))
        x = torch.from_numpy(values).to(torch.get_default_dtype())
        try:
            with torch.enable_grad():
                y = self._call(x.requires_grad_())
        except Exception as error:
            if "numpy()" in str(error):  # where torch itself advises to detach
                what = "it leaves torch for numpy, where there are no gradients. Write it in "
                what += "torch, all the way: torch.sqrt for np.sqrt, and so on."
            else:
                hint = layout_hint(self._function(x), x.detach(), self.event_shape_, "fn")
                what = f"{type(error).__name__}: {error}. {hint}"
            raise ValueError(
                f"{name}: fn failed on two images of shape {self.event_shape_}, values between 0 "
                f"and 1: {what}"
            ) from error
        if not isinstance(y, torch.Tensor) or y.is_complex() or not y.is_floating_point():
            got = f"a tensor of {y.dtype}" if isinstance(y, torch.Tensor) else type(y).__name__
            raise TypeError(
                f"{name}: fn must return a tensor of real floats, got {got}. Return the real and "
                f"imaginary parts of complex numbers, and leave conversions to numpy out."
            )
        if y.ndim < 1 or len(y) != 2:
            raise ValueError(
                f"{name}: fn must keep the rows, (n, *event_shape) to (n, *measurement_shape); of "
                f"images {(2, *self.event_shape_)} it made {tuple(y.shape)}."
            )
        if not self._has_slope(x.detach()):
            raise ValueError(
                f"{name}: the result of fn does not depend on the images in a way that autograd "
                f"can follow: its gradient is zero (a detach, numpy, rounding?). For rounding and "
                f"1-bit measurements use their likelihood, noise=QuantizationNoise(...) or "
                f"BernoulliNoise(...)."
            )
        with torch.no_grad():
            alone = self._call(x.detach()[:1])
        scale = float(y.detach().abs().max())
        away = float((alone - y.detach()[:1]).abs().max()) if y.numel() else 0.0
        if away > 1e-3 * scale:
            raise ValueError(
                f"{name}: what fn makes of an image depends on the other images of the batch, by "
                f"{away:.3g} of {scale:.3g} (a mean over the batch, a batch norm, random noise?). "
                f"Reconstructions would depend on their neighbours."
            )
        return tuple(y.shape[1:]) if y.ndim > 1 else (1,)

    def _has_slope(self, x):
        """Whether the gradient is other than zero anywhere, for values of many sizes."""
        for size in (1.0, -1.0, 10.0, 100.0, 1000.0):
            images = (size * x).requires_grad_()
            with torch.enable_grad():
                y = self._call(images)
            if not y.requires_grad:
                return False
            # (Weights, for functions whose values have a constant sum.)
            weights = torch.linspace(1, 2, y.numel()).to(y).reshape(y.shape)
            (gradient,) = torch.autograd.grad(y, images, weights, allow_unused=True)
            if gradient is not None and bool((gradient != 0).any()):
                return True
        return False

    def _function(self, like):
        """``fn``; if it is a module, a frozen copy of the dtype and device of a tensor."""
        if not isinstance(self.fn, nn.Module):
            return self.fn

        def make():
            module = copy.deepcopy(self.fn).eval().requires_grad_(False)
            # (Module.to would take the imaginary parts from complex buffers.)
            return module._apply(
                lambda t: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
            )

        return self._cached(("fn", like.device, like.dtype), make)

    def _call(self, x):
        x = x.reshape(len(x), *self.event_shape_)
        params = (self._params,) if "_n_given" in self.__dict__ else ()
        return self._function(x)(x, *params)

    def forward(self, x):
        self._check(x)
        y = self._call(x).reshape(len(x), -1)
        if y.shape[1] != self.n_measurements_:
            raise ValueError(
                f"{type(self).__name__}: fn made {y.shape[1]} values of an image, and "
                f"{self.n_measurements_} when it was bound."
            )
        return y


class Clipping(NonlinearOperator):
    """A sensor that saturates: ``f(x) = min(max(x, low), high)``, pixel by pixel.

    The noise is that which comes after the sensor has saturated. Where it comes before, so that
    what is beyond an end is read as the end itself, the model is a likelihood without kinks:
    ``Denoising()`` with :class:`~skaipo.noise.CensoredGaussianNoise`.

    Parameters
    ----------
    low, high : float or None, default=None
        Ends of the range; None: none. At least one is needed.
    softness : float, default=0
        Width of the transition at an end, in the units of the images: ``max(x, low)`` becomes
        ``low + softness * log(1 + exp((x - low) / softness))``, at most ``0.7 * softness`` above
        it. At a kink many solutions lie, and no gradient tells a solver so: rows stop there
        "stalled" or at their budget. With a softness of about the noise's sigma they converge.

    Raises
    ------
    ValueError
        By ``bind``: no end is given, ``low >= high``, or a negative softness.
    """

    def __init__(self, low=None, high=None, softness=0.0):
        self.low = low
        self.high = high
        self.softness = softness

    def _setup(self):
        for name in ("low", "high"):
            end = getattr(self, name)
            if end is not None and (not isinstance(end, numbers.Real) or not math.isfinite(end)):
                raise ValueError(f"Clipping({name}) must be a finite number or None, got {end!r}.")
        if self.low is None and self.high is None:
            raise ValueError("Clipping needs low, high or both.")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"Clipping needs low < high, got {self.low} and {self.high}.")
        if not isinstance(self.softness, numbers.Real) or not 0 <= self.softness < math.inf:
            raise ValueError(f"Clipping(softness) must be at least 0, got {self.softness!r}.")
        self.measurement_shape_ = self.event_shape_

    def _call(self, x):
        width = self.softness
        if width == 0:
            return x.clamp(self.low, self.high)
        # The difference of two soft steps: monotonous, and between low and high where both are.
        out = x
        if self.low is not None:
            out = self.low + width * nn.functional.softplus((x - self.low) / width)
        if self.high is not None:
            out = out - width * nn.functional.softplus((x - self.high) / width)
        return out


class Linearisation(Operator):
    """What a bound operator is near some images: ``f(x0) + J (x - x0)``, row by row.

    Row ``i`` belongs to ``x0[i]``. The products with the Jacobian and its transpose come from one
    graph of ``f``, which lives as long as this does.

    Parameters
    ----------
    op : Operator
        Bound.
    x0 : torch.Tensor of shape (n, d)
    """

    def __init__(self, op, x0):
        for name in ("event_shape", "n_features_in", "n_measurements", "measurement_shape"):
            setattr(self, f"{name}_", getattr(op, f"{name}_"))
        self.measured_, self.precision_ = op.measured_, x0.dtype
        self._measured = op.measured(x0)
        # Its rows are not alike.
        self._n_given = len(x0)
        with torch.inference_mode(False), torch.enable_grad():
            self._x0 = x0.detach().clone().requires_grad_()
            self._y0 = op.forward(self._x0)
            self._w = torch.zeros_like(self._y0, requires_grad=True)
            # Linear in w: its derivative is the Jacobian.
            (self._pull,) = torch.autograd.grad(self._y0, self._x0, self._w, create_graph=True)
        self._constant = self._y0.detach() - self.linear(self._x0.detach())

    def _setup(self):
        raise TypeError("A Linearisation is made of a bound operator.")

    def _derivative(self, of, by, v):
        with torch.inference_mode(False):
            (out,) = torch.autograd.grad(
                of, by, v.to(of).clone(), retain_graph=True, materialize_grads=True
            )
        return out.to(v.dtype)

    def linear(self, x):
        if not self._pull.requires_grad:
            return torch.zeros_like(self._y0).to(x.dtype)
        return self._derivative(self._pull, self._w, x)

    def forward(self, x):
        return self._constant.to(x.dtype) + self.linear(x)

    def _origin(self, like):
        return self._constant.to(like.dtype)

    def adjoint(self, y):
        return self._derivative(self._y0, self._x0, y)

    def measured(self, like):
        return self._measured

    def __getstate__(self):
        raise TypeError("A Linearisation does not pickle: it holds a graph.")
