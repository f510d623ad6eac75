"""The interface of projections onto what explains the measurements."""

from abc import ABC, abstractmethod

__all__ = ["AffineProjector", "CorrectingProjector", "check_same_rows"]


class AffineProjector(ABC):
    """Orthogonal projection onto ``{x : f(x) = y}``, row by row, made by ``Operator.projector``.

    Calling it with images ``(n, d)`` returns the nearest images (Euclidean) whose observed
    measurements equal ``y``. Where the observed measurements contradict each other it returns the
    nearest minimiser of ``||f(x) - y||^2`` over the observed entries.

    Attributes
    ----------
    converged : Tensor of bool, shape (n,), or None
        Rows of the latest projection that are what they should be; None: all, by a formula.
    quiet : bool
        Whether nobody is to be warned of the others: set by those who look at ``converged``.
    """

    converged = None
    quiet = False

    @abstractmethod
    def __call__(self, x):
        """Project images ``x`` (n, d)."""

    @abstractmethod
    def null(self, v):
        """Project directions ``v`` (n, d) on the null space of the observed measurements."""


class CorrectingProjector(AffineProjector):
    """A formula, ``_correct(x, y)``, for the measurements ``_y`` and, of directions, for zero."""

    def __call__(self, x):
        return self._correct(x, self._y.to(x.dtype))

    def null(self, v):
        return self._correct(v, 0.0)


def check_same_rows(x, y):
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"This projector was made for {y.shape[0]} measurements, got {x.shape[0]} images."
        )
