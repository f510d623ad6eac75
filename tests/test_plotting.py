"""Pictures: what is drawn where, and in which colour."""

import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skaipo import AIPORegressor, AIPORegressorCV, GaussianPrior, Reconstruction, aipo_path
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising, Inpainting, MatrixOperator
from skaipo.plotting import (
    ConvergenceDisplay,
    LambdaPathDisplay,
    ReconstructionDisplay,
    plot_image_rows,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib.image import imread  # noqa: E402

BAD = np.array([0x9D, 0xB7, 0xD5])


def drawn(axes):
    """The colours of an image as it is drawn, (H, W, 3) in 0..255, one per pixel."""
    (image,) = axes.images
    return drawn_image(image)


def drawn_image(image):
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


# -------------------------------------------------------------------------------- displays


def batch(n, shape=(8, 8), seed=0):
    return np.random.default_rng(seed).random((n, *shape))


def nothing_is_cut_off(figure):
    """Every Axes with its labels is on the page."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        if box is not None:
            assert box.x0 > -1 and box.x1 < figure.bbox.x1 + 1, axes
            assert box.y0 > -1 and box.y1 < figure.bbox.y1 + 1, axes


def no_overlap(images):
    """Images in one Axes: whether they are all beside or under each other."""
    corners = np.array([image.get_extent() for image in images])  # left, right, bottom, top
    low, high = corners[:, [0, 3]], corners[:, [1, 2]]
    apart = (low[:, None] >= high[None]).any(-1)
    return (apart | apart.T | np.eye(len(low), dtype=bool)).all()


def small_problem(n=4):
    """Images of 4 x 4 pixels, noisy measurements, and an estimator that is ready."""
    d = 16
    rng = np.random.default_rng(0)
    root = rng.normal(size=(d, d)) / 4
    prior = GaussianPrior(np.full(d, 3.0), root @ root.T + 0.1 * np.eye(d))
    X = 3 + rng.normal(size=(n, d)) @ root.T
    noise = GaussianNoise(0.3)
    model = AIPORegressor(Denoising(), prior=prior, noise=noise, max_evals=8)
    return X, noise.add_noise(X, random_state=0), model


@pytest.mark.parametrize("n, shape", [(1, (8, 8)), (45, (3, 6, 10))], ids=["grey", "colour"])
def test_reconstructions_are_drawn_as_they_are(n, shape):
    truth, measured = batch(n, shape), batch(n, shape, 1)
    pred = np.clip(truth + 0.1 * batch(n, shape, 2), 0, 1)
    truth.flat[:2] = 0, 1
    measured[0, ..., 0, 0] = np.nan
    display = ReconstructionDisplay.from_predictions(truth, pred, Y=measured)
    assert list(display.image_rows) == ["truth", "measurement", "reconstruction", "error"]
    for label, source in (("truth", truth), ("measurement", measured), ("reconstruction", pred)):
        assert len(display.images_[label]) == n
        for image, picture in zip(display.images_[label], source, strict=True):
            expected = picture if len(shape) == 2 else picture.transpose(1, 2, 0)
            holes = np.isnan(expected)
            expected = np.where(holes, (BAD / 255 if len(shape) == 3 else 0), expected)
            # The pixels to the eye: 0 is black, 1 is white.
            seen = image.to_rgba(image.get_array())[..., :3]
            seen = seen if len(shape) == 3 else np.where(holes, 0, seen[..., 0])
            np.testing.assert_allclose(seen, expected, atol=0.005)
    np.testing.assert_array_equal(drawn_image(display.images_["measurement"][0])[0, 0], BAD)
    error = np.sqrt(((truth - pred) ** 2).reshape(n, -1, *shape[-2:]).mean(1))
    for image, picture in zip(display.images_["error"], error, strict=True):
        np.testing.assert_allclose(image.get_array(), picture)
        assert image.get_clim() == (0, pytest.approx(error.max()))
    (axes,) = display.axes_
    assert display.figure_ is axes.figure and len(display.figure_.axes) == 2  # the colour bar
    assert no_overlap(axes.images)
    assert [text.get_text() for text in axes.texts] == [
        f"{value:.1f}" for value in psnr_score(truth, pred, per_image=True)
    ]
    assert [label.get_text() for label in axes.get_yticklabels()][:5] == [
        *display.image_rows,
        "PSNR (dB)",
    ]
    assert all("pixel units" in bar.get_ylabel() for bar in display.figure_.axes[1:])
    nothing_is_cut_off(display.figure_)


def test_a_hundred_images_go_in_blocks_and_more_are_thinned_out():
    X = batch(100)
    display = ReconstructionDisplay.from_predictions(None, X)
    assert list(display.image_rows) == ["reconstruction"]
    assert len(display.axes_[0].images) == 100 and len(display.figure_.axes) == 1
    assert display.axes_[0].get_title() == ""
    corners = np.array([image.get_extent() for image in display.axes_[0].images])
    assert len(np.unique(corners[:, 0])) == 20 and len(np.unique(corners[:, 2])) == 5
    assert no_overlap(display.axes_[0].images)
    assert (display.figure_.get_size_inches() < 16).all()
    display.plot(max_images=3, title="digits")
    np.testing.assert_array_equal(display.shown_, [0, 50, 99])
    np.testing.assert_array_equal(display.axes_[0].images[1].get_array(), X[50])
    assert display.axes_[0].get_title() == "digits\n3 of 100 images, evenly spaced"


def test_reconstructions_of_an_estimator():
    X, Y, model = small_problem()
    Y[0, 3] = np.nan
    display = ReconstructionDisplay.from_estimator(model, Y, X, image_shape=(4, 4))
    np.testing.assert_allclose(display.reconstruction.reshape(4, 16), model.predict(Y))
    np.testing.assert_array_equal(display.measurement.reshape(4, 16), Y)
    np.testing.assert_array_equal(display.psnr, psnr_score(X, model.predict(Y), per_image=True))
    pipeline = make_pipeline(FunctionTransformer(lambda Y: 2 * Y), model)
    twice = ReconstructionDisplay.from_estimator(pipeline, Y)  # 16 pixels: a square
    np.testing.assert_array_equal(twice.measurement.reshape(4, 16), 2 * Y)
    assert twice.truth is None


def test_measurements_that_are_no_images_show_their_adjoint():
    X, _, model = small_problem()
    matrix = np.random.default_rng(0).normal(size=(5, 16))
    Y = X @ matrix.T
    Y[1, 2] = np.nan
    expected = np.nan_to_num(Y) @ matrix
    by_hand = ReconstructionDisplay.from_predictions(X, X + 1, Y=Y, op=matrix)
    np.testing.assert_allclose(by_hand.back_projection.reshape(4, 16), expected)
    assert "adjoint of measurement" in by_hand.image_rows and by_hand.measurement is None
    # It has a range of its own; the others have that of the truth.
    assert by_hand.images_["adjoint of measurement"][0].get_clim() == pytest.approx(
        (expected.min(), expected.max())
    )
    assert by_hand.images_["reconstruction"][0].get_clim() == pytest.approx((X.min(), X.max()))
    model = model.set_params(op=MatrixOperator(matrix))
    display = ReconstructionDisplay.from_estimator(model, Y, X)
    np.testing.assert_allclose(display.back_projection.reshape(4, 16), expected)


def test_operators_that_are_not_linear_have_no_adjoint_to_show():
    class Square(MatrixOperator):
        is_linear = False

    X, op = batch(2), Square(np.ones((3, 64)))
    with pytest.raises(ValueError, match="Square, which is not linear"):
        ReconstructionDisplay.from_predictions(None, X, Y=np.zeros((2, 3)), op=op)


def test_what_an_operator_does_not_measure_is_not_shown():
    X = batch(2, (4, 4))
    mask = np.arange(16).reshape(4, 4) % 2 == 0
    display = ReconstructionDisplay.from_predictions(None, X, Y=X, op=Inpainting(mask))
    np.testing.assert_array_equal(np.isnan(display.measurement[0, 0]), ~mask)


def test_rows_that_failed_do_not_hide_the_others():
    X = batch(3)
    pred = X.copy()
    pred[1] = np.nan
    pred[2] += 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        display = ReconstructionDisplay.from_predictions(X, pred)
        paths = LambdaPathDisplay.from_predictions([1, 2], [pred, pred], X_true=X)
    psnr = -20 * np.log10(0.1 / np.ptp(X))
    texts = [text.get_text() for text in display.axes_[0].texts]
    assert texts == ["∞", "nan", f"{psnr:.1f}"]
    assert (drawn_image(display.images_["reconstruction"][1]) == BAD).all()
    (median,) = [line for line in paths.axes_[1].lines if line.get_label() == "median of 3"]
    np.testing.assert_allclose(median.get_ydata(), psnr)


@pytest.mark.parametrize("n, shape", [(100, (6, 5)), (1, (3, 4, 6))], ids=["grey", "colour"])
def test_path(n, shape):
    lams = np.geomspace(0.01, 10, 15)
    truth = batch(n, shape)
    path = truth + lams[:, None, None, None].reshape(-1, *(1,) * truth.ndim) / 10
    display = LambdaPathDisplay.from_predictions(lams, path, X_true=truth, lam=lams[5])
    assert len(display.axes_) == 2
    shown = [0] if n == 1 else [0, 25, 50, 74, 99]
    np.testing.assert_array_equal(display.shown_, shown)
    assert 5 in display.shown_lams_ and len(display.shown_lams_) == 12
    for i, row in zip(shown, display.images_, strict=True):
        for k, image in zip(display.shown_lams_, row, strict=True):
            expected = np.clip(path[k, i], truth[shown].min(), truth[shown].max())
            if len(shape) == 2:
                np.testing.assert_array_equal(image.get_array(), path[k, i])
            else:
                expected = (expected - truth[shown].min()) / np.ptp(truth[shown])
                np.testing.assert_allclose(image.get_array(), expected.transpose(1, 2, 0))
    assert no_overlap(display.axes_[0].images)
    # The frame is around the images of the chosen lambda: those and no others.
    box = display.frame_.get_bbox()
    inside = [
        image
        for image in display.axes_[0].images
        if box.x0 <= np.mean(image.get_extent()[:2]) <= box.x1
    ]
    position = display.shown_lams_.tolist().index(5)
    assert inside == [row[position] for row in display.images_]
    curve = display.axes_[1]
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("λ", "PSNR (dB)")
    by_label = {line.get_label(): line for line in curve.lines}
    median = by_label["the image" if n == 1 else "median of 100"]
    psnr = [psnr_score(truth, x, per_image=True) for x in path]
    np.testing.assert_allclose(median.get_ydata(), np.median(psnr, axis=1))
    np.testing.assert_array_equal(by_label["chosen: λ = 0.12"].get_xdata(), lams[5])
    notes = (
        ["12 of 15 lambdas"] if n == 1 else ["5 of 100 images, evenly spaced", "12 of 15 lambdas"]
    )
    assert display.axes_[0].get_title() == ", ".join(notes)
    nothing_is_cut_off(display.figure_)


def test_path_of_what_aipo_path_returns():
    X, Y, model = small_problem()
    grid = dict(lams=[0.0, 0.1, 1.0], noise=model.noise, max_evals=8)
    lams, path, results, _ = aipo_path(Y, model.op, model.prior, return_details=True, **grid)
    images = LambdaPathDisplay.from_predictions(*aipo_path(Y, model.op, model.prior, **grid))
    assert len(images.axes_) == 1 and images.frame_ is None
    np.testing.assert_array_equal(images.images_[3][2].get_array(), path[2, 3].reshape(4, 4))
    display = LambdaPathDisplay.from_predictions(lams, path, results, X_true=X, unit="nats")
    labels = ["misfit (nats)", "−log p(x) (nats)", "PSNR (dB)"]
    assert [axes.get_ylabel() for axes in display.axes_[1:]] == labels
    np.testing.assert_array_equal(display.curves[labels[0]], [r.misfit for r in results])
    np.testing.assert_array_equal(display.curves[labels[1]], [-r.log_prob for r in results])
    # Zero has a place on the axis.
    for axes in display.axes_[1:]:
        assert axes.get_xscale() == "symlog"
        x = axes.transData.transform([(lam, 0) for lam in lams])[:, 0]
        assert np.diff(x).min() > 10
    nothing_is_cut_off(display.figure_)


def test_path_of_a_search():
    X, Y, model = small_problem(6)
    search = AIPORegressorCV(
        Denoising(), lams=[0.1, 1.0, 10.0], cv=2, prior=model.prior, noise=model.noise, max_evals=8
    )
    with pytest.raises(NotFittedError):
        LambdaPathDisplay.from_estimator(search, Y, X)
    search.fit(Y, X)
    display = LambdaPathDisplay.from_estimator(search, Y, X)
    assert display.lam == search.lam_ and len(display.axes_) == 4
    # The path by which it chose, not solves with a budget of their own for each lambda.
    settings = dict(schedule="geometric", noise=model.noise, max_evals=8)
    _, path = aipo_path(Y, Denoising(), model.prior, lams=search.lams, **settings)
    np.testing.assert_array_equal(display.image_path.reshape(3, 6, 16), path.reshape(3, 6, 16))
    assert display.axes_[1].get_ylabel() == "misfit (nats)"
    with pytest.raises(TypeError, match="fitted AIPORegressorCV, got AIPORegressor"):
        LambdaPathDisplay.from_estimator(model, Y)


def history(objectives, statuses, lam=2.0, lams=None):
    n = len(objectives)
    objectives = [np.array(row, dtype=float) for row in objectives]
    zeros = np.zeros(n)
    return Reconstruction(
        x=np.zeros((n, 4)),
        objective=np.array([np.nanmin(row) for row in objectives]),
        misfit=zeros,
        log_prob=zeros,
        n_evals=zeros,
        n_observed=zeros,
        status=np.array(statuses),
        lam=lam,
        lam_history=[np.full(len(row), lam) for row in objectives] if lams is None else lams,
        objective_history=objectives,
    )


def test_convergence_by_row_and_status():
    rows = [[9, 5, 2, 1], [30, 20, np.inf, 10], [7, 4]]
    result = history(rows, ["converged", "diverged", "converged"])
    display = ConvergenceDisplay.from_predictions(result, unit="nats")
    (axes,) = display.axes_
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "objective − best of the row (nats)"
    assert list(display.lines_) == ["converged", "diverged"]
    first, third = display.lines_["converged"].get_segments()
    # (Points of gap zero and those that are no number are not on the scale.)
    np.testing.assert_array_equal(first, [[1, 8], [2, 4], [3, 1]])
    np.testing.assert_array_equal(third, [[1, 3]])
    colours = [display.lines_[status].get_color()[0][:3] for status in display.lines_]
    assert not np.allclose(*colours)
    # The third row is done after two iterations, at its best: gaps (8, 20, 3), (4, 10, 0), (1, 0).
    np.testing.assert_array_equal(display.median_.get_ydata(), [8, 4, 0.5, np.nan])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["converged: 2 of 3", "diverged: 1 of 3", "median"]
    display.plot(gap=False)
    (second,) = display.lines_["diverged"].get_segments()[:1]
    np.testing.assert_array_equal(second[:2], [[1, 30], [2, 20]])
    assert display.axes_[0].get_yscale() == "linear"
    np.testing.assert_array_equal(display.median_.get_ydata(), [9, 5, 3, 4])


def test_convergence_from_a_better_value_and_at_the_target_only():
    result = history([[9, 5], [8, 6]], ["budget", "budget"])
    display = ConvergenceDisplay.from_predictions(result, best=[4, 7])
    first, second = display.lines_["budget"].get_segments()
    np.testing.assert_array_equal(first[:, 1], [5, 1])
    np.testing.assert_array_equal(second[:, 1], [2])  # what this run found is lower still
    # A row that is done counts with what it found, not with what could have been found.
    result = history([[9, 5], [8, 6, 4], [7]], ["converged"] * 3)
    display = ConvergenceDisplay.from_predictions(result, best=[1, 2, 3])
    np.testing.assert_array_equal(display.median_.get_ydata(), [6, 4, 4])
    # Objectives at another lambda, which are lower here, are no measure of this one.
    result = history([[1, 9, 5, 6]], ["stalled"], lams=[np.array([0.1, 2, 2, 2])])
    result.objective[:] = 5
    display = ConvergenceDisplay.from_predictions(result)
    points = np.vstack(display.lines_["stalled"].get_segments())
    points = points[np.isfinite(points).all(1)]
    np.testing.assert_array_equal(points, [[2, 4], [4, 1]])
    assert display.median_ is None


def test_convergence_of_an_estimator():
    _, Y, model = small_problem()
    model.set_params(init="zero", solver="adam")
    display = ConvergenceDisplay.from_estimator(model, Y)
    result = model.reconstruct(Y, history=True)
    assert [len(row) for row in display.histories] == [len(h) for h in result.objective_history]
    assert "nats" in display.axes_[0].get_ylabel()
    assert sum(len(lines.get_segments()) for lines in display.lines_.values()) == 4
    nothing_is_cut_off(display.figure_)
    with pytest.raises(ValueError, match=r"reconstruct\(Y, history=True\)"):
        ConvergenceDisplay.from_predictions(model.reconstruct(Y))
    with pytest.raises(ValueError, match=r"4 rows, got shape \(3,\)"):
        ConvergenceDisplay.from_predictions(result, best=np.zeros(3))
    result.objective_history = result.lam_history = [np.array([])] * 4
    with pytest.raises(ValueError, match="4 rows has an iteration to draw.*init='zero'"):
        ConvergenceDisplay.from_predictions(result)


def test_displays_draw_where_they_are_told_to():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    X = batch(3)
    path = np.stack([X, X + 0.1])
    result = history([[3, 2, 1]], ["converged"])
    figure = Figure(figsize=(14, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    display = ReconstructionDisplay.from_predictions(X, X / 2, ax=left)
    assert display.figure_ is figure and display.axes_.tolist() == [left]
    display = ConvergenceDisplay.from_predictions(result, ax=middle)
    assert display.figure_ is figure and display.axes_.tolist() == [middle]
    place = right.get_position()
    display = LambdaPathDisplay.from_predictions([1, 2], path, X_true=X, ax=right)
    assert display.figure_ is figure and len(display.axes_) == 2 and not right.axison
    for axes in display.axes_:
        assert axes.get_position().x0 >= place.x0 - 1e-6
    nothing_is_cut_off(figure)
    given = Figure().subplots(2)
    display = LambdaPathDisplay.from_predictions([1, 2], path, X_true=X, ax=given)
    assert display.axes_.tolist() == given.tolist()
    with pytest.raises(ValueError, match="2 Axes, for the images and 1 curves, got 3"):
        display.plot(ax=Figure().subplots(3))
    with pytest.raises(ValueError, match="cannot be divided"):
        display.plot(ax=Figure().add_axes((0, 0, 1, 1)))


def test_displays_leave_pyplot_alone_and_show_in_a_notebook():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    display = ReconstructionDisplay.from_predictions(None, batch(2))
    assert plt.get_fignums() == before
    assert display._repr_png_().startswith(b"\x89PNG")


def test_torch_tensors():
    X = torch.rand(2, 1, 4, 4)
    display = ReconstructionDisplay.from_predictions(X, X.requires_grad_(), Y=X)
    np.testing.assert_array_equal(display.truth, display.reconstruction)
    assert [text.get_text() for text in display.axes_[0].texts] == ["∞", "∞"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda R, X: R(None, X[0]), r"got shape \(8, 8\), which|rows of 8 values"),
        (lambda R, X: R(None, np.zeros((2, 12))), "image_shape="),
        (lambda R, X: R(None, np.zeros(5)), r"got shape \(5,\)"),
        (lambda R, X: R(None, np.zeros((2, 8, 8, 3))), r"X_pred.transpose\(0, 3, 1, 2\)"),
        (lambda R, X: R(None, np.zeros((2, 2, 4, 4))), r"got \(2, 4, 4\)"),
        (lambda R, X: R(X[:2], X), "got 2 of shape"),
        (lambda R, X: R(batch(3, (4, 16)), X), r"X_true must hold images of shape \(1, 8, 8\)"),
        (lambda R, X: R(None, X, image_shape=(7, 9)), r"got shape \(3, 8, 8\)"),
        (lambda R, X: R(None, X, Y=np.zeros((3, 5))), "pass op="),
        (lambda R, X: R(None, X, Y=np.zeros((2, 64))), "got 2 for 3 images"),
        (lambda R, X: R(None, X, Y=X, op=np.ones((5, 64))), "the 5 measurements of MatrixOperator"),
    ],
)
def test_wrong_images_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make(ReconstructionDisplay.from_predictions, batch(3))


@pytest.mark.parametrize(
    ("lams", "options", "message"),
    [
        ([2, 1], {}, "ascending"),
        ([-1, 1], {}, "ascending"),
        ([1, 2, 3], {}, "each of the 3 lams, got 2"),
        ([1, 2], dict(lam=1.5), "one of lams"),
        ([1, 2], dict(reconstructions=[1]), "reconstructions must have one entry"),
        ([1, 2], dict(X_true=np.zeros((2, 64))), "X_true and"),
    ],
)
def test_wrong_paths_say_what_is_wrong(lams, options, message):
    X = batch(3)
    with pytest.raises(ValueError, match=message):
        LambdaPathDisplay.from_predictions(lams, [X, X], **options)


@pytest.mark.parametrize("display", [ReconstructionDisplay, ConvergenceDisplay])
def test_other_estimators_are_refused(display):
    with pytest.raises(TypeError, match="got LinearRegression"):
        display.from_estimator(LinearRegression(), np.zeros((2, 16)))


def test_displays_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    X, result = batch(2), history([[2, 1]], ["converged"])
    for make in (
        lambda: ReconstructionDisplay.from_predictions(None, X),
        lambda: LambdaPathDisplay.from_predictions([1], [X]),
        lambda: ConvergenceDisplay.from_predictions(result),
    ):
        with pytest.raises(ImportError, match=r"pip install 'skaipo\[plot\]'"):
            make()
