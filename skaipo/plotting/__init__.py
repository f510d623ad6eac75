"""Pictures of reconstructions. Needs matplotlib (``pip install skaipo[plot]``)."""

from skaipo.plotting._convergence import ConvergenceDisplay
from skaipo.plotting._images import plot_image_rows
from skaipo.plotting._path import LambdaPathDisplay
from skaipo.plotting._reconstruction import ReconstructionDisplay

__all__ = ["ConvergenceDisplay", "LambdaPathDisplay", "ReconstructionDisplay", "plot_image_rows"]
