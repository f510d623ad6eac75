"""Reconstructions along lambda."""

import numpy as np
from sklearn.utils.validation import check_is_fitted

from skaipo.metrics import psnr_score
from skaipo.plotting._base import FONT, Display, medians, same_size, some, unit_of, with_unit
from skaipo.plotting._images import (
    Mosaic,
    as_images,
    evenly_spaced,
    finite_range,
    load_matplotlib,
    new_figure,
)

__all__ = ["LambdaPathDisplay"]

CHOSEN = "#D55E00"


class LambdaPathDisplay(Display):
    """Reconstructions along lambda, and what lambda does to misfit, log-density and PSNR.

    Make it with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    lams : ndarray of shape (n_lams,)
        Ascending.
    image_path : ndarray of shape (n_lams, n_samples, C, H, W)
        With one channel or three.
    truth : ndarray of shape (n_samples, C, H, W), default=None
    curves : dict of str to ndarray of shape (n_lams, n_samples), default=None
        What to draw against lambda, by its label with its unit.
    lam : float, default=None
        The chosen one of ``lams``.

    Attributes
    ----------
    figure_ : matplotlib.figure.Figure
    axes_ : ndarray of matplotlib.axes.Axes of shape (1 + n_curves,)
        That of all images, then one per curve.
    shown_ : ndarray of int
        Indices of the images that are drawn. (The curves are of all.)
    shown_lams_ : ndarray of int
        Indices of the lambdas whose images are drawn.
    images_ : list of list of matplotlib.image.AxesImage
        The drawn images: a list for each of ``shown_``, in the order of ``shown_lams_``.
    truth_images_ : list of matplotlib.image.AxesImage
        The drawn truth, where it is known, in the order of ``shown_``.
    frame_ : matplotlib.patches.Rectangle or None
        Around the images of the chosen lambda.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.plotting import LambdaPathDisplay
    >>> lams, X_path = np.array([0.1, 1.0]), np.random.default_rng(0).random((2, 5, 64))
    >>> display = LambdaPathDisplay.from_predictions(lams, X_path, X_true=X_path[0], lam=1.0)
    >>> len(display.axes_)  # the images and the PSNR
    2
    """

    def __init__(self, lams, image_path, *, truth=None, curves=None, lam=None):
        self.lams = lams
        self.image_path = image_path
        self.truth = truth
        self.curves = curves
        self.lam = lam

    @classmethod
    def from_estimator(cls, estimator, Y, X=None, *, image_shape=None, ax=None, **kwargs):
        """Reconstruct measurements along the lambdas of a search, and draw them.

        The images are those of the path by which the search chose. (``predict`` solves for the
        chosen lambda alone, with all of ``max_evals``.)

        Parameters
        ----------
        estimator : AIPORegressorCV
            Fitted: it has the grid, and the choice.
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured.
        X : array-like or torch.Tensor of shape (n_samples, d), default=None
            Clean images, for the PSNR.
        image_shape : tuple of int, default=None
            (H, W) or (C, H, W). Default: the prior's ``event_shape_``.
        ax, **kwargs
            As in :meth:`from_predictions`.

        Returns
        -------
        display : LambdaPathDisplay

        Raises
        ------
        TypeError
            If ``estimator`` is no ``AIPORegressorCV``.
        NotFittedError
            If it has not chosen lambda yet.
        """
        if not (hasattr(estimator, "lams") and hasattr(estimator, "reconstruct")):
            raise TypeError(
                f"estimator must be a fitted AIPORegressorCV, got {type(estimator).__name__}. For "
                f"others use LambdaPathDisplay.from_predictions with what aipo_path returns."
            )
        check_is_fitted(estimator)
        prior = estimator._ready_prior()
        results, _ = estimator._along_the_path()._solve(Y, tuple(estimator.lams_.tolist()))
        return cls.from_predictions(
            estimator.lams_,
            [result.x for result in results],
            results,
            X_true=X,
            lam=estimator.lam_,
            image_shape=prior.event_shape_ if image_shape is None else image_shape,
            unit=unit_of(estimator.noise),
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        lams,
        X_path,
        reconstructions=None,
        *,
        X_true=None,
        lam=None,
        image_shape=None,
        data_range=None,
        unit=None,
        ax=None,
        **kwargs,
    ):
        """Draw a path that is there already.

        ``LambdaPathDisplay.from_predictions(*aipo_path(Y, op, prior))`` has the images only;
        ``return_details=True`` gives the reconstructions that the curves are drawn from.

        Parameters
        ----------
        lams : array-like of shape (n_lams,)
            Ascending, >= 0.
        X_path : array-like or torch.Tensor of shape (n_lams, n_samples, d) or \
                (n_lams, n_samples, *shape)
        reconstructions : list of Reconstruction, default=None
            One for each lambda: misfit and log-density are drawn.
        X_true : array-like or torch.Tensor of shape (n_samples, d), default=None
            Clean images: they and the PSNR are drawn.
        lam : float, default=None
            The chosen one of ``lams``, to be marked.
        image_shape : tuple of int, default=None
            (H, W) or (C, H, W). Default: that of ``X_path``; flat rows are square grey images.
        data_range : float, default=None
            Of the PSNR, see :func:`~skaipo.metrics.psnr_score`.
        unit : str, default=None
            Of the misfit, for its label: "nats" where there is a noise model.
        ax : matplotlib.axes.Axes or array-like of them, default=None
            Where to draw: an Axes, whose place is divided, or one for the images and one for each
            curve. Default: a new figure.
        **kwargs
            Of :meth:`plot`.

        Returns
        -------
        display : LambdaPathDisplay

        Raises
        ------
        ValueError
            If the shapes do not fit, ``lams`` is not ascending, or ``lam`` is none of it.
        ImportError
            If matplotlib is not installed.
        """
        lams = np.asarray(lams, dtype=np.float64)
        if lams.ndim != 1 or len(lams) == 0 or not (lams >= 0).all() or (np.diff(lams) <= 0).any():
            raise ValueError(
                f"lams must hold ascending numbers >= 0, got {lams!r:.200}. Sort lams, and X_path "
                f"with it."
            )
        for name, values in (("X_path", X_path), ("reconstructions", reconstructions)):
            if values is not None and len(values) != len(lams):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(lams)} lams, got "
                    f"{len(values)}."
                )
        paths = [as_images(X, image_shape, f"X_path[{k}]") for k, X in enumerate(X_path)]
        for k, images in enumerate(paths):
            same_size(images, f"X_path[{k}]", paths[0], "X_path[0]")
        display = cls(lams, np.stack(paths), curves={})
        if lam is not None:
            if not np.isclose(lams, lam, rtol=1e-6, atol=0).any():
                raise ValueError(f"lam must be one of lams, {lams!r:.200}, got {lam!r}.")
            display.lam = float(lam)
        if reconstructions is not None:
            for label, name, sign in (
                (with_unit("misfit", unit), "misfit", 1),
                ("−log p(x) (nats)", "log_prob", -1),
            ):
                rows = [np.asarray(getattr(result, name)) for result in reconstructions]
                display.curves[label] = sign * np.stack(rows)
        if X_true is not None:
            display.truth = as_images(X_true, paths[0].shape[1:], "X_true")
            same_size(display.truth, "X_true", paths[0], "X_path[0]")
            display.curves["PSNR (dB)"] = np.stack(
                [psnr_score(display.truth, x, data_range, per_image=True) for x in paths]
            )
        return display.plot(ax=ax, **kwargs)

    def plot(self, ax=None, *, max_images=5, max_lams=12, vmin=None, vmax=None, title=None):
        """Draw images and curves.

        Parameters
        ----------
        ax : matplotlib.axes.Axes or array-like of them, default=None
            Where to draw: an Axes, whose place is divided (each curve takes about three inches), or
            one for the images and one for each curve. Default: a new figure.
        max_images, max_lams : int, default=5 and 12
            Of more so many are drawn, evenly spaced, and the chosen lambda; the title says so.
            The curves are of all.
        vmin, vmax : float, default=None
            Range of grey (or colour) levels. Default: that of the truth, or else from the first to
            the last percentile of the path.
        title : str, default=None

        Returns
        -------
        self : LambdaPathDisplay
        """
        load_matplotlib()
        n_lams, n = self.image_path.shape[:2]
        shape = self.image_path.shape[2:]
        chosen = None if self.lam is None else int(np.argmin(np.abs(self.lams - self.lam)))
        self.shown_ = shown = evenly_spaced(n, max_images)
        self.shown_lams_ = columns = evenly_spaced(n_lams, max_lams)
        if chosen is not None and chosen not in columns:
            # In place of its neighbour.
            columns = np.sort(np.r_[np.delete(columns, np.abs(columns - chosen).argmin()), chosen])
            self.shown_lams_ = columns
        curves = self.curves or {}
        aspect = shape[-2] / shape[-1]
        self.axes_ = self._make_axes(ax, len(curves), len(shown) * aspect, len(columns))
        self.figure_ = self.axes_[0].figure
        self._draw_images(shown, columns, chosen, vmin, vmax)
        notes = [some(shown, n), some(columns, n_lams, "lambdas")]
        title = "\n".join(part for part in (title, ", ".join(filter(None, notes))) if part)
        if title:
            self.axes_[0].set_title(title, fontsize=FONT + 1)
        for k, (axes, (label, values)) in enumerate(
            zip(self.axes_[1:], curves.items(), strict=True)
        ):
            self._draw_curve(axes, label, values, legend=k == 0)
        return self

    def _make_axes(self, ax, n_curves, height, n_columns):
        if ax is None:
            width = n_columns + (self.truth is not None)
            inches = float(np.clip(11 / width, 0.6, 1.3))
            tall = height * 1.06 * inches + 0.7
            wide = max(width * inches + 0.8, 3.4 * n_curves, 4)
            figure = new_figure(wide, tall + (2.7 if n_curves else 0))
            if not n_curves:
                return np.array([figure.add_subplot()])
            grid = figure.add_gridspec(2, n_curves, height_ratios=(tall, 2.7))
        elif np.ndim(ax) > 0 or isinstance(ax, list | tuple):
            axes = np.asarray(ax, dtype=object).ravel()
            if len(axes) != 1 + n_curves:
                raise ValueError(
                    f"ax must hold {1 + n_curves} Axes, for the images and {n_curves} curves, got "
                    f"{len(axes)}."
                )
            return axes
        elif n_curves == 0:
            return np.array([ax])
        else:
            if ax.get_subplotspec() is None:
                raise ValueError(
                    f"An Axes that no grid placed cannot be divided: pass one made by subplots, or "
                    f"{1 + n_curves} Axes."
                )
            # Its place is what counts: the axis of the place itself would lie under the parts.
            ax.set_axis_off()
            figure, grid = ax.figure, ax.get_subplotspec().subgridspec(2, n_curves)
        return np.array(
            [
                figure.add_subplot(grid[0, :]),
                *(figure.add_subplot(grid[1, k]) for k in range(n_curves)),
            ]
        )

    def _draw_images(self, shown, columns, chosen, vmin, vmax):
        mpl = load_matplotlib()
        shape = self.image_path.shape[2:]
        mosaic = Mosaic(self.axes_[0], shape)
        reference = self.image_path[:, shown] if self.truth is None else self.truth[shown]
        levels = finite_range(reference, vmin, vmax, 0.01 if self.truth is None else 0)
        step = mosaic.height + mosaic.gap
        # The truth stands at the left, a little apart from the path.
        first = 0.0 if self.truth is None else 1 + 3 * mosaic.gap
        left = first + np.arange(len(columns)) * (1 + mosaic.gap)
        self.images_, self.truth_images_ = [], []
        for r, i in enumerate(shown):
            self.images_.append(
                [
                    mosaic.draw(self.image_path[k, i], x, r * step, *levels)
                    for k, x in zip(columns, left, strict=True)
                ]
            )
            if self.truth is not None:
                self.truth_images_.append(mosaic.draw(self.truth[i], 0, r * step, *levels))
        height = len(shown) * step - mosaic.gap
        ticks = [] if self.truth is None else [(0.5, "truth")]
        ticks += [(x + 0.5, f"{self.lams[k]:.2g}") for k, x in zip(columns, left, strict=True)]
        rows = [(r * step + mosaic.height / 2, f"image {i}") for r, i in enumerate(shown)]
        inches = self.axes_[0].get_window_extent().width / self.figure_.dpi / (left[-1] + 1)
        mosaic.finish(left[-1] + 1, height, rows, ticks, float(np.clip(22 * inches, 5, FONT)))
        self.axes_[0].set_xlabel("λ", fontsize=FONT)
        self.axes_[0].xaxis.set_label_position("top")
        self.frame_ = None
        if chosen is not None:
            position = columns.tolist().index(chosen)
            self.frame_ = mpl.patches.Rectangle(
                (left[position], 0), 1, height, fill=False, edgecolor=CHOSEN, linewidth=2.5
            )
            self.frame_.set_clip_on(False)
            self.axes_[0].add_patch(self.frame_)
            label = self.axes_[0].get_xticklabels()[position + (first > 0)]
            label.set_color(CHOSEN)

    def _draw_curve(self, axes, label, values, legend):
        mpl = load_matplotlib()
        values = np.where(np.isfinite(values), values, np.nan)
        n = values.shape[1]
        if n > 1:
            lines = [np.column_stack((self.lams, row)) for row in values.T]
            axes.add_collection(
                mpl.collections.LineCollection(
                    lines, colors="0.6", linewidths=0.5, alpha=0.6, label="one image"
                )
            )
        axes.plot(
            self.lams,
            medians(values),
            color="black",
            marker=".",
            label=f"median of {n}" if n > 1 else "the image",
        )
        positive = self.lams[self.lams > 0]
        if len(positive) == len(self.lams):
            axes.set_xscale("log")
        elif len(positive):
            # There is room for zero at the left of a scale that is logarithmic beyond it.
            axes.set_xscale("symlog", linthresh=positive[0])
        if label.startswith("misfit") and not (values <= 0).any():
            axes.set_yscale("log")
        axes.autoscale_view()
        rows = values[np.isfinite(values).any(1)]
        if n >= 10 and len(rows) and axes.get_yscale() == "linear":
            # A few images far away would leave the others no room.
            low = np.nanpercentile(rows, 10, axis=1).min()
            high = np.nanpercentile(rows, 90, axis=1).max()
            if high > low:
                axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        if self.lam is not None:
            axes.axvline(
                self.lam,
                color=CHOSEN,
                linestyle="--",
                label=f"chosen: λ = {self.lam:.2g}",
            )
        axes.set_xlabel("λ", fontsize=FONT)
        axes.set_ylabel(label, fontsize=FONT)
        axes.tick_params(which="both", labelsize=FONT - 1)
        if legend:
            axes.legend(fontsize=FONT - 1.5, framealpha=0.8)
