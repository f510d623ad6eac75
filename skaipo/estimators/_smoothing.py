"""What the parameter ``smoothing`` of an estimator means for its other parameters and its prior."""

from skaipo.objective import check_smoothing
from skaipo.solvers import (
    AdaptiveSchedule,
    DirectSchedule,
    LatticeSchedule,
    Method,
    TheorySchedule,
)

__all__ = ["Smoothing"]


class Smoothing:
    """Reads and checks ``smoothing``, for estimators of reconstructions."""

    def _common_smoothing(self):
        """The smoothing that all rows are to have; 0.0 with "auto"."""
        if not isinstance(self.smoothing, str):
            return check_smoothing(self.smoothing, self.space, self.penalty)
        if self.smoothing != "auto":
            raise ValueError(
                f"smoothing must be 'auto' or a finite number >= 0, in the units of the images, "
                f"got {self.smoothing!r}."
            )
        return 0.0

    def _check_smoothing(self):
        smoothing = self._common_smoothing()
        if smoothing == 0:
            return
        if self.n_starts > 1 and self.max_evals < 8 * self.n_starts:
            raise ValueError(
                f"max_evals must be at least 8 for each of the n_starts={self.n_starts} starts "
                f"with smoothing, got {self.max_evals!r}."
            )
        if isinstance(self._schedule(), AdaptiveSchedule | TheorySchedule):
            raise ValueError(
                f"smoothing={smoothing:g} leaves noise in every gradient, and "
                f"schedule={self.schedule!r} goes by gradients that vanish: take another schedule, "
                f"or set smoothing=0."
            )

    def _width(self, prior, lams):
        """Standard deviation of the noise over which the density is averaged, and where it is."""
        schedule = self._schedule()
        if schedule is None and lams == (0.0,):
            return 0.0, False  # where the density does not count there is nothing to smooth
        if not isinstance(self.smoothing, str):
            return self._common_smoothing(), False
        by_density = (self.space, self.penalty) == ("image", "density")
        tells = type(self._method()).rough_rows is not Method.rough_rows
        # (The stages of the other schedules are too short to average, or go by exact gradients.)
        steady = schedule is None or isinstance(schedule, DirectSchedule | LatticeSchedule)
        if not (by_density and tells and steady):
            return 0.0, False
        width = 0.5 * getattr(prior, "dequantize_width", 0.0)
        return width, width > 0
