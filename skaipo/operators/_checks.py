"""What a foreign operator must keep: tried once on a few random images, before it is relied on."""

import torch

__all__ = ["check_adjoint", "check_measures", "is_linear", "probe", "worst"]

# Two sizes of images: what saturates looks linear to the small ones.
_SIZES = (1.0, 1e3)


def probe(n, size, like, seed=0):
    """Random rows (n, size), the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, size, generator=generator, dtype=torch.float64)
    return rows.to(like.device, like.dtype)


def worst(a, b):
    """Largest difference of two batches relative to the largest entry of either."""
    size = max(float(a.abs().max()), float(b.abs().max()))
    return float((a - b).abs().max()) / size if size > 0 else 0.0


def check_measures(name, measure, x, tolerance):
    """Measurements ``measure(x)``; they must be finite, repeatable and independent of each other.

    Parameters
    ----------
    name : str
        What messages call the operator.
    measure : callable
        Flat rows (n, d) to flat rows (n, m).
    x : Tensor, shape (n, d), with n > 1
    tolerance : float
        Relative.

    Returns
    -------
    Tensor, shape (n, m)

    Raises
    ------
    ValueError
        Naming what failed, by how much, and what to do.
    """
    given = x.clone()
    y = measure(x)
    if not torch.equal(x, given):
        raise ValueError(
            f"{name} changes its input in place: the image it was given differs afterwards. Let it "
            "work on a copy (x = x.clone())."
        )
    again = measure(x)
    bad = int((~y.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} gives {bad} of {y.numel()} measurements that are NaN or infinite, for random "
            "normal images. It must be finite for every finite image."
        )
    error = worst(y, again)
    if error > tolerance:
        raise ValueError(
            f"{name} gives two answers for the same image: they differ by {error:.1e} of the "
            "largest measurement. An operator is f(x) without the noise: leave the noise out (and "
            "name it with noise=), call eval() on a module with dropout, fix the random mask."
        )
    one = measure(x[:1].clone())
    error = worst(one, y[:1])
    if error > tolerance:
        raise ValueError(
            f"{name} measures an image differently when it comes alone: by {error:.1e} of the "
            "largest measurement. Rows of a batch must not influence each other: call eval() on a "
            "module with batch normalisation, and take no mean over the batch."
        )
    return y


def is_linear(measure, x, tolerance):
    """Whether ``f(x) - f(0)`` is linear, and by how much it is not at worst, relative."""
    zero = measure(torch.zeros_like(x[:1]))
    error = 0.0
    for size in _SIZES:
        a, b = size * x[:1], size * x[1:2]
        left = measure(0.75 * a - 0.5 * b) - zero
        right = 0.75 * (measure(a) - zero) - 0.5 * (measure(b) - zero)
        if not (left.isfinite().all() and right.isfinite().all()):
            return False, float("inf")
        # Rounding is relative to what was computed, the constant included.
        scale = max(float(t.abs().max()) for t in (left, right, zero))
        error = max(error, float((left - right).abs().max()) / scale if scale > 0 else 0.0)
    return error <= tolerance, error


def check_adjoint(name, linear, adjoint, x, n_measurements, tolerance, remedy):
    """The dot-product test ``<A x, y> = <x, A^T y>``.

    Raises
    ------
    ValueError
        With the relative error, and ``remedy``.
    """
    measured = linear(x)
    # Random measurements, and measurements of the images: these tell of a wrong factor, too.
    for y in (probe(len(x), n_measurements, x, seed=1), measured):
        back = adjoint(y)
        if not back.isfinite().all():
            raise ValueError(
                f"The adjoint of {name} gives numbers that are NaN or infinite. {remedy}"
            )
        left, right = (measured * y).sum(1), (x * back).sum(1)
        size = measured.norm(dim=1) * y.norm(dim=1) + x.norm(dim=1) * back.norm(dim=1)
        error = float(torch.where(size > 0, (left - right).abs() / size, 0.0).max())
        if error > tolerance:
            i = int(((left - right).abs() / size).nan_to_num().argmax())
            raise ValueError(
                f"The adjoint of {name} is not its transpose: <f(x), y> = {float(left[i]):.9g} but "
                f"<x, adjoint(y)> = {float(right[i]):.9g}, a relative error of {error:.1e} where "
                f"{tolerance:.0e} is rounding. {remedy}"
            )
