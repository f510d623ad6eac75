"""Images: what shape they have, which colours, and where on the page they go."""

import math

import numpy as np
import torch

from skaipo._validation import to_numpy

__all__ = [
    "Mosaic",
    "as_images",
    "draw_image",
    "evenly_spaced",
    "finite_range",
    "load_matplotlib",
    "new_figure",
    "plot_image_rows",
]

# Pixels that were not measured: a colour that is no shade of grey.
MISSING = "#9db7d5"


def load_matplotlib():
    """Import matplotlib, or say how to get it. (Not at the top: skaipo works without it.)"""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.collections
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib: install it with pip install 'skaipo[plot]'."
        ) from error
    return matplotlib


def new_figure(width, height, layout="constrained"):
    """A figure of its own, in inches, which pyplot does not know of and need not close."""
    mpl = load_matplotlib()
    figure = mpl.figure.Figure(figsize=(width, height), dpi=120, facecolor="white", layout=layout)
    mpl.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def as_images(X, image_shape=None, name="X"):
    """A batch as float images.

    Parameters
    ----------
    X : array-like or torch.Tensor of shape (n, d), (n, H, W) or (n, C, H, W)
    image_shape : tuple of int, default=None
        (H, W) or (C, H, W), with one or three channels. Default: that of ``X``; flat rows of
        s * s pixels are square grey images.
    name : str
        For messages.

    Returns
    -------
    images : ndarray of shape (n, C, H, W)
    """
    X = np.asarray(to_numpy(X) if isinstance(X, torch.Tensor) else X, dtype=np.float64)
    if X.ndim < 2 or X.size == 0:
        raise ValueError(
            f"{name} must be a batch of images, of shape (n, d), (n, H, W) or (n, C, H, W), got "
            f"shape {X.shape}. For a single image pass {name}[None]."
        )
    n, d = len(X), math.prod(X.shape[1:])
    shape = tuple(X.shape[1:]) if image_shape is None else tuple(image_shape)
    if len(shape) == 1:
        side = math.isqrt(d)
        if side * side != d:
            raise ValueError(
                f"{name} has rows of {d} values, which are no square image: pass "
                f"image_shape=(H, W) or (C, H, W)."
            )
        shape = (side, side)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        hint = ""
        if len(shape) == 3 and shape[-1] in (1, 3):
            hint = f" For channels-last images pass {name}.transpose(0, 3, 1, 2)."
        raise ValueError(
            f"Images must be of shape (H, W), (1, H, W) or (3, H, W), got {shape} for {name}.{hint}"
        )
    own = (1, *X.shape[1:]) if X.ndim == 3 else X.shape[1:]
    if math.prod(shape) != d or (len(own) > 1 and own != shape):
        raise ValueError(
            f"{name} must hold images of shape {shape} (C, H, W), or flat rows of "
            f"{math.prod(shape)} pixels, got shape {X.shape}. Reshape {name}, or pass the "
            f"image_shape that it has."
        )
    return X.reshape(n, *shape)


def evenly_spaced(n, most):
    """Indices of at most ``most`` of ``n`` things, the first and the last among them."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, max(most, 1)).round().astype(int)


def draw_image(axes, picture, vmin, vmax, cmap="gray", **options):
    """Draw one image of shape (H, W), (1, H, W) or (3, H, W); NaN pixels in their own colour."""
    mpl = load_matplotlib()
    cmap = mpl.colormaps[cmap].with_extremes(bad=MISSING)
    if picture.ndim == 3 and len(picture) == 1:
        picture = picture[0]
    elif picture.ndim == 3:
        picture = np.clip((picture - vmin) / (vmax - vmin), 0, 1).transpose(1, 2, 0)
        missing = np.isnan(picture).any(-1, keepdims=True)
        picture = np.where(missing, cmap.get_bad()[:3], picture)
        vmin, vmax = 0, 1
    return axes.imshow(picture, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest", **options)


def finite_range(images, vmin=None, vmax=None, share=0.0):
    """The range of grey levels, where it was not given, less a share at both ends; never empty."""
    finite = images[np.isfinite(images)]
    low, high = np.quantile(finite, (share, 1 - share)) if finite.size else (0.0, 1.0)
    vmin, vmax = low if vmin is None else vmin, high if vmax is None else vmax
    return float(vmin), float(vmax if vmax > vmin else vmin + 1)


class Mosaic:
    """Images in the cells of a grid, all in the same Axes.

    One Axes per image would be hundreds of them, which takes matplotlib minutes to lay out, and
    would not fit into an Axes that the user passes. A cell is one unit wide.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    image_shape : tuple of int
        (C, H, W)
    """

    gap = 0.06

    def __init__(self, axes, image_shape):
        self.axes = axes
        self.height = image_shape[-2] / image_shape[-1]

    def draw(self, picture, left, top, *args):
        """Draw one image with its upper left corner there; ``y`` points down."""
        extent = (left, left + 1, top + self.height, top)
        return draw_image(self.axes, picture, *args, extent=extent)

    def finish(self, width, height, row_labels, column_labels=(), fontsize=9):
        """Set the limits, and label rows and columns where (position, label) says.

        The labels are those of ticks: matplotlib makes room for them.
        """
        axes, pad = self.axes, self.gap / 2
        axes.set(xlim=(-pad, width + pad), ylim=(height + pad, -pad), facecolor="none")
        axes.set_aspect("equal", anchor="C")
        axes.spines[:].set_visible(False)
        axes.set_yticks([y for y, _ in row_labels], [label for _, label in row_labels])
        axes.set_xticks([x for x, _ in column_labels], [label for _, label in column_labels])
        axes.tick_params(length=0, labelsize=fontsize, pad=2)
        axes.tick_params(axis="x", labeltop=True, labelbottom=False)


def plot_image_rows(rows, path=None, *, vmin=None, vmax=None, title=None):
    """Draw labelled rows of images under each other.

    Parameters
    ----------
    rows : dict, or list of (label, images) pairs
        Images of shape (n_images, H, W) or (n_images, C, H, W). NaN pixels are drawn grey-blue:
        they were not measured. Images of None make the label a heading.
    path : path-like, default=None
        Where to save the figure; its ending gives the format.
    vmin, vmax : float, default=None
        Grey (or colour) range; default: that of the first row.
    title : str, default=None

    Returns
    -------
    figure : matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    pairs = list(rows.items()) if isinstance(rows, dict) else list(rows)
    pairs = [(name, None if row is None else np.asarray(row, float)) for name, row in pairs]
    pictures = [row for _, row in pairs if row is not None]
    vmin = np.nanmin(pictures[0]) if vmin is None else vmin
    vmax = np.nanmax(pictures[0]) if vmax is None else vmax
    columns = max(len(row) for row in pictures)
    cell, heading = min(0.8, 12 / columns), 0.4
    margin = 0.075 * max(len(name) for name, row in pairs if row is not None) + 0.2
    content = sum(heading if row is None else cell for _, row in pairs)
    width, height = margin + cell * columns, content + (0.4 if title else 0.1)
    figure = new_figure(width, height, layout=None)
    y = content
    for name, row in pairs:
        if row is None:
            y -= heading
            figure.text(0.1 / width, (y + 0.12) / height, name, fontsize=10, weight="bold")
            continue
        y -= cell
        x, middle = (margin - 0.1) / width, (y + cell / 2) / height
        figure.text(x, middle, name, ha="right", va="center", fontsize=9)
        for c, picture in enumerate(row):
            left = (margin + c * cell) / width
            size = 0.95 * cell / width, 0.95 * cell / height
            axes = figure.add_axes((left, y / height, *size))
            draw_image(axes, picture, vmin, vmax)
            axes.set_axis_off()
    if title:
        figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=10)
    if path is not None:
        figure.savefig(path)
    return figure
