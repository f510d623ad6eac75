"""Operators that somebody else wrote: what their adapters share."""

import math
import numbers
import operator
import weakref

import torch

from skaipo.operators._base import Operator
from skaipo.operators._checks import check_adjoint, check_measures, is_linear
from skaipo.operators._packing import Packed, packed
from skaipo.operators._pixels import squeezed

__all__ = ["TOLERANCES", "ForeignOperator", "Product"]

# Relative errors that pass for rounding: of products, and of sums of products.
TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 2e-3)}
# What the checks found, by the foreign object: an estimator binds its operator in every call.
_FACTS = {}


class ForeignOperator(Operator):
    """What the adapters share; :func:`as_operator` makes them.

    Parameters
    ----------
    obj : object
        What measures. It is used in place, and never copied or changed.
    in_shape : tuple of int, default=None
        Shape of one image as ``obj`` takes it. Default: the prior's.
    out_shape : tuple of int, default=None
        Shape of one measurement. Default: what ``obj`` says or returns.

    Notes
    -----
    ``bind`` tries the object on a few random images, once: that its measurements are finite,
    repeatable and independent of each other, that it is linear, and that its adjoint is one.
    """

    def __init__(self, obj, *, in_shape=None, out_shape=None):
        self.obj = obj
        self.in_shape = in_shape
        self.out_shape = out_shape

    # ------------------------------------------------------------------------------ for subclasses

    def _image_shape(self):
        """Shape of the images that the object takes, when ``in_shape`` does not say."""
        return self.event_shape_

    def _examine(self):
        """Try the object; return a dict of what was found, or raise."""
        raise NotImplementedError(f"{type(self).__name__} has no _examine.")

    def _identity(self):
        """What else than the object decides what :meth:`_examine` finds."""
        return ()

    def _portable(self):
        """The object as it is to be pickled."""
        return self.obj

    # ------------------------------------------------------------------------------------ binding

    @property
    def _name(self):
        given = getattr(self.obj, "__name__", None)
        return f"The function {given}" if isinstance(given, str) else type(self.obj).__name__

    def _setup(self):
        self.in_shape_ = self._image_shape() if self.in_shape is None else self.in_shape
        self.in_shape_ = as_shape("in_shape", self.in_shape_)
        if math.prod(self.in_shape_) != self.n_features_in_:
            raise ValueError(
                f"{self._name} takes images of shape {self.in_shape_} "
                f"({math.prod(self.in_shape_)} features), but the images (the prior's) have shape "
                f"{self.event_shape_} ({self.n_features_in_} features)."
            )
        ours, theirs = (squeezed(shape) for shape in (self.event_shape_, self.in_shape_))
        if ours != theirs and sorted(ours) == sorted(theirs):
            raise ValueError(
                f"in_shape={self.in_shape_} has the axes of the images (the prior's), "
                f"{self.event_shape_}, in another order. They are reshaped, not turned, which "
                f"would scramble them: leave in_shape out and turn them in the function, for "
                f"channels last lambda x: f(x.movedim(1, -1))."
            )
        out_shape = None if self.out_shape is None else as_shape("out_shape", self.out_shape)
        known = facts_about(self.obj)
        key = (type(self).__name__, self.in_shape_, out_shape, self._identity())
        if key not in known:
            known[key] = self._examine()
        self._found = known[key]
        self.measurement_shape_ = self._found["shape"] if out_shape is None else out_shape
        self.n_measurements_ = math.prod(self._found["shape"])
        if math.prod(self.measurement_shape_) != self.n_measurements_:
            raise ValueError(
                f"out_shape={self.out_shape} has {math.prod(self.measurement_shape_)} entries, but "
                f"{self._name} makes measurements of shape {self._found['shape']} "
                f"({self.n_measurements_} entries)."
            )
        self.precision_ = self._found["precision"]

    def _check_all(self, measure, linear, adjoint, x, m, precision, remedy):
        """The checks on what passes for linear; whether it is."""
        product, total = TOLERANCES[precision]
        with torch.no_grad():
            check_measures(self._name, measure, x, product)
            straight, error = is_linear(measure, x, total)
        if straight:
            check_adjoint(self._name, linear, adjoint, x, m, product, remedy)
        return straight, error

    # ----------------------------------------------------------------------------------- pickling

    def __copy__(self):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_bound_params", None)
        state["obj"] = packed(self._portable(), self._name)
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if isinstance(self.obj, Packed):
            self.obj = self.obj.open()
        if "event_shape_" in self.__dict__:
            self._bound_params = self.get_params()


class Product(torch.autograd.Function):
    """A product with A or A^T in autograd: the derivative of each is the product with the other."""

    @staticmethod
    def forward(rows, op, transposed):
        return op._product(rows, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.op, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, grad):
        return Product.apply(grad, ctx.op, not ctx.transposed), None, None


def as_shape(name, shape):
    shape = (shape,) if isinstance(shape, numbers.Integral) else shape
    try:
        shape = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"{name} must be a tuple of sizes, got {shape!r}.") from None
    if not shape or min(shape) < 1:
        raise ValueError(f"{name} must hold positive sizes, got {shape}.")
    return shape


def facts_about(obj):
    """What is known of an object, for as long as it lives."""
    key = id(obj)
    entry = _FACTS.get(key)
    if entry is not None and entry[0]() is obj:
        return entry[1]

    def forget(ref):
        if key in _FACTS and _FACTS[key][0] is ref:
            del _FACTS[key]

    try:
        _FACTS[key] = weakref.ref(obj, forget), {}
    except TypeError:  # it cannot be watched
        return {}
    return _FACTS[key][1]
