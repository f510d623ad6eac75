"""Frequencies of an image."""

import math

import numpy as np
import torch

from skaipo.operators._base import Operator
from skaipo.operators._pixels import as_mask
from skaipo.operators._projector import CorrectingProjector, check_same_rows

__all__ = ["MaskedFourier"]


class MaskedFourier(Operator):
    """Some of the frequencies of an image, as magnetic resonance measures them.

    The discrete Fourier transform of each channel, with norm="ortho", at the frequencies under a
    mask. Complex numbers are two real channels: images (C, H, W) have measurements (2 C, H, W),
    first the real parts of all channels, then the imaginary parts; (H, W) gives (2, H, W), and
    signals (d,) give (2, d). What ``Y`` holds outside of the mask is ignored, and ``f(x)`` has
    zeros there. :meth:`to_real` and :meth:`to_complex` change between that and complex arrays.

    Parameters
    ----------
    mask : array-like of bool (or 0/1), shape (H, W), or (d,) for signals
        True where a frequency is measured, in the order of ``numpy.fft.fft2``: frequency zero is
        the first entry. Where it is in the middle use ``np.fft.ifftshift(mask)``.

    Raises
    ------
    ValueError
        By ``bind``: a mask of another shape than the images, not boolean, or False everywhere.

    Notes
    -----
    The images are real, so that the values at the frequencies k and -k are conjugate. Where both
    are measured they say the same twice, and a projection goes to their mean. It is a formula for
    any mask, and for any pattern of NaN.

    The numbers are real and imaginary parts: noise of standard deviation sigma in each of them is
    ``GaussianNoise(sigma)``.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import MaskedFourier
    >>> mask = np.array([[True, True], [False, False]])
    >>> y = MaskedFourier(mask)(np.array([[[[1.0, 2.0], [3.0, 4.0]]]]))
    >>> y.shape
    (1, 2, 2, 2)
    >>> MaskedFourier.to_complex(y)
    array([[[[ 5.+0.j, -1.+0.j],
             [ 0.+0.j,  0.+0.j]]]])
    """

    # What PhaseRetrieval asks: real parts first, then as many imaginary ones.
    is_complex = True

    def __init__(self, mask):
        self.mask = mask

    def _setup(self):
        shape = self.event_shape_
        if len(shape) > 3:
            raise ValueError(
                f"MaskedFourier measures images (C, H, W) or (H, W), or signals (d,), got {shape}."
            )
        mask = as_mask(self.mask, "MaskedFourier")
        if mask.shape != shape[-2:]:
            raise ValueError(
                f"MaskedFourier(mask) has a mask of shape {mask.shape}, but the images (the "
                f"prior's) have shape {shape}: it needs one of shape {shape[-2:]}, the same for "
                "all channels."
            )
        channels = shape[0] if len(shape) == 3 else 1
        self._axes = tuple(range(-min(2, len(shape)), 0))
        self._image = (channels, *shape[-2:])
        self.measurement_shape_ = (2 * channels, *shape[-2:])
        self.measured_ = np.broadcast_to(mask, self.measurement_shape_).flatten()
        opposite = np.roll(np.flip(mask), 1, self._axes)
        self._norm = 1.0 if (mask & opposite).any() else math.sqrt(0.5)

    def _keep(self, values):
        return torch.where(self.measured(values), values, values.new_zeros(()))

    def forward(self, x):
        self._check(x)
        spectrum = torch.fft.fftn(x.reshape(-1, *self._image), dim=self._axes, norm="ortho")
        return self._keep(torch.cat((spectrum.real, spectrum.imag), 1).flatten(1))

    def adjoint(self, y):
        self._check_y(y)
        return self._image_of(self._keep(y))

    def _image_of(self, y):
        """Real part of the inverse transform."""
        real, imaginary = y.reshape(-1, 2, *self._image).unbind(1)
        spectrum = torch.complex(real, imaginary)
        return torch.fft.ifftn(spectrum, dim=self._axes, norm="ortho").real.flatten(1)

    def _opposite(self, parts):
        """What is at frequency -k, for parts (n, 2, C, H, W) at k."""
        return parts.flip(self._axes).roll((1,) * len(self._axes), self._axes)

    def projector(self, y, observed=None):
        return _HermitianProjector(self, y, self._observed(y, observed))

    def norm(self):
        return self._norm

    @staticmethod
    def to_real(kspace):
        """Complex values as the real measurements of this operator.

        Parameters
        ----------
        kspace : array-like or Tensor of complex, shape (n, C, H, W), (n, H, W) or (n, d)

        Returns
        -------
        ndarray or Tensor, shape (n, 2 C, H, W), (n, 2, H, W) or (n, 2 d)

        Raises
        ------
        ValueError
            If it has other axes.
        """
        if not isinstance(kspace, torch.Tensor):
            kspace = np.asarray(kspace)
        if kspace.ndim not in (2, 3, 4):
            raise ValueError(
                f"to_real takes complex values of shape (n, C, H, W), (n, H, W) or (n, d), got "
                f"{tuple(kspace.shape)}."
            )
        if kspace.ndim == 3:
            kspace = kspace[:, None]
        if isinstance(kspace, torch.Tensor):
            imaginary = kspace.imag if kspace.is_complex() else torch.zeros_like(kspace)
            return torch.cat((kspace.real, imaginary), 1)
        return np.concatenate((kspace.real, kspace.imag), axis=1)

    @staticmethod
    def to_complex(Y):
        """Measurements as complex values: the first half of axis 1 and ``i`` times the second.

        Parameters
        ----------
        Y : array-like or Tensor, shape (n, 2 C, H, W) or (n, 2 d)

        Returns
        -------
        ndarray or Tensor of complex, shape (n, C, H, W) or (n, d)

        Raises
        ------
        ValueError
            If axis 1 has no halves.
        """
        if not isinstance(Y, torch.Tensor):
            Y = np.asarray(Y)
        if Y.ndim < 2 or Y.shape[1] % 2:
            raise ValueError(
                f"to_complex takes measurements whose axis 1 holds real and imaginary parts, got "
                f"shape {tuple(Y.shape)}."
            )
        half = Y.shape[1] // 2
        return Y[:, :half] + 1j * Y[:, half:]


class _HermitianProjector(CorrectingProjector):
    """Projection where measurements are real and imaginary parts of a real image's transform.

    With ``u, v`` orthonormal coordinates of the pair (k, -k) the transform is
    ``(u + i v) / sqrt(2)`` at k and its conjugate at -k: each part that is measured once or twice
    determines its coordinate, as its mean, and the others stay as they are.
    """

    def __init__(self, op, y, observed):
        self._op, self._y = op, y.detach()
        with torch.inference_mode(False), torch.no_grad():
            if observed is None:
                observed = torch.ones_like(y[:1], dtype=torch.bool)
            self._observed = observed
            counts = observed.reshape(-1, 2, *op._image).to(y.dtype)
            self._counts = (counts + op._opposite(counts)).clamp_min(1)
            # The values at k and -k are conjugate.
            self._sign = torch.tensor([1.0, -1.0]).to(y).reshape(2, *(1,) * len(op._image))

    def _correct(self, x, y):
        op = self._op
        op._check(x)
        check_same_rows(x, self._y)
        residual = torch.where(self._observed, op.forward(x) - y, x.new_zeros(()))
        parts = residual.reshape(-1, 2, *op._image)
        parts = (parts + self._sign.to(x) * op._opposite(parts)) / self._counts.to(x)
        return x - op._image_of(parts.flatten(1))
