"""Priors: densities in the user's units, what goes in and comes out, files, and closed forms."""

import contextlib
import copy
import json
import math
import os
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from problems import covering
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch.autograd.functional import jacobian

from skaipo import FlowPrior, GaussianPrior
from skaipo.flows import Flow, Glow, RealNVP
from skaipo.noise import GaussianNoise, NoiseModel
from skaipo.operators import CompressedSensing, Denoising, Inpainting, MatrixOperator
from skaipo.priors import _file

IMAGE = (3, 4, 2)
D = math.prod(IMAGE)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they bring at these sizes, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_flow(architecture=Glow, event_shape=IMAGE, dtype=torch.float32, **options):
    """Random parameters: an untrained flow would be the identity, or a rotation."""
    options = dict(n_steps=2, hidden_channels=8, loc=100.0, scale=40.0) | options
    flow = architecture(event_shape, **options)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            is_lu = name.rpartition(".")[2] in ("lower", "upper", "log_diagonal")
            parameter.add_((0.02 if is_lu else 0.1) * torch.randn_like(parameter))
    return flow.to(dtype).eval()


@pytest.fixture(params=["flow32", "flow64", "gaussian"])
def prior(request):
    """A fitted prior of each kind over small images."""
    if request.param == "gaussian":
        A = np.random.default_rng(0).standard_normal((D, D))
        return GaussianPrior(np.arange(D) * 1.0, A @ A.T / D + np.eye(D), event_shape=IMAGE)
    dtype = torch.float32 if request.param == "flow32" else torch.float64
    return FlowPrior(make_flow(dtype=dtype))


@pytest.fixture
def X(prior):
    return prior.sample(11, random_state=0).astype(np.float64)


def tolerance(prior):
    return 1e-3 if prior.flow_.loc.dtype == torch.float32 else 1e-9


@pytest.fixture(scope="module")
def trained():
    """Fitted on two-dimensional data in units far from one; reused, so do not change it."""
    rng = np.random.default_rng(0)
    X = 500 + 80 * rng.standard_normal((300, 2)) @ [[1.0, 0.6], [0.0, 0.5]]
    options = dict(n_steps=4, hidden_channels=16, max_epochs=30, learning_rate=5e-3)
    return FlowPrior(**options, random_state=0).fit(X), X


# ---------------------------------------------------------------------------------- densities


def test_score_samples_is_the_change_of_variables_in_the_users_units(prior, X):
    """Both terms recomputed: scipy's base density, autograd's Jacobian of the flow itself."""
    flow = copy.deepcopy(prior.flow_).double()
    z = prior.transform(X)
    volume = []
    for row in torch.tensor(X[:4]):
        matrix = jacobian(lambda x: flow(x[None])[0][0], row)
        volume.append(float(torch.linalg.slogdet(matrix).logabsdet))
    want = stats.norm.logpdf(z[:4]).sum(1) + volume
    got = prior.score_samples(X)
    assert got.shape == (11,)
    np.testing.assert_allclose(got[:4], want, atol=10 * tolerance(prior))
    assert prior.score(X) == pytest.approx(got.mean())


@pytest.mark.parametrize("flow", ["realnvp", "glow"])
def test_density_has_the_units_of_the_data(flow):
    """Data in other units: the same fit, and a density smaller by the volume of the units.

    Powers of two, so that standardisation gives the very same numbers.
    """
    X = np.random.default_rng(0).standard_normal((60, 3)) + 2
    # Without early stopping: among almost equal epochs, rounding would choose the best.
    options = dict(n_steps=2, hidden_channels=8, max_epochs=3, early_stopping=False, random_state=0)
    small, large = FlowPrior(flow, **options).fit(X), FlowPrior(flow, **options).fit(256 * X)
    assert np.array_equal(small.transform(X), large.transform(256 * X))
    want = small.score_samples(X) - 3 * math.log(256)
    np.testing.assert_allclose(large.score_samples(256 * X), want, rtol=1e-6)
    assert small.history_[-1]["train_nll"] == pytest.approx(
        large.history_[-1]["train_nll"] - math.log(256), rel=1e-5
    )


def test_fitted_density_integrates_to_one(trained):
    prior, X = trained
    low, high = X.min(0) - 200, X.max(0) + 200
    axes = [np.linspace(a, b, 300) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    mass = np.exp(prior.score_samples(grid)).sum() * ((high - low) / 299).prod()
    assert mass == pytest.approx(1, abs=5e-3)
    # A density of this data, not any: about as good as the normal that made it.
    covariance = np.cov(X, rowvar=False)
    normal = stats.multivariate_normal(X.mean(0), covariance).logpdf(X).mean()
    assert prior.score(X) == pytest.approx(normal, abs=0.3)


def test_rows_do_not_depend_on_their_batch(prior, X):
    """Bit for bit, for batches of any size and over the border of two chunks.

    On one thread, where torch has another convolution for fewer than 16 rows.
    """
    many = np.concatenate([X] * 30)
    assert len(many) > 256
    for method in (prior.score_samples, prior.transform):
        whole = method(many)
        for rows in (slice(0, 1), slice(3, 5), slice(250, 261), slice(0, 9)):
            assert np.array_equal(method(many[rows]), whole[rows])


# ---------------------------------------------------------------------------------- layouts


def test_transform_and_inverse_transform_are_inverses(prior, X):
    Z = prior.transform(X)
    assert Z.shape == (11, D) and Z.dtype == X.dtype
    np.testing.assert_allclose(prior.inverse_transform(Z), X, atol=50 * tolerance(prior))
    Z = np.random.default_rng(1).standard_normal((5, D))
    np.testing.assert_allclose(
        prior.transform(prior.inverse_transform(Z)), Z, atol=10 * tolerance(prior)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_dtype_and_image_layout(prior, X, dtype):
    X = X.astype(dtype)
    images = X.reshape(-1, *IMAGE)
    before = images.copy()
    for method, shape in ((prior.score_samples, (11,)), (prior.transform, (11, D))):
        flat = method(X)
        assert isinstance(flat, np.ndarray) and flat.dtype == dtype and flat.shape == shape
        assert np.array_equal(method(images), flat)
        assert np.array_equal(method(np.asfortranarray(images)), flat)
        assert np.array_equal(method(X[::-1])[::-1], flat)
    assert prior.inverse_transform(prior.transform(X)).dtype == dtype
    assert np.array_equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(prior, X, dtype):
    x = torch.tensor(X, dtype=dtype, requires_grad=True)
    want = prior.score_samples(x.detach().numpy())
    for batch in (x, x.reshape(-1, *IMAGE)):
        scores = prior.score_samples(batch)
        assert isinstance(scores, torch.Tensor)
        assert scores.dtype == dtype and scores.device == x.device and not scores.requires_grad
        assert np.array_equal(scores.numpy(), want)
    z = prior.transform(x)
    assert z.dtype == dtype and z.shape == (11, D) and not z.requires_grad
    back = prior.inverse_transform(z)
    assert back.dtype == dtype and not back.requires_grad
    torch.testing.assert_close(back, x.detach(), rtol=1e-4, atol=1e-3)
    assert prior.score(x) == pytest.approx(float(want.mean()), rel=1e-6)


def test_lists_integers_and_frames_are_data(prior, X):
    X = np.round(X)
    want = prior.score_samples(X)
    assert np.array_equal(prior.score_samples(X.tolist()), want)
    assert np.array_equal(prior.score_samples(X.astype(np.int64)), want)
    assert np.array_equal(prior.score_samples(pd.DataFrame(X)), want)
    assert np.array_equal(prior.score_samples(torch.tensor(X).long()), want.astype(np.float32))


# ---------------------------------------------------------------------------------- samples


def test_samples_repeat_with_their_random_state(prior):
    X = prior.sample(7, random_state=3)
    assert X.shape == (7, D) and X.dtype == prior.transform(X).dtype
    assert np.array_equal(X, prior.sample(7, random_state=3))
    assert np.array_equal(X, prior.sample(7, random_state=np.random.RandomState(3)))
    assert not np.array_equal(X, prior.sample(7, random_state=4))
    assert prior.sample().shape == (1, D)
    state = torch.get_rng_state()
    assert not np.array_equal(prior.sample(7), prior.sample(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_follow_the_density(prior):
    """Their latents are standard normal, and the temperature is the standard deviation there."""
    Z = prior.transform(prior.sample(400, random_state=0))
    assert stats.kstest(Z.ravel(), "norm").pvalue > 1e-3
    half = prior.transform(prior.sample(400, random_state=0, temperature=0.5))
    np.testing.assert_allclose(half, Z / 2, atol=10 * tolerance(prior))


@pytest.mark.parametrize("n_samples", [0, -1, 2.5, "3"])
def test_number_of_samples_must_be_one(prior, n_samples):
    with pytest.raises(ValueError, match="n_samples must be an integer of at least 1, got"):
        prior.sample(n_samples)


# ---------------------------------------------------------------------------------- bad input


def spoil(X, value):
    X = X.copy()
    X[2, 3] = value
    return X


BAD = {
    "columns": (lambda X: X[:, :-1], ValueError, f"23 columns|23 features.*{D}"),
    "vector": (lambda X: X[0], ValueError, "Expected 2D array, got 1D array"),
    "single image": (
        lambda X: X[0].reshape(IMAGE),
        ValueError,
        r"shape \(3, 4, 2\), but .* expects \(n_samples, 24\) or \(n_samples, 3, 4, 2\).*X\[None\]",
    ),
    "channels last": (
        lambda X: X.reshape(-1, *IMAGE).transpose(0, 2, 3, 1),
        ValueError,
        r"channels-last images pass X.transpose\(0, 3, 1, 2\)",
    ),
    "other sides": (lambda X: X.reshape(-1, 3, 2, 4), ValueError, r"has shape \(11, 3, 2, 4\)"),
    "scalar": (lambda X: 3.0, ValueError, "Expected 2D array, got scalar"),
    "NaN": (lambda X: spoil(X, np.nan), ValueError, "contains NaN"),
    "infinity": (lambda X: spoil(X, -np.inf), ValueError, "contains infinity"),
    "NaN image": (lambda X: spoil(X, np.nan).reshape(-1, *IMAGE), ValueError, "contains NaN"),
    "float16": (lambda X: X.astype(np.float16), ValueError, "float16.*float32 or float64"),
    "float16 image": (
        lambda X: X.astype(np.float16).reshape(-1, *IMAGE),
        ValueError,
        "float16.*float32 or float64",
    ),
    "text": (lambda X: np.full(X.shape, "a"), ValueError, "could not convert string"),
    "complex": (lambda X: X + 1j, ValueError, "Complex data not supported"),
    "empty": (lambda X: X[:0], ValueError, r"0 sample\(s\)"),
    "empty images": (lambda X: X[:0].reshape(0, *IMAGE), ValueError, r"0 sample\(s\)"),
    "sparse": (sp.csr_array, TypeError, "[Ss]parse"),
    "tensor columns": (lambda X: torch.tensor(X[:, 1:]), ValueError, "23 columns"),
    "tensor NaN": (lambda X: torch.tensor(spoil(X, np.nan)), ValueError, r"NaN or inf.* 1 row"),
    "tensor inf": (lambda X: torch.tensor(spoil(X, np.inf)), ValueError, r"NaN or inf.* 1 row"),
    "tensor half": (lambda X: torch.tensor(X).half(), ValueError, "float16.*float32"),
    "tensor bfloat16": (lambda X: torch.tensor(X).bfloat16(), ValueError, "bfloat16.*float32"),
    "tensor complex": (lambda X: torch.tensor(X) + 1j, ValueError, "complex64"),
    "tensor sparse": (lambda X: torch.tensor(X).to_sparse(), ValueError, "must be a dense tensor"),
    "tensor empty": (lambda X: torch.tensor(X[:0]), ValueError, r"0 sample\(s\)"),
    "tensor single": (lambda X: torch.tensor(X[0]).reshape(IMAGE), ValueError, r"X\[None\]"),
}


@pytest.mark.parametrize("method", ["score_samples", "transform", "score"])
@pytest.mark.parametrize("case", BAD)
def test_bad_batches_are_explained(case, method):
    prior = FlowPrior(make_flow())
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(prior, method)(make(prior.sample(11, random_state=0)))


def test_bad_latents_are_explained(prior):
    Z = np.zeros((3, D))
    with pytest.raises(ValueError, match=f"Z has 23 columns, but .* expects {D}"):
        prior.inverse_transform(Z[:, 1:])
    with pytest.raises(ValueError, match="Z has shape .3, 3, 4, 2., but"):
        prior.inverse_transform(Z.reshape(3, *IMAGE))
    with pytest.raises(ValueError, match="contains NaN"):
        prior.inverse_transform(spoil(Z, np.nan))


@pytest.mark.parametrize("case", ["NaN", "text", "complex", "float16", "empty", "vector"])
@pytest.mark.parametrize("make", [FlowPrior, GaussianPrior])
def test_fit_refuses_bad_data_too(make, case):
    spoilt, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make().fit(spoilt(np.random.default_rng(0).standard_normal((11, D))))


def test_fit_checks_the_event_shape():
    X = np.random.default_rng(0).standard_normal((12, D))
    options = dict(n_steps=2, hidden_channels=4, max_epochs=1, random_state=0)
    flat = FlowPrior("glow", event_shape=IMAGE, **options).fit(X)
    images = FlowPrior("glow", **options).fit(X.reshape(-1, *IMAGE))
    assert flat.event_shape_ == images.event_shape_ == IMAGE
    assert flat.n_features_in_ == images.n_features_in_ == D
    assert np.array_equal(flat.score_samples(X), images.score_samples(X))
    assert FlowPrior("glow", **options).fit(X).event_shape_ == (D,)
    with pytest.raises(ValueError, match=r"24 columns, but event_shape expects 16"):
        FlowPrior("glow", event_shape=(1, 4, 4), **options).fit(X)
    with pytest.raises(ValueError, match=r"\(C, H, W\) for images, got \(6, 4\)"):
        FlowPrior("glow", **options).fit(X.reshape(-1, 6, 4))


def test_width_is_that_of_fit(trained):
    prior, X = trained
    with pytest.raises(ValueError, match="X has 3 features, but FlowPrior is expecting 2"):
        prior.score_samples(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="X has 3 features, but FlowPrior is expecting 2"):
        prior.score_samples(torch.zeros(4, 3))


def test_names_of_a_data_frame_are_kept_and_given_up():
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((12, 2)), columns=["a", "b"])
    prior = FlowPrior(n_steps=2, hidden_channels=4, max_epochs=1, random_state=0).fit(frame)
    assert prior.feature_names_in_.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="feature names"):
        prior.score_samples(frame.rename(columns={"a": "c"}))
    prior.fit(torch.tensor(frame.to_numpy()))
    assert not hasattr(prior, "feature_names_in_")


# ---------------------------------------------------------------------------------- fitted or not


@pytest.mark.parametrize("make", [FlowPrior, GaussianPrior, lambda: FlowPrior("glow")])
def test_unfitted_prior_says_how_to_fit_it(make):
    prior = make()
    assert not hasattr(prior, "n_features_in_")
    for call in (
        lambda: prior.score_samples(np.zeros((2, 2))),
        lambda: prior.transform(np.zeros((2, 2))),
        lambda: prior.inverse_transform(np.zeros((2, 2))),
        lambda: prior.sample(2),
        lambda: prior.flow_,
        lambda: prior.event_shape_,
    ):
        with pytest.raises(NotFittedError, match=r"call fit\(X\) with clean data"):
            call()
    with pytest.raises(NotFittedError):
        check_is_fitted(prior)


def test_unfitted_prior_cannot_be_saved(tmp_path):
    with pytest.raises(NotFittedError):
        FlowPrior().save(tmp_path / "prior.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrapped_flow_is_fitted_and_stays_as_it_is():
    flow = make_flow(dropout=0.5).train()
    before = copy.deepcopy(flow.state_dict())
    prior = FlowPrior(flow)
    check_is_fitted(prior)
    X = prior.sample(9, random_state=0)
    scores = prior.score_samples(X)
    assert prior.fit(X) is prior and prior.flow_ is flow
    assert prior.n_features_in_ == D and prior.event_shape_ == IMAGE
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
    assert np.array_equal(prior.score_samples(X), scores)  # no dropout either
    with pytest.raises(ValueError, match=f"columns, but this FlowPrior expects {D}"):
        prior.fit(X[:, 1:])
    copied = clone(prior)
    check_is_fitted(copied)
    assert np.array_equal(copied.score_samples(X), scores)


def test_wrapped_module_must_be_a_flow():
    prior = FlowPrior(torch.nn.Linear(2, 2))
    for call in (prior.fit, prior.score_samples, prior.transform):
        with pytest.raises(TypeError, match="must be a skaipo.flows.Flow, got Linear. Subclass"):
            call(np.zeros((3, 2)))


def test_clone_forgets_the_fit(trained):
    prior, X = trained
    assert clone(prior).get_params() == prior.get_params()
    with pytest.raises(NotFittedError):
        clone(prior).score_samples(X)


def test_fitted_prior_can_be_pickled_and_copied(prior, X):
    for other in (pickle.loads(pickle.dumps(prior)), copy.deepcopy(prior)):
        assert np.array_equal(other.score_samples(X), prior.score_samples(X))


# ---------------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prior.safetensors"


@pytest.fixture
def saved(path):
    """A saved prior of random weights, its file, and data."""
    prior = FlowPrior(make_flow(n_levels=1))
    prior.save(path)
    return prior, path, prior.sample(9, random_state=0)


@pytest.mark.parametrize("architecture", [Glow, RealNVP])
@pytest.mark.parametrize("event_shape", [(7,), IMAGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_prior_is_the_same_bit_for_bit(architecture, event_shape, dtype, path):
    prior = FlowPrior(make_flow(architecture, event_shape, dtype, bound=1.5, dropout=0.1))
    prior.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    state = torch.get_rng_state()
    other = FlowPrior.load(str(path), device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(other.flow_) is architecture and other.flow_.loc.dtype == dtype
    X = prior.sample(9, random_state=0)
    assert np.array_equal(other.score_samples(X), prior.score_samples(X))
    assert np.array_equal(other.transform(X), prior.transform(X))
    assert np.array_equal(other.sample(5, random_state=1), prior.sample(5, random_state=1))
    assert other.flow_.config() == prior.flow_.config()
    assert other.event_shape_ == event_shape and other.n_features_in_ == math.prod(event_shape)
    assert not any(parameter.requires_grad for parameter in other.flow_.parameters())


def test_trained_prior_keeps_its_parameters_and_level_in_the_file(path):
    X = np.random.default_rng(0).integers(0, 9, size=(30, 2))
    options = dict(n_steps=3, hidden_channels=6, dropout=0.25, max_epochs=1, random_state=0)
    prior = FlowPrior("glow", **options).fit(X)
    prior.save(path)
    other = FlowPrior.load(path)
    assert other.dequantize_level_ == prior.dequantize_level_ == 1.0
    assert np.array_equal(other.score_samples(X), prior.score_samples(X))
    params = other.get_params()
    assert params["flow"] == "glow" and params["event_shape"] == (2,)
    assert {k: params[k] for k in ("n_steps", "hidden_channels", "dropout")} == {
        k: options[k] for k in ("n_steps", "hidden_channels", "dropout")
    }
    refit = clone(other).set_params(max_epochs=1, random_state=0).fit(X)  # it can be trained anew
    assert np.isfinite(refit.score(X))


def edit(path, change, tensors=None):
    """Rewrite the metadata of a saved prior."""
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["skaipo"])
    save_file(tensors or load_file(path), path, {"skaipo": json.dumps(change(info) or info)})


EDITS = {
    "another width": (lambda i: i["flow"].update(hidden_channels=9), "do not fit the architecture"),
    "more levels": (lambda i: i["flow"].update(n_levels=7), "do not fit .*multiples of 2"),
    "another shape": (lambda i: i["flow"].update(event_shape=[1, 4, 4]), "do not fit"),
    "no shape": (lambda i: i["flow"].update(event_shape=None), "do not fit"),
    "another class": (lambda i: i["flow"].update({"class": "RealNVP"}), "do not fit .*'RealNVP'"),
    "unknown class": (lambda i: i["flow"].update({"class": "Nice"}), "Unknown flow 'Nice'"),
    "unknown option": (lambda i: i["flow"].update(colour="red"), "do not fit .*colour"),
    "text for a number": (lambda i: i["flow"].update(hidden_channels="many"), "do not fit"),
    "no class": (lambda i: i["flow"].pop("class") and None, "do not fit"),
    "newer format": (lambda i: i.update(format=99), "format 99, .* reads 1: update skaipo"),
    "no format": (lambda i: i.pop("format") and None, "holds no skaipo prior"),
    "no flow": (lambda i: i.pop("flow") and None, "holds no skaipo prior"),
    "unknown dtype": (lambda i: i.update(dtype="float7"), "holds no skaipo prior"),
    "not a dtype": (lambda i: i.update(dtype="nn"), "do not fit"),
    "a list": (lambda i: [1, 2], "holds no skaipo prior"),
}


@pytest.mark.parametrize("case", EDITS)
def test_wrong_metadata_is_explained(case, saved):
    _, path, _ = saved
    change, message = EDITS[case]
    edit(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        FlowPrior.load(path)
    assert str(path) in str(caught.value)


def test_options_missing_in_the_metadata_have_their_defaults(saved):
    """Files of a version that did not know an option yet."""
    prior, path, X = saved
    edit(path, lambda info: info["flow"].pop("dropout") and None)
    other = FlowPrior.load(path)
    assert np.array_equal(other.score_samples(X), prior.score_samples(X))
    assert other.dropout == 0


def test_missing_and_foreign_weights_are_explained(saved):
    _, path, _ = saved
    tensors = load_file(path)
    tensors.pop("loc")
    edit(path, lambda info: None, tensors)
    with pytest.raises(ValueError, match="(?s)do not fit .*Missing key.*loc"):
        FlowPrior.load(path)
    edit(path, lambda info: None, tensors | {"loc": torch.zeros(()), "extra": torch.zeros(2)})
    with pytest.raises(ValueError, match="(?s)do not fit .*Unexpected key.*extra"):
        FlowPrior.load(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.3, 0.9, -1])
def test_truncated_file_is_explained(keep, saved):
    _, path, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="not a whole safetensors file .*truncated"):
        FlowPrior.load(path)


def test_files_of_others_are_explained(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        FlowPrior.load(path)
    for metadata in (None, {"format": "pt"}, {"skaipo": "not JSON"}, {"skaipo": "null"}):
        save_file({"w": torch.zeros(3)}, path, metadata)
        with pytest.raises(ValueError, match="holds no skaipo prior: it was not written by"):
            FlowPrior.load(path)


def test_missing_file_and_folder(tmp_path):
    for name in ("nothing.safetensors", "."):
        with pytest.raises(FileNotFoundError, match="No file at"):
            FlowPrior.load(tmp_path / name)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_no_pickle_is_ever_loaded(writer, tmp_path, path):
    target = tmp_path / "executed"
    bomb = Bomb(str(target))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"state": bomb}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        FlowPrior.load(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(bomb)).close()
    assert target.exists()  # the bomb is a live one


@pytest.mark.parametrize("failing", ["write", "rename"])
def test_failed_save_leaves_the_old_file(failing, saved, monkeypatch):
    prior, path, X = saved
    before = path.read_bytes()

    def partial_write(tensors, target, metadata=None):
        with open(target, "wb") as file:
            file.write(b"half of")
        raise OSError("No space left on device")

    def refuse(*args):
        raise OSError("No space left on device")

    if failing == "write":
        monkeypatch.setattr(_file, "save_file", partial_write)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    other = FlowPrior(make_flow())
    with pytest.raises(OSError, match="No space left"):
        other.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    new = path.with_name("new.safetensors")
    with pytest.raises(OSError, match="No space left"):
        other.save(new)
    assert not new.exists()


def test_save_into_a_missing_folder(tmp_path):
    for prior in (FlowPrior(make_flow()), GaussianPrior(np.zeros(2), np.eye(2))):
        with pytest.raises(OSError, match="Could not write .*nowhere"):
            prior.save(tmp_path / "nowhere" / "prior.safetensors")


NORMALS = {
    "fitted": lambda X: GaussianPrior().fit(X),
    "shrunk": lambda X: GaussianPrior(shrinkage=np.float32(0.5)).fit(X),
    "images": lambda X: GaussianPrior().fit(X.reshape(-1, *IMAGE)),
    "given": lambda X: GaussianPrior(X.mean(0), np.cov(X.T) + np.eye(D), event_shape=IMAGE),
}


@pytest.mark.parametrize("name", NORMALS)
def test_a_saved_normal_is_the_same_bit_for_bit(name, path):
    X = np.random.default_rng(0).normal(size=(40, D)) * np.arange(1, D + 1)
    prior = NORMALS[name](X)
    prior.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    other = GaussianPrior.load(str(path))
    check_is_fitted(other)
    for attribute in ("mean_", "covariance_"):
        np.testing.assert_array_equal(getattr(other, attribute), getattr(prior, attribute))
    np.testing.assert_array_equal(other.score_samples(X), prior.score_samples(X))
    np.testing.assert_array_equal(other.transform(X), prior.transform(X))
    np.testing.assert_array_equal(other.sample(5, random_state=1), prior.sample(5, random_state=1))
    assert other.event_shape_ == prior.event_shape_ and other.n_features_in_ == D
    assert other.shrinkage == prior.shrinkage
    assert other.flow_.mean.dtype == torch.float64
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(other)).score_samples(X), prior.score_samples(X)
    )
    # It can be fitted anew, to other data.
    again = clone(other).fit(X[:20])
    assert np.isfinite(again.score(X)) and again.score(X) != prior.score(X)


def test_an_unfitted_normal_cannot_be_saved(path):
    with pytest.raises(NotFittedError, match=r"GaussianPrior.load\(path\)"):
        GaussianPrior().save(path)
    assert not path.exists()


def test_files_of_the_other_prior_are_explained(path):
    GaussianPrior(np.zeros(2), np.eye(2)).save(path)
    with pytest.raises(ValueError, match=r"holds a GaussianPrior, .* GaussianPrior.load\(path\)"):
        FlowPrior.load(path)
    FlowPrior(make_flow()).save(path)
    with pytest.raises(ValueError, match=r"holds a FlowPrior, .* FlowPrior.load\(path\)"):
        GaussianPrior.load(path)


NORMAL_EDITS = {
    "newer format": (lambda i: i.update(format=99), {}, "format 99, .* reads 1: update skaipo"),
    "nothing": (lambda i: i.pop("gaussian") and None, {}, "no skaipo prior.*GaussianPrior.save"),
    "no shape": (lambda i: i["gaussian"].pop("event_shape") and None, {}, "no skaipo prior"),
    "text": (lambda i: i.update(gaussian="text"), {}, "no skaipo prior"),
    "another shape": (lambda i: i["gaussian"].update(event_shape=[3]), {}, "do not fit its event"),
    "float32": (None, {"mean": torch.zeros(2)}, "do not fit its event shape .*float32"),
    "infinite": (None, {"mean": torch.full((2,), torch.inf).double()}, "must be finite"),
    "not lower": (None, {"cholesky": torch.ones(2, 2).double()}, "lower triangular"),
    "not positive": (None, {"cholesky": -torch.eye(2).double()}, "positive diagonal"),
}


@pytest.mark.parametrize("case", NORMAL_EDITS)
def test_wrong_files_of_a_normal_are_explained(case, path):
    GaussianPrior(np.zeros(2), np.eye(2)).save(path)
    change, tensors, message = NORMAL_EDITS[case]
    edit(path, change or (lambda info: None), load_file(path) | tensors)
    with pytest.raises(ValueError, match=message) as caught:
        GaussianPrior.load(path)
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files_of_a_normal(path):
    with pytest.raises(FileNotFoundError, match="No file at"):
        GaussianPrior.load(path)
    GaussianPrior(np.zeros(2), np.eye(2)).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* GaussianPrior.save"):
        GaussianPrior.load(path)


@pytest.mark.parametrize("flow", ["realnvp", "glow"])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 6, 4), (8, 8, 1)])
def test_channels_last_images_are_told(flow, shape):
    X = np.random.default_rng(0).normal(size=(12, *shape))
    options = dict(n_levels=1, n_steps=1, hidden_channels=4, max_epochs=1, random_state=0)
    told = r"pass X.transpose\(0, 3, 1, 2\), of shape \(n_samples, {}, {}, {}\)"
    told = told.format(shape[2], *shape[:2])
    for prior, images in (
        (FlowPrior(flow, **options), X),
        (FlowPrior(flow, event_shape=shape, **options), X.reshape(12, -1)),
    ):
        # (Where the flow can take them at all.)
        with pytest.warns(UserWarning, match=told), contextlib.suppress(ValueError):
            prior.fit(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlowPrior(flow, **options).fit(X.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(3, 8, 4), (1, 8, 4), (4, 4, 4), (2, 8, 4), (8, 2)])
def test_channels_first_images_are_not_told_off(shape, recwarn):
    options = dict(n_levels=1, n_steps=1, hidden_channels=4, max_epochs=1, random_state=0)
    X = np.random.default_rng(0).normal(size=(12, *shape))
    with contextlib.suppress(ValueError):
        FlowPrior(**options).fit(X)
    assert not [w for w in recwarn if "transpose" in str(w.message)]


def test_a_users_own_flow_cannot_be_saved(path):
    class Own(Flow):
        pass

    class Wider(Glow):
        def _normalize(self, x):
            z, log_det = super()._normalize(x)
            return 2 * z, log_det + z.shape[1] * np.log(2)

    # The same weights, another density.
    with pytest.raises(TypeError, match="can be saved; save a Wider"):
        FlowPrior(Wider((1, 4, 4))).save(path)
    with pytest.raises(TypeError, match="Only the flows of skaipo.flows can be saved; save a Own"):
        FlowPrior(Own((2,))).save(path)
    assert not path.exists()


# ---------------------------------------------------------------------------------- Gaussian


def gaussian(d, seed=0, **options):
    """A prior with a covariance far from diagonal; its mean, covariance and precision."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, d))
    covariance = A @ A.T / d + 0.1 * np.eye(d)
    mean = 3 * rng.standard_normal(d)
    return GaussianPrior(mean, covariance, **options), mean, covariance, np.linalg.inv(covariance)


@pytest.mark.parametrize("d", [1, 2, 6])
def test_gaussian_density_is_scipys(d):
    prior, mean, covariance, _ = gaussian(d)
    X = mean + 2 * np.random.default_rng(1).standard_normal((20, d))
    want = stats.multivariate_normal(mean, covariance).logpdf(X)
    np.testing.assert_allclose(prior.score_samples(X), want, rtol=1e-10)
    np.testing.assert_allclose(prior.mean_, mean)
    np.testing.assert_allclose(prior.covariance_, covariance)
    np.testing.assert_allclose(prior.inverse_transform(prior.transform(X)), X, rtol=1e-10)


def test_gaussian_samples_have_its_moments():
    prior, mean, covariance, _ = gaussian(3)
    X = prior.sample(20_000, random_state=0)
    np.testing.assert_allclose(X.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(X, rowvar=False), covariance, atol=0.08)


PROBLEMS = {
    "denoising": lambda d: Denoising(),
    "inpainting": lambda d: Inpainting(np.arange(d) % 3 > 0),
    "sensing": lambda d: CompressedSensing(3, random_state=1),
    "matrix": lambda d: np.vander(np.linspace(0.3, 1.2, d), 4).T,
    "overdetermined": lambda d: np.random.default_rng(5).standard_normal((9, d)),
}


def matrix_of(op, d):
    """The rows that are measured, without going through ``forward``."""
    if isinstance(op, Denoising):
        return np.eye(d)
    if isinstance(op, Inpainting):
        return np.diag(np.asarray(op.mask, dtype=float))
    return op if isinstance(op, np.ndarray) else op.bind((d,)).matrix_


def measurements(op, prior, missing):
    A = matrix_of(op, prior.n_features_in_ if hasattr(prior, "n_features_in_") else 6)
    rng = np.random.default_rng(2)
    Y = prior.sample(4, random_state=1) @ A.T + 0.3 * rng.standard_normal((4, len(A)))
    if missing:
        Y[0, 1] = Y[1, 0] = Y[1, 2] = np.nan
    return A, Y


NOISES = {
    "squared": (None, lambda m: np.full(m, 2.0)),
    "gaussian": (lambda m: GaussianNoise(0.4), lambda m: np.full(m, 0.4**-2)),
    "per entry": (
        lambda m: GaussianNoise(np.linspace(0.2, 1, m)),
        lambda m: np.linspace(0.2, 1, m) ** -2,
    ),
}


@pytest.fixture(params=PROBLEMS)
def op(request):
    return PROBLEMS[request.param](6)


@pytest.mark.parametrize(
    "op, noise, lam, missing",
    covering(PROBLEMS, NOISES, [0.05, 1.0, 7.0], [False, True]),
    indirect=["op"],
)
def test_map_estimate_is_what_an_optimiser_finds(op, noise, lam, missing):
    prior, mean, _, precision = gaussian(6)
    A, Y = measurements(op, prior, missing)
    make, weights = NOISES[noise]
    model, weights = make and make(len(A)), weights(len(A))
    X = prior.map_estimate(Y, op, model, lam)
    assert X.shape == (4, 6)
    for x, y in zip(X, Y, strict=True):
        seen = ~np.isnan(y) & A.any(1)
        a, w = A[seen], weights[seen]

        def objective(x, a=a, w=w, y=y[seen]):
            r, e = a @ x - y, x - mean
            value = 0.5 * (w * r**2).sum() + lam * 0.5 * e @ precision @ e
            return value, a.T @ (w * r) + lam * precision @ e

        found = minimize(objective, mean, jac=True, method="BFGS", options=dict(gtol=1e-9))
        np.testing.assert_allclose(x, found.x, rtol=1e-5, atol=1e-6)
        assert objective(x)[0] <= found.fun + 1e-9


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "overdetermined"])
def test_map_estimate_at_zero_is_the_likeliest_consistent_image(name, noise, missing):
    """The constraints hold, and the prior's gradient lies in the row space of the constraints."""
    op = PROBLEMS[name](6)
    prior, mean, _, precision = gaussian(6)
    A, Y = measurements(op, prior, missing)
    make, _ = NOISES[noise]
    X = prior.map_estimate(Y, op, make and make(len(A)), lam=0)
    for x, y in zip(X, Y, strict=True):
        seen = ~np.isnan(y) & A.any(1)
        a = A[seen]
        np.testing.assert_allclose(a @ x, y[seen], atol=1e-8)
        gradient = precision @ (x - mean)
        multipliers = np.linalg.lstsq(a.T, gradient, rcond=None)[0]
        np.testing.assert_allclose(a.T @ multipliers, gradient, atol=1e-7)


def test_map_estimate_with_repeated_rows_at_zero():
    """A singular Gram matrix: the repetitions change nothing."""
    prior, *_ = gaussian(6)
    A, Y = measurements(PROBLEMS["matrix"](6), prior, False)
    once = prior.map_estimate(Y, A, lam=0)
    twice = prior.map_estimate(np.hstack((Y, Y)), np.vstack((A, A)), lam=0)
    np.testing.assert_allclose(twice, once, atol=1e-6)


def test_map_estimate_goes_from_the_data_to_the_mean():
    prior, mean, _, _ = gaussian(6)
    Y = prior.sample(3, random_state=0)
    np.testing.assert_allclose(prior.map_estimate(Y, Denoising(), lam=0), Y, atol=1e-9)
    far = prior.map_estimate(Y, Denoising(), lam=1e12)
    np.testing.assert_allclose(far, np.tile(mean, (3, 1)), atol=1e-8)
    # The two forms of the noise are one: lam = 2 sigma^2 there is 1 here.
    bayes = prior.map_estimate(Y, Denoising(), GaussianNoise(0.3))
    np.testing.assert_allclose(prior.map_estimate(Y, Denoising(), lam=2 * 0.3**2), bayes)


def test_row_with_nothing_measured_is_the_mean():
    """What it holds lies under the mask, where values are ignored."""
    prior, mean, covariance, _ = gaussian(6)
    op = Inpainting(np.arange(6) < 2)
    Y = np.full((1, 6), 50.0)
    Y[0, :2] = np.nan
    np.testing.assert_allclose(prior.map_estimate(Y, op), mean[None])
    np.testing.assert_allclose(prior.posterior(Y, op, GaussianNoise(1.0))[1], covariance[None])


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("noise", ["gaussian", "per entry"])
def test_posterior_is_the_precision_form(op, noise, missing):
    prior, mean, _, precision = gaussian(6)
    A, Y = measurements(op, prior, missing)
    make, weights = NOISES[noise]
    means, covariances = prior.posterior(Y, op, make(len(A)))
    assert means.shape == (4, 6) and covariances.shape == (4, 6, 6)
    for y, got_mean, got_covariance in zip(Y, means, covariances, strict=True):
        seen = ~np.isnan(y) & A.any(1)
        a, w = A[seen], np.diag(weights(len(A))[seen])
        want = np.linalg.inv(precision + a.T @ w @ a)
        np.testing.assert_allclose(got_covariance, want, atol=1e-8)
        np.testing.assert_allclose(
            got_mean, want @ (precision @ mean + a.T @ w @ y[seen]), atol=1e-8
        )


def test_posterior_mean_is_the_map_and_images_are_accepted():
    prior, *_ = gaussian(D, event_shape=IMAGE)
    Y = prior.sample(3, random_state=0)
    noise = GaussianNoise(0.5)
    want = prior.posterior(Y, Denoising(), noise)[0]
    np.testing.assert_allclose(prior.map_estimate(Y, Denoising(), noise), want)
    images = prior.map_estimate(Y.reshape(-1, *IMAGE), Denoising(), noise)
    np.testing.assert_allclose(images.reshape(3, D), want)


# ---------------------------------------------------------------------------------- Gaussian: fit


@pytest.fixture
def correlated():
    rng = np.random.default_rng(0)
    return rng.standard_normal((30, 5)) @ rng.standard_normal((5, 5)) + 7


def test_gaussian_fit_is_ledoit_wolfs_by_default(correlated):
    prior = GaussianPrior().fit(correlated)
    want = LedoitWolf().fit(correlated)
    assert 0 < want.shrinkage_ < 1
    np.testing.assert_allclose(prior.covariance_, want.covariance_, rtol=1e-6)
    np.testing.assert_allclose(prior.mean_, correlated.mean(0))
    assert prior.n_features_in_ == 5 and prior.event_shape_ == (5,)


@pytest.mark.parametrize("shrinkage", [0, 0.3, 1])
def test_gaussian_shrinkage(correlated, shrinkage):
    sample = np.cov(correlated, rowvar=False, bias=True)
    want = (1 - shrinkage) * sample + shrinkage * np.eye(5) * np.diag(sample).mean()
    prior = GaussianPrior(shrinkage=shrinkage).fit(correlated)
    np.testing.assert_allclose(prior.covariance_, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit", [1e-9, 1e6])
@pytest.mark.parametrize("shrinkage", ["auto", 0.1])
def test_gaussian_fit_does_not_depend_on_the_units(correlated, unit, shrinkage):
    prior = GaussianPrior(shrinkage=shrinkage).fit(correlated)
    other = GaussianPrior(shrinkage=shrinkage).fit(unit * correlated)
    np.testing.assert_allclose(other.transform(unit * correlated), prior.transform(correlated))
    want = prior.score_samples(correlated) - 5 * math.log(unit)
    np.testing.assert_allclose(other.score_samples(unit * correlated), want)


def test_gaussian_fit_survives_features_that_never_vary():
    X = np.random.default_rng(0).standard_normal((20, 4))
    X[:, 1:3] = 2.0
    for shrinkage in ("auto", 0):
        prior = GaussianPrior(shrinkage=shrinkage).fit(X)
        assert np.isfinite(prior.score_samples(X)).all()
    assert np.isfinite(GaussianPrior().fit(np.ones((5, 3))).score_samples(np.ones((2, 3)))).all()


def test_gaussian_fit_accepts_images(correlated):
    X = np.random.default_rng(0).standard_normal((40, *IMAGE))
    prior = GaussianPrior().fit(X)
    assert prior.event_shape_ == IMAGE
    flat = GaussianPrior(event_shape=IMAGE).fit(X.reshape(40, -1))
    assert flat.event_shape_ == IMAGE and np.array_equal(flat.covariance_, prior.covariance_)


def test_given_moments_are_not_fitted(correlated):
    prior = GaussianPrior(np.zeros(5), np.eye(5)).fit(correlated)
    np.testing.assert_allclose(prior.mean_, 0)
    np.testing.assert_allclose(prior.covariance_, np.eye(5))
    with pytest.raises(ValueError, match="4 columns|4 features"):
        GaussianPrior(np.zeros(5), np.eye(5)).fit(correlated[:, 1:])


def test_fit_after_set_params_uses_the_new_moments(correlated):
    prior = GaussianPrior(np.zeros(5), np.eye(5))
    prior.score_samples(correlated)
    prior.set_params(mean=np.ones(5), covariance=2 * np.eye(5)).fit(correlated)
    np.testing.assert_allclose(prior.mean_, 1)
    prior.set_params(mean=None, covariance=None)
    with pytest.raises(NotFittedError):
        check_is_fitted(prior)
    with pytest.raises(NotFittedError):
        prior.score_samples(correlated)
    np.testing.assert_allclose(prior.fit(correlated).mean_, correlated.mean(0))


# ---------------------------------------------------------------------------------- bad moments


@pytest.mark.parametrize(
    "mean, covariance, options, message",
    [
        (np.zeros(2), None, {}, "Pass both mean and covariance, or neither"),
        (None, np.eye(2), {}, "Pass both mean and covariance, or neither"),
        (np.zeros(3), np.eye(2), {}, r"got \(3,\) and \(2, 2\)"),
        (np.zeros((1, 2)), np.eye(2), {}, r"got \(1, 2\) and \(2, 2\)"),
        ([0, np.nan], np.eye(2), {}, "must be finite"),
        ([0, 0], [[1, np.inf], [np.inf, 1]], {}, "must be finite"),
        ([0, 0], [[1, 0.5], [0, 1]], {}, "covariance must be symmetric"),
        ([0, 0], [[1, 2], [2, 1]], {}, "symmetric positive definite.*shrinkage"),
        ([0, 0], np.zeros((2, 2)), {}, "symmetric positive definite"),
        (np.zeros(5), np.eye(5), dict(event_shape=(2, 3)), r"5 entries, but event_shape \(2, 3\)"),
    ],
)
def test_gaussian_moments_that_make_no_sense(mean, covariance, options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPrior(mean, covariance, **options).score_samples(np.zeros((3, 2)))


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5, "some", None])
def test_gaussian_shrinkage_out_of_range(shrinkage, correlated):
    with pytest.raises(ValueError, match=r"shrinkage must be 'auto' or in \[0, 1\], got"):
        GaussianPrior(shrinkage=shrinkage).fit(correlated)


def test_gaussian_fit_needs_two_samples(correlated):
    with pytest.raises(ValueError, match="at least 2 samples to fit, got n_samples=1"):
        GaussianPrior().fit(correlated[:1])


def test_map_estimate_errors():
    class Laplace(NoiseModel):
        def _penalty(self, residual):
            return residual.abs()

        def max_curvature(self):
            return math.inf

    class Squaring(Denoising):
        is_linear = False

        def forward(self, x):
            return x.square()

    prior, *_ = gaussian(6)
    Y = np.zeros((2, 6))
    for lam, error in ((-1.0, ValueError), (np.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="lam must be"):
            prior.map_estimate(Y, Denoising(), lam=lam)
    with pytest.raises(TypeError, match="needs squared error or GaussianNoise, got Laplace"):
        prior.map_estimate(Y, Denoising(), Laplace())
    with pytest.raises(TypeError, match="needs a linear operator, got Squaring"):
        prior.map_estimate(Y, Squaring())
    with pytest.raises(ValueError, match="Y has 5 columns, but op expects 6"):
        prior.map_estimate(Y[:, 1:], Denoising())
    Y[1] = np.nan
    with pytest.raises(ValueError, match=r"1 row.s. without a single measured value .*row 1"):
        prior.map_estimate(Y, Denoising())
    with pytest.raises(ValueError, match="5 features.* have 6"):
        prior.map_estimate(np.zeros((2, 4)), MatrixOperator(np.ones((4, 5))))
