"""Forward operators ``f``, their adjoint and their projection onto ``{x : f(x) = y}``.

An operator is a recipe (parameters only, so ``sklearn.clone`` and ``set_params`` work). ``bind``
gives a new operator that knows the image shape and holds the arrays; the tensor methods
(``forward``, ``adjoint``, ``projector``...) belong to that bound operator and work on flat rows:
images ``(n, d)``, measurements ``(n, m)``. No row ever influences another one.
"""

import numpy as np
import scipy.sparse as sp
import torch

from skaipo.operators._base import AffineProjector, Operator
from skaipo.operators._compose import Compose, Stack
from skaipo.operators._filters import Blur, Downsampling, gaussian_kernel
from skaipo.operators._fourier import MaskedFourier
from skaipo.operators._linear import CompressedSensing, LeastSquaresOperator, MatrixOperator
from skaipo.operators._per_sample import PerSampleMatrix
from skaipo.operators._pixels import Denoising, Inpainting

__all__ = [
    "AffineProjector",
    "Blur",
    "Compose",
    "CompressedSensing",
    "Denoising",
    "Downsampling",
    "Inpainting",
    "LeastSquaresOperator",
    "MaskedFourier",
    "MatrixOperator",
    "Operator",
    "PerSampleMatrix",
    "Stack",
    "as_operator",
    "gaussian_kernel",
]


def as_operator(op):
    """Turn what users pass as ``op`` into an Operator.

    Parameters
    ----------
    op : Operator, 2-D ndarray, scipy sparse matrix or array, or 2-D Tensor

    Returns
    -------
    Operator
        ``op`` itself, or ``MatrixOperator(op)``.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(op, Operator):
        return op
    is_array = isinstance(op, np.ndarray | torch.Tensor) or sp.issparse(op)
    if is_array and op.ndim == 2:
        return MatrixOperator(op)
    what = type(op).__name__
    if is_array:
        what = f"{what} of shape {tuple(op.shape)}"
    elif isinstance(op, type) and issubclass(op, Operator):
        what = f"the class {op.__name__}; did you mean {op.__name__}(...)"
    raise TypeError(
        "op must be an operator (Denoising(), CompressedSensing(m), Inpainting(mask), "
        "MatrixOperator(A)), or a matrix of shape (m, d) as a numpy array, scipy sparse array or "
        f"torch tensor; got {what}."
    )
