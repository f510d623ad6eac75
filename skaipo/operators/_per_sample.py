"""A matrix for each row."""

import torch

from skaipo.operators._base import Operator
from skaipo.operators._linear import _inverse_root, _is_int
from skaipo.operators._projector import CorrectingProjector, check_same_rows

__all__ = ["PerSampleMatrix"]


class PerSampleMatrix(Operator):
    """A linear operator ``A_i x_i`` whose matrix is another one for each row.

    The matrices are parameters of the rows: ``op(X, params=A)``, and ``op_params=A`` for the
    estimators, with ``A`` of shape (n, m, d).

    Parameters
    ----------
    n_measurements : int
        Number of measurements ``m``.

    Raises
    ------
    TypeError, ValueError
        By ``bind``: ``n_measurements`` is not an integer of at least 1.

    Notes
    -----
    Projections factorise an m x m matrix per row, in float64. Where rows of a matrix depend on each
    other, singular values below about 1e-7 of its largest count as zero.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import PerSampleMatrix
    >>> A = np.array([[[1.0, 1.0]], [[1.0, -1.0]]])  # a sum, and a difference
    >>> PerSampleMatrix(1)(np.array([[3.0, 1.0], [3.0, 1.0]]), params=A)
    array([[4.],
           [2.]])
    """

    takes_params = True

    def __init__(self, n_measurements):
        self.n_measurements = n_measurements

    def _setup(self):
        if not _is_int(self.n_measurements):
            raise TypeError(
                f"PerSampleMatrix(n_measurements) must be an integer, got "
                f"{self._describe(self.n_measurements)}. "
                "The matrices themselves are parameters of the rows: params, op_params."
            )
        if self.n_measurements < 1:
            raise ValueError(
                f"PerSampleMatrix(n_measurements) must be at least 1, got {self.n_measurements}."
            )
        self.n_measurements_ = int(self.n_measurements)

    def _wanted_params(self):
        return f"matrices of shape (n, {self.n_measurements}, {self.n_features_in_})"

    def _check_given(self, params):
        if params.shape[1:] != (self.n_measurements_, self.n_features_in_):
            raise ValueError(
                f"PerSampleMatrix takes {self._wanted_params()}, got shape {tuple(params.shape)}."
            )

    def _given(self, params):
        self._matrices = params

    def forward(self, x):
        self._check(x)
        return torch.einsum("nmd,nd->nm", self._matrices.to(x), x)

    def adjoint(self, y):
        self._check_y(y)
        return torch.einsum("nmd,nm->nd", self._matrices.to(y), y)

    def projector(self, y, observed=None):
        return _RowsProjector(self, y, self._observed(y, observed))

    def norm(self):
        self._check_ready()
        return torch.linalg.matrix_norm(self._matrices.to("cpu", torch.float64), 2)


class _RowsProjector(CorrectingProjector):
    """x - A^T (A A^T)^+ (A x - y), each row with its own A."""

    def __init__(self, op, y, observed):
        self._op, self._y = op, y.detach()
        # mps has no float64
        self._device = torch.device("cpu") if y.device.type == "mps" else y.device
        with torch.inference_mode(False), torch.no_grad():
            self._keep = torch.ones_like(y, dtype=torch.bool) if observed is None else observed
            a = op._matrices.to(self._device, torch.float64)
            self._root = _inverse_root(a @ a.mT, self._keep.to(self._device))

    def _correct(self, x, y):
        check_same_rows(x, self._y)
        for _ in range(2):  # the second time removes what rounding left
            residual = torch.where(self._keep, self._op.forward(x) - y, 0.0)
            r = residual.to(self._device, torch.float64)[:, None]
            r = ((r @ self._root) @ self._root.mT)[:, 0].to(x)
            x = x - self._op.adjoint(torch.where(self._keep, r, 0.0))
        return x
