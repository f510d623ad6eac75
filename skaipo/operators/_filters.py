"""Convolutions, which the Fourier transform makes diagonal or nearly so.

Internally everything is an image (channels, height, width); a signal is one of height 1.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from skaipo.operators._base import Operator
from skaipo.operators._filter_projectors import (
    FilterProjector,
    SeparableProjector,
    SplitProjector,
    wide,
)
from skaipo.operators._linear import _is_int

__all__ = ["Blur", "Downsampling", "gaussian_kernel"]

# What numpy.pad calls them; the names here are those of scipy.ndimage, but for the first two.
_BOUNDARIES = {
    "periodic": "wrap",
    "zero": "constant",
    "reflect": "symmetric",
    "mirror": "reflect",
    "nearest": "edge",
}


def gaussian_kernel(sigma, ndim=2, truncate=4.0):
    """A Gaussian kernel, sampled at whole pixels, of sum 1.

    Parameters
    ----------
    sigma : float
        Standard deviation in pixels.
    ndim : int, default=2
        1 for signals, 2 for images.
    truncate : float, default=4
        The kernel ends at that many standard deviations.

    Returns
    -------
    ndarray, shape (k,) or (k, k)
        With ``k = 2 round(truncate sigma) + 1``.

    Raises
    ------
    ValueError
        If ``sigma`` or ``truncate`` is not positive, or ``ndim`` is neither 1 nor 2.

    Examples
    --------
    >>> from skaipo.operators import gaussian_kernel
    >>> gaussian_kernel(0.5, ndim=1).round(3)
    array([0.   , 0.106, 0.787, 0.106, 0.   ])
    """
    if not (sigma > 0 and math.isfinite(sigma) and truncate > 0 and math.isfinite(truncate)):
        raise ValueError(
            f"gaussian_kernel needs sigma > 0 and truncate > 0, got {sigma!r} and {truncate!r}."
        )
    if ndim not in (1, 2):
        raise ValueError(f"gaussian_kernel makes kernels of ndim 1 or 2, got {ndim!r}.")
    radius = int(truncate * sigma + 0.5)
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    line /= line.sum()
    return line if ndim == 1 else np.outer(line, line)


class _Filter(Operator):
    """A filter, and some of its values: ``f(x) = (k * x)[::factor]`` on a grid that may be larger.

    ``_setup`` calls ``_lay_out``, and sets ``_kernel`` (float64, 2-D) unless rows have their own.
    """

    _factors = (1, 1)
    _padding = None

    def _lay_out(self):
        """Channels, height and width; the grid of the transform, and where the kernel sits."""
        shape, name = self.event_shape_, type(self).__name__
        if len(shape) > 3:
            raise ValueError(
                f"{name} measures images (C, H, W) or (H, W), or signals (d,), got {shape}."
            )
        self._image = (*(1,) * (3 - len(shape)), *shape)

    def _as_kernel(self, kernel):
        """A user's kernel as a float64 array (kh, kw)."""
        name = type(self).__name__
        if isinstance(kernel, torch.Tensor):
            kernel = kernel.detach().cpu().numpy()
        kernel = np.asarray(kernel)
        if kernel.dtype.kind not in "biuf":
            raise TypeError(f"{name}(kernel) must hold real numbers, got dtype {kernel.dtype}.")
        ndim = min(2, len(self.event_shape_))
        if kernel.ndim != ndim or 0 in kernel.shape:
            raise ValueError(
                f"{name}(kernel) has shape {kernel.shape}, but the images (the prior's) have shape "
                f"{self.event_shape_}: it needs {ndim} axes, "
                + (
                    "(k,). Where rows of the data are images, give the prior their shape."
                    if ndim == 1
                    else "(kh, kw), the same for all channels."
                )
            )
        kernel = kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
        if not np.isfinite(kernel).all():
            raise ValueError(f"{name}(kernel) has entries that are NaN or infinite.")
        if not kernel.any():
            raise ValueError(f"{name}(kernel) is zero everywhere: nothing would be measured.")
        return kernel

    def _origin_of(self, kernel_shape):
        """The kernel's entry that sits on the pixel itself, per axis, and the grid's size."""
        _, *sizes = self._image
        return [k // 2 for k in kernel_shape], sizes

    def _transfer_of(self, kernel):
        """Transform of kernels (..., kh, kw) on the grid, half of it as rfft2 gives it."""
        (top, left), (height, width) = self._origin_of(kernel.shape[-2:])
        grid = kernel.new_zeros(*kernel.shape[:-2], height, width)
        # A kernel larger than the grid goes around it.
        rows = (torch.arange(kernel.shape[-2], device=kernel.device) - top) % height
        columns = (torch.arange(kernel.shape[-1], device=kernel.device) - left) % width
        flat = (rows[:, None] * width + columns).flatten()
        grid = grid.flatten(-2).index_add(-1, flat, kernel.flatten(-2))
        return torch.fft.rfft2(grid.unflatten(-1, (height, width)))

    def _transfer(self, like):
        """Transfer function, (1 or n, 1, H, W // 2 + 1)."""

        def make():
            if "_kernels" in self.__dict__:
                kernel = self._kernels.to(like.device, wide(like.device))[:, None]
            else:
                kernel = torch.from_numpy(self._kernel).to(like.device, wide(like.device))[
                    None, None
                ]
            transfer = self._transfer_of(kernel)
            return transfer.to(torch.complex128 if like.dtype == torch.float64 else torch.complex64)

        return self._cached(("transfer", like.device, like.dtype), make)

    def _filter(self, images, transfer):
        spectrum = torch.fft.rfft2(images) * transfer
        return torch.fft.irfft2(spectrum, s=images.shape[-2:])

    def forward(self, x):
        self._check(x)
        images = x.reshape(len(x), *self._image)
        if self._padding is not None:
            images = self._extend(images)
        images = self._filter(images, self._transfer(x))
        if self._padding is not None:
            images = images[..., : self._image[1], : self._image[2]]
        step_h, step_w = self._factors
        return images[..., ::step_h, ::step_w].flatten(1)

    def adjoint(self, y):
        self._check_y(y)
        channels, height, width = self._image
        step_h, step_w = self._factors
        images = y.reshape(len(y), channels, height // step_h, width // step_w)
        if self._factors != (1, 1):
            images = _stuffed(images, self._factors)
        if self._padding is not None:
            _, (grid_h, grid_w) = self._origin_of(self._kernel_shape)
            images = F.pad(images, (0, grid_w - width, 0, grid_h - height))
        images = self._filter(images, self._transfer(y).conj())
        if self._padding is not None:
            images = self._fold(images)
        return images.flatten(1)

    def _gain(self, like):
        """Diagonal of ``A A^T`` in the Fourier domain of the measurements.

        Subsampling by f adds up the f frequencies that become the same one and divides by f:
        ``A A^T`` multiplies frequency q by ``sum_a |T(q + a n / f)|^2 / f``, per axis.
        """

        def make():
            transfer = self._transfer(like)
            power = transfer.real.square() + transfer.imag.square()
            if self._factors == (1, 1):
                return power
            _, height, width = self._image
            step_h, step_w = self._factors
            low_h, low_w = height // step_h, width // step_w
            # The other half of the transform, by its symmetry.
            rows = -torch.arange(height, device=power.device) % height
            left = torch.arange(power.shape[-1], width, device=power.device)
            whole = torch.cat((power, power[..., rows, :][..., width - left]), -1)
            folded = whole.unflatten(-1, (step_w, low_w)).unflatten(-3, (step_h, low_h))
            return folded.mean((-4, -2))[..., : low_w // 2 + 1]

        return self._cached(("gain", like.device, like.dtype), make)

    def _axes(self, device):
        """Matrices of the two axes where the filter is their Kronecker product, or None."""
        return None

    def projector(self, y, observed=None):
        observed = self._observed(y, observed)
        formula = FilterProjector
        if self._padding is not None:
            if self._axes(y.device) is None:
                return super().projector(y, observed)
            formula = SeparableProjector
        whole = None if observed is None else observed.all(1)
        if whole is None or bool(whole.all()):
            return formula(self, y)
        if not bool(whole.any()):
            return super().projector(y, observed)
        return SplitProjector(self, y, observed, whole)

    def norm(self):
        self._check_ready()
        if self._padding is None:
            gain = self._gain(torch.zeros((), dtype=torch.float64))
            norms = gain.flatten(1).amax(1).sqrt()
            return norms if "_n_given" in self.__dict__ else float(norms)
        axes = self._axes(torch.device("cpu"))
        return super().norm() if axes is None else math.prod(float(s[0]) for _, s, _ in axes)


class Blur(_Filter):
    """Convolution with a kernel, the same for every channel.

    ``f(x)_i = sum_j k_j x_{i - (j - c)}`` with ``c = size // 2`` along each axis: convolution,
    which flips the kernel, as ``scipy.ndimage.convolve``; for correlation give
    ``kernel[::-1, ::-1]`` (of odd sizes). A measurement has the shape of the image.

    Parameters
    ----------
    kernel : array-like or Tensor, shape (kh, kw), or (k,) for signals, or None
        See :func:`gaussian_kernel` for one. None: each row has its own; they are parameters of the
        rows, of shape (n, kh, kw) or (n, k).
    boundary : {"periodic", "zero", "reflect", "mirror", "nearest"}, default="periodic"
        What lies outside of the image ``a b c d``: ``a b c d`` again, zeros, ``d c b a``, ``c b a``
        or ``d d d``. In ``scipy.ndimage`` the first two are "grid-wrap" and "constant".

    Raises
    ------
    TypeError
        By ``bind``: the kernel does not hold real numbers.
    ValueError
        By ``bind``: an unknown boundary; a kernel with other axes than the images, or with entries
        that are not finite, or of zeros.

    Notes
    -----
    With a periodic boundary the operator is diagonal in the Fourier domain, and with a separable
    kernel (of rank 1: Gaussians, boxes) it is so in the singular vectors of its two axes, whatever
    the boundary: norm and projection are exact. What the kernel damps to less than 1e-7 of what it
    damps least counts as lost, and a projection leaves it as it is. For other kernels with other
    boundaries, and for rows with NaN, projections are found by conjugate gradients, which may take
    hundreds of products.

    All of them amplify noise in what the kernel damps, as every exact inverse does: start at
    ``init="gaussian"`` (the default) rather than "mle" if the measurements are noisy.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import Blur
    >>> Blur([0.0, 0.75, 0.25])(np.array([[4.0, 0.0, 8.0, 8.0]])).round(6)
    array([[5., 1., 6., 8.]])
    """

    def __init__(self, kernel=None, boundary="periodic"):
        self.kernel = kernel
        self.boundary = boundary

    @property
    def takes_params(self):
        return self.kernel is None

    def _setup(self):
        if not (isinstance(self.boundary, str) and self.boundary in _BOUNDARIES):
            raise ValueError(
                f"Blur(boundary) must be one of {', '.join(map(repr, _BOUNDARIES))}, got "
                f"{self.boundary!r}."
            )
        self._lay_out()
        self.measurement_shape_ = self.event_shape_
        self._padding = None if self.boundary == "periodic" else _BOUNDARIES[self.boundary]
        if self.kernel is not None:
            self._kernel = self._as_kernel(self.kernel)
            self._kernel_shape = self._kernel.shape
            self._index = self._index_of()

    def _wanted_params(self):
        return "kernels of shape " + ("(n, k)" if len(self.event_shape_) == 1 else "(n, kh, kw)")

    def _check_given(self, params):
        if params.ndim != min(2, len(self.event_shape_)) + 1 or 0 in params.shape[1:]:
            raise ValueError(
                f"Blur takes {self._wanted_params()}, got shape {tuple(params.shape)}."
            )
        empty = (params.flatten(1) == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"The kernels of {len(empty)} row(s) are zero everywhere, the first that of row "
                f"{empty[0]}: nothing would be measured."
            )

    def _given(self, params):
        self._kernels = params if params.ndim == 3 else params[:, None]
        if self.__dict__.get("_kernel_shape") != self._kernels.shape[1:]:
            self._kernel_shape = self._kernels.shape[1:]
            self._index = self._index_of()

    def _origin_of(self, kernel_shape):
        if self._padding is None:
            return super()._origin_of(kernel_shape)
        # On the extended grid pixel i begins where the kernel's last entry first reaches it.
        sizes = [n + k - 1 for n, k in zip(self._image[1:], kernel_shape, strict=True)]
        return [k - 1 for k in kernel_shape], sizes

    def _axes(self, device):
        """Singular value decompositions (U, s, V^T) of the two axes, for kernels of rank 1."""

        def make():
            if "_kernels" in self.__dict__:
                return None
            u, s, vt = np.linalg.svd(self._kernel)
            if s[1:].max(initial=0.0) > 1e-14 * s[0]:
                return None
            lines = s[0] * u[:, 0], vt[0]
            matrices = map(self._line_matrix, lines, self._image[1:])
            return [torch.linalg.svd(matrix.to(device, wide(device))) for matrix in matrices]

        return self._cached(("axes", device), make)

    def _line_matrix(self, line, n):
        """Convolution of a signal of n pixels with one line of the kernel."""
        k = len(line)
        mode = "edge" if n == 1 and self._padding != "constant" else self._padding
        extended = np.pad(np.eye(n), ((k - 1 - k // 2, k // 2), (0, 0)), mode)
        return torch.from_numpy(sum(line[j] * extended[k - 1 - j :][:n] for j in range(k)))

    def _index_of(self):
        """Which pixel lies at each place of the extended grid, per axis."""
        if self._padding in (None, "constant"):
            return None
        index = []
        for n, k in zip(self._image[1:], self._kernel_shape, strict=True):
            # (A mirror needs something to mirror.)
            mode = "edge" if n == 1 else self._padding
            index.append(torch.from_numpy(np.pad(np.arange(n), (k - 1 - k // 2, k // 2), mode)))
        return index

    def _extend(self, images):
        if self._padding == "constant":
            (kh, kw) = self._kernel_shape
            return F.pad(images, (kw - 1 - kw // 2, kw // 2, kh - 1 - kh // 2, kh // 2))
        rows, columns = (index.to(images.device) for index in self._index)
        return images.index_select(-2, rows).index_select(-1, columns)

    def _fold(self, grid):
        """The transpose of :meth:`_extend`."""
        _, height, width = self._image
        if self._padding == "constant":
            top, left = (k - 1 - k // 2 for k in self._kernel_shape)
            return grid[..., top : top + height, left : left + width]
        rows, columns = (index.to(grid.device) for index in self._index)
        shape = grid.shape[:2]
        grid = grid.new_zeros(*shape, grid.shape[2], width).index_add(-1, columns, grid)
        return grid.new_zeros(*shape, height, width).index_add(-2, rows, grid)


class Downsampling(_Filter):
    """A camera of lower resolution: a periodic blur, of which every ``factor``-th value is kept.

    ``f(x) = Blur(kernel)(x)[..., o_h::f_h, o_w::f_w]`` with ``o = (f - 1) // 2``, the middle of
    each block of pixels (where ``f`` is even, the last pixel before the middle). A measurement of
    images (C, H, W) has shape (C, H / f_h, W / f_w).

    Parameters
    ----------
    factor : int or (int, int)
        Along both axes, or along each. For signals an integer.
    kernel : array-like or Tensor, shape (kh, kw), or (k,) for signals, default=None
        What is measured before the values are picked. None: the mean over a block of ``factor``
        pixels. ``[[1]]`` (``[1]``): the pixel itself.

    Raises
    ------
    TypeError
        By ``bind``: ``factor`` is not an integer, or the kernel does not hold real numbers.
    ValueError
        By ``bind``: the image's sides are no multiples of ``factor``; or for the kernel, as in
        :class:`Blur`.

    Notes
    -----
    ``A A^T`` is diagonal in the Fourier domain of the measurements, where the powers of all the
    frequencies that are folded onto one add up: norm and projection are exact. Frequencies whose
    singular value is below 1e-7 of the largest count as lost. Rows with NaN are projected by
    conjugate gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import Downsampling
    >>> image = np.arange(16.0).reshape(1, 4, 4)
    >>> Downsampling(2)(image[None]).reshape(2, 2).round(6)
    array([[ 2.5,  4.5],
           [10.5, 12.5]])
    """

    def __init__(self, factor, kernel=None):
        self.factor = factor
        self.kernel = kernel

    def _setup(self):
        self._lay_out()
        shape, factor = self.event_shape_, self.factor
        if _is_int(factor):
            factor = (1, factor) if len(shape) == 1 else (factor, factor)
        pair = isinstance(factor, tuple | list) and len(factor) == 2 and all(map(_is_int, factor))
        if not pair or min(factor) < 1:
            raise (ValueError if pair else TypeError)(
                f"Downsampling(factor) must be an integer of at least 1, or two of them for "
                f"images (H, W), got {self.factor!r}."
            )
        self._factors = tuple(int(f) for f in factor)
        channels, *sizes = self._image
        if any(size % f for size, f in zip(sizes, self._factors, strict=True)):
            raise ValueError(
                f"Downsampling(factor={self.factor!r}) needs images whose sides are multiples of "
                f"it, the prior's have shape {shape}. Crop them, or choose another factor."
            )
        low = [size // f for size, f in zip(sizes, self._factors, strict=True)]
        self.measurement_shape_ = (channels, *low)[3 - len(shape) :]
        if self.kernel is None:
            self._kernel = np.full(self._factors, 1 / math.prod(self._factors))
        else:
            self._kernel = self._as_kernel(self.kernel)

    def _origin_of(self, kernel_shape):
        # With the offset of the first value, so that every factor-th one counts from zero.
        origin, sizes = super()._origin_of(kernel_shape)
        return [c + (f - 1) // 2 for c, f in zip(origin, self._factors, strict=True)], sizes


def _stuffed(images, factors):
    """Zeros between the values, so that every factor-th one is what it was."""
    n, channels, height, width = images.shape
    step_h, step_w = factors
    images = images[:, :, :, None, :, None]
    images = F.pad(images, (0, step_w - 1, 0, 0, 0, step_h - 1))
    return images.reshape(n, channels, height * step_h, width * step_w)
