"""Pictures: what is drawn where, and in which colour."""

import sys
import warnings

import numpy as np
import pytest

from skaipo.plotting import plot_image_rows

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.image import imread  # noqa: E402

BAD = np.array([0x9D, 0xB7, 0xD5])


def drawn(axes):
    """The colours of an image as it is drawn, (H, W, 3) in 0..255, one per pixel."""
    (image,) = axes.images
    return np.asarray(image.to_rgba(image.get_array(), bytes=True))[..., :3]


def labels(figure):
    return [text.get_text() for text in figure.texts]


def position(figure, label):
    (text,) = [text for text in figure.texts if text.get_text() == label]
    return text.get_position()


def test_every_image_of_every_row_in_its_place():
    rng = np.random.default_rng(0)
    rows = {"truth": rng.random((3, 4, 5)), "measurement": rng.random((2, 4, 5))}
    figure = plot_image_rows(rows)
    assert labels(figure) == ["truth", "measurement"]
    assert len(figure.axes) == 5
    for axes, picture in zip(figure.axes, [*rows["truth"], *rows["measurement"]], strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture)
        assert not axes.axison
    boxes = np.array([axes.get_position().bounds for axes in figure.axes])
    # Left to right within a row, the first row above the second, columns under each other,
    # everything on the page and to the right of the labels.
    assert (np.diff(boxes[:3, 0]) > boxes[0, 2]).all()
    assert (boxes[:3, 1] > boxes[3, 1] + boxes[3, 3]).all()
    np.testing.assert_allclose(boxes[:2, 0], boxes[3:, 0])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1).all()
    for label, first in (("truth", 0), ("measurement", 3)):
        x, y = position(figure, label)
        assert 0 < x < boxes[first, 0]
        assert boxes[first, 1] < y < boxes[first, 1] + boxes[first, 3]


def test_grey_levels_share_one_range():
    first = np.array([[[0.0, 2.0], [4.0, 8.0]]])
    figure = plot_image_rows([("a", first), ("b", first / 2 - 3)])
    # The range is that of the first row: black is 0, white is 8.
    np.testing.assert_allclose(drawn(figure.axes[0])[..., 0], [[0, 64], [128, 255]], atol=1)
    np.testing.assert_array_equal(drawn(figure.axes[1])[..., 0], [[0, 0], [0, 32]])
    figure = plot_image_rows([("a", first)], vmin=-8, vmax=8)
    np.testing.assert_allclose(drawn(figure.axes[0])[..., 0], [[128, 160], [192, 255]], atol=1)


def test_missing_pixels_have_a_colour_of_their_own():
    picture = np.arange(9.0).reshape(1, 3, 3)
    picture[0, 1, 2] = np.nan
    for row in (picture, picture[:, None]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = plot_image_rows({"measurement": row})
        colours = drawn(figure.axes[0])
        np.testing.assert_array_equal(colours[1, 2], BAD)
        rest = np.delete(colours.reshape(-1, 3), 5, axis=0)
        assert (rest == rest[:, :1]).all(), "the measured pixels are grey"
        assert len(np.unique(rest[:, 0])) == 8


def test_colour_images_and_their_missing_pixels(tmp_path):
    picture = np.zeros((1, 3, 2, 2))
    picture[0, 0, 0, 0] = 10  # red
    picture[0, 1, 0, 1] = 5  # a darker green
    picture[0, :, 1, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_image_rows({"faces": picture}, tmp_path / "colour.png")
    colours = drawn(figure.axes[0])
    np.testing.assert_array_equal(colours[0, 0], [255, 0, 0])
    np.testing.assert_allclose(colours[0, 1], [0, 128, 0], atol=1)
    np.testing.assert_array_equal(colours[1, 0], BAD)
    np.testing.assert_array_equal(colours[1, 1], [0, 0, 0])


def test_one_channel_is_grey():
    picture = np.arange(4.0).reshape(1, 1, 2, 2)
    np.testing.assert_array_equal(
        drawn(plot_image_rows({"a": picture}).axes[0]),
        drawn(plot_image_rows({"a": picture[:, 0]}).axes[0]),
    )


def test_headings_and_repeated_labels():
    row = np.random.default_rng(0).random((2, 3, 3))
    figure = plot_image_rows(
        [("Denoising", None), ("truth", row), ("Inpainting", None), ("truth", row)], title="digits"
    )
    assert labels(figure) == ["Denoising", "truth", "Inpainting", "truth", "digits"]
    assert len(figure.axes) == 4
    heights = [text.get_position()[1] for text in figure.texts]
    assert heights[:4] == sorted(heights[:4], reverse=True) and heights[4] > heights[0]
    assert all(0 < height < 1 for height in heights)


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_saving(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    plot_image_rows({"a": np.random.default_rng(0).random((2, 8, 8))}, path)
    assert path.stat().st_size > 500
    if suffix == "png":
        pixels = imread(path)
        assert pixels.std() > 0.05 and len(np.unique(pixels[..., 0])) > 50


def test_inputs_are_left_alone():
    picture = np.array([[[np.nan, 1.0], [2.0, 3.0]]])
    kept = picture.copy()
    plot_image_rows({"a": picture, "b": [[[1, 2], [3, 4]]]})
    np.testing.assert_array_equal(picture, kept)


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'skaipo\[plot\]'"):
        plot_image_rows({"a": np.zeros((1, 2, 2))})
