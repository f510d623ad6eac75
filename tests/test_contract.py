"""What scikit-learn's users take for granted: fit in any form, clone, pickle, search, pipelines."""

import contextlib
import copy
import io
import pickle

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from problems import random_flow
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
)
from skaipo._handle import pack_module, unpack_module
from skaipo.datasets import load_digits_split
from skaipo.flows import Flow, RealNVP
from skaipo.metrics import (
    ReconstructionScorer,
    discrepancy_scorer,
    psnr_score,
    psnr_scorer,
    reconstruction_error_scorer,
)
from skaipo.noise import GaussianNoise
from skaipo.operators import (
    CompressedSensing,
    Denoising,
    Inpainting,
    LeastSquaresOperator,
    MatrixOperator,
)

# Budgets are small; whether rows converge is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

D = 6
SIGMA = 0.4
REGRESSORS = [AIPORegressor, FixedLambdaMAP]
TINY = dict(n_steps=1, hidden_channels=4, max_epochs=1, random_state=0)


@pytest.fixture(scope="module")
def X():
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, D)) @ rng.normal(size=(D, D)) / 2 + 1


@pytest.fixture(scope="module")
def Y(X):
    return X + SIGMA * np.random.default_rng(1).normal(size=X.shape)


@pytest.fixture(scope="module")
def gaussian(X):
    return GaussianPrior().fit(X)


@pytest.fixture(scope="module")
def trained(X):
    return FlowPrior(**TINY).fit(X)


PRIORS = {
    "trained flow": lambda X: FlowPrior(**TINY).fit(X),
    "wrapped flow": lambda X: FlowPrior(flow=random_flow(RealNVP, (D,), torch.float32)),
    "fitted normal": lambda X: GaussianPrior().fit(X),
    "given normal": lambda X: GaussianPrior(X.mean(0), np.cov(X.T)),
}


@pytest.fixture(params=PRIORS, scope="module")
def ready(request, X):
    """A prior that needs no fit any more."""
    return PRIORS[request.param](X)


@pytest.fixture(scope="module")
def expected(ready, Y):
    """By that prior."""
    return denoiser(ready).predict(Y)


def denoiser(prior=None, make=AIPORegressor, **params):
    return make(
        Denoising(), prior=prior, **{"noise": GaussianNoise(SIGMA), "max_evals": 4, **params}
    )


# Forms of fit


@pytest.mark.parametrize(
    "make, ready",
    [*((AIPORegressor, name) for name in PRIORS), (FixedLambdaMAP, "trained flow")],
    indirect=["ready"],
)
def test_a_ready_prior_goes_in_by_any_door(make, ready, X, Y):
    expected = denoiser(ready, make).predict(Y)
    assert expected.shape == X.shape and not np.array_equal(expected, Y)
    for model in (
        denoiser(make=make).fit(ready),
        denoiser(make=make).fit(prior=ready),
        denoiser(make=make).fit(Y, prior=ready),
        denoiser(make=make).fit(Y, X, prior=ready),
        denoiser(ready, make).fit(),
        denoiser(ready, make).fit(Y),
        denoiser(ready, make).fit(Y, X),
        denoiser(make=make).set_params(prior=ready),
    ):
        np.testing.assert_array_equal(model.predict(Y), expected)


def test_a_flow_module_is_a_prior(Y):
    flow = random_flow(RealNVP, (D,))
    model = denoiser().fit(flow)
    assert model.prior_.flow_ is flow
    expected = denoiser(FlowPrior(flow=flow)).predict(Y)
    np.testing.assert_array_equal(model.predict(Y), expected)


def test_without_fit_in_a_pipeline(gaussian, Y):
    pipeline = make_pipeline(FunctionTransformer(np.negative), denoiser(gaussian))
    check_is_fitted(pipeline)
    np.testing.assert_array_equal(pipeline.predict(-Y), denoiser(gaussian).predict(Y))


@pytest.mark.parametrize("prior", [GaussianPrior(), FlowPrior(**TINY)], ids=["gaussian", "flow"])
@pytest.mark.parametrize("make", REGRESSORS)
def test_clean_data_trains_an_unfitted_prior(make, prior, X, Y):
    model = denoiser(prior, make).fit(Y, X)
    assert model.prior is prior
    with pytest.raises(NotFittedError):
        check_is_fitted(prior)
    np.testing.assert_array_equal(model.predict(Y), denoiser(clone(prior).fit(X), make).predict(Y))


def test_a_trained_prior_is_not_trained_again(trained, X, Y):
    before = trained.score_samples(X)
    model = denoiser(trained).fit(Y, 3 * X)
    assert model.prior_ is trained
    np.testing.assert_array_equal(trained.score_samples(X), before)


def test_an_operator_is_learnt_from_pairs(gaussian, X):
    A = np.random.default_rng(2).normal(size=(4, D))
    model = AIPORegressor(LeastSquaresOperator(ridge=0), prior=gaussian).fit(X @ A.T + 1, X)
    np.testing.assert_allclose(model.op_.A, A, atol=1e-8)
    np.testing.assert_allclose(model.op_.offset, 1, atol=1e-8)
    assert isinstance(model.op, LeastSquaresOperator)


@pytest.mark.parametrize("make", [*REGRESSORS, AIPOTransformer, AIPORegressorCV])
def test_there_is_no_default_prior(make, X, Y):
    model = make(Denoising())
    infer = "transform" if make is AIPOTransformer else "predict"
    for call in (
        lambda: model.fit(Y, X),
        lambda: model.fit(Y),
        lambda: getattr(model, infer)(Y) if make is not AIPORegressorCV else model.fit(Y, X),
        lambda: model.reconstruct(Y) if make is not AIPORegressorCV else model.fit(Y),
    ):
        with pytest.raises(NotFittedError, match=r"no prior.*prior=prior.*fit\(prior\).*X_clean"):
            call()
    assert not hasattr(model, "prior_")
    with pytest.raises(NotFittedError):
        check_is_fitted(model)


@pytest.mark.parametrize("make", REGRESSORS)
def test_an_unfitted_prior_asks_for_clean_data(make, Y):
    model = denoiser(GaussianPrior(), make)
    with pytest.raises(ValueError, match=r"GaussianPrior is not fitted.*fit\(Y, X_clean\)"):
        model.fit(Y)
    with pytest.raises(NotFittedError, match=r"not fitted yet.*fit\(Y, X_clean\)"):
        model.predict(Y)


def test_an_operator_to_be_learnt_asks_for_pairs(gaussian, Y):
    model = AIPORegressor(LeastSquaresOperator(), prior=gaussian)
    with pytest.raises(ValueError, match=r"LeastSquaresOperator is not fitted.*X_clean"):
        model.fit(Y)
    with pytest.raises(NotFittedError, match=r"operator.*fit\(Y, X_clean\)"):
        model.predict(Y)


def test_fit_refuses_what_is_no_prior(gaussian, Y):
    with pytest.raises(TypeError, match="two priors"):
        denoiser().fit(gaussian, prior=gaussian)
    with pytest.raises(TypeError, match="FlowPrior or GaussianPrior, got StandardScaler"):
        denoiser().fit(Y, prior=StandardScaler())


def test_clean_images_of_another_size(gaussian, X, Y):
    with pytest.raises(ValueError, match=r"clean images of 6 features.*got shape \(24, 5\)"):
        denoiser(gaussian).fit(Y, X[:, :5])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        denoiser(gaussian).fit(Y, X[:-1])


def test_a_refit_forgets_that_the_target_was_a_column(gaussian, X, Y):
    op = MatrixOperator(np.ones((1, 1)))
    model = AIPORegressor(op, prior=GaussianPrior()).fit(Y[:, :1], X[:, 0])
    assert model.predict(Y[:, :1]).shape == (24,)
    assert model.fit(Y[:, :1], X[:, :1]).predict(Y[:, :1]).shape == (24, 1)


def test_a_prior_given_to_fit_survives_clone_and_search(ready, X, Y):
    model = denoiser().fit(ready)
    expected = model.predict(Y)
    np.testing.assert_array_equal(clone(model).predict(Y), expected)
    search = GridSearchCV(model, {"lam": [0.5, 1.0]}, cv=2).fit(Y, X)
    assert search.best_estimator_.prior_.flow_ is ready.flow_
    lam = search.best_params_["lam"]
    np.testing.assert_array_equal(search.predict(Y), denoiser(ready, lam=lam).predict(Y))


# Parameters


def test_parameters_of_an_unfitted_prior_can_be_set(X, Y):
    model = denoiser(FlowPrior(**TINY))
    model.set_params(prior__n_steps=2, prior__batch_size=12).fit(Y, X)
    expected = FlowPrior(**{**TINY, "n_steps": 2}, batch_size=12).fit(X)
    np.testing.assert_array_equal(model.prior_.score_samples(X), expected.score_samples(X))
    assert model.prior.batch_size == 12


def test_a_training_parameter_changed_after_training_is_an_error(trained, Y):
    model = clone(denoiser(trained)).set_params(prior__n_steps=2)
    with pytest.raises(ValueError, match="n_steps was changed from 1 to 2"):
        model.predict(Y)
    with pytest.raises(ValueError, match="n_steps was changed"):
        GridSearchCV(denoiser(trained), {"prior__n_steps": [2]}, error_score="raise", cv=2).fit(Y)
    # The one that was cloned is as it was; so is the clone when it is set back.
    assert trained.n_steps == 1
    expected = denoiser(trained).predict(Y)
    np.testing.assert_array_equal(model.set_params(prior__n_steps=1).predict(Y), expected)


def test_parameters_of_operator_and_noise(gaussian, X):
    model = AIPORegressor(CompressedSensing(4), prior=gaussian, noise=GaussianNoise(1.0))
    for m, sigma in ((4, 1.0), (3, 0.1)):
        model.set_params(op__n_measurements=m, noise__sigma=sigma)
        measured = CompressedSensing(m)(X)
        expected = AIPORegressor(CompressedSensing(m), prior=gaussian, noise=GaussianNoise(sigma))
        np.testing.assert_array_equal(model.predict(measured), expected.predict(measured))
    assert measured.shape == (24, 3)


def test_parameters_are_listed_whatever_the_estimator():
    shared = set(AIPORegressor().get_params())
    assert set(AIPOTransformer().get_params()) == shared
    assert set(FixedLambdaMAP().get_params()) == shared - {"schedule"} | {"init"}
    assert set(AIPORegressorCV().get_params()) >= shared - {"lam"}
    with pytest.raises(ValueError, match="Invalid parameter 'lamda'"):
        AIPORegressor().set_params(lamda=1)


@pytest.mark.parametrize(
    "params, error, message",
    [
        (dict(lam=-1.0), ValueError, "lam"),
        (dict(lam="1"), TypeError, "lam"),
        (dict(max_evals=3), ValueError, "max_evals"),
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(tol=-1), ValueError, "tol"),
        (dict(solver="newton"), ValueError, "solver"),
        (dict(space="pixels"), ValueError, "space"),
        (dict(penalty="l1"), ValueError, "penalty"),
        (dict(schedule="cubic"), ValueError, "schedule"),
        (dict(op=None), ValueError, "forward operator"),
    ],
)
def test_bad_parameters_are_named(params, error, message, gaussian, Y):
    model = denoiser(gaussian).set_params(**params)
    with pytest.raises(error, match=message):
        model.predict(Y)


@pytest.mark.parametrize("make", [*REGRESSORS, AIPOTransformer, AIPORegressorCV])
@pytest.mark.parametrize("html", [False, True])
def test_reprs_do_not_dump_arrays(make, html):
    A = np.random.default_rng(0).normal(size=(40, 64))
    prior = GaussianPrior(np.full(64, 0.123), np.eye(64))
    flow = FlowPrior(flow=random_flow(RealNVP, (64,)))
    for op, given in ((A, prior), (MatrixOperator(A), flow), (Inpainting(A[0] > 0), prior)):
        model = make(op, prior=given, noise=GaussianNoise(np.full(40, 0.123)))
        text = model._repr_html_() if html else repr(model)
        assert make.__name__ in text and "0.123" not in text and f"{A[0, 0]:.3f}" not in text
        # Around it, older versions put a style sheet.
        assert html or len(text) < 500


# Clones, copies and pickles


def _joblib_file(obj, tmp_path):
    joblib.dump(obj, tmp_path / "model.joblib")
    return joblib.load(tmp_path / "model.joblib")


ROUND_TRIPS = {
    "clone": lambda obj, path: clone(obj),
    "copy": lambda obj, path: copy.copy(obj),
    "deepcopy": lambda obj, path: copy.deepcopy(obj),
    "pickle": lambda obj, path: pickle.loads(pickle.dumps(obj)),
    "old pickle": lambda obj, path: pickle.loads(pickle.dumps(obj, protocol=2)),
    "cloudpickle": lambda obj, path: pickle.loads(cloudpickle.dumps(obj)),
    "joblib": _joblib_file,
}


@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_a_fitted_prior_rides_along(trip, ready, expected, Y, tmp_path):
    travel = ROUND_TRIPS[trip]
    for model in (denoiser(ready), denoiser().fit(ready), denoiser(ready).fit(Y)):
        # Twice, since the second starts from what the first has made.
        there = travel(model, tmp_path)
        again = travel(there, tmp_path)
        assert again is not there and there is not model
        np.testing.assert_array_equal(again.predict(Y), expected)
        if trip in ("clone", "copy", "deepcopy"):
            assert again.prior.flow_ is ready.flow_


@pytest.mark.parametrize("trip", ROUND_TRIPS)
def test_what_fit_learnt_rides_along_but_for_clones(trip, X, Y, tmp_path):
    prior = GaussianPrior()
    model = AIPORegressor(LeastSquaresOperator(), prior=prior, max_evals=20).fit(Y, X)
    there = ROUND_TRIPS[trip](model, tmp_path)
    if trip == "clone":
        with pytest.raises(NotFittedError):
            there.predict(Y)
        there.fit(Y, X)
    np.testing.assert_array_equal(there.predict(Y), model.predict(Y))


def test_clones_do_not_share_parameters(gaussian):
    model = denoiser(gaussian)
    other = clone(model).set_params(noise__sigma=3.0, lam=2.0, prior__shrinkage=0.5)
    assert (model.lam, model.noise.sigma, gaussian.shrinkage) == (1.0, SIGMA, "auto")
    assert other.prior is not gaussian


def test_clones_keep_their_requests_and_output(gaussian, trained):
    with sklearn.config_context(enable_metadata_routing=True):
        model = clone(denoiser(gaussian).set_predict_request(mask=True))
        assert model.get_metadata_routing().predict.requests["mask"] is True
    frozen = FlowPrior(flow=random_flow(RealNVP, (D,)))
    for transformer in (denoiser(gaussian, AIPOTransformer), GaussianPrior(), frozen):
        other = clone(transformer.set_output(transform="pandas"))
        assert isinstance(
            other.fit_transform(np.random.default_rng(0).normal(size=(20, D))), pd.DataFrame
        )


def test_a_subclass_whose_constructor_is_wrong_is_not_cloned(gaussian):
    class Doubled(AIPORegressor):
        def __init__(self, op=None, lam=1.0, *, prior=None):
            super().__init__(op, 2.5 * lam, prior=prior)

    with pytest.raises(RuntimeError, match="does not set or modifies parameter lam"):
        clone(Doubled(Denoising(), prior=gaussian))


def test_weights_are_written_once():
    prior = FlowPrior(flow=_wide_flow())
    model = denoiser(prior)
    one = len(pickle.dumps(model))
    ten = len(pickle.dumps([clone(model) for _ in range(10)]))
    assert one > 300_000
    assert ten < one + 10 * 4_000
    assert len(pickle.dumps(prior)) == pytest.approx(one, abs=4_000)


def _wide_flow():
    flow = RealNVP((D,), n_steps=4, hidden_channels=128)
    return flow.eval().requires_grad_(False)


def test_a_module_is_packed_into_one_array():
    flow = _wide_flow()
    state = pack_module(flow)
    assert pack_module(flow)["flat"] is state["flat"]
    there = unpack_module(state)
    # So that a worker that sends it on does not make another.
    assert pack_module(there)["flat"] is state["flat"]
    for key, value in flow.state_dict().items():
        torch.testing.assert_close(there.state_dict()[key], value, rtol=0, atol=0)


def test_unpacking_does_not_write_into_the_array():
    state = pack_module(_wide_flow())
    before = state["flat"].copy()
    state["flat"].setflags(write=False)
    there = unpack_module(state)
    for parameter in there.parameters():
        parameter.data.add_(1)
    np.testing.assert_array_equal(state["flat"], before)


class Odd(torch.nn.Module):
    """Tied weights, a buffer that is not saved, types of several sizes, a tensor in a list."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("count", torch.arange(5), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 4, dtype=torch.float64))
        self.register_buffer("coarse", torch.tensor([1.5], dtype=torch.bfloat16))
        self.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
        self.extra = [torch.arange(6.0).reshape(2, 3).T]


def test_tied_tensors_and_odd_buffers_survive():
    module = Odd()
    there = unpack_module(pickle.loads(pickle.dumps(pack_module(module))))
    assert there.second.weight is there.first.weight
    assert isinstance(there.first.weight, torch.nn.Parameter)
    assert there.first.weight.requires_grad and not there.first.bias.requires_grad
    for name in ("flag", "count", "empty", "coarse", "conjugate"):
        before, after = getattr(module, name), getattr(there, name)
        assert after.dtype == before.dtype and after.shape == before.shape
        assert torch.equal(after, before)
    assert torch.equal(there.extra[0], module.extra[0])
    assert set(there.state_dict()) == set(module.state_dict())


@pytest.mark.parametrize("change", ["in place", "unseen", "replaced", "loaded"])
def test_a_module_that_changes_is_packed_anew(change):
    module = Odd()
    old = pack_module(module)
    weight = torch.full((3, 3), 7.0)
    with torch.no_grad():
        if change == "in place":
            module.first.weight.copy_(weight)
        elif change == "unseen":
            module.first.weight.data.copy_(weight)
        elif change == "replaced":
            module.first.weight = torch.nn.Parameter(weight)
        else:
            module.load_state_dict({**module.state_dict(), "first.weight": weight}, strict=False)
            module.first.weight.copy_(weight)
    new = pack_module(module)
    assert new["flat"] is not old["flat"]
    assert torch.equal(unpack_module(new).first.weight, weight)
    assert not torch.equal(unpack_module(old).first.weight, weight)


def shifted_flow_class():
    """A flow class as a notebook has it: in __main__, where no other process can import it."""

    class Shifted(Flow):
        def __init__(self, d):
            super().__init__((d,))
            self.register_buffer("shift", torch.arange(d, dtype=torch.float32))

        def _normalize(self, x):
            return x - self.shift, x.new_zeros(len(x))

        def _generate(self, z):
            return z + self.shift, z.new_zeros(len(z))

    Shifted.__module__ = "__main__"
    Shifted.__qualname__ = "Shifted"
    return Shifted


def test_a_users_own_class_is_pickled_by_value(Y):
    prior = FlowPrior(flow=shifted_flow_class()(D))
    model = denoiser(prior)
    # Plain pickle, which cannot find the class by its name.
    there = pickle.loads(pickle.dumps(model))
    assert type(there.prior.flow_).__name__ == "Shifted"
    np.testing.assert_array_equal(there.predict(Y), model.predict(Y))
    assert not np.array_equal(model.predict(Y), Y)


# Searches

GRIDS = {
    "lam": {"lam": [0.01, 1.0, 10.0]},
    "sigma": {"noise__sigma": [0.1, 0.4, 1.6]},
    "solver": {"solver": ["adam", "lbfgs", "gd"], "space": ["image", "latent"]},
    "operator": {"op": [Denoising(), MatrixOperator(0.5 * np.eye(D))]},
    "schedule": {"schedule": ["linear", "geometric", "lattice"]},
}


@pytest.mark.parametrize("name", GRIDS)
def test_grid_search_scores_what_single_fits_score(name, gaussian, X, Y):
    model = denoiser(gaussian, max_evals=12)
    search = GridSearchCV(model, GRIDS[name], cv=2, error_score="raise").fit(Y, X)
    scores = search.cv_results_["mean_test_score"]
    for params, score in zip(search.cv_results_["params"], scores, strict=True):
        single = clone(model).set_params(**params)
        assert score == cross_val_score(single, Y, X, cv=2).mean()
    assert len(set(scores)) == len(scores)
    assert search.best_score_ == scores.max()
    best = clone(model).set_params(**search.best_params_)
    np.testing.assert_array_equal(search.predict(Y), best.predict(Y))


def test_grid_over_a_parameter_of_the_operator(gaussian, X):
    Y = CompressedSensing(4, random_state=2)(X)
    model = AIPORegressor(CompressedSensing(4), lam=0.01, prior=gaussian, solver="lbfgs")
    search = GridSearchCV(model, {"op__random_state": [0, 1, 2, 3]}, cv=2).fit(Y, X)
    # Only one of them is the matrix that measured.
    assert search.best_params_ == {"op__random_state": 2}


def test_randomized_search(gaussian, X, Y):
    distribution = {"lam": loguniform(1e-2, 1e2)}
    search = RandomizedSearchCV(
        denoiser(gaussian), distribution, n_iter=4, cv=2, random_state=0, error_score="raise"
    ).fit(Y, X)
    lams = search.cv_results_["param_lam"].astype(float)
    assert len(set(lams)) == 4 and lams.min() >= 1e-2 and lams.max() <= 1e2
    best = denoiser(gaussian, lam=search.best_params_["lam"])
    assert search.best_score_ == cross_val_score(best, Y, X, cv=2).mean()


def test_cross_val_predict_of_a_ready_prior_is_predict(gaussian, X, Y):
    held_out = cross_val_predict(denoiser(gaussian), Y, X, cv=5)
    np.testing.assert_array_equal(held_out, denoiser(gaussian).predict(Y))
    trained = cross_val_predict(denoiser(GaussianPrior()), Y, X, cv=5)
    assert trained.shape == X.shape and not np.allclose(trained, held_out)


def test_search_with_several_metrics(gaussian, X, Y):
    scoring = {
        "psnr": psnr_scorer,
        "mse": reconstruction_error_scorer,
        "named": "neg_mean_squared_error",
        "discrepancy": discrepancy_scorer,
    }
    grid = {"lam": [0.01, 1.0, 100.0]}
    search = GridSearchCV(denoiser(gaussian), grid, scoring=scoring, refit="psnr", cv=2)
    results = search.fit(Y, X).cv_results_
    np.testing.assert_allclose(results["mean_test_mse"], results["mean_test_named"], rtol=1e-12)
    folds = (slice(0, 12), slice(12, 24))
    for i, lam in enumerate(grid["lam"]):
        predicted = denoiser(gaussian, lam=lam).predict(Y)
        psnr = np.mean([psnr_score(X[rows], predicted[rows]) for rows in folds])
        assert results["mean_test_psnr"][i] == pytest.approx(psnr, rel=1e-12)
    assert len(set(results["mean_test_discrepancy"])) == 3


def test_discrepancy_needs_no_clean_data(gaussian, Y):
    grid = {"lam": [1e-3, 0.1, 10.0, 1e4]}
    model = denoiser(gaussian, max_evals=60)
    search = GridSearchCV(model, grid, scoring=discrepancy_scorer, cv=2).fit(Y)
    assert search.best_params_ == {"lam": 10.0}
    misfit = [model.set_params(lam=lam).reconstruct(Y).misfit.mean() for lam in grid["lam"]]
    # The residual alone would have taken the smallest.
    assert np.argmin(misfit) == 0


def test_halving_over_the_budget(gaussian, X, Y):
    search = HalvingGridSearchCV(
        denoiser(gaussian),
        {"lam": [0.01, 0.1, 1.0, 10.0]},
        resource="max_evals",
        min_resources=5,
        max_resources=20,
        factor=2,
        cv=2,
        random_state=0,
        error_score="raise",
    ).fit(Y, X)
    assert search.n_resources_ == [5, 10, 20]
    assert search.best_estimator_.max_evals == 20
    expected = denoiser(gaussian, lam=search.best_params_["lam"], max_evals=20)
    np.testing.assert_array_equal(search.predict(Y), expected.predict(Y))


def test_flows_are_chosen_by_their_likelihood(X):
    search = GridSearchCV(FlowPrior(**TINY), {"n_steps": [1, 2], "bound": [1.0]}, cv=2).fit(X)
    for params, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        folds = ((X[12:], X[:12]), (X[:12], X[12:]))
        fitted = [(FlowPrior(**{**TINY, **params}).fit(a), b) for a, b in folds]
        assert score == pytest.approx(np.mean([prior.score(b) for prior, b in fitted]), rel=1e-12)
    assert search.best_estimator_.n_steps == search.best_params_["n_steps"]
    assert len(set(search.cv_results_["mean_test_score"])) == 2


@pytest.mark.parametrize("make", REGRESSORS)
def test_tags_tell_what_is_left_to_learn(make, gaussian):
    for prior, op, ready in (
        (gaussian, Denoising(), True),
        (gaussian, LeastSquaresOperator(), False),
        (GaussianPrior(), Denoising(), False),
        (None, Denoising(), False),
    ):
        tags = get_tags(make(op, prior=prior))
        assert tags.estimator_type == "regressor"
        assert tags.requires_fit is not ready
        assert tags.target_tags.required is not ready
        assert tags.target_tags.multi_output
        assert tags.input_tags.allow_nan
        assert not tags.non_deterministic


def test_tags_of_the_others(gaussian):
    random = FixedLambdaMAP(Denoising(), prior=gaussian, init="random")
    assert get_tags(random).non_deterministic
    assert not get_tags(random.set_params(random_state=0)).non_deterministic
    transformer = get_tags(AIPOTransformer(Denoising(), prior=gaussian))
    assert transformer.transformer_tags is not None and transformer.estimator_type is None
    assert not transformer.requires_fit and not transformer.target_tags.required
    assert get_tags(AIPORegressorCV(Denoising(), prior=gaussian)).requires_fit


# Pipelines


def test_measurements_may_be_prepared(gaussian, X, Y):
    pipeline = make_pipeline(FunctionTransformer(lambda raw: raw / 10), denoiser(gaussian))
    pipeline.fit(10 * Y, X)
    np.testing.assert_array_equal(pipeline.predict(10 * Y), denoiser(gaussian).predict(10 * Y / 10))
    grid = {"aiporegressor__lam": [0.5, 1.0]}
    search = GridSearchCV(pipeline, grid, scoring=discrepancy_scorer, cv=2).fit(10 * Y)
    direct = GridSearchCV(denoiser(gaussian), {"lam": [0.5, 1.0]}, scoring=discrepancy_scorer, cv=2)
    direct.fit(10 * Y / 10)
    assert search.best_score_ == direct.best_score_


def test_corrupted_digits_are_classified():
    X_train, X_test, labels_train, labels_test = load_digits_split()
    names = np.array([f"digit {k}" for k in range(10)])
    words_train, words_test = names[labels_train], names[labels_test[:80]]
    rng = np.random.default_rng(0)
    Y_train, Y_test = X_train.copy(), X_test[:80].copy()
    Y_train[rng.random(Y_train.shape) < 0.5] = np.nan
    Y_test[rng.random(Y_test.shape) < 0.5] = np.nan
    prior = GaussianPrior().fit(X_train)
    fill_in = AIPOTransformer(Inpainting(), 10.0, prior=prior, max_evals=12)
    classifier = LogisticRegression(max_iter=300)
    pipeline = make_pipeline(fill_in, PCA(20, random_state=0), classifier)
    pipeline.fit(Y_train[:400], words_train[:400])
    predicted = pipeline.predict(Y_test)
    assert predicted.dtype.kind == "U"
    naive = make_pipeline(
        FunctionTransformer(np.nan_to_num), PCA(20, random_state=0), clone(classifier)
    ).fit(Y_train[:400], words_train[:400])
    accuracy = np.mean(predicted == words_test)
    assert accuracy > 0.75
    assert accuracy > naive.score(Y_test, words_test)
    # Step by step it is the same.
    images = fill_in.transform(Y_test)
    by_hand = pipeline[-1].predict(pipeline[1].transform(images))
    np.testing.assert_array_equal(predicted, by_hand)


def test_a_transformer_trains_its_prior_on_clean_images(X, Y):
    model = denoiser(GaussianPrior(), AIPOTransformer).fit(X, ["label"] * len(X))
    expected = denoiser(GaussianPrior().fit(X)).predict(Y)
    np.testing.assert_array_equal(model.transform(Y), expected)
    with pytest.raises(ValueError, match="only on images.*fitted prior"):
        AIPOTransformer(CompressedSensing(3), prior=GaussianPrior()).fit(X[:, :3])


def test_a_regressor_does_not_transform(gaussian):
    # A pipeline would hand it the labels as clean images.
    assert not hasattr(denoiser(gaussian), "transform")
    assert not hasattr(denoiser(gaussian, AIPOTransformer), "predict")


def test_transformed_target(X, Y):
    inner = AIPORegressor(LeastSquaresOperator(), 0.1, prior=GaussianPrior(), max_evals=20)
    model = TransformedTargetRegressor(inner, transformer=StandardScaler()).fit(Y, X)
    scaler = StandardScaler().fit(X)
    by_hand = clone(inner).fit(Y, scaler.transform(X)).predict(Y)
    np.testing.assert_allclose(model.predict(Y), scaler.inverse_transform(by_hand), rtol=1e-12)
    assert not np.allclose(model.predict(Y), clone(inner).fit(Y, X).predict(Y))


def test_column_transformer_and_feature_union(X, Y):
    halves = [list(range(3)), list(range(3, 6))]
    steps = [
        (f"half{k}", denoiser(GaussianPrior().fit(X[:, columns]), AIPOTransformer), columns)
        for k, columns in enumerate(halves)
    ]
    both = ColumnTransformer(steps).fit_transform(Y)
    for _, step, columns in steps:
        np.testing.assert_array_equal(both[:, columns], step.transform(Y[:, columns]))
    union = FeatureUnion(
        [("image", denoiser(GaussianPrior().fit(X), AIPOTransformer)), ("raw", "passthrough")]
    )
    out = union.fit_transform(Y)
    np.testing.assert_array_equal(out[:, D:], Y)
    np.testing.assert_array_equal(out[:, :D], union.transformer_list[0][1].transform(Y))


def test_names_and_frames(gaussian, trained, Y):
    frame = pd.DataFrame(Y, columns=list("abcdef"), index=np.arange(24)[::-1])
    transformer = denoiser(gaussian, AIPOTransformer)
    names = [f"aipotransformer{i}" for i in range(D)]
    assert transformer.get_feature_names_out().tolist() == names
    expected = transformer.transform(Y)
    out = transformer.set_output(transform="pandas").fit_transform(frame)
    assert out.columns.tolist() == names and out.index.equals(frame.index)
    np.testing.assert_array_equal(out, expected)
    assert transformer.feature_names_in_.tolist() == list("abcdef")
    with pytest.raises(ValueError, match="feature names should match"):
        transformer.transform(frame[list("fedcba")])
    latent = copy.copy(trained).set_output(transform="pandas").transform(Y)
    assert latent.columns.tolist() == [f"flowprior{i}" for i in range(D)]
    # A regressor's frame gives an array, as everywhere in scikit-learn.
    predicted = denoiser(gaussian).fit(frame, frame).predict(frame)
    np.testing.assert_array_equal(predicted, expected)


def test_pipeline_with_a_cache(gaussian, Y, tmp_path):
    def build(memory):
        return make_pipeline(denoiser(gaussian, AIPOTransformer), PCA(2), memory=memory)

    expected = build(None).fit_transform(Y)
    memory = joblib.Memory(tmp_path, verbose=0)
    np.testing.assert_array_equal(build(memory).fit_transform(Y), expected)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        cached = build(joblib.Memory(tmp_path, verbose=10)).fit(Y)
    # A prior that hashed differently each time would be solved for again.
    assert "Loading _fit_transform_one" in log.getvalue()
    assert "Calling" not in log.getvalue()
    np.testing.assert_array_equal(cached.transform(Y), build(None).fit(Y).transform(Y))


@pytest.mark.parametrize("make", REGRESSORS)
def test_mask_is_routed_and_means_nan(make, gaussian, X, Y):
    mask = np.random.default_rng(3).random(Y.shape) < 0.7
    mask[:, 0] = True
    marked = np.where(mask, Y, np.nan)
    expected = denoiser(gaussian, make).predict(marked)
    # Whatever is under the mask.
    np.testing.assert_array_equal(
        denoiser(gaussian, make).predict(np.where(mask, Y, 1e3), mask=mask), expected
    )
    assert not np.array_equal(expected, denoiser(gaussian, make).predict(Y))
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(FunctionTransformer(), denoiser(gaussian, make)).fit(Y, X)
        np.testing.assert_array_equal(pipeline.predict(Y, mask=mask), expected)
        np.testing.assert_array_equal(clone(pipeline).predict(Y, mask=mask), expected)
        np.testing.assert_array_equal(
            pipeline.fit(Y, X, mask=mask).score(Y, X, mask=mask),
            denoiser(gaussian, make).score(marked, X),
        )
        refused = denoiser(gaussian, make).set_predict_request(mask=False)
        with pytest.raises(TypeError, match="mask.*not routed"):
            make_pipeline(FunctionTransformer(), refused).fit(Y, X).predict(Y, mask=mask)


@pytest.mark.parametrize("scoring", [None, psnr_scorer, ReconstructionScorer(data_range=16)])
def test_searches_split_the_mask(scoring, gaussian, X, Y):
    mask = np.random.default_rng(3).random(Y.shape) < 0.7
    mask[:, 0] = True
    marked, hidden = np.where(mask, Y, np.nan), np.where(mask, Y, 1e3)
    grid = {"lam": [0.1, 1.0]}
    search = GridSearchCV(denoiser(gaussian), grid, scoring=scoring, cv=3, error_score="raise")
    expected = clone(search).fit(marked, X).cv_results_["mean_test_score"]
    with sklearn.config_context(enable_metadata_routing=True):
        found = clone(search).fit(hidden, X, mask=mask).cv_results_["mean_test_score"]
        rows = cross_validate(
            denoiser(gaussian, lam=1.0),
            hidden,
            X,
            scoring={"one": search.scoring or psnr_scorer},
            params=dict(mask=mask),
            cv=3,
            error_score="raise",
        )
    np.testing.assert_array_equal(found, expected)
    assert expected[0] != expected[1]
    if scoring is not None:
        assert rows["test_one"].mean() == expected[1]


def test_what_is_under_the_mask_is_not_learnt_from(X, Y):
    mask = np.random.default_rng(3).random(Y.shape) < 0.7
    mask[:12] = True
    marked, hidden = np.where(mask, Y, np.nan), np.where(mask, Y, 1e3)
    op, prior = LeastSquaresOperator(), GaussianPrior()
    model = AIPORegressor(op, 0.1, prior=prior, max_evals=20)
    expected = clone(model).fit(marked, X).predict(marked)
    found = clone(model).fit(hidden, X, mask=mask).predict(hidden, mask=mask)
    np.testing.assert_array_equal(found, expected)
    # A prior that is trained on whole rows.
    transformer = denoiser(prior, AIPOTransformer)
    with pytest.warns(UserWarning, match="8 of 24 rows have missing values"):
        expected = clone(transformer).fit(marked).transform(marked)
    with pytest.warns(UserWarning, match="8 of 24 rows have missing values"):
        found = clone(transformer).fit_transform(hidden, mask=mask)
    np.testing.assert_array_equal(found, expected)
    # The size of the noise.
    images = X.reshape(len(X), 1, 2, 3)
    sized = AIPORegressor(
        Denoising(),
        prior=GaussianPrior(event_shape=(1, 2, 3)).fit(images),
        noise=GaussianNoise("estimate"),
    )
    noise = sized.fit(marked).noise_
    assert sized.fit(hidden, mask=mask).noise_.sigma == noise.sigma
    assert sized.fit(hidden).noise_.sigma > noise.sigma
    # Masks that go with the operator say the same.
    sized.set_params(op=Inpainting())
    assert sized.fit(hidden, op_params=mask).noise_.sigma == noise.sigma
    with pytest.raises(TypeError, match="mask and op_params belong to measurements"):
        denoiser(prior).fit(GaussianPrior().fit(X), mask=mask)


def test_mask_of_a_transformer_is_routed(gaussian, X, Y):
    mask = np.random.default_rng(3).random(Y.shape) < 0.7
    mask[:, 0] = True
    expected = denoiser(gaussian, AIPOTransformer).transform(np.where(mask, Y, np.nan))
    with sklearn.config_context(enable_metadata_routing=True):
        fill_in = denoiser(gaussian, AIPOTransformer)
        for step in (fill_in, clone(fill_in).set_transform_request(mask=True)):
            pipeline = make_pipeline(step, StandardScaler(with_mean=False, with_std=False))
            pipeline.fit(Y, mask=mask)
            np.testing.assert_array_equal(pipeline.transform(Y, mask=mask), expected)
        # Where the operator takes the masks, they are the operator's parameters.
        pipeline.set_params(aipotransformer__op=Inpainting()).fit(Y, op_params=mask)
        found = pipeline.fit_transform(Y, op_params=mask)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.full((24, D), 0.5), "boolean"),
        (np.ones((24, D - 1), dtype=bool), "shape of Y"),
        (np.ones(D, dtype=bool), "shape of Y"),
        (np.zeros((24, D), dtype=bool), "24 row"),
    ],
)
def test_bad_masks_are_explained(mask, message, gaussian, Y):
    with pytest.raises(ValueError, match=message):
        denoiser(gaussian).predict(Y, mask=mask)


def test_a_flow_is_a_step_of_a_pipeline(X):
    pipeline = make_pipeline(StandardScaler(), FlowPrior(**TINY), PCA(2)).fit(X)
    scaled = StandardScaler().fit_transform(X)
    latents = FlowPrior(**TINY).fit(scaled).transform(scaled)
    np.testing.assert_array_equal(pipeline[:2].transform(X), latents)
    assert pipeline.transform(X).shape == (24, 2)
    density = make_pipeline(StandardScaler(), FlowPrior(**TINY)).fit(X)
    assert density.score(X) == FlowPrior(**TINY).fit(scaled).score(scaled)


def test_a_frozen_prior_stays_fitted(trained, X):
    frozen = trained.freeze()
    assert frozen.flow_ is trained.flow_ and frozen is not trained
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(trained))
    expected = trained.transform(X)
    np.testing.assert_array_equal(clone(frozen).transform(X), expected)
    pipeline = clone(make_pipeline(frozen, PCA(2))).fit(2 * X)
    np.testing.assert_array_equal(pipeline[0].transform(X), expected)
    assert pipeline[0].flow_ is trained.flow_
