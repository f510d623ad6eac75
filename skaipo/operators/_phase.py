"""Magnitudes of linear measurements, whose phases are lost."""

import numpy as np
import scipy.sparse as sp
import torch

from skaipo.operators._base import Operator
from skaipo.operators._convert import as_operator
from skaipo.operators._linear import MatrixOperator
from skaipo.operators._nonlinear import NonlinearOperator

__all__ = ["PhaseRetrieval"]


class PhaseRetrieval(NonlinearOperator):
    """Magnitudes of linear measurements, ``f(x) = |A x|``: their phases (or signs) are lost.

    Where ``x`` and ``-x`` (for Fourier measurements also shifts and the flipped image) have the
    same magnitudes it is the prior that tells which one is meant.

    Parameters
    ----------
    A : Operator, or array-like of shape (m, d), real or complex
        Linear. Of an operator that gives complex values as two real channels
        (:class:`MaskedFourier`) the magnitudes are those of the complex values.
    squared : bool, default=False
        Intensities ``|A x|^2`` instead.

    Raises
    ------
    TypeError, ValueError
        By ``bind``: what the linear operator raises, or it is not linear.
    """

    def __init__(self, A, squared=False):
        self.A = A
        self.squared = squared

    def _setup(self):
        op = self.A
        if isinstance(op, torch.Tensor) and op.layout == torch.strided:
            op = op.detach().cpu().numpy()
        is_matrix = isinstance(op, np.ndarray | list | tuple) or sp.issparse(op)
        pairs = is_matrix and np.iscomplexobj(op)
        if pairs:
            stack = sp.vstack if sp.issparse(op) else np.concatenate
            op = stack([op.real, op.imag] if sp.issparse(op) else [np.real(op), np.imag(op)])
        if is_matrix:
            op = MatrixOperator(op)
        elif not isinstance(op, Operator):
            op = as_operator(op)
        pairs = pairs or getattr(op, "is_complex", False)
        if pairs is None:
            raise TypeError(
                f"PhaseRetrieval cannot tell which numbers of {op!r} belong together as real and "
                f"imaginary parts. Take the magnitudes of each complex part by itself, "
                f"Stack([PhaseRetrieval(a), PhaseRetrieval(b)])."
            )
        if getattr(op, "takes_params", False) and op.needs_params:
            raise TypeError(
                f"PhaseRetrieval needs an operator that is the same for all rows, "
                f"{type(op).__name__} takes parameters for each. Use "
                f"NonlinearOperator(fn, takes_params=True)."
            )
        self.linear_ = op.bind(self.event_shape_)
        if not self.linear_.is_linear:
            raise TypeError(
                f"PhaseRetrieval needs a linear operator, {type(op).__name__} is not. For other "
                f"functions use NonlinearOperator(fn)."
            )
        self._pairs = bool(pairs)
        self._n_magnitudes = self.linear_.n_measurements_ // (2 if self._pairs else 1)
        self.measurement_shape_ = (self._n_magnitudes,)
        self.measured_ = self.linear_.measured_[: self._n_magnitudes]

    def _call(self, x):
        y = self.linear_.forward(x)
        power = y.square()
        if self._pairs:
            real, imaginary = power.unflatten(1, (2, self._n_magnitudes)).unbind(1)
            power = real + imaginary
        if self.squared:
            return power
        # Without the square root's infinite slope at zero, where there is no direction either.
        positive = power > 0
        return torch.where(positive, torch.where(positive, power, 1.0).sqrt(), 0.0)
