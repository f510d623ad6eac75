"""Operators made of others: one after the other, and several of the same scene."""

import numpy as np
import torch
from sklearn.base import clone

from skaipo.operators._base import Operator
from skaipo.operators._convert import as_operator
from skaipo.operators._pixels import Denoising, PixelOperator

__all__ = ["Compose", "Stack"]


class _Combined(Operator):
    """What operators made of others share: ``_recipes`` gives the parts, ``_setup`` binds them."""

    _parts = None

    @property
    def _current(self):
        """The parts, bound where this one is."""
        return self._recipes() if self._parts is None else self._parts

    @property
    def is_linear(self):
        return all(getattr(part, "is_linear", True) for part in self._current)

    @property
    def precision_(self):
        precisions = [getattr(part, "precision_", torch.float64) for part in self._current]
        return max(precisions, key=lambda dtype: torch.finfo(dtype).eps)

    # One array of parameters has one reader: the part that needs it, or the only one that takes it.

    @property
    def _reader(self):
        parts = list(enumerate(self._current))
        needing = [i for i, part in parts if getattr(part, "needs_params", False)]
        taking = [i for i, part in parts if getattr(part, "takes_params", False)]
        candidates = needing or taking
        return candidates[0] if len(candidates) == 1 else None

    @property
    def takes_params(self):
        return self._reader is not None

    @property
    def needs_params(self):
        return any(getattr(part, "needs_params", False) for part in self._current)

    def _check_reader(self):
        if self.needs_params and self._reader is None:
            names = [type(part).__name__ for part in self._current if part.needs_params]
            raise ValueError(
                f"{type(self).__name__} has {len(names)} operators that need parameters for each "
                f"row ({', '.join(names)}), but one array of them is all that it can get: fix "
                "those of the others."
            )

    def _wanted_params(self):
        return self._parts[self._reader]._wanted_params()

    def _check_given(self, params):
        self._parts[self._reader]._check_given(params)

    def _given(self, params):
        self._parts = list(self._parts)
        self._parts[self._reader] = self._parts[self._reader].given(params)

    def __sklearn_clone__(self):
        # Parts are recipes, too: set_params of the copy must leave the original's alone.
        return type(self)(**{k: _cloned(v) for k, v in self.get_params(deep=False).items()})


def _cloned(value):
    if isinstance(value, list | tuple):
        return type(value)(_cloned(item) for item in value)
    return clone(value) if isinstance(value, Operator) else value


class Compose(_Combined):
    """One operator after another: ``f(x) = outer(inner(x))``.

    For three write ``Compose(a, Compose(b, c))``.

    Parameters
    ----------
    outer : Operator, or what :func:`as_operator` takes
        Measures what ``inner`` gives, as an image of that shape.
    inner : Operator, or what :func:`as_operator` takes
        Measures the image.

    Raises
    ------
    ValueError
        By ``bind``: ``outer`` does not measure images of the shape that ``inner`` gives; or both
        need parameters for each row.
    TypeError
        By ``bind``: a part is not an operator.

    Notes
    -----
    It is linear where both are. The parameters of the parts are ``outer__name`` and
    ``inner__name`` for ``set_params`` and grid searches. Where a part takes parameters for each
    row, they are handed on to it.

    The projection is that of ``inner`` where ``outer`` picks some of its values (``Inpainting``);
    in general it is found by conjugate gradients.

    Examples
    --------
    A blurred signal, half of which is measured:

    >>> import numpy as np
    >>> from skaipo.operators import Blur, Compose, Inpainting
    >>> op = Compose(Inpainting([True, False, True, False]), Blur([0.5, 0.5, 0.0]))
    >>> op(np.array([[1.0, 3.0, 5.0, 7.0]])).round(6)
    array([[2., 0., 6., 0.]])
    """

    def __init__(self, outer, inner):
        self.outer = outer
        self.inner = inner

    @property
    def is_complex(self):
        """Whether a measurement is real parts, then imaginary ones; None: nobody can tell."""
        outer, inner = (getattr(part, "is_complex", False) for part in self._recipes())
        return None if inner is not False and outer is False else outer

    def _recipes(self):
        return [self.outer, self.inner]

    def _setup(self):
        outer, inner = (as_operator(part) for part in self._recipes())
        inner = inner.bind(self.event_shape_)
        try:
            outer = outer.bind(inner.measurement_shape_)
        except ValueError as error:
            raise ValueError(
                f"Compose: the outer operator, {outer!r}, gets what the inner one, {inner!r}, "
                f"measures, of shape {inner.measurement_shape_}, and says: {error}"
            ) from error
        self._parts = [outer, inner]
        self._check_reader()
        self.measurement_shape_ = outer.measurement_shape_
        self.measured_ = outer.measured_

    def forward(self, x):
        self._check(x)
        outer, inner = self._parts
        return outer.forward(inner.forward(x))

    def linear(self, x):
        self._check_linear("linear part")
        self._check(x)
        outer, inner = self._parts
        return outer.linear(inner.linear(x))

    def adjoint(self, y):
        self._check_linear("adjoint")
        self._check_y(y)
        outer, inner = self._parts
        return inner.adjoint(outer.adjoint(y))

    def projector(self, y, observed=None):
        outer, inner = self._parts
        if isinstance(inner, Denoising):
            return outer.projector(y, observed)
        if isinstance(outer, PixelOperator) and self.is_linear:
            observed = self._observed(y, observed)
            if observed is not None:
                observed = observed.expand(y.shape)
            return inner.projector(y, observed)
        return super().projector(y, observed)

    def measured(self, like):
        return self._parts[0].measured(like)

    def _measures_all(self):
        return self._parts[0]._measures_all()


class Stack(_Combined):
    """Several measurements of one scene: ``f(x) = (f_1(x), f_2(x), ...)``.

    A measurement is a flat row: all the numbers of the first operator, then those of the second...
    :meth:`join` makes it of arrays, :meth:`split` takes it apart.

    Parameters
    ----------
    ops : list of Operator, or of what :func:`as_operator` takes

    Raises
    ------
    ValueError
        By ``bind``: an operator does not measure such images; or several need parameters for each
        row.
    TypeError
        By ``bind``: ``ops`` is no list of operators, or empty.

    Notes
    -----
    It is linear where all are. The parameters of the parts are ``op0__name``, ``op1__name``... for
    ``set_params`` and grid searches. Where a part takes parameters for each row, they are handed on
    to it. Projections are found by conjugate gradients.

    For noise of another size in each of them, give ``GaussianNoise`` an array with a value for each
    number of the row.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import Denoising, Downsampling, Stack
    >>> op = Stack([Downsampling(2), Denoising()])
    >>> op(np.array([[1.0, 3.0, 5.0, 7.0]])).round(6)
    array([[2., 6., 1., 3., 5., 7.]])
    """

    def __init__(self, ops):
        self.ops = ops

    def get_params(self, deep=True):
        """Parameters, those of the parts included.

        Parameters
        ----------
        deep : bool, default=True

        Returns
        -------
        dict
        """
        params = {"ops": self.ops}
        for i, op in enumerate(self.ops if deep and _is_list(self.ops) else ()):
            params[f"op{i}"] = op
            if isinstance(op, Operator):
                params.update({f"op{i}__{key}": value for key, value in op.get_params().items()})
        return params

    def set_params(self, **params):
        """Set parameters, ``op0`` and ``op0__name`` among them.

        Parameters
        ----------
        **params : dict

        Returns
        -------
        self : Stack
        """
        if "ops" in params:
            self.ops = params.pop("ops")
        for i in range(len(self.ops)):
            if f"op{i}" in params:
                ops = list(self.ops)
                ops[i] = params.pop(f"op{i}")
                self.ops = ops
        return super().set_params(**params)

    @property
    def is_complex(self):
        """None where a part's measurements are complex: what is where is not for others to know."""
        mixed = any(getattr(part, "is_complex", False) is not False for part in self._recipes())
        return None if mixed else False

    def _recipes(self):
        return list(self.ops) if _is_list(self.ops) else []

    def _setup(self):
        if not (_is_list(self.ops) and len(self.ops)):
            raise TypeError(
                f"Stack(ops) needs a list of operators, [Blur(kernel), Downsampling(2)], got "
                f"{self._describe(self.ops)}."
            )
        self._parts = [as_operator(op).bind(self.event_shape_) for op in self.ops]
        self._check_reader()
        self._sizes = [part.n_measurements_ for part in self._parts]
        self.n_measurements_ = sum(self._sizes)
        self.measured_ = np.concatenate([part.measured_ for part in self._parts])

    def forward(self, x):
        self._check(x)
        return torch.cat([part.forward(x) for part in self._parts], 1)

    def linear(self, x):
        self._check_linear("linear part")
        self._check(x)
        return torch.cat([part.linear(x) for part in self._parts], 1)

    def adjoint(self, y):
        self._check_linear("adjoint")
        self._check_y(y)
        pieces = zip(self._parts, y.split(self._sizes, 1), strict=True)
        return sum(part.adjoint(piece) for part, piece in pieces)

    def projector(self, y, observed=None):
        if len(self._parts) == 1:
            return self._parts[0].projector(y, observed)
        return super().projector(y, observed)

    def measured(self, like):
        pieces = [part.measured(like) for part in self._parts]
        n = max(len(piece) for piece in pieces)
        return torch.cat([piece.expand(n, -1) for piece in pieces], 1)

    def _measures_all(self):
        return all(part._measures_all() for part in self._parts)

    @staticmethod
    def join(measurements):
        """The measurements of this operator, from those of its parts.

        Parameters
        ----------
        measurements : list of array-like, shapes (n, ...)
            One for each part, in order.

        Returns
        -------
        ndarray, shape (n, m)

        Raises
        ------
        ValueError
            If they do not hold the same number of rows.
        """
        arrays = [np.asarray(array) for array in measurements]
        lengths = [len(array) for array in arrays]
        if len(set(lengths)) != 1:
            raise ValueError(f"Stack.join needs as many rows from each part, got {lengths}.")
        return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)

    def split(self, Y):
        """Measurements of this operator as those of its parts (bound operators only).

        Parameters
        ----------
        Y : ndarray or Tensor, shape (n, m)

        Returns
        -------
        list of ndarray or Tensor, shapes (n, *measurement_shape_)

        Raises
        ------
        ValueError
            If ``Y`` has another shape.
        """
        self._check_bound()
        if Y.ndim != 2 or Y.shape[1] != self.n_measurements_:
            raise ValueError(
                f"Stack.split takes measurements of shape (n, {self.n_measurements_}), got "
                f"{tuple(Y.shape)}."
            )
        pieces, start = [], 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            piece = Y[:, start : start + size]
            pieces.append(piece.reshape(len(Y), *part.measurement_shape_))
            start += size
        return pieces

    def _describe(self, value):
        if _is_list(value):
            return f"[{', '.join(super(Stack, self)._describe(item) for item in value)}]"
        return super()._describe(value)


def _is_list(value):
    return isinstance(value, list | tuple)
