"""Operators that measure pixels as they are: all of them, or those under a mask."""

import numpy as np
import torch

from skaipo.operators._base import AffineProjector, Operator, check_same_rows

__all__ = ["Denoising", "Inpainting"]


class _PixelProjector(AffineProjector):
    """Projection where measurement i is pixel i."""

    def __init__(self, op, y, observed):
        self._op, self._y, self._observed = op, y.detach(), observed

    def _pick(self, images, values):
        self._op._check(images)
        check_same_rows(images, self._y)
        if self._observed is None:
            return values.clone()
        return torch.where(self._observed, values, images)

    def __call__(self, x):
        return self._pick(x, self._y.to(x.dtype))

    def null(self, v):
        return self._pick(v, torch.zeros_like(v))


class PixelOperator(Operator):
    """Operators that measure some of the pixels, each as it is."""

    _keeps_shape = True

    def _setup(self):
        self.n_measurements_ = self.n_features_in_

    def _keep(self, values):
        if self._measures_all():
            return values
        # where, not a product: what a masked pixel holds must not matter, even NaN.
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        return torch.where(self._observed(values, None), values, zero)

    def forward(self, x):
        self._check(x)
        return self._keep(x)

    def adjoint(self, y):
        self._check_y(y)
        return self._keep(y)

    def projector(self, y, observed=None):
        return _PixelProjector(self, y, self._observed(y, observed))

    def norm(self):
        return 1.0


class Denoising(PixelOperator):
    """The identity: every pixel is measured, ``f(x) = x``."""


class Inpainting(PixelOperator):
    """Some pixels are measured, the others are missing.

    A measurement has the shape of the image (the diagonal 0/1 matrix): ``f(x)`` is ``x`` with
    zeros where ``mask`` is False. What ``Y`` holds there (zero, NaN, anything) is ignored.

    Parameters
    ----------
    mask : array-like of bool (or 0/1), shape (d,) or event_shape, or None
        True where the pixel is observed, the same for all samples. None: the missing pixels differ
        by sample, and NaN in ``Y`` marks them, or parameters of each row do: masks of shape (n, d)
        or (n, *event_shape).

    Raises
    ------
    ValueError
        By ``bind``: mask of another size than the images, not boolean, or False everywhere.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.operators import Inpainting
    >>> masks = np.array([[True, False], [True, True]])
    >>> Inpainting()(np.array([[1.0, 2.0], [3.0, 4.0]]), params=masks)
    array([[1., 0.],
           [3., 4.]])
    """

    needs_params = False

    def __init__(self, mask=None):
        self.mask = mask

    @property
    def takes_params(self):
        return self.mask is None

    def _setup(self):
        super()._setup()
        if self.mask is None:
            return
        mask = as_mask(self.mask, "Inpainting")
        d, shape = self.n_features_in_, self.event_shape_
        # A flat layout on either side is unambiguous, and so are axes of length one.
        same = mask.ndim == 1 or len(shape) == 1 or squeezed(mask.shape) == squeezed(shape)
        if mask.size != d or not same:
            raise ValueError(
                f"Inpainting(mask) has a mask of shape {mask.shape} ({mask.size} pixels), but the "
                f"images (the prior's) have shape {shape} ({d} features). Give a mask of shape "
                f"({d},) or {shape}, for example np.broadcast_to(mask, {shape})."
            )
        self.measured_ = mask.reshape(-1)

    def _wanted_params(self):
        shape = ", ".join(map(str, self.event_shape_))
        images = "" if len(self.event_shape_) == 1 else f" or (n, {shape})"
        return f"masks of shape (n, {self.n_features_in_}){images}"

    def _check_given(self, params):
        if params.shape[1:] not in ((self.n_features_in_,), self.event_shape_):
            raise ValueError(
                f"Inpainting takes {self._wanted_params()}, got shape {tuple(params.shape)}."
            )
        flat = params.flatten(1)
        if not ((flat == 0) | (flat == 1)).all():
            raise ValueError("Inpainting takes masks of True and False, or 1 and 0.")
        empty = (~(flat == 1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"The masks of {len(empty)} row(s) are False everywhere, the first that of row "
                f"{empty[0]}. True marks the observed pixels; did you mean ~mask?"
            )

    def _given(self, params):
        self._masks = params.flatten(1) > 0.5

    def measured(self, like):
        if "_masks" not in self.__dict__:
            return super().measured(like)
        return self._masks.to(like.device)

    def _measures_all(self):
        return "_masks" not in self.__dict__ and super()._measures_all()

    def norm(self):
        if "_masks" in self.__dict__:
            return torch.ones(len(self._masks), dtype=torch.float64)
        return super().norm()

    def _describe(self, value):
        text = super()._describe(value)
        if not isinstance(value, np.ndarray) or value.dtype != bool:
            return text
        return f"{text[:-1]}, {np.count_nonzero(value)} observed>"


def as_mask(mask, name):
    """A user's mask as a boolean array that is True somewhere."""
    mask = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if mask.dtype != bool:
        if mask.dtype.kind not in "iuf" or not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"{name}(mask) must be boolean, or hold only 0 and 1, with True for what is "
                f"observed; got dtype {mask.dtype} with other values. Did you mean mask > 0.5, or "
                "~np.isnan(image)?"
            )
        mask = mask.astype(bool)
    if not mask.any():
        raise ValueError(
            f"{name}(mask) is False everywhere: nothing is observed. True marks what is observed; "
            "did you mean ~mask?"
        )
    return mask


def squeezed(shape):
    """A shape without its axes of length one."""
    return tuple(size for size in shape if size != 1)
