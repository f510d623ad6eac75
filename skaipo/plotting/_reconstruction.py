"""A batch of images: truth, measurement, reconstruction, error."""

import math

import numpy as np
import torch

from skaipo._validation import to_numpy, to_tensor
from skaipo.metrics import psnr_score
from skaipo.operators import as_operator
from skaipo.plotting._base import FONT, Display, reconstructor, same_size, some
from skaipo.plotting._images import (
    Mosaic,
    as_images,
    evenly_spaced,
    finite_range,
    load_matplotlib,
    new_figure,
)

__all__ = ["ReconstructionDisplay"]

ADJOINT = "adjoint of measurement"
# Inches: a line of text, and the space between two blocks of columns.
LINE, SPACE = 0.2, 0.12


class ReconstructionDisplay(Display):
    """Truth, measurement, reconstruction and error of a batch of images, under each other.

    Make it with :meth:`from_estimator` or :meth:`from_predictions`.

    Parameters
    ----------
    reconstruction : ndarray of shape (n_samples, C, H, W)
        With one channel or three.
    truth : ndarray of shape (n_samples, C, H, W), default=None
    measurement : ndarray of shape (n_samples, C, H, W), default=None
        Measurements that are images; NaN where nothing was measured.
    back_projection : ndarray of shape (n_samples, C, H, W), default=None
        The adjoint of the operator applied to measurements that are no images. It has units of its
        own, and is drawn in its own range.
    psnr : ndarray of shape (n_samples,), default=None
        In dB, written under each image.

    Attributes
    ----------
    image_rows : dict of str to ndarray of shape (n_samples, C, H, W)
        What is drawn, by the label of its row. The error, the root mean square over the channels,
        has one channel.
    figure_ : matplotlib.figure.Figure
    axes_ : ndarray of matplotlib.axes.Axes of shape (1,)
        All images are in one Axes.
    shown_ : ndarray of int
        Indices of the images that are drawn.
    images_ : dict of str to list of matplotlib.image.AxesImage
        The drawn images of each row of ``image_rows``, in the order of ``shown_``.
    colorbar_ : matplotlib.colorbar.Colorbar
        Of the error, where there is one.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo.plotting import ReconstructionDisplay
    >>> X = np.random.default_rng(0).random((5, 64))
    >>> display = ReconstructionDisplay.from_predictions(X, X + 0.1)
    >>> list(display.image_rows)
    ['truth', 'reconstruction', 'error']
    >>> display.figure_.savefig("figure.png")  # doctest: +SKIP
    """

    def __init__(
        self, reconstruction, *, truth=None, measurement=None, back_projection=None, psnr=None
    ):
        self.reconstruction = reconstruction
        self.truth = truth
        self.measurement = measurement
        self.back_projection = back_projection
        self.psnr = psnr

    @property
    def image_rows(self):
        rows = {
            "truth": self.truth,
            "measurement": self.measurement,
            ADJOINT: self.back_projection,
            "reconstruction": self.reconstruction,
        }
        if self.truth is not None:
            square = (self.reconstruction - self.truth) ** 2
            rows["error"] = np.sqrt(square.mean(1, keepdims=True))
        return {label: row for label, row in rows.items() if row is not None}

    @classmethod
    def from_estimator(
        cls, estimator, Y, X=None, *, image_shape=None, data_range=None, ax=None, **kwargs
    ):
        """Reconstruct measurements, and draw them.

        Parameters
        ----------
        estimator : estimator of skaipo, or search or pipeline that ends in one
            Ready to predict.
        Y : array-like or torch.Tensor of shape (n_samples, m) or (n_samples, *event_shape)
            Measurements; NaN where nothing was measured. Those of the size of the images are drawn
            as images. Of others the adjoint is drawn where the operator is linear, and nothing
            where it is not.
        X : array-like or torch.Tensor of shape (n_samples, d), default=None
            Clean images.
        image_shape : tuple of int, default=None
            (H, W) or (C, H, W). Default: the prior's ``event_shape_``.
        data_range, ax, **kwargs
            As in :meth:`from_predictions`.

        Returns
        -------
        display : ReconstructionDisplay

        Raises
        ------
        TypeError
            If ``estimator`` is none of skaipo's.
        """
        estimator, Y = reconstructor(estimator, Y)
        result = estimator.reconstruct(Y)
        prior = estimator._ready_prior()
        op, _ = estimator._bind(prior)
        shape = prior.event_shape_ if image_shape is None else image_shape
        visible = op.n_measurements_ == op.n_features_in_ or op.is_linear
        return cls.from_predictions(
            X,
            result.x,
            Y=Y if visible else None,
            op=op,
            image_shape=shape,
            data_range=data_range,
            ax=ax,
            **kwargs,
        )

    @classmethod
    def from_predictions(
        cls,
        X_true,
        X_pred,
        *,
        Y=None,
        op=None,
        image_shape=None,
        data_range=None,
        ax=None,
        **kwargs,
    ):
        """Draw reconstructions that are there already, of any method.

        Parameters
        ----------
        X_true : array-like or torch.Tensor of shape (n_samples, d) or (n_samples, *shape), or None
            Clean images, if they are known.
        X_pred : array-like or torch.Tensor of shape (n_samples, d) or (n_samples, *shape)
            Reconstructions.
        Y : array-like or torch.Tensor of shape (n_samples, m), default=None
            Measurements; NaN where nothing was measured.
        op : Operator or array-like of shape (m, d), default=None
            What measured ``Y``; needed where measurements are no images, to apply its adjoint.
        image_shape : tuple of int, default=None
            (H, W) or (C, H, W). Default: that of ``X_pred``; flat rows are square grey images.
        data_range : float, default=None
            Of the PSNR, see :func:`~skaipo.metrics.psnr_score`. Default: that of ``X_true``.
        ax : matplotlib.axes.Axes, default=None
            Where to draw. Default: a new figure.
        **kwargs
            Of :meth:`plot`.

        Returns
        -------
        display : ReconstructionDisplay

        Raises
        ------
        ValueError
            If the images are not of the same number and shape, no images at all, or ``Y`` holds no
            images and there is no ``op``.
        ImportError
            If matplotlib is not installed.
        """
        images = as_images(X_pred, image_shape, "X_pred")
        shape = images.shape[1:]
        display = cls(images)
        if X_true is not None:
            display.truth = as_images(X_true, shape, "X_true")
            same_size(display.truth, "X_true", images, "X_pred")
            display.psnr = psnr_score(display.truth, images, data_range, per_image=True)
        if Y is not None:
            name, rows = _measured_images(Y, op, images, np.shape(X_pred)[1:], image_shape)
            setattr(display, name, rows)
        return display.plot(ax=ax, **kwargs)

    def plot(
        self,
        ax=None,
        *,
        max_images=100,
        n_columns=None,
        vmin=None,
        vmax=None,
        error_max=None,
        title=None,
    ):
        """Draw the images, in as many blocks of columns as it takes.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, default=None
            Where to draw. Default: a new figure.
        max_images : int, default=100
            Of more images so many are drawn, evenly spaced; the title says so.
        n_columns : int, default=None
            Images next to each other. Default: up to 20, in blocks of equal width.
        vmin, vmax : float, default=None
            Range of grey (or colour) levels. Default: that of the truth, or else from the first to
            the last percentile of the reconstructions.
        error_max : float, default=None
            End of the error's colour scale. Default: the largest error that is drawn.
        title : str, default=None

        Returns
        -------
        self : ReconstructionDisplay
        """
        load_matplotlib()
        rows = self.image_rows
        self.shown_ = shown = evenly_spaced(len(self.reconstruction), max_images)
        ax, n_columns, cell = self._place(ax, n_columns)
        fontsize = float(np.clip(72 * cell / 3.2, 4, FONT))
        mosaic = Mosaic(ax, self.reconstruction.shape[1:])
        ranges = self._ranges(rows, vmin, vmax, error_max)
        self.images_ = {label: [] for label in rows}
        labels, bottom = [], 0.0
        left = np.arange(n_columns) * (1 + mosaic.gap)
        for start in range(0, len(shown), n_columns):
            block = list(zip(shown[start : start + n_columns], left, strict=False))
            for label, images in rows.items():
                cmap = "magma" if label == "error" else "gray"
                self.images_[label] += [
                    mosaic.draw(images[i], x, bottom, *ranges[label], cmap) for i, x in block
                ]
                labels.append((bottom + mosaic.height / 2, label.replace(" of ", " of\n")))
                bottom += mosaic.height + mosaic.gap
            if self.psnr is not None:
                middle = bottom + LINE / cell / 2
                for i, x in block:
                    text = "∞" if self.psnr[i] == np.inf else f"{self.psnr[i]:.1f}"
                    ax.text(x + 0.5, middle, text, ha="center", va="center", fontsize=fontsize)
                labels.append((middle, "PSNR (dB)"))
                bottom += LINE / cell
            bottom += SPACE / cell
        mosaic.finish(left[-1] + 1, bottom, labels, fontsize=fontsize)
        title = "\n".join(part for part in (title, some(shown, len(self.reconstruction))) if part)
        if title:
            ax.set_title(title, fontsize=FONT + 1)
        self.figure_, self.axes_ = ax.figure, np.array([ax])
        if "error" in rows:
            self._draw_colorbar(ax, math.ceil(len(shown) / n_columns), bottom * cell, fontsize)
        return self

    def _place(self, ax, n_columns):
        """The Axes to draw in, the number of columns, and the width of a cell in inches."""
        n, n_rows = len(self.shown_), len(self.image_rows)
        if n_columns is None:
            n_columns = math.ceil(n / math.ceil(n / 20))
        n_columns = max(1, min(n_columns, n))
        n_blocks = math.ceil(n / n_columns)
        aspect = self.reconstruction.shape[-2] / self.reconstruction.shape[-1]
        rows = n_rows * (aspect + Mosaic.gap)
        text = SPACE + (0 if self.psnr is None else LINE)
        if ax is not None:
            width, height = np.array(ax.get_window_extent().size) / ax.figure.dpi
            cell = min(width / (n_columns * (1 + Mosaic.gap)), (height / n_blocks - text) / rows)
            return ax, n_columns, max(cell, 0.05)
        cell = float(np.clip(12 / n_columns, 0.6, 1.3))
        # Beside the images are the labels of the rows, and the colour bar of the error.
        width = n_columns * (1 + Mosaic.gap) * cell + (1.2 if self.truth is None else 2.1)
        figure = new_figure(
            max(width, 3.2), n_blocks * (rows * cell + text) + 0.4, layout="compressed"
        )
        return figure.add_subplot(), n_columns, cell

    def _ranges(self, rows, vmin, vmax, error_max):
        """The range of grey levels, or of the colour map, of each row."""
        if self.truth is None:
            levels = finite_range(self.reconstruction[self.shown_], vmin, vmax, 0.01)
        else:
            levels = finite_range(self.truth[self.shown_], vmin, vmax)
        ranges = dict.fromkeys(rows, levels)
        if self.back_projection is not None:
            ranges[ADJOINT] = finite_range(self.back_projection[self.shown_])
        if "error" in rows:
            ranges["error"] = finite_range(rows["error"][self.shown_], 0.0, error_max)
        return ranges

    def _draw_colorbar(self, ax, n_blocks, height, fontsize):
        # As long as one block or as its label, and no wider than it needs.
        length = max(height / n_blocks, min(height, 2.4))
        available, width = (np.array(ax.get_window_extent().size) / ax.figure.dpi)[::-1]
        name = "error" if self.reconstruction.shape[1] == 1 else "error, RMS over\nthe channels"
        self.colorbar_ = self.figure_.colorbar(
            self.images_["error"][0],
            ax=ax,
            shrink=min(1, length / max(height, available)),
            anchor=(0, 0.5 if n_blocks == 1 else 1),
            fraction=min(0.15, 0.25 / width),
            aspect=25,
        )
        self.colorbar_.set_label(f"{name} (pixel units)", fontsize=fontsize)
        self.colorbar_.ax.tick_params(labelsize=fontsize)


def _measured_images(Y, op, images, *shapes):
    """Measurements as images (n, C, H, W), and whether they are, or their adjoint is."""
    Y = np.asarray(to_numpy(Y) if isinstance(Y, torch.Tensor) else Y, dtype=np.float64)
    n, d = len(images), images[0].size
    if len(Y) != n:
        raise ValueError(f"Y must hold one measurement per image, got {len(Y)} for {n} images.")
    Y = Y.reshape(n, -1)
    if op is not None:
        op = as_operator(op)
        if not hasattr(op, "n_features_in_"):
            # Flat images have a shape only if it was given.
            shape = next((s for s in shapes if s is not None and len(s) > 1), images.shape[1:])
            op = op.bind(shape)
        if Y.shape[1] != op.n_measurements_:
            raise ValueError(
                f"Y must hold the {op.n_measurements_} measurements of {type(op).__name__}, got "
                f"{Y.shape[1]} columns."
            )
        Y = np.where(op.measured_, Y, np.nan)
    if Y.shape[1] == d:
        return "measurement", Y.reshape(images.shape)
    if op is None:
        raise ValueError(
            f"Y holds {Y.shape[1]} values for images of {d} pixels, which are no images: pass op= "
            f"to show its adjoint, or leave Y out."
        )
    if not op.is_linear:
        raise ValueError(
            f"Y holds no images, and {type(op).__name__}, which is not linear, has no adjoint to "
            f"show instead: leave Y out."
        )
    adjoint = op.adjoint(to_tensor(np.nan_to_num(Y)))
    return "back_projection", to_numpy(adjoint).reshape(images.shape)
