"""The path along lambda, and the cross-validation that uses it, against single solves."""

import copy

import numpy as np
import pytest
import sklearn
import torch
from problems import drop_entries, gaussian_prior, random_flow
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import make_scorer, mean_absolute_error
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    ShuffleSplit,
    cross_val_score,
    cross_validate,
)

from skaipo import AIPORegressor, AIPORegressorCV, FlowPrior, GaussianPrior, aipo_path
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.flows import Glow, RealNVP
from skaipo.metrics import (
    discrepancy_scorer,
    psnr_scorer,
    reconstruction_error,
    reconstruction_error_scorer,
)
from skaipo.noise import GaussianNoise
from skaipo.objective import MAPObjective
from skaipo.operators import CompressedSensing, Denoising, Inpainting, LeastSquaresOperator
from skaipo.solvers import GeometricSchedule, LatticeSchedule

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SIGMA = 0.5
LAMS = [0.003, 0.1, 1.0, 30.0]
# What aipo_path takes where nothing is said.
LATTICE = LatticeSchedule()
COMMON = dict(noise=GaussianNoise(SIGMA), max_evals=24)


@pytest.fixture(scope="module")
def prior():
    return gaussian_prior(6)


@pytest.fixture(scope="module")
def X(prior):
    return prior.sample(18, random_state=0)


@pytest.fixture(scope="module")
def Y(X):
    return X + SIGMA * np.random.default_rng(1).normal(size=X.shape)


def flow_prior(architecture=RealNVP, event_shape=(6,)):
    return FlowPrior(flow=random_flow(architecture, event_shape, torch.float32))


# The path

PATHS = {
    "gaussian, default": lambda: (gaussian_prior(6), Denoising(), {}),
    "gaussian, gd": lambda: (gaussian_prior(6), Inpainting(), dict(solver="gd", batch_size=4)),
    "flow, default": lambda: (flow_prior(), CompressedSensing(4), dict(batch_size=5)),
    "flow, adam from the mle": lambda: (
        flow_prior(),
        CompressedSensing(4),
        dict(solver="adam", init="mle", mle_solver="pgd", batch_size=5),
    ),
    "flow, lbfgs in z": lambda: (flow_prior(), Denoising(), dict(solver="lbfgs", space="latent")),
    "glow, latent penalty": lambda: (
        flow_prior(Glow, (1, 4, 4)),
        Inpainting(),
        dict(space="latent", penalty="latent"),
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_point_of_the_path_is_the_single_solve(name):
    prior, op, params = PATHS[name]()
    images = prior.sample(8, random_state=2)
    Y = op(images)
    if isinstance(op, Inpainting):
        Y = drop_entries(Y)
    # With this budget the lattice is 0.01, 1 and 100: on it, between its points, and beyond them.
    grids = ([0.0, 0.02, 1.0, 50.0], [1e4, 0.02])
    params = {**COMMON, **params}
    single = AIPORegressor(op, prior=prior, schedule=LATTICE, **params)
    known = {}
    for grid in grids:
        lams, path = aipo_path(Y, op, prior, lams=grid, **params)
        assert lams.tolist() == sorted(grid) and path.shape == (len(grid), *images.shape)
        for lam, x in zip(lams.tolist(), path, strict=True):
            if lam not in known:
                known[lam] = single.set_params(lam=lam).predict(Y)
            np.testing.assert_array_equal(x, known[lam])
    # They are not all one: where two are equal no step made progress.
    assert len({answer.tobytes() for answer in known.values()}) >= 4


def test_details_of_the_path_are_those_of_the_single_solves(prior, Y):
    lams, path, results, n_evals = aipo_path(
        Y, Denoising(), prior, lams=[0.0, *LAMS], return_details=True, **COMMON
    )
    total = 0
    for lam, x, result in zip(lams, path, results, strict=True):
        single = AIPORegressor(
            Denoising(), float(lam), prior=prior, schedule=LATTICE, **COMMON
        ).reconstruct(Y)
        assert result.lam == lam == single.lam
        np.testing.assert_array_equal(x, result.x)
        for field in ("x", "objective", "misfit", "log_prob", "n_evals", "n_observed", "status"):
            np.testing.assert_array_equal(getattr(result, field), getattr(single, field))
        total += int(single.n_evals.sum())
    # The trunk and the start are shared.
    assert results[-1].n_evals.sum() < n_evals < total


@pytest.mark.parametrize("schedule", ["geometric", "lattice"])
@pytest.mark.parametrize("init", ["gaussian", "mle"])
def test_what_lambda_zero_costs_is_counted(schedule, init, prior, Y, monkeypatch):
    rows, original = [], MAPObjective.evaluate

    def counting(self, u, *args):
        rows.append(len(u))
        return original(self, u, *args)

    monkeypatch.setattr(MAPObjective, "evaluate", counting)
    params = dict(schedule=schedule, init=init, return_details=True, **COMMON)
    n_evals = aipo_path(Y, Denoising(), prior, lams=[0.0, 0.1, 1.0], **params)[-1]
    # (In denoising the MLE is the measurement, and takes no evaluation to find.)
    assert n_evals == sum(rows)


def test_twenty_lambdas_at_the_price_of_three_solves():
    """And none of them is a short cut: the objective is that of a solve for one lambda alone.

    The exact one: where the density was averaged the objective at the result says little.
    """
    prior = load_digits_prior("cpu")
    op, noise = Denoising(), GaussianNoise(2.0)
    options = dict(prior=prior, noise=noise, smoothing=0)
    Y = noise.add_noise(load_digits_split()[1][:6], random_state=0)
    lams, _, along, n_evals = aipo_path(Y, op, return_details=True, **options)
    assert len(lams) == 20 and n_evals <= 3 * AIPORegressor().max_evals * len(Y)
    single = AIPORegressor(op, float(lams[17]), schedule=LATTICE, max_evals=880, **options)
    np.testing.assert_array_equal(along[17].objective, single.reconstruct(Y).objective)
    for k in (3, 10):
        direct = AIPORegressor(op, float(lams[k]), **options).reconstruct(Y)
        # (Now and then one of the two finds the lower of two minima.)
        assert np.median(along[k].objective / direct.objective - 1) < 0.003


def test_the_path_approaches_the_closed_form(prior, Y):
    lams, path = aipo_path(
        Y,
        Denoising(),
        prior,
        lams=LAMS,
        noise=GaussianNoise(SIGMA),
        solver="lbfgs",
        tol=1e-9,
        max_evals=240,
    )
    for lam, x in zip(lams, path, strict=True):
        exact = prior.map_estimate(Y, Denoising(), noise=GaussianNoise(SIGMA), lam=lam)
        np.testing.assert_allclose(x, exact, atol=1e-5)


def test_lambda_zero_is_the_start(prior, Y):
    _, path = aipo_path(Y, Denoising(), prior, lams=[0.0, 1.0], **COMMON)
    np.testing.assert_allclose(path[0], Y, rtol=1e-12)


def test_a_number_of_lambdas_is_a_geometric_grid(prior, Y):
    lams, path = aipo_path(Y, Denoising(), prior, lams=5, eps=1e-3, **COMMON)
    assert path.shape == (5, *Y.shape)
    # Up to the Bayesian lambda.
    np.testing.assert_allclose(lams, np.geomspace(1e-3, 1, 5), rtol=1e-12)
    lams, _ = aipo_path(Y, Denoising(), prior, lams=5, **COMMON)
    np.testing.assert_allclose(lams, np.geomspace(1e-2, 1, 5), rtol=1e-12)
    (only,), _ = aipo_path(Y, Denoising(), prior, lams=np.int64(1), **COMMON)
    assert only == pytest.approx(1, rel=1e-12)
    # Without nats up to where prior and data weigh the same: curvature times the data's variance.
    without, _ = aipo_path(Y, Denoising(), prior, lams=4, max_evals=24)
    top = 2 * prior.flow_.data_scale() ** 2
    np.testing.assert_allclose(without, np.geomspace(1e-3 * top, top, 4), rtol=1e-12)


def test_grids_are_sorted_and_lose_duplicates(prior, Y):
    lams, path = aipo_path(Y, Denoising(), prior, lams=(1, 0.1, 1.0, 0.1), **COMMON)
    assert lams.tolist() == [0.1, 1.0] and len(path) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(dtype, prior, Y):
    given = torch.tensor(Y, dtype=dtype)
    lams, path = aipo_path(given, Denoising(), prior, lams=LAMS, **COMMON)
    assert isinstance(path, torch.Tensor) and path.dtype == dtype and not path.requires_grad
    _, expected = aipo_path(given.numpy(), Denoising(), prior, lams=LAMS, **COMMON)
    np.testing.assert_array_equal(path.numpy(), expected)


def test_images_stay_images():
    prior = flow_prior(Glow, (1, 4, 4))
    Y = prior.sample(3, random_state=0)
    _, flat = aipo_path(Y, Denoising(), prior, lams=[0.1, 1.0], **COMMON)
    _, images = aipo_path(Y.reshape(3, 1, 4, 4), Denoising(), prior, lams=[0.1, 1.0], **COMMON)
    assert images.shape == (2, 3, 1, 4, 4)
    np.testing.assert_array_equal(images.reshape(flat.shape), flat)


BAD = {
    "empty": (dict(lams=[]), ValueError, "at least one lambda"),
    "none asked for": (dict(lams=0), ValueError, "at least 1"),
    "negative": (dict(lams=[1.0, -1.0]), ValueError, ">= 0"),
    "infinite": (dict(lams=[1.0, np.inf]), ValueError, "finite"),
    "text": (dict(lams=["1"]), TypeError, "real number"),
    "eps too large": (dict(lams=3, eps=1.0), ValueError, "eps"),
    "eps zero": (dict(lams=3, eps=0.0), ValueError, "eps"),
    "linear schedule": (dict(schedule="linear"), ValueError, "do not depend on the target"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_explained(case, prior, X, Y):
    params, error, message = BAD[case]
    with pytest.raises(error, match=message):
        aipo_path(Y, Denoising(), prior, **{**COMMON, **params})
    with pytest.raises(error, match=message):
        AIPORegressorCV(Denoising(), prior=prior, **{**COMMON, **params}).fit(Y, X)


def test_the_path_needs_a_fitted_prior(Y):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        aipo_path(Y, Denoising(), GaussianPrior())
    with pytest.raises(NotFittedError, match="no prior"):
        aipo_path(Y, Denoising(), None)


# Cross-validation, against GridSearchCV over single estimators

PROBLEMS = {
    "frozen flow": lambda: (flow_prior(Glow, (1, 4, 4)), CompressedSensing(8)),
    "given normal": lambda: (gaussian_prior(6), Denoising()),
    "unfitted normal": lambda: (GaussianPrior(), CompressedSensing(4)),
    "unfitted flow": lambda: (
        FlowPrior(n_steps=1, hidden_channels=4, max_epochs=1, random_state=0),
        Denoising(),
    ),
    "learnt operator": lambda: (gaussian_prior(6), LeastSquaresOperator()),
    "both learnt": lambda: (GaussianPrior(), LeastSquaresOperator()),
}


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "learnt operator"])
def test_it_chooses_what_grid_search_chooses(name, X, Y):
    prior, op = PROBLEMS[name]()
    if isinstance(prior, FlowPrior) and not isinstance(prior.flow, str):
        X = prior.sample(9, random_state=0)
        Y = X + SIGMA * np.random.default_rng(1).normal(size=X.shape)
    if isinstance(op, CompressedSensing):
        Y = op(X) + SIGMA * np.random.default_rng(2).normal(size=(len(X), op.n_measurements))
    params = dict(prior=prior, **COMMON)
    if name == "given normal":
        params["batch_size"] = 5
    lams, cv = [0.003, 1.0, 30.0], KFold(2, shuffle=True, random_state=0)
    search = AIPORegressorCV(op, lams=lams, cv=cv, **params).fit(Y, X)
    grid = GridSearchCV(
        AIPORegressor(op, schedule="geometric", **params),
        {"lam": lams},
        scoring=reconstruction_error_scorer,
        cv=cv,
        error_score="raise",
    ).fit(Y, X)
    assert search.lam_ == grid.best_params_["lam"]
    np.testing.assert_array_equal(search.lams_, lams)
    for key in (*(f"split{k}_test_score" for k in range(2)), "mean_test_score", "std_test_score"):
        np.testing.assert_allclose(
            search.cv_results_[key], grid.cv_results_[key], rtol=1e-10, atol=1e-10
        )
    np.testing.assert_array_equal(
        search.cv_results_["rank_test_score"], grid.cv_results_["rank_test_score"]
    )
    assert len(set(search.cv_results_["mean_test_score"])) == 3
    assert search.best_score_ == pytest.approx(grid.best_score_, rel=1e-10)
    # With one lambda there is no way to share: its predictions are the default's.
    alone = grid.best_estimator_.set_params(schedule="direct")
    np.testing.assert_array_equal(search.predict(Y), alone.predict(Y))


def test_digits_with_the_shipped_prior():
    X = load_digits_split()[1][:8]
    Y = X + 3 * np.random.default_rng(0).normal(size=X.shape)
    lams = [0.01, 0.3, 30.0]
    params = dict(
        prior=load_digits_prior("cpu"), noise=GaussianNoise(3.0), max_evals=12, space="latent"
    )
    search = AIPORegressorCV(Denoising(), lams=lams, cv=2, **params).fit(Y, X)
    single = AIPORegressor(Denoising(), schedule="geometric", **params)
    errors = [-reconstruction_error(X, single.set_params(lam=lam).predict(Y)) for lam in lams]
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], errors, rtol=1e-10)
    assert search.lam_ == lams[int(np.argmax(errors))]
    assert len(set(errors)) == 3


def test_errors_along_the_path(prior, X, Y):
    search = AIPORegressorCV(Denoising(), lams=LAMS, prior=prior, cv=3, **COMMON).fit(Y, X)
    assert search.mse_path_.shape == (len(LAMS), 3)
    np.testing.assert_array_equal(search.mse_path_.mean(1), -search.cv_results_["mean_test_score"])
    _, path = aipo_path(Y, Denoising(), prior, lams=LAMS, schedule="geometric", **COMMON)
    for k, (_, test) in enumerate(KFold(3).split(Y)):
        errors = [((x[test] - X[test]) ** 2).mean() for x in path]
        np.testing.assert_allclose(search.mse_path_[:, k], errors, rtol=1e-12)
    assert search.best_score_ == -search.mse_path_.mean(1).min()


SCORINGS = {
    "name": "neg_median_absolute_error",
    "r2": "r2",
    "callable": psnr_scorer,
    "made": make_scorer(mean_absolute_error, greater_is_better=False),
}


def test_scoring_is_scikit_learns(prior, X, Y):
    params = dict(prior=prior, **COMMON)
    single = AIPORegressor(Denoising(), schedule="geometric", **params)
    expected = [
        cross_validate(single.set_params(lam=lam), Y, X, cv=2, scoring=SCORINGS)
        for lam in LAMS[1:3]
    ]
    for name, scoring in SCORINGS.items():
        search = AIPORegressorCV(Denoising(), lams=LAMS[1:3], cv=2, scoring=scoring, **params)
        search.fit(Y, X)
        np.testing.assert_allclose(
            search.cv_results_["mean_test_score"],
            [scores[f"test_{name}"].mean() for scores in expected],
            rtol=1e-10,
        )
        # The errors are there whatever the score.
        assert search.mse_path_.shape == (2, 2)


def test_an_unknown_score_is_an_error(prior, X, Y):
    with pytest.raises(ValueError, match="scoring"):
        AIPORegressorCV(Denoising(), prior=prior, scoring="psrn", **COMMON).fit(Y, X)
    with pytest.raises(ValueError, match="scoring must be one scorer, .* For several use cross_"):
        AIPORegressorCV(Denoising(), prior=prior, scoring={"a": psnr_scorer}, **COMMON).fit(Y, X)


def test_without_clean_data_the_discrepancy_decides(prior, Y):
    lams = [1e-3, 10.0, 1e4]
    search = AIPORegressorCV(Denoising(), lams=lams, prior=prior, cv=2, **COMMON).fit(Y)
    assert not hasattr(search, "mse_path_")
    single = AIPORegressor(Denoising(), prior=prior, schedule="geometric", **COMMON)
    for lam, score in zip(lams, search.cv_results_["mean_test_score"], strict=True):
        expected = cross_val_score(
            single.set_params(lam=lam), Y, None, cv=2, scoring=discrepancy_scorer
        )
        assert score == pytest.approx(expected.mean(), rel=1e-10)
    assert search.lam_ == 10.0


def test_without_clean_data_the_noise_must_be_known(prior, Y):
    with pytest.raises(ValueError, match=r"noise=GaussianNoise\(sigma\).*got noise=None"):
        AIPORegressorCV(Denoising(), lams=LAMS, prior=prior, max_evals=24).fit(Y)


@pytest.mark.parametrize(
    "name, cv",
    [
        ("given normal", 2),
        ("unfitted normal", ShuffleSplit(2, test_size=0.5, random_state=0)),
        ("learnt operator", 2),
    ],
)
def test_the_mask_is_split_as_the_rows_are(name, cv, X, Y):
    prior, op = PROBLEMS[name]()
    if isinstance(op, CompressedSensing):
        op = Denoising()
    mask = ~np.isnan(drop_entries(Y))
    marked, hidden = np.where(mask, Y, np.nan), np.where(mask, Y, 1e3)
    model = AIPORegressorCV(op, lams=[0.1, 1.0], prior=prior, cv=cv, **{**COMMON, "max_evals": 8})
    expected = clone(model).fit(marked, X)
    found = clone(model).fit(hidden, X, mask=mask)
    np.testing.assert_array_equal(found.mse_path_, expected.mse_path_)
    np.testing.assert_array_equal(found.predict(hidden, mask=mask), expected.predict(marked))
    assert not np.array_equal(clone(model).fit(hidden, X).mse_path_, expected.mse_path_)
    if name == "learnt operator":
        with sklearn.config_context(enable_metadata_routing=True):
            scores = cross_validate(model, hidden, X, params=dict(mask=mask), cv=2)["test_score"]
        np.testing.assert_array_equal(scores, cross_val_score(model, marked, X, cv=2))


def test_a_path_takes_a_mask(prior, Y):
    mask = ~np.isnan(drop_entries(Y))
    marked, hidden = np.where(mask, Y, np.nan), np.where(mask, Y, 1e3)
    _, expected = aipo_path(marked, Denoising(), prior, lams=LAMS, **COMMON)
    _, found = aipo_path(hidden, Denoising(), prior, lams=LAMS, mask=mask, **COMMON)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(TypeError, match=r"pass lams=\[0.5\] in place of lam=0.5"):
        aipo_path(Y, Denoising(), prior, lam=0.5)


def test_predict_uses_the_chosen_lambda(prior, X, Y):
    search = AIPORegressorCV(Denoising(), lams=LAMS, prior=prior, cv=2, **COMMON).fit(Y, X)
    best = AIPORegressor(Denoising(), search.lam_, prior=prior, **COMMON)
    np.testing.assert_array_equal(search.predict(Y), best.predict(Y))
    assert search.reconstruct(Y).lam == search.lam_
    assert search.score(Y, X) == best.score(Y, X)
    assert search.lam_ not in (LAMS[0], LAMS[-1])


def test_it_costs_less_than_the_single_solves(X, Y):
    params = dict(prior=GaussianPrior(), **COMMON)
    search = AIPORegressorCV(Denoising(), lams=LAMS, cv=2, **params).fit(Y, X)
    single = AIPORegressor(Denoising(), schedule="geometric", **params)
    spent = np.zeros(len(LAMS))
    for train, test in KFold(2).split(Y):
        single.fit(Y[train], X[train])
        for k, lam in enumerate(LAMS):
            spent[k] += single.set_params(lam=lam).reconstruct(Y[test]).n_evals.sum()
    assert spent.max() < search.n_evals_ < 0.6 * spent.sum()


def test_folds_that_overlap(prior, X, Y):
    lams, cv = LAMS[1:3], ShuffleSplit(2, test_size=0.6, random_state=0)
    search = AIPORegressorCV(Denoising(), lams=lams, prior=prior, cv=cv, **COMMON).fit(Y, X)
    grid = GridSearchCV(
        AIPORegressor(Denoising(), prior=prior, schedule="geometric", **COMMON),
        {"lam": lams},
        scoring="neg_mean_squared_error",
        cv=list(cv.split(Y)),
        refit=False,
    ).fit(Y, X)
    for key in ("split0_test_score", "split1_test_score"):
        np.testing.assert_allclose(search.cv_results_[key], grid.cv_results_[key], rtol=1e-10)
    # One path serves all folds: each row is solved for once.
    params = dict(schedule="geometric", return_details=True, **COMMON)
    assert search.n_evals_ == aipo_path(Y, Denoising(), prior, lams=lams, **params)[-1]


def test_a_number_of_lambdas_and_zero(prior, X, Y):
    search = AIPORegressorCV(Denoising(), lams=3, eps=0.1, prior=prior, cv=2, **COMMON).fit(Y, X)
    np.testing.assert_allclose(search.lams_, [0.1, np.sqrt(0.1), 1.0], rtol=1e-12)
    search.set_params(lams=[0.0, 1.0]).fit(Y, X)
    assert search.lams_.tolist() == [0.0, 1.0]
    np.testing.assert_allclose(search.mse_path_[0].mean(), ((X - Y) ** 2).mean(), rtol=1e-12)


def test_ties_go_to_the_smaller_lambda(prior, X, Y):
    search = AIPORegressorCV(
        Denoising(), lams=LAMS, prior=prior, cv=2, scoring=lambda model, Y, y=None: 1.0, **COMMON
    ).fit(Y, X)
    assert search.lam_ == LAMS[0]


def test_tensors_and_lists_are_data(prior, X, Y):
    model = AIPORegressorCV(Denoising(), lams=LAMS[1:3], prior=prior, cv=2, **COMMON)
    expected = clone(model).fit(Y, X).cv_results_["mean_test_score"]
    for kind in (torch.tensor, lambda array: array.tolist()):
        search = clone(model).fit(kind(Y), kind(X))
        np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-12)
    assert isinstance(search.predict(torch.tensor(Y)), torch.Tensor)


def test_before_fit_there_is_no_lambda(prior, Y):
    model = AIPORegressorCV(Denoising(), prior=prior, **COMMON)
    for call in (model.predict, model.reconstruct, lambda Y: model.score(Y, Y)):
        with pytest.raises(NotFittedError, match="not chosen lambda yet"):
            call(Y)


def test_it_needs_measurements(prior):
    for args in ((None,), (prior,), (prior.flow_,)):
        with pytest.raises(TypeError, match=r"fit\(Y, X_clean\).*fit\(Y, prior=prior\)"):
            AIPORegressorCV(Denoising(), **COMMON).fit(*args)


def test_the_prior_may_be_given_to_fit(prior, X, Y):
    model = AIPORegressorCV(Denoising(), lams=LAMS, cv=2, **COMMON)
    given = clone(model).fit(Y, X, prior=prior)
    expected = clone(model).set_params(prior=prior).fit(Y, X)
    np.testing.assert_array_equal(given.mse_path_, expected.mse_path_)
    assert given.prior_ is prior


def test_a_refit_leaves_nothing_of_the_last(prior, X, Y):
    model = AIPORegressorCV(Denoising(), lams=[0.1, 1.0], prior=prior, cv=2, **COMMON).fit(Y, X)
    model.fit(Y)
    assert not hasattr(model, "mse_path_")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_lambda_without_a_score_is_not_chosen(prior, X, Y, bad):
    def score(estimator, Y, X):
        return bad if estimator.lam == 30.0 else -estimator.lam

    params = dict(lams=LAMS, prior=prior, cv=2, scoring=score, noise=GaussianNoise(SIGMA))
    search = AIPORegressorCV(Denoising(), max_evals=8, **params)
    with pytest.warns(UserWarning, match="not finite at lambda 30: .*It is not chosen from there"):
        search.fit(Y, X)
    assert search.lam_ == LAMS[0] and search.best_score_ == pytest.approx(-LAMS[0])
    assert search.cv_results_["rank_test_score"].tolist() == [1, 2, 3, 4]
    search.set_params(scoring=lambda estimator, Y, X: bad)
    with pytest.raises(ValueError, match="not finite at lambda 0.003, 0.1, 1, 30: .*leave such"):
        clone(search).fit(Y, X)


@pytest.mark.parametrize("schedule", [GeometricSchedule(), LatticeSchedule()])
def test_a_schedule_of_ones_own_predicts_as_its_name_does(prior, X, Y, schedule):
    name = {"GeometricSchedule": "geometric", "LatticeSchedule": "lattice"}[type(schedule).__name__]
    found, expected = (
        AIPORegressorCV(Denoising(), lams=LAMS, prior=prior, cv=2, schedule=s, **COMMON).fit(Y, X)
        for s in (schedule, name)
    )
    assert found.lam_ == expected.lam_
    np.testing.assert_array_equal(found.predict(Y), expected.predict(Y))


@pytest.mark.parametrize("space", ["image", "latent"])
@pytest.mark.parametrize("share", [0.9, 0.99])
def test_a_look_at_the_low_valley_is_of_the_budget(space, share):
    """Its start alone is some evaluations, and a large first stage leaves less than these."""
    prior = flow_prior(Glow, (1, 4, 4))
    Y = prior.sample(2, random_state=0)
    options = dict(prior=prior, noise=GaussianNoise(0.5), space=space, solver="adam", tol=0)
    _, _, (result,), _ = aipo_path(
        Y,
        Denoising(),
        lams=[0.5],
        max_evals=120,
        schedule=LatticeSchedule(share=share),
        smoothing=0,
        return_details=True,
        **options,
    )
    assert (result.n_evals <= 120).all()


def test_the_grid_follows_a_flow_whose_weights_change():
    # Without a noise model it is the data that have a scale.
    prior = flow_prior(Glow, (1, 4, 4))
    Y = prior.sample(2, random_state=0)
    before, _ = aipo_path(Y, Denoising(), prior, lams=2, max_evals=8)
    with torch.no_grad():
        prior.flow_.scale.data.mul_(10)
    fresh = FlowPrior(flow=copy.deepcopy(prior.flow_))
    after, _ = aipo_path(Y, Denoising(), prior, lams=2, max_evals=8)
    np.testing.assert_array_equal(after, aipo_path(Y, Denoising(), fresh, lams=2, max_evals=8)[0])
    assert after[-1] > 50 * before[-1]
    assert prior.flow_.typical_log_prob() == fresh.flow_.typical_log_prob()
