"""The door between numpy and torch: what passes, how it goes out again, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator

from skaipo._validation import (
    Layout,
    check_batch,
    check_lam,
    resolve_device,
    to_numpy,
    to_tensor,
)

IMAGE = (3, 4, 5)
D = 60


@pytest.fixture
def X():
    return np.random.default_rng(0).standard_normal((6, D))


# ---------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize("event_shape", [None, IMAGE])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_flat_rows(X, dtype, event_shape):
    x, layout, shape = check_batch(X.astype(dtype), event_shape=event_shape)
    assert isinstance(x, torch.Tensor) and x.shape == (6, D) and shape == (D,)
    assert np.array_equal(x.numpy(), X.astype(dtype)) and x.numpy().dtype == dtype
    assert layout == Layout(torch=False, dtype=np.dtype(dtype), images=False)


@pytest.mark.parametrize("event_shape", [None, IMAGE])
def test_images_become_rows(X, event_shape):
    images = X.reshape(6, *IMAGE)
    for batch in (images, np.asfortranarray(images), images.tolist()):
        x, layout, shape = check_batch(batch, event_shape=event_shape)
        assert np.array_equal(x.numpy(), X) and shape == IMAGE and layout.images
    x, layout, shape = check_batch(torch.tensor(images), event_shape=event_shape)
    assert np.array_equal(x.numpy(), X) and shape == IMAGE and layout.images and layout.torch


def test_flat_event_of_one_dimension():
    x, layout, shape = check_batch([[1, 2], [3, 4]], event_shape=(2,))
    assert x.tolist() == [[1, 2], [3, 4]] and x.dtype == torch.float64
    assert shape == (2,) and not layout.images


@pytest.mark.parametrize(
    "convert",
    [
        lambda X: X[::-1][::-1],
        lambda X: X.astype(">f8"),
        lambda X: np.asfortranarray(X),
        lambda X: pd.DataFrame(X),
        lambda X: X.tolist(),
        lambda X: X.astype(object),
        lambda X: torch.tensor(X).T.contiguous().T,
        lambda X: torch.tensor(X, requires_grad=True),
    ],
    ids=["strides", "byteorder", "fortran", "frame", "list", "object", "t-strides", "t-grad"],
)
def test_any_holder_of_the_same_numbers(X, convert):
    x, _, _ = check_batch(convert(X))
    assert np.array_equal(x.numpy(), X) and not x.requires_grad and x.is_contiguous()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_integers_become_float64(dtype):
    X = np.array([[0, 1], [1, 1]]).astype(dtype)
    x, layout, _ = check_batch(X)
    assert x.dtype == torch.float64 and layout.dtype == np.float64
    assert x.tolist() == [[0, 1], [1, 1]]


def test_integer_tensors_take_the_default_dtype():
    x, layout, _ = check_batch(torch.tensor([[1, 2]]))
    assert x.dtype == layout.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_takes_the_dtype_asked_for_but_the_layout_keeps_its_own(X, dtype):
    x, layout, _ = check_batch(X, dtype=dtype, device="cpu")
    assert x.dtype == dtype and layout.dtype == np.float64
    x, layout, _ = check_batch(torch.tensor(X), dtype=dtype)
    assert x.dtype == dtype and layout.dtype == torch.float64


@pytest.mark.parametrize("shape", [(6, D), (6, *IMAGE)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_input_is_never_aliased(X, shape, kind):
    X = X.reshape(shape)
    batch = torch.tensor(X) if kind == "torch" else X.copy()
    x, _, _ = check_batch(batch)
    x.zero_()
    assert np.array_equal(np.asarray(batch), X)


def test_read_only_input_passes_without_a_warning(X, recwarn):
    X.flags.writeable = False
    x, _, _ = check_batch(X)
    x.zero_()
    assert not recwarn.list


# ---------------------------------------------------------------------------------- and leaves


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("images", [False, True])
def test_answer_leaves_in_the_layout_of_the_question(X, dtype, images):
    shape = IMAGE if images else (D,)
    answer = torch.arange(6.0 * D, dtype=torch.float64, requires_grad=True).reshape(6, D)

    _, layout, _ = check_batch(X.astype(dtype).reshape(6, *shape))
    out = layout.restore(answer, IMAGE)
    assert isinstance(out, np.ndarray) and out.dtype == dtype and out.shape == (6, *shape)
    assert np.array_equal(out.ravel(), np.arange(6 * D))

    tensor = torch.tensor(X.astype(dtype).reshape(6, *shape))
    _, layout, _ = check_batch(tensor)
    out = layout.restore(answer, IMAGE)
    assert out.dtype == tensor.dtype and out.shape == (6, *shape) and out.device == tensor.device
    assert not out.requires_grad
    assert torch.equal(out.double().flatten(), torch.arange(6 * D).double())


def test_answers_of_another_shape_keep_theirs(X):
    """Log-densities and latents of an image batch are not images."""
    _, layout, _ = check_batch(X.reshape(6, *IMAGE))
    assert layout.restore(torch.zeros(6)).shape == (6,)
    assert layout.restore(torch.zeros(6, D)).shape == (6, D)


def test_to_tensor_copies_and_to_numpy_detaches():
    array = np.arange(4.0)[::-1]
    tensor = to_tensor(array, dtype=torch.float32)
    assert tensor.tolist() == [3, 2, 1, 0] and tensor.dtype == torch.float32
    same = to_tensor(np.ascontiguousarray(array))
    same.zero_()
    assert array.tolist() == [3, 2, 1, 0]
    assert to_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


# ---------------------------------------------------------------------------------- missing values


@pytest.mark.parametrize("kind", ["numpy", "torch", "images"])
def test_missing_values_where_they_are_allowed(X, kind):
    X[0, 3] = X[4, 7] = np.nan
    convert = {
        "numpy": lambda X: X,
        "torch": torch.tensor,
        "images": lambda X: X.reshape(6, *IMAGE),
    }[kind]
    x, _, _ = check_batch(convert(X), allow_nan=True)
    assert np.array_equal(x.numpy(), X, equal_nan=True)
    with pytest.raises(ValueError, match="Y.* contains NaN"):
        check_batch(convert(X), name="Y")
    X[5, 0] = np.inf
    with pytest.raises(ValueError, match="contains infinity"):
        check_batch(convert(X), allow_nan=True)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_rows_without_any_value_are_named(X, convert):
    X[[1, 4]] = np.nan
    with pytest.raises(ValueError, match=r"Y has 2 row\(s\) without a single .* row 1, 4\. Drop"):
        check_batch(convert(X), allow_nan=True, name="Y")
    many = np.full((9, 3), np.nan)
    with pytest.raises(ValueError, match=r"9 row\(s\) .* row 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."):
        check_batch(convert(many), allow_nan=True)


def test_tensor_counts_its_bad_rows(X):
    X[[1, 4], 2] = np.nan
    X[4, 5] = np.inf
    with pytest.raises(ValueError, match=r"Input X contains NaN or infinity in 2 row\(s\)"):
        check_batch(torch.tensor(X))


# ---------------------------------------------------------------------------------- refused

REFUSED = {
    "columns": (lambda X: X[:, 1:], "X has 59 columns, but the prior expects 60 .shape .3, 4, 5"),
    "row": (lambda X: X[0], r"Expected 2D array, got 1D array instead: .*\(60,\), but the prior"),
    "single": (
        lambda X: X[0].reshape(IMAGE),
        r"shape \(3, 4, 5\), but the prior expects \(n_samples, 60\) or \(n_samples, 3, 4, 5\)\. "
        r"Reshape your data\. For a single sample pass X\[None\]",
    ),
    "channels last": (
        lambda X: X.reshape(6, *IMAGE).transpose(0, 2, 3, 1),
        r"shape \(6, 4, 5, 3\).* For channels-last images pass X\.transpose\(0, 3, 1, 2\)",
    ),
    "no channels": (lambda X: X.reshape(6, 12, 5), r"shape \(6, 12, 5\), but the prior expects"),
    "other sides": (lambda X: X.reshape(6, 3, 5, 4), r"shape \(6, 3, 5, 4\), but the prior"),
    "batch of batches": (lambda X: X.reshape(2, 3, *IMAGE), r"shape \(2, 3, 3, 4, 5\), but"),
    "no samples": (lambda X: X[:0], r"0 sample\(s\)"),
    "no images": (lambda X: X[:0].reshape(0, *IMAGE), r"0 sample\(s\)"),
    "no features": (lambda X: X[:, :0], r"0 feature\(s\)"),
}


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_shapes_are_explained(X, case, convert):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_batch(convert(make(X)), event_shape=IMAGE)


def test_names_in_the_message():
    with pytest.raises(ValueError, match="Y has 3 columns, but op expects 4"):
        check_batch(np.zeros((2, 3)), event_shape=(4,), name="Y", whose="op")
    with pytest.raises(ValueError, match=r"Y has shape \(1, 2, 2\), but op .* pass Y\[None\]"):
        check_batch(np.zeros((1, 2, 2)), event_shape=(1, 2, 2), name="Y", whose="op")


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_unknown_event_shape_still_needs_a_batch(convert):
    with pytest.raises(ValueError, match=r"Expected 2D array, got 1D array instead: .*reshape"):
        check_batch(convert(np.zeros(3)))


@pytest.mark.parametrize("scalar", [3.0, np.float64(3), np.array(3.0)])
def test_scalars_are_no_batch(scalar):
    with pytest.raises(ValueError, match="Expected 2D array, got scalar array"):
        check_batch(scalar, event_shape=IMAGE)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    "convert, error, message",
    [
        (lambda X: X.astype(np.float16), ValueError, "X has dtype float16.*float32 or float64"),
        (lambda X: torch.tensor(X).half(), ValueError, "torch.float16, which is too coarse"),
        (lambda X: torch.tensor(X).bfloat16(), ValueError, "torch.bfloat16, which is too coarse"),
        (lambda X: X + 1j, ValueError, "Complex data not supported"),
        (lambda X: torch.tensor(X) * 1j, ValueError, "dense tensor of real numbers"),
        (lambda X: torch.tensor(X) > 0, ValueError, "dense tensor of real numbers, .*bool"),
        (lambda X: torch.tensor(X).to_sparse(), ValueError, "dense tensor of real numbers"),
        (lambda X: np.full(X.shape, "word"), ValueError, "could not convert string to float"),
        (lambda X: np.full(X.shape, {}, dtype=object), TypeError, "must be a string or a real"),
    ],
    ids=[
        "half",
        "t-half",
        "t-bfloat",
        "complex",
        "t-complex",
        "t-bool",
        "t-sparse",
        "text",
        "objects",
    ],
)
def test_what_is_no_real_number_is_refused(X, convert, error, message, images):
    X = X.reshape(6, *IMAGE) if images else X
    with pytest.raises(error, match=message):
        check_batch(convert(X))


@pytest.mark.parametrize("make", [sp.csr_array, sp.csr_matrix, sp.coo_array])
def test_sparse_matrices_are_refused(X, make):
    with pytest.raises(TypeError, match="Sparse data was passed"):
        check_batch(make(X))


# ---------------------------------------------------------------------------------- estimators


class Dummy(BaseEstimator):
    pass


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("images", [False, True])
def test_width_is_noted_and_compared(X, convert, images):
    X = convert(X.reshape(6, *IMAGE) if images else X)
    estimator = Dummy()
    check_batch(X, estimator=estimator, reset=True)
    assert estimator.n_features_in_ == D
    check_batch(X, estimator=estimator)
    with pytest.raises(ValueError, match="X has 2 features, but Dummy is expecting 60 features"):
        check_batch(convert(np.zeros((3, 2))), estimator=estimator)
    assert estimator.n_features_in_ == D


def test_feature_names_are_compared_and_given_up(X):
    frame = pd.DataFrame(X[:, :2], columns=["a", "b"])
    estimator = Dummy()
    check_batch(frame, estimator=estimator, reset=True)
    assert estimator.feature_names_in_.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="feature names should match"):
        check_batch(frame[["b", "a"]], estimator=estimator)
    check_batch(torch.zeros(3, 2), estimator=estimator, reset=True)
    assert not hasattr(estimator, "feature_names_in_")


# ---------------------------------------------------------------------------------- small things


@pytest.mark.parametrize("lam", [0, 1, 0.5, np.float32(0.25), np.int64(3), 1e300])
def test_lam_becomes_a_float(lam):
    assert type(check_lam(lam)) is float and check_lam(lam) == lam


@pytest.mark.parametrize("lam", [-1e-9, math.inf, -math.inf, math.nan, np.float64("nan"), -1])
def test_lam_out_of_range(lam):
    with pytest.raises(ValueError, match="lam must be finite and >= 0 .0 is the MLE., got"):
        check_lam(lam)


@pytest.mark.parametrize(
    "lam", ["1", None, True, np.bool_(True), [1.0], np.array(1.0), 1j, torch.tensor(1.0)]
)
def test_lam_must_be_a_number(lam):
    with pytest.raises(TypeError, match="lam must be a real number >= 0, got .* of type"):
        check_lam(lam)


def test_fractions_are_no_floats():
    with pytest.raises(TypeError, match="of type Fraction"):
        check_lam(Fraction(1, 2))


@pytest.mark.parametrize("available, expected", [(True, "cuda"), (False, "cpu")])
def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device(torch.device("meta")) == torch.device("meta")


def test_unknown_device_is_refused():
    with pytest.raises(RuntimeError, match="device"):
        resolve_device("abacus")
