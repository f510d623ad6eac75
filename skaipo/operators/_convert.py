"""What users pass as ``op``, made an operator."""

import contextlib

import numpy as np
import scipy.sparse as sp
import torch

from skaipo.operators._base import Operator
from skaipo.operators._checks import refuse_numpy
from skaipo.operators._linear import MatrixOperator
from skaipo.operators._products import ProductsOperator
from skaipo.operators._torch import PhysicsOperator, TorchOperator

__all__ = ["as_operator", "is_foreign"]


def as_operator(obj, in_shape=None, out_shape=None):
    """Turn what users pass as ``op`` into an Operator.

    Parameters
    ----------
    obj : object
        - an ``Operator``, which is returned as it is;
        - a matrix of shape (m, d): numpy array, nested lists, scipy sparse array, torch tensor;
        - ``scipy.sparse.linalg.LinearOperator``, a PyLops operator, or anything with ``shape``,
          ``matvec`` and ``rmatvec``: numpy on the CPU;
        - a deepinv ``Physics``: its ``A`` is used, and ``A_adjoint`` if it has one. The sigma of
          its ``GaussianNoise`` is the noise of an estimator with ``noise=None``;
        - a torch function or module, or an object with ``forward`` and, if it likes, ``adjoint``:
          from images (n, \\*in_shape) to measurements (n, \\*out_shape). If it is not linear it
          becomes a ``NonlinearOperator``.
    in_shape : tuple of int, default=None
        Shape of one image as ``obj`` takes it, where that is not the prior's: ``(C, H, W)`` for a
        prior of vectors. Images are reshaped, never transposed; for a function that wants channels
        last pass ``lambda x: f(x.movedim(1, -1))``.
    out_shape : tuple of int, default=None
        Shape of one measurement. Default: what ``obj`` says or returns in a dry run.

    Returns
    -------
    Operator
        Nothing is copied, and ``obj`` is not changed. Its ``bind`` tries ``obj`` on random images,
        once: shapes, precision, finite and repeatable results, rows that do not depend on each
        other, linearity, the dot-product test of the adjoint.

    Raises
    ------
    TypeError
        For anything else, and for shapes with an operator or matrix, which know theirs. By
        ``bind``: complex measurements.
    ValueError
        By ``bind``: ``obj`` fails one of the checks; the message says by how much and what to do.

    Examples
    --------
    >>> import torch
    >>> from skaipo.operators import as_operator
    >>> op = as_operator(lambda x: x.cumsum(-1))
    >>> op(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 3., 6.]])
    >>> op.bind((3,)).adjoint(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[1., 0., 0.]])
    """
    refuse_numpy("op", obj)
    obj = _as_matrix(obj) if isinstance(obj, list | tuple) else obj
    is_array = isinstance(obj, np.ndarray | torch.Tensor) or sp.issparse(obj)
    made = None
    if isinstance(obj, Operator) or (is_array and obj.ndim == 2):
        if in_shape is not None or out_shape is not None:
            raise TypeError(
                f"in_shape and out_shape are for foreign operators; this {type(obj).__name__} "
                "knows its own, and takes the shape of the images from bind."
            )
        made = obj if isinstance(obj, Operator) else MatrixOperator(obj)
    elif not is_array:
        kind = _adapter(obj)
        made = None if kind is None else kind(obj, in_shape=in_shape, out_shape=out_shape)
    if made is not None:
        return made
    what = type(obj).__name__
    if is_array:
        what = f"{what} of shape {tuple(obj.shape)}"
    elif isinstance(obj, type):
        what = f"the class {obj.__name__}; did you mean {obj.__name__}(...)"
    raise TypeError(
        "op must be an operator (Denoising(), CompressedSensing(m), Inpainting(mask), "
        "MatrixOperator(A)); a matrix of shape (m, d) as a numpy array, nested lists, scipy "
        "sparse array or torch tensor; a scipy LinearOperator or PyLops operator; a deepinv "
        "Physics; or a torch function, module or object with forward, of batches (n, *shape); got "
        f"{what}."
    )


def _as_matrix(rows):
    """Nested lists of numbers as an array (m, d); anything else as it is."""
    # (Ragged lists, and lists of tensors with a gradient, are none.)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        array = np.asarray(rows)
        if array.ndim == 2 and array.dtype.kind in "biufc":
            return array
    return rows


def is_foreign(obj):
    """Whether :func:`as_operator` would have to adapt an object: no operator, no matrix."""
    known = isinstance(obj, Operator | np.ndarray | torch.Tensor) or sp.issparse(obj)
    return not known and not hasattr(obj, "get_params") and _adapter(obj) is not None


def _adapter(obj):
    """The class that adapts an object, or None if it is nothing that measures."""
    if isinstance(obj, type):
        return None

    def has(name):
        return callable(getattr(obj, name, None))

    if has("matvec") and len(getattr(obj, "shape", ())) == 2:
        return ProductsOperator
    comes_from = {kind.__module__.partition(".")[0] for kind in type(obj).__mro__}
    if has("A") and ("deepinv" in comes_from or has("A_adjoint")):
        return PhysicsOperator
    return TorchOperator if callable(obj) or has("forward") else None
