"""What a foreign operator must keep: tried once on a few random images, before it is relied on."""

import math

import numpy as np
import torch

__all__ = [
    "check_adjoint",
    "check_measures",
    "is_linear",
    "layout_hint",
    "probe",
    "refuse_numpy",
    "worst",
]

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


def refuse_numpy(what, obj):
    """Raise a TypeError for a function of numpy or scipy, which leaves torch and its gradients."""
    library = str(getattr(type(obj) if isinstance(obj, np.ufunc) else obj, "__module__", ""))
    library = library.partition(".")[0]
    name = getattr(obj, "__name__", None)
    if library not in ("numpy", "scipy") or isinstance(obj, type) or name is None:
        return
    instead = f"torch.{name}" if callable(getattr(torch, name, None)) else "a torch function"
    raise TypeError(
        f"{what} is the {library} function {name}, which takes arrays out of torch and has no "
        f"gradient. Use {instead}; or, if it is linear, a scipy.sparse.linalg.LinearOperator of it "
        f"and of its transpose (matvec, rmatvec)."
    )


def layout_hint(function, x, shape, name="f"):
    """What to do about a function that fails on images, found by trying other layouts of them.

    Parameters
    ----------
    function : callable
        Takes batches of images.
    x : Tensor, shape (n, d)
    shape : tuple of int
        Of the images that it failed on.
    name : str, default="f"
        What the hint calls the function.

    Returns
    -------
    str
        A sentence or two.
    """

    def works(images):
        for dtype in (x.dtype, torch.float32):
            try:
                with torch.no_grad():
                    out = function(images.to(dtype))
            except Exception:
                continue
            if isinstance(out, torch.Tensor) and out.ndim > 0 and len(out) == len(x):
                return True
        return False

    n, d = x.shape
    if works(x.reshape(n, *shape)):
        return "It works where no gradient is asked for."
    if len(shape) == 3 and works(x.reshape(n, *shape).movedim(1, -1)):
        channels, height, width = shape
        return (
            f"It works on images with their channels last, {(height, width, channels)}, and those "
            f"here have them first: pass a function that turns them, lambda x: "
            f"{name}(x.movedim(1, -1)), and turns back what it makes, .movedim(-1, 1), if it is an "
            f"image."
        )
    side, third = math.isqrt(d), math.isqrt(d // 3)
    others = {(1, *shape)} if len(shape) == 2 else set()
    if len(shape) > 1:
        others |= {(d,), tuple(size for size in shape if size != 1) or (1,)}
    elif side * side == d:
        others |= {(1, side, side), (side, side)}
    elif 3 * third * third == d:
        others |= {(3, third, third)}
    for other in sorted(others - {shape}, key=len, reverse=True):
        if works(x.reshape(n, *other)):
            return (
                f"It works on images of shape {other}: if they are of that shape, pass "
                f"as_operator({name}, in_shape={other})."
            )
    if len(shape) == 1:
        return (
            f"The images (the prior's) are vectors of {d} numbers. Where {name} wants images say "
            f"of which shape: as_operator({name}, in_shape=(C, H, W)), C * H * W = {d}; or give "
            f"the prior that event_shape. Where it takes a single image pass torch.vmap({name})."
        )
    return (
        f"Pass in_shape, as_operator({name}, in_shape=...), where it takes images of another shape "
        f"than the prior's, and torch.vmap({name}) where {name} takes a single image."
    )


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
