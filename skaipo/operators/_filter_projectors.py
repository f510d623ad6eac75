"""Projections for filters: by the Fourier transform, and by the singular vectors of the axes."""

import torch

from skaipo.operators._projector import AffineProjector, CorrectingProjector, check_same_rows

__all__ = ["FilterProjector", "SeparableProjector", "SplitProjector", "wide"]

# Singular values below this part of the largest count as zero.
_CUTOFF = 1e-7


def wide(device):
    """Float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _FormulaProjector(CorrectingProjector):
    """``x - A^+ (A x - y)``, in float64; subclasses write ``_inverse(residual)``."""

    def __init__(self, op, y):
        self._op = op
        with torch.inference_mode(False), torch.no_grad():
            self._y = y.detach().to(wide(y.device))
            self._prepare()

    def _correct(self, x, y):
        self._op._check(x)
        check_same_rows(x, self._y)
        images = x.to(self._y.dtype)
        return (images - self._inverse(self._op.forward(images) - y)).to(x.dtype)

    def __call__(self, x):
        # Float64 whatever the images come in.
        return self._correct(x, self._y)


class FilterProjector(_FormulaProjector):
    """``A^+ = A^T (A A^T)^+`` where ``A A^T`` is diagonal in the Fourier domain."""

    def _prepare(self):
        gain = self._op._gain(self._y)
        real = gain > _CUTOFF**2 * gain.amax((-3, -2, -1), keepdim=True)
        self._inverse_gain = torch.where(real, 1 / gain, 0.0)

    def _inverse(self, residual):
        op = self._op
        channels, height, width = op._image
        step_h, step_w = op._factors
        residual = residual.reshape(-1, channels, height // step_h, width // step_w)
        return op.adjoint(op._filter(residual, self._inverse_gain).flatten(1))


class SeparableProjector(_FormulaProjector):
    """``A`` is a Kronecker product, and so are its singular vectors and values."""

    def _prepare(self):
        (u_h, s_h, vt_h), (u_w, s_w, vt_w) = self._op._axes(self._y.device)
        values = s_h[:, None] * s_w
        self._inverse_values = torch.where(values > _CUTOFF * values[0, 0], 1 / values, 0.0)
        self._left, self._right = (u_h.mT, u_w), (vt_h.mT, vt_w)

    def _inverse(self, residual):
        images = residual.reshape(-1, *self._op._image)
        images = self._inverse_values * (self._left[0] @ images @ self._left[1])
        return (self._right[0] @ images @ self._right[1]).flatten(1)


class SplitProjector(AffineProjector):
    """Rows that were measured whole by a formula, the others by conjugate gradients."""

    def __init__(self, op, y, observed, whole):
        self._parts = []
        for rows, seen in ((whole, None), (~whole, observed)):
            index = rows.nonzero().flatten()
            part = op.given(op._params[index]) if "_n_given" in op.__dict__ else op
            seen = None if seen is None else seen[index]
            self._parts.append((index, part.projector(y[index], seen)))
        self._y = y
        self._order = torch.cat([index for index, _ in self._parts]).argsort()

    def _apply(self, method, x):
        check_same_rows(x, self._y)
        parts = [getattr(projector, method)(x[rows]) for rows, projector in self._parts]
        return torch.cat(parts)[self._order]

    def __call__(self, x):
        return self._apply("__call__", x)

    def null(self, v):
        return self._apply("null", v)
