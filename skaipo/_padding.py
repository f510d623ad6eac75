"""Batches of sizes for which a row's result does not depend on the other rows."""

import torch

__all__ = ["padded", "padded_size"]


def padded_size(n):
    """The next multiple of 8 that is at least 16."""
    return max(16, n + -n % 8)


def padded(function, *arguments):
    """Call with rows padded to a multiple of 8 and at least 16; return what belongs to the rows.

    Kernels choose their order of summation by the batch's size, and a row's result should not
    depend on it. (For images it is then the same bits on the processors tried; for vectors of odd
    sizes, to rounding. Below 16 rows torch has another convolution where it runs on one thread.)
    """
    n = len(arguments[0])
    padding = padded_size(n) - n
    if padding:
        arguments = [torch.cat((a, a[-1:].expand(padding, *a.shape[1:]))) for a in arguments]
    result = function(*arguments)
    return tuple(r[:n] for r in result) if isinstance(result, tuple) else result[:n]
