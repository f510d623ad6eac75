"""What the displays share."""

import io

import numpy as np

from skaipo.noise import SquaredError, as_noise

__all__ = [
    "FONT",
    "Display",
    "medians",
    "reconstructor",
    "same_size",
    "some",
    "unit_of",
    "with_unit",
]

# Font size of labels, in points.
FONT = 9


class Display:
    """What the displays share. ``plot`` sets ``figure_`` and ``axes_``."""

    def _repr_png_(self):
        # A figure that pyplot does not know of is not shown by a notebook; its display is.
        if not hasattr(self, "figure_"):
            return None
        buffer = io.BytesIO()
        self.figure_.savefig(buffer, format="png")
        return buffer.getvalue()


def same_size(images, name, other, other_name):
    """Refuse two batches of another number or shape of images."""
    if images.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must hold the same images, got {len(images)} of shape "
            f"{images.shape[1:]} and {len(other)} of shape {other.shape[1:]} (C, H, W)."
        )


def reconstructor(estimator, Y):
    """The estimator inside of searches and pipelines, and the measurements as it gets them."""
    inner = getattr(estimator, "best_estimator_", estimator)
    if hasattr(inner, "steps"):
        Y = inner[:-1].transform(Y) if len(inner.steps) > 1 else Y
        inner = inner[-1]
    if not hasattr(inner, "reconstruct"):
        raise TypeError(
            f"estimator must be one of skaipo's, or a fitted search or a pipeline that ends in "
            f"one, got {type(estimator).__name__}. For other methods use from_predictions."
        )
    return inner, Y


def medians(values):
    """The median of each row's finite values; NaN where there are none."""
    finite = (row[np.isfinite(row)] for row in values)
    return np.array([np.median(row) if len(row) else np.nan for row in finite])


def unit_of(noise):
    """The unit of misfit and objective."""
    # All other noise models give a negative log-likelihood.
    return "squared measurement units" if type(as_noise(noise)) is SquaredError else "nats"


def with_unit(label, unit):
    """A label, with the unit where it is known."""
    return label if unit is None else f"{label} ({unit})"


def some(shown, n, what="images, evenly spaced"):
    """What to say where not everything is shown; nothing where it is."""
    return f"{len(shown)} of {n} {what}" if len(shown) < n else ""
