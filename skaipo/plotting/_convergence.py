"""The objective of each row, iteration by iteration."""

import numpy as np

from skaipo.plotting._base import FONT, Display, medians, reconstructor, unit_of, with_unit
from skaipo.plotting._images import load_matplotlib, new_figure
from skaipo.solvers import STATUS

__all__ = ["ConvergenceDisplay"]

# Okabe and Ito's colours, which the colour-blind can tell apart; markers say the same again.
STATUS_STYLES = {
    "converged": ("#0072B2", "o"),
    "budget": ("#E69F00", "s"),
    "stalled": ("#CC79A7", "^"),
    "diverged": ("#D55E00", "X"),
}


class ConvergenceDisplay(Display):
    """How the objective of each row came down, and how the row ended.

    Make it with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    histories : list of ndarray of shape (n_iterations,)
        The objective of each row after each iteration of the solver.
    found : ndarray of shape (n_samples,)
        The objective of each row's result.
    best : ndarray of shape (n_samples,)
        What the gap is measured from: the lowest objective known of each row.
    status : ndarray of str of shape (n_samples,)
    at_target : list of ndarray of bool of shape (n_iterations,), default=None
        Which iterations were at the target lambda; only their objectives can be compared with
        ``best``. Default: all of them.
    unit : str, default=None
        Of the objective, for its label.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
    axes_ : ndarray of matplotlib.axes.Axes of shape (1,)
    lines_ : dict of str to matplotlib.collections.LineCollection
        The lines of the rows of each status.
    median_ : matplotlib.lines.Line2D or None
        The median of several rows; those that are done count with what they found.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import AIPORegressor, GaussianPrior
    >>> from skaipo.operators import Denoising
    >>> from skaipo.plotting import ConvergenceDisplay
    >>> prior = GaussianPrior(mean=np.zeros(2), covariance=np.diag([1.0, 9.0]))
    >>> model = AIPORegressor(Denoising(), prior=prior, init="zero")
    >>> display = ConvergenceDisplay.from_estimator(model, np.ones((3, 2)))
    >>> list(display.lines_)
    ['converged']
    """

    def __init__(self, histories, found, best, status, *, at_target=None, unit=None):
        self.histories = histories
        self.found = found
        self.best = best
        self.status = status
        self.at_target = at_target
        self.unit = unit

    @classmethod
    def from_estimator(cls, estimator, Y, *, best=None, ax=None, **kwargs):
        """Reconstruct measurements with their histories, and draw these.

        Parameters
        ----------
        estimator : estimator of skaipo, or search or pipeline that ends in one
            Ready to predict.
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.
        best, ax, **kwargs
            As in :meth:`from_predictions`.

        Returns
        -------
        display : ConvergenceDisplay
        """
        estimator, Y = reconstructor(estimator, Y)
        result = estimator.reconstruct(Y, history=True)
        unit = unit_of(estimator.noise)
        return cls.from_predictions(result, best=best, unit=unit, ax=ax, **kwargs)

    @classmethod
    def from_predictions(cls, reconstruction, *, best=None, unit=None, ax=None, **kwargs):
        """Draw the histories of a reconstruction that is there already.

        Parameters
        ----------
        reconstruction : Reconstruction
            From ``reconstruct(Y, history=True)``.
        best : array-like of shape (n_samples,), default=None
            The lowest objective known of each row, from a longer run, say. Default: the lowest of
            this one, where the gap of a row that did not converge ends at zero all the same.
        unit : str, default=None
            Of the objective, for its label: "nats" where there is a noise model.
        ax : matplotlib.axes.Axes, default=None
            Where to draw. Default: a new figure.
        **kwargs
            Of :meth:`plot`.

        Returns
        -------
        display : ConvergenceDisplay

        Raises
        ------
        ValueError
            If the reconstruction has no histories, or ``best`` another length.
        ImportError
            If matplotlib is not installed.
        """
        if getattr(reconstruction, "objective_history", None) is None:
            raise ValueError(
                f"{type(reconstruction).__name__} has no objective_history: make it with "
                f"estimator.reconstruct(Y, history=True)."
            )
        histories = [np.asarray(h, np.float64) for h in reconstruction.objective_history]
        at_target = [np.isclose(h, reconstruction.lam, atol=0) for h in reconstruction.lam_history]
        found = np.asarray(reconstruction.objective, np.float64)
        lowest = np.array(
            [
                min([end, *h[t & np.isfinite(h)]]) if np.isfinite(end) else np.nan
                for end, h, t in zip(found, histories, at_target, strict=True)
            ]
        )
        if best is not None:
            best = np.asarray(best, dtype=np.float64)
            if best.shape != lowest.shape:
                raise ValueError(
                    f"best must hold the lowest objective of each of the {len(lowest)} rows, got "
                    f"shape {best.shape}."
                )
            # Whatever is lower still is the best known now.
            lowest = np.fmin(lowest, best)
        status = np.asarray(reconstruction.status)
        display = cls(histories, found, lowest, status, at_target=at_target, unit=unit)
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax=None, *, gap=True, title=None):
        """Draw one thin line per row, and their median.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw. Default: a new figure.
        gap : bool, default=True
            Draw the gap to the best value of the row, on a logarithmic scale: the iterations at
            the target lambda, but for the best itself, whose gap of zero has no place there.
            False: the objective at the lambda of the moment, all iterations.
        title : str, default=None

        Returns
        -------
        self : ConvergenceDisplay
        """
        mpl = load_matplotlib()
        n, length = len(self.histories), max(map(len, self.histories), default=0)
        if length == 0:
            raise ValueError(
                f"None of the {n} rows has an iteration to draw: their start solved them. Another "
                f"one, such as init='zero', leaves the solver something to do."
            )
        if ax is None:
            ax = new_figure(6.4, 4.2).add_subplot()
        self.figure_, self.axes_ = ax.figure, np.array([ax])
        values = np.full((n, length), np.nan)
        last = np.full((n, length), np.nan)
        for i, history in enumerate(self.histories):
            row = np.where(np.isfinite(history), history, np.nan)
            if gap:
                row = row - self.best[i]
                if self.at_target is not None:
                    row[~self.at_target[i]] = np.nan
            values[i, : len(row)] = last[i, : len(row)] = row
            # A row that is done keeps what it found.
            last[i, len(row) :] = self.found[i] - (self.best[i] if gap else 0)
        if gap:
            values[values <= 0] = np.nan
        iterations = np.arange(1, length + 1)
        self.lines_ = {}
        for status in STATUS:
            rows = values[np.asarray(self.status) == status]
            if not len(rows):
                continue
            color, marker = STATUS_STYLES[status]
            self.lines_[status] = mpl.collections.LineCollection(
                [np.column_stack((iterations, row)) for row in rows],
                colors=color,
                linewidths=1.5 if n == 1 else 0.6,
                alpha=max(0.25, min(0.8, 20 / n)),
            )
            ax.add_collection(self.lines_[status])
            drawn = [np.flatnonzero(np.isfinite(row)) for row in rows]
            ends = [(d[-1] + 1, row[d[-1]]) for d, row in zip(drawn, rows, strict=True) if len(d)]
            ax.plot(
                *np.array(ends).reshape(-1, 2).T,
                color=color,
                marker=marker,
                markersize=4,
                linestyle="none",
                alpha=0.8,
                label=f"{status}: {len(rows)} of {n}",
            )
        if gap:
            ax.set_yscale("log")
        self.median_ = None
        if n > 1:
            median = medians(last.T)
            if gap:
                median[~(median > 0)] = np.nan
            (self.median_,) = ax.plot(
                iterations, median, color="black", linewidth=2, label="median"
            )
        ax.autoscale_view()
        what = "objective − best of the row" if gap else "objective at the current λ"
        ax.set_xlabel("iteration of the solver (the start is not counted)", fontsize=FONT)
        ax.set_ylabel(with_unit(what, self.unit), fontsize=FONT)
        ax.tick_params(which="both", labelsize=FONT - 1)
        ax.legend(fontsize=FONT - 1)
        if title:
            ax.set_title(title, fontsize=FONT + 1)
        return self
