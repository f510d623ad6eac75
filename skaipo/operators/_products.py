"""Matrices known by their products: scipy's LinearOperator, PyLops and the like."""

import math
import operator

import numpy as np
import torch

from skaipo.operators._checks import probe
from skaipo.operators._foreign import TOLERANCES, ForeignOperator, Product

__all__ = ["ProductsOperator"]


class ProductsOperator(ForeignOperator):
    """A matrix known by its products: ``scipy.sparse.linalg.LinearOperator``, PyLops and the like.

    ``obj`` has ``shape`` (m, d), ``matvec`` and ``rmatvec``, and computes in numpy on the CPU, in
    its ``dtype``; ``matmat`` and ``rmatmat`` take whole batches where they work. PyLops' ``dims``
    and ``dimsd`` give the layout of images and measurements.
    """

    def _examine(self):
        obj, d = self.obj, self.n_features_in_
        m, columns = (operator.index(size) for size in obj.shape)
        if columns != d:
            raise ValueError(
                f"{self._name} has shape {(m, columns)}: it measures images of {columns} features, "
                f"but the images (the prior's, shape {self.event_shape_}) have {d}. Give an "
                f"operator with {d} columns, or a prior of {columns} features."
            )
        dtype = getattr(obj, "dtype", None)
        dtype = np.dtype(np.float64 if dtype is None else dtype)
        if dtype.kind == "c":
            raise TypeError(
                f"{self._name} is complex ({dtype}), and measurements are real. Stack the real and "
                "imaginary parts of its result as two measurements (and the adjoint likewise); for "
                "masked Fourier transforms there is MaskedFourier."
            )
        # float16 and integers are computed in the next larger precision that is left.
        self._compute = np.dtype(np.float32 if dtype == np.float32 else np.float64)
        precision = torch.float32 if dtype in (np.float16, np.float32) else torch.float64
        self._batched = (False, False)
        x = probe(3, d, torch.zeros((), dtype=torch.float64))
        try:
            y = self._product(x, False)
        except Exception as error:
            raise ValueError(
                f"{self._name}.matvec failed on an image of {d} random numbers "
                f"({self._compute}): {type(error).__name__}: {error}"
            ) from error
        try:
            back = self._product(y, True)
        except Exception as error:
            raise ValueError(
                f"{self._name} has no adjoint that works: rmatvec failed on {m} random numbers: "
                f"{type(error).__name__}: {error}. Gradients are products with the transpose: give "
                f"the operator rmatvec, for example LinearOperator({(m, d)}, matvec, rmatvec)."
            ) from error
        self._batched = tuple(
            self._agrees(rows, transposed, expected, precision)
            for rows, transposed, expected in ((x, False, y), (y, True, back))
        )
        straight, error = self._check_all(
            lambda rows: self._product(rows, False),
            lambda rows: self._product(rows, False) - self._product(0 * rows, False),
            lambda rows: self._product(rows, True),
            x,
            m,
            precision,
            "Check rmatvec (for real numbers it is the product with the transposed matrix).",
        )
        if not straight:
            raise ValueError(
                f"{self._name} is not linear: f(a x + b y) - f(0) and a (f(x) - f(0)) + b (f(y) - "
                f"f(0)) differ by {error:.1e} of their size. Write f in torch and pass the "
                "function, or NonlinearOperator(fn)."
            )
        if bool(self._product(torch.zeros_like(x), False).any()):
            raise ValueError(
                f"{self._name} adds a constant: its product with zero is not zero. Subtract it "
                "from the operator and from the measurements."
            )
        shape = tuple(operator.index(k) for k in getattr(obj, "dimsd", None) or (m,))
        return {
            "shape": shape if math.prod(shape) == m else (m,),
            "linear": True,
            "precision": precision,
            "compute": self._compute,
            "batched": self._batched,
        }

    def _setup(self):
        super()._setup()
        self._compute, self._batched = self._found["compute"], self._found["batched"]

    def _agrees(self, rows, transposed, expected, precision):
        """Whether the product with many vectors exists and is that with one after the other."""
        self._batched = (True, True)
        try:
            found = self._product(rows, transposed)
        except Exception:
            return False
        finally:
            self._batched = (False, False)
        error = float((found - expected).norm()) if found.shape == expected.shape else math.inf
        return error <= TOLERANCES[precision][0] * float(expected.norm())

    def _product(self, rows, transposed):
        vectors = rows.detach().cpu().numpy().astype(self._compute, copy=True)
        one = self.obj.rmatvec if transposed else self.obj.matvec
        if self._batched[transposed] and len(vectors):
            out = np.asarray(
                self.obj.rmatmat(vectors.T) if transposed else self.obj.matmat(vectors.T)
            )
            out = np.ascontiguousarray(out.T)
        else:
            size = self.obj.shape[1 if transposed else 0]
            out = np.empty((len(vectors), size), dtype=self._compute)
            for row, vector in zip(out, vectors, strict=True):
                result = np.asarray(one(vector)).reshape(-1)
                if result.dtype.kind == "c":
                    raise TypeError("it returned complex numbers.")
                row[:] = result
        return torch.from_numpy(out).to(rows.device, rows.dtype)

    def forward(self, x):
        self._check(x)
        return Product.apply(x, self, False)

    def linear(self, x):
        return self.forward(x)

    def _origin(self, like):
        return None

    def adjoint(self, y):
        self._check_y(y)
        return Product.apply(y, self, True)
