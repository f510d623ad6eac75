"""Pictures of reconstructions. Needs matplotlib (``pip install skaipo[plot]``)."""

from skaipo.plotting._images import plot_image_rows

__all__ = ["plot_image_rows"]
