"""Pictures of reconstructions. Needs matplotlib (``pip install skaipo[plot]``)."""

import numpy as np

__all__ = ["plot_image_rows"]


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
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib: install it with pip install 'skaipo[plot]'."
        ) from error
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
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grey = colormaps["gray"].with_extremes(bad="#9db7d5")
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
            low, high = vmin, vmax
            if picture.ndim == 3 and len(picture) == 1:
                picture = picture[0]
            elif picture.ndim == 3:
                picture = np.clip((picture - vmin) / (vmax - vmin), 0, 1).transpose(1, 2, 0)
                missing = np.isnan(picture).any(-1, keepdims=True)
                picture = np.where(missing, grey.get_bad()[:3], picture)
                low, high = 0, 1
            axes.imshow(picture, cmap=grey, vmin=low, vmax=high, interpolation="nearest")
            axes.set_axis_off()
    if title:
        figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=10)
    if path is not None:
        figure.savefig(path)
    return figure
