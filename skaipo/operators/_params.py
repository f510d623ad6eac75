"""Operators with parameters for each row: its kernel, its mask, its matrix."""

import numpy as np
import torch
from sklearn.exceptions import NotFittedError

__all__ = ["OneRow", "RowParameters"]


class RowParameters:
    """What operators do with parameters for each row; a base of ``Operator``.

    A class that takes them sets ``takes_params`` and writes ``_given``, and ``_check_given`` and
    ``_wanted_params`` for good messages.
    """

    takes_params = False

    @property
    def needs_params(self):
        return self.takes_params

    def check_params(self, params, n, like=None):
        """Validate the parameters of ``n`` rows, once, before :meth:`given` is called often.

        Parameters
        ----------
        params : array-like or Tensor, shape (n, ...), or None
            One entry per row; what an entry is, the class says.
        n : int
            Number of rows.
        like : Tensor, default=None
            The result gets its dtype and device. Default: float64 on the CPU.

        Returns
        -------
        Tensor, shape (n, ...), or None
            A copy; None where none were passed and none are needed.

        Raises
        ------
        TypeError
            If the operator takes no parameters, or they are not real numbers.
        ValueError
            If it needs some and there are none, or their number, shape or values are wrong.
        """
        name = type(self).__name__
        if params is None:
            if not self.needs_params:
                return None
            self._check_bound()
            raise ValueError(
                f"This {name} needs parameters for each row, {self._wanted_params()}, and got "
                "none: pass op_params to the estimator's method, or params to the operator."
            )
        self._refuse_params()
        self._check_bound()
        if isinstance(params, torch.Tensor):
            values = params.detach()
            is_real = not values.is_complex()
        else:
            values = np.asarray(params)
            is_real = values.dtype.kind in "biuf"
        if not is_real:
            raise TypeError(f"{name} takes real parameters, got dtype {values.dtype}.")
        if isinstance(values, np.ndarray):
            values = torch.tensor(np.array(values, dtype=np.float64, order="C"))
        dtype, device = (torch.float64, "cpu") if like is None else (like.dtype, like.device)
        values = values.to(device, dtype, copy=True)
        if values.ndim == 0 or len(values) != n:
            raise ValueError(
                f"{name} takes parameters for each row, {self._wanted_params()}: expected {n} of "
                f"them, got shape {tuple(values.shape)}. For the same in all rows repeat it."
            )
        bad = (~values.reshape(n, -1).isfinite()).any(1).nonzero().flatten().tolist() if n else []
        if bad:
            raise ValueError(
                f"The parameters of {len(bad)} row(s) are not finite, the first in row {bad[0]}."
            )
        self._check_given(values)
        return values

    def given(self, params):
        """The operator for some rows, whose parameters are these.

        Cheap: nothing is checked here that :meth:`check_params` checks.

        Parameters
        ----------
        params : Tensor, shape (n, ...), or None
            From :meth:`check_params`, or some rows of that. None: the operator as it is.

        Returns
        -------
        Operator
            A bound copy whose methods take ``n`` rows, each measured with its own parameters.
            Its ``norm()`` is a float64 tensor (n,). What they say about which measurements exist
            is in :meth:`measured`.

        Raises
        ------
        TypeError
            If the operator takes no parameters.
        """
        if params is None:
            return self
        self._refuse_params()
        self._check_bound()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_cache", None)
        other._n_given, other._params = len(params), params
        other._given(params)
        return other

    def _given(self, params):
        """Hook of classes with parameters for each row: keep what ``params`` (n, ...) says."""
        raise NotImplementedError(f"{type(self).__name__} takes parameters, but has no _given.")

    def _check_given(self, params):
        """Hook: raise ``ValueError`` where parameters (n, ...), finite, are none of this class."""

    def _wanted_params(self):
        """Hook: the shape of the parameters in words, for messages."""
        return "an array of shape (n, ...)"

    def _refuse_params(self):
        if not self.takes_params:
            raise TypeError(
                f"This {type(self).__name__} takes no parameters for each row (op_params): it "
                "measures all rows alike."
            )

    def _check_bound(self):
        if "n_features_in_" not in self.__dict__:
            raise NotFittedError(
                f"This {type(self).__name__} does not know the image shape yet: call "
                "bind(event_shape) and use the operator that it returns."
            )

    def _check_ready(self):
        """Refuse an operator that is not bound, or has not got the parameters that it needs."""
        self._check_bound()
        if self.needs_params and "_n_given" not in self.__dict__:
            raise ValueError(
                f"This {type(self).__name__} needs parameters for each row, "
                f"{self._wanted_params()}: use the operator that given(params) returns."
            )


class OneRow:
    """The operator that one row has, for any number of images."""

    def __init__(self, op, index):
        self._op, self._params = op, op._params[index : index + 1]
        self.n_measurements_, self.n_features_in_ = op.n_measurements_, op.n_features_in_

    def _given(self, n):
        return self._op.given(self._params.expand(n, *self._params.shape[1:]))

    def linear(self, x):
        return self._given(len(x)).linear(x)

    def adjoint(self, y):
        return self._given(len(y)).adjoint(y)
