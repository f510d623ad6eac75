"""The size of white noise, estimated from the measurements alone."""

import numpy as np
import torch

__all__ = ["estimate_sigma"]

# Median of the absolute value of a standard normal variable.
_MEDIAN = 0.6744897501960817
# Entries of a dense matrix of the operator, above which least squares are not tried.
_LARGEST = 2**25


def estimate_sigma(y, op):
    """Standard deviation of white noise in measurements.

    The median absolute value of what holds nothing but noise, over that of a standard normal
    variable: of the residuals of the least-squares fit, each in units of its own standard
    deviation, where the operator is linear and has more measurements than unknowns; otherwise of
    the finest diagonal Haar wavelets of measurements that are images (Donoho and Johnstone, 1994).

    Parameters
    ----------
    y : Tensor, shape (n, m)
        NaN where nothing was measured.
    op : Operator
        Bound.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If neither is there, or the estimate is zero.
    """
    y = y.detach().cpu().double()
    measured = torch.from_numpy(np.array(op.measured_, dtype=bool))
    observed = measured & ~y.isnan()
    values, reasons = None, []
    for find in (_residuals, _details):
        values, reason = find(torch.where(observed, y, 0.0), observed, op)
        if values is not None and len(values):
            break
        reasons.append(reason)
    else:
        raise ValueError(
            f"GaussianNoise(sigma='estimate') cannot tell noise from signal here: "
            f"{', and '.join(reasons)}. Pass a number, for example the standard deviation of "
            f"repeated measurements."
        )
    sigma = float(values.abs().median()) / _MEDIAN
    if sigma == 0:
        raise ValueError(
            "GaussianNoise(sigma='estimate') found no noise: at least half of what it looks at is "
            "exactly zero. Pass a number, or noise=None for noiseless measurements."
        )
    return sigma


def _residuals(y, observed, op):
    """Standardised residuals of the least-squares fit, or None and the reason."""
    d, m = op.n_features_in_, op.n_measurements_
    if getattr(op, "needs_params", False):
        return None, f"{type(op).__name__} differs from row to row"
    if not op.is_linear:
        return None, f"{type(op).__name__} is not linear"
    if int(observed.sum(1).max()) <= d:
        return None, f"there are no more measurements than the {d} unknowns"
    if m * d > _LARGEST:
        return None, f"a matrix of {m} x {d} is too large for a least-squares fit"
    with torch.no_grad():
        matrix = op.linear(torch.eye(d, dtype=torch.float64)).T
        offset = op.forward(torch.zeros(1, d, dtype=torch.float64))
    found = []
    patterns, group = torch.unique(observed, dim=0, return_inverse=True)
    for k, seen in enumerate(patterns):
        part = matrix[seen]
        if len(part) <= d:
            continue
        left, singular, _ = torch.linalg.svd(part, full_matrices=False)
        left = left[:, singular > singular.max() * 1e-10]
        rows = (y - offset)[group == k][:, seen]
        freedom = 1 - left.square().sum(1)
        # What is fitted exactly tells nothing.
        free = freedom > 1e-6
        residual = rows - (rows @ left) @ left.T
        found.append((residual[:, free] / freedom[free].sqrt()).flatten())
    return torch.cat(found), "the least-squares fit is exact"


def _details(y, observed, op):
    """The finest diagonal Haar wavelets, or None and the reason."""
    shape = op.measurement_shape_
    if getattr(op, "is_complex", False) is not False:
        return None, f"the measurements of {type(op).__name__} are frequencies, no image"
    if len(shape) != 3 or min(shape[1:]) < 2:
        return None, f"measurements of shape {tuple(shape)} are no images (C, H, W)"
    _, height, width = shape

    def blocks(x):
        x = x.reshape(-1, *shape)[:, :, : height - height % 2, : width - width % 2]
        return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]

    a, b, c, d = blocks(y)
    whole = torch.stack(blocks(observed)).all(0)
    return ((a - b - c + d) / 2)[whole], "no 2 x 2 pixels are measured together"
