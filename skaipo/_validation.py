"""The only place where arrays enter torch and leave it again."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.utils.validation import check_array, validate_data

__all__ = [
    "Layout",
    "as_bytes",
    "check_batch",
    "check_lam",
    "check_range",
    "checksum",
    "reject_empty_rows",
    "resolve_device",
    "to_numpy",
    "to_tensor",
]

_TOO_SMALL = (np.dtype(np.float16), torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """How a batch came in, so that the answer goes out the same way."""

    torch: bool
    dtype: object
    device: object = None
    images: bool = False

    def restore(self, tensor, event_shape=None):
        """Give a ``(n, d)`` tensor the type, dtype, device and shape of the input batch."""
        tensor = tensor.detach()
        if self.images and event_shape is not None:
            tensor = tensor.reshape(len(tensor), *event_shape)
        if self.torch:
            return tensor.to(device=self.device, dtype=self.dtype)
        return to_numpy(tensor).astype(self.dtype, copy=False)


def to_tensor(array, device=None, dtype=None):
    """Copy an array into a tensor; the input is never aliased."""
    return torch.tensor(np.ascontiguousarray(array), device=device, dtype=dtype)


def to_numpy(tensor):
    """Move a tensor to the CPU as a numpy array."""
    return tensor.detach().cpu().numpy()


def checksum(*tensors):
    """A number that changes with the contents of tensors.

    A version counter would not do: it does not see what is written through ``.data``, as averages
    of weights often are, or through a view by numpy.
    """
    digest = 0
    for tensor in tensors:
        digest = zlib.crc32(to_numpy(as_bytes(tensor)), digest)
    return digest


def as_bytes(tensor):
    """The contents of a dense tensor, one after the other."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def resolve_device(device):
    """Return a ``torch.device``; "auto" is the first CUDA device when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _reject_small_floats(dtype, name):
    if dtype in _TOO_SMALL:
        raise ValueError(
            f"{name} has dtype {dtype}, which is too coarse for this optimisation; "
            f"convert it to float32 or float64."
        )


def _flatten(shape, event_shape, name, whose):
    """Check trailing dimensions against ``event_shape``; return True for the image layout."""
    if event_shape is None:
        if len(shape) < 2:
            raise ValueError(
                f"Expected 2D array, got {len(shape)}D array instead: {name} has shape "
                f"{tuple(shape)}. Reshape your data using array.reshape(1, -1) if it contains a "
                f"single sample."
            )
        return len(shape) > 2
    if len(shape) == 2 or tuple(shape[1:]) == tuple(event_shape):
        return len(shape) > 2
    d = math.prod(event_shape)
    accepted = f"(n_samples, {d})"
    if len(event_shape) > 1:
        accepted += " or (n_samples, " + ", ".join(map(str, event_shape)) + ")"
    hint = ""
    if tuple(shape) == tuple(event_shape):
        hint = f" For a single sample pass {name}[None]."
    elif len(shape) == 4 and len(event_shape) == 3 and shape[-1] == event_shape[0]:
        hint = f" For channels-last images pass {name}.transpose(0, 3, 1, 2)."
    expected = "Expected 2D array, got 1D array instead: " if len(shape) == 1 else ""
    raise ValueError(
        f"{expected}{name} has shape {tuple(shape)}, but {whose} expects {accepted}. "
        f"Reshape your data.{hint}"
    )


def check_batch(
    X,
    *,
    event_shape=None,
    estimator=None,
    reset=False,
    name="X",
    whose="the prior",
    allow_nan=False,
    device=None,
    dtype=None,
):
    """Validate a batch and turn it into a ``(n, d)`` tensor.

    Parameters
    ----------
    X : array-like or torch.Tensor of shape (n, d) or (n, *event_shape)
    event_shape : tuple of int, default=None
        The shape that the trailing dimensions must have; None accepts any.
    estimator : estimator, default=None
        Whose ``n_features_in_`` is set (``reset=True``) or compared.
    reset : bool, default=False
    name, whose : str
        For messages.
    allow_nan : bool, default=False
        NaN means "not measured"; a row of NaN only is an error in any case.
    device, dtype : optional
        Of the returned tensor.

    Returns
    -------
    x : torch.Tensor of shape (n, d)
    layout : Layout
    shape : tuple of int
        The trailing dimensions as they came.

    Raises
    ------
    ValueError
        For wrong sizes, infinities, missing values where none are allowed, an empty batch,
        float16, or values that are not numbers.
    """
    if isinstance(X, torch.Tensor):
        x, layout = _check_tensor(X, event_shape, name, whose, allow_nan)
        shape = tuple(X.shape[1:])
        if estimator is not None:
            _check_width(estimator, x.shape[1], reset)
    else:
        finite = "allow-nan" if allow_nan else True
        raw = getattr(X, "dtype", None)
        if isinstance(raw, np.dtype):
            _reject_small_floats(raw, name)
        ndim = getattr(X, "ndim", None)
        if ndim is None and not hasattr(X, "__dataframe__"):
            ndim = np.asarray(X).ndim
        images = False
        shape = None
        if ndim is not None and ndim != 2:
            X = check_array(
                X,
                allow_nd=True,
                ensure_2d=False,
                dtype=None,
                ensure_all_finite=False,
                ensure_min_samples=0,
                input_name=name,
            )
            if X.ndim > 0:
                images = _flatten(X.shape, event_shape, name, whose)
                shape = X.shape[1:]
                X = X.reshape(len(X), math.prod(shape)) if images else X
        options = dict(dtype=[np.float64, np.float32], ensure_all_finite=finite)
        if estimator is None:
            X = check_array(X, input_name=name, **options)
        else:
            X = validate_data(estimator, X, reset=reset, **options)
        shape = X.shape[1:] if shape is None else shape
        layout = Layout(torch=False, dtype=X.dtype, images=images)
        x = to_tensor(X)
    expected = None if event_shape is None else math.prod(event_shape)
    if expected is not None and x.shape[1] != expected:
        raise ValueError(
            f"{name} has {x.shape[1]} columns, but {whose} expects {expected} "
            f"(shape {tuple(event_shape)})."
        )
    if allow_nan:
        reject_empty_rows(x, f"{name} has", " (all NaN)")
    x = x.to(device=device, dtype=dtype)
    if x.isinf().any():  # (there were none before)
        raise ValueError(
            f"{name} has values beyond {torch.finfo(x.dtype).max:.3g}, the largest number in "
            f"{str(x.dtype).removeprefix('torch.')}, in which the prior computes. Pass them in "
            f"other units{', or as NaN where nothing was measured' if allow_nan else ''}."
        )
    return x, layout, tuple(shape)


def masked(y, mask, shapes):
    """Measurements (n, m) with NaN where a mask is False; ``shapes`` are those of one."""
    values = mask if isinstance(mask, torch.Tensor) else np.asarray(mask)
    wanted = "mask must be boolean, or hold only 0 and 1 (True: measured)"
    name = f"dtype {values.dtype}"
    if not isinstance(values, torch.Tensor):
        if values.dtype.kind not in "biuf":
            raise ValueError(f"{wanted}, got {name}.")
        values = to_tensor(values)
    other = values[(values != 0) & (values != 1)]
    if other.numel():
        raise ValueError(
            f"{wanted}, got {name} with other values, such as {other[0].item():g}. Did you mean "
            f"mask > 0.5, or ~np.isnan(Y)?"
        )
    if len(values.shape) < 2 or len(values) != len(y) or tuple(values.shape[1:]) not in shapes:
        hint = ""
        if tuple(values.shape) in shapes:
            hint = " For the same mask in every row pass np.broadcast_to(mask, Y.shape)."
        raise ValueError(
            f"mask must be boolean and of the shape of Y, {len(y)} rows of {y.shape[1]} values; "
            f"got {name} of shape {tuple(values.shape)}.{hint}"
        )
    y = torch.where(values.reshape(y.shape).to(y.device) == 1, y, torch.nan)
    reject_empty_rows(y, "mask leaves")
    return y


def reject_empty_rows(y, found, detail=""):
    """Refuse rows that are NaN alone; ``found`` begins the message."""
    empty = y.isnan().all(1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"{found} {len(empty)} row(s) without a single measured value{detail}: row "
            f"{named_rows(empty)}. Drop these rows."
        )


def named_rows(rows):
    """Row numbers for a message."""
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")


def _check_tensor(X, event_shape, name, whose, allow_nan):
    _reject_small_floats(X.dtype, name)
    if X.is_complex() or X.dtype == torch.bool or X.is_sparse:
        raise ValueError(f"{name} must be a dense tensor of real numbers, got dtype {X.dtype}.")
    images = _flatten(tuple(X.shape), event_shape, name, whose)
    if X.numel() == 0:
        what = "feature(s)" if len(X) else "sample(s)"
        raise ValueError(f"Found array with 0 {what} (shape={tuple(X.shape)}) in {name}.")
    dtype = X.dtype if X.is_floating_point() else torch.get_default_dtype()
    x = X.detach().reshape(len(X), -1)
    x = x.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
    bad = x.isinf() if allow_nan else ~x.isfinite()
    if bad.any():
        kind = "infinity" if allow_nan else "NaN or infinity"
        raise ValueError(f"Input {name} contains {kind} in {int(bad.any(1).sum())} row(s).")
    return x, Layout(torch=True, dtype=dtype, device=X.device, images=images)


def _check_width(estimator, width, reset):
    if reset:
        estimator.n_features_in_ = width
        # Names that an earlier fit saw in a data frame.
        vars(estimator).pop("feature_names_in_", None)
    elif getattr(estimator, "n_features_in_", width) != width:
        raise ValueError(
            f"X has {width} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input."
        )


def check_lam(lam):
    """Return ``lam`` as a float; it must be a finite number of at least zero."""
    number = isinstance(lam, int | float | np.integer | np.floating) and not isinstance(lam, bool)
    if not number:
        raise TypeError(
            f"lam must be a real number >= 0, got {lam!r} of type {type(lam).__name__}."
        )
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be finite and >= 0 (0 is the MLE), got {lam!r}.")
    return float(lam)


def check_range(lam, dtype):
    """Raise a ValueError where products of ``lam`` with an objective may overflow."""
    largest = torch.finfo(dtype).max ** 0.5
    if lam > largest:
        raise ValueError(
            f"lam must be at most {largest:.3g} where the prior computes in "
            f"{str(dtype).removeprefix('torch.')}, got {lam:g}."
        )
