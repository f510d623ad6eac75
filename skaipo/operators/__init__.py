"""Forward operators ``f``, their adjoint and their projection onto ``{x : f(x) = y}``.

An operator is a recipe (parameters only, so ``sklearn.clone`` and ``set_params`` work). ``bind``
gives a new operator that knows the image shape and holds the arrays; the tensor methods
(``forward``, ``adjoint``, ``projector``...) belong to that bound operator and work on flat rows:
images ``(n, d)``, measurements ``(n, m)``. No row ever influences another one.
"""

from skaipo.operators._base import AffineProjector, Operator
from skaipo.operators._compose import Compose, Stack
from skaipo.operators._convert import as_operator
from skaipo.operators._filters import Blur, Downsampling, gaussian_kernel
from skaipo.operators._fourier import MaskedFourier
from skaipo.operators._linear import CompressedSensing, LeastSquaresOperator, MatrixOperator
from skaipo.operators._nonlinear import Clipping, NonlinearOperator
from skaipo.operators._per_sample import PerSampleMatrix
from skaipo.operators._phase import PhaseRetrieval
from skaipo.operators._pixels import Denoising, Inpainting

__all__ = [
    "AffineProjector",
    "Blur",
    "Clipping",
    "Compose",
    "CompressedSensing",
    "Denoising",
    "Downsampling",
    "Inpainting",
    "LeastSquaresOperator",
    "MaskedFourier",
    "MatrixOperator",
    "NonlinearOperator",
    "Operator",
    "PerSampleMatrix",
    "PhaseRetrieval",
    "Stack",
    "as_operator",
    "gaussian_kernel",
]
