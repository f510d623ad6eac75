"""Every kind of bad input has its own message: what came, what was expected, how to fix it."""

import re

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from problems import gaussian_prior, random_flow
from sklearn.exceptions import NotFittedError

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
    aipo_path,
)
from skaipo.flows import Glow
from skaipo.metrics import ReconstructionScorer
from skaipo.noise import GaussianNoise
from skaipo.operators import (
    CompressedSensing,
    Denoising,
    Inpainting,
    LeastSquaresOperator,
    MatrixOperator,
)
from skaipo.solvers import (
    LBFGS,
    Adam,
    AdaptiveSchedule,
    DirectSchedule,
    GeometricSchedule,
    Hybrid,
    LatticeSchedule,
    LinearSchedule,
)

D, M = 6, 4
ESTIMATORS = [AIPORegressor, FixedLambdaMAP, AIPOTransformer]


@pytest.fixture(params=ESTIMATORS, ids=lambda e: e.__name__)
def build(request):
    """Build an estimator with a fitted prior, and whatever a test changes."""

    def make(**params):
        prior = GaussianPrior(np.zeros(D), np.eye(D))
        settings = dict(op=CompressedSensing(M), prior=prior, max_evals=20)
        return request.param(**{**settings, **params})

    return make


def call(model, Y):
    return model.transform(Y) if isinstance(model, AIPOTransformer) else model.predict(Y)


Y_GOOD = np.ones((3, M))


def altered(position, value):
    Y = Y_GOOD.copy()
    Y[position] = value
    return Y


@pytest.mark.parametrize(
    "Y, message",
    [
        (np.ones((3, M + 1)), r"Y has 5 columns, but CompressedSensing \(with a prior of 6 feat"),
        (altered((1, 2), np.inf), r"infinity"),
        (altered(1, np.nan), r"1 row\(s\) without a single measured value .* row 1"),
        (np.array([["a"] * M]), r"could not convert string|non-numeric|dtype"),
        (np.ones((0, M)), r"0 sample\(s\)"),
        (np.ones((3, M), dtype=np.float16), r"float16, which is too coarse .* float32 or float64"),
        (torch.ones(3, M, dtype=torch.float16), r"float16, which is too coarse"),
        (torch.full((3, M), torch.inf), r"contains infinity in 3 row\(s\)"),
        (np.ones((3, 2, M)), r"Y has shape \(3, 2, 4\), but .* expects \(n_samples, 4\)"),
        (np.ones(M), r"Expected 2D array, got 1D array instead"),
        (np.ones((3, M), dtype=complex), r"Complex data not supported"),
    ],
    ids=["width", "inf", "all_nan", "strings", "empty", "float16", "torch_float16", "torch_inf",
         "3d", "1d", "complex"],
)  # fmt: skip
def test_measurements(build, Y, message):
    with pytest.raises(ValueError, match=message):
        call(build(), Y)


def test_sparse_measurements(build):
    with pytest.raises(TypeError, match="[Ss]parse"):
        call(build(), sp.csr_array(Y_GOOD))


@pytest.mark.parametrize("lam", [-1.0, np.nan, np.inf])
def test_lam_out_of_range(build, lam):
    with pytest.raises(ValueError, match="lam must be finite and >= 0"):
        call(build(lam=lam), Y_GOOD)


@pytest.mark.parametrize("lam", ["1", None, True, [1.0]])
def test_lam_of_another_type(build, lam):
    with pytest.raises(TypeError, match="lam must be a real number >= 0, got"):
        call(build(lam=lam), Y_GOOD)


@pytest.mark.parametrize(
    "params, message",
    [
        (
            dict(solver="newton"),
            r"solver must be one of 'hybrid', 'lbfgs', 'adam', 'gd', got 'new",
        ),
        (dict(space="pixel"), r"space must be one of 'image', 'latent', got 'pixel'"),
        (dict(penalty="l2"), r"penalty must be one of 'density', 'latent', got 'l2'"),
        (dict(max_evals=0), r"max_evals must be an integer of at least 4, got 0"),
        (dict(max_evals=10.5), r"max_evals must be an integer"),
        (dict(batch_size=0), r"batch_size must be an integer of at least 1, got 0"),
        (dict(batch_size=True), r"batch_size must be an integer of at least 1, got True"),
        (dict(solver=LBFGS), r"solver must be one of 'hybrid', 'lbfgs', 'adam', 'gd', got <class"),
        (dict(n_starts=0), r"n_starts must be an integer of at least 1, got 0"),
        (
            dict(n_starts=5, max_evals=19),
            r"max_evals must be at least 4 for each of the n_starts",
        ),
        (dict(mle_solver="sgd"), r"mle_solver must be one of 'pgd', 'lbfgs', got 'sgd'"),
        (dict(tol=np.nan), r"tol must be a number >= 0, got nan"),
        (dict(tol=-1), r"tol must be a number >= 0, got -1"),
        (dict(op=None), r"needs a forward operator: pass op"),
        (dict(noise=GaussianNoise([1.0, 2.0])), r"2.*4|4.*2"),
        (dict(noise=GaussianNoise(-1.0)), r"sigma"),
        (dict(op=CompressedSensing(7)), r"n_measurements=7.* 6 features.*prior's"),
        (dict(op=MatrixOperator(np.ones((4, 5)))), r"measures images of 5 features.*prior's.*6"),
        (dict(op=Inpainting(np.ones(5, dtype=bool))), r"5.*6|6.*5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parameters(build, params, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(build(**params), Y_GOOD)


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(noise=0.1), r"GaussianNoise\(0.1\)"),
        (dict(op=Denoising), r"the class Denoising; did you mean Denoising\(\.\.\.\)"),
        (dict(op="blur"), r"op must be an operator"),
    ],
)
def test_parameters_of_another_type(build, params, message):
    with pytest.raises(TypeError, match=message):
        call(build(**params), Y_GOOD)


@pytest.mark.parametrize(
    "params",
    [
        dict(schedule=AdaptiveSchedule(first=0.0)),
        dict(schedule=AdaptiveSchedule(stage_evals=0)),
        dict(schedule=GeometricSchedule(n_stages=0)),
        dict(schedule=LinearSchedule(share=1.0)),
        dict(schedule=LatticeSchedule(span=1.0)),
        dict(solver=LBFGS(memory=0)),
        dict(solver=Hybrid(smooth=LBFGS(give_up=1.0))),
    ],
)
def test_parameters_of_solvers_and_schedules(params):
    (owner,) = params.values()
    owner = getattr(owner, "smooth", owner)
    model = AIPORegressor(Denoising(), prior=gaussian_prior(D), init="mle", **params)
    with pytest.raises(
        ValueError, match=rf"{type(owner).__name__} needs .*got {re.escape(repr(owner))}"
    ):
        model.predict(np.zeros((2, D)))


def test_numbers_beyond_the_precision_of_the_prior():
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4), dtype=torch.float32))
    Y = np.zeros((2, 16))
    Y[1, 0] = 1e39
    with pytest.raises(ValueError, match=r"values beyond 3.4e\+38, the largest number in float32"):
        AIPORegressor(Denoising(), prior=prior).predict(Y)
    with pytest.raises(ValueError, match=r"lam must be at most .* in float32, got 1e\+39"):
        AIPORegressor(Denoising(), 1e39, prior=prior).predict(Y[:1])


def test_rows_of_which_the_operator_measures_nothing():
    Y = np.ones((3, D))
    Y[1, :2] = np.nan
    op = Inpainting(np.arange(D) < 2)
    for model in (AIPORegressor(op, prior=gaussian_prior(D)), FixedLambdaMAP(op)):
        for call in ("fit", "predict"):
            with pytest.raises(ValueError, match=r"mask and the NaN in Y leave 1 row.*: row 1\."):
                model.set_params(prior=gaussian_prior(D))
                getattr(model, call)(Y)


def test_unknown_init():
    prior, op = GaussianPrior(np.zeros(D), np.eye(D)), CompressedSensing(M)
    message = "init must be one of 'auto', 'gaussian', 'mle', 'zero', 'random', got 'ones'"
    for model in (FixedLambdaMAP(op, prior=prior), AIPORegressor(op, prior=prior)):
        with pytest.raises(ValueError, match=message):
            model.set_params(init="ones").predict(Y_GOOD)


def test_unknown_schedule():
    model = AIPORegressor(CompressedSensing(M), prior=GaussianPrior(np.zeros(D), np.eye(D)))
    message = "schedule must be one of 'direct', 'linear', 'geometric', 'lattice', 'adaptive', got "
    for schedule in ("exponential", 3, None, LinearSchedule):
        with pytest.raises(ValueError, match=message):
            model.set_params(schedule=schedule).predict(Y_GOOD)


def test_no_prior(build):
    with pytest.raises(NotFittedError, match=r"no prior. Pass a fitted one, .* or fit\(prior\)"):
        call(build(prior=None), Y_GOOD)
    with pytest.raises(NotFittedError, match="has no prior"):
        build(prior=None).fit(Y_GOOD)


@pytest.mark.parametrize("prior", [FlowPrior(), GaussianPrior()], ids=["flow", "gaussian"])
def test_prior_that_is_not_fitted(build, prior):
    with pytest.raises(NotFittedError, match=r"prior of this \w+ is not fitted yet"):
        call(build(prior=prior), Y_GOOD)


@pytest.mark.parametrize("estimator", [AIPORegressor, FixedLambdaMAP])
def test_prior_that_is_not_fitted_and_nothing_to_fit_it_on(estimator):
    model = estimator(CompressedSensing(M), prior=GaussianPrior())
    with pytest.raises(ValueError, match=r"GaussianPrior is not fitted.*fit\(Y, X_clean\)"):
        model.fit(Y_GOOD)


def test_transformer_does_not_take_measurements_for_images():
    model = AIPOTransformer(CompressedSensing(M), prior=GaussianPrior())
    with pytest.raises(ValueError, match="what CompressedSensing measures are none"):
        model.fit(Y_GOOD, ["a", "b", "a"])


def test_two_priors(build):
    prior = GaussianPrior(np.zeros(D), np.eye(D))
    with pytest.raises(TypeError, match=r"two priors: pass it once"):
        build().fit(prior, prior=prior)


def test_what_is_no_prior(build):
    with pytest.raises(TypeError, match="prior must be a FlowPrior or GaussianPrior, got 3"):
        build().fit(prior=3)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            np.full((3, M), 0.25),
            r"mask must be boolean, or hold only 0 and 1 .*got dtype float64 .*0.25.*mask > 0.5",
        ),
        (np.full((3, M), 2), r"only 0 and 1 \(True: measured\), got dtype int64 .* such as 2"),
        (torch.full((3, M), torch.nan), r"got dtype torch.float32 .* such as nan.*np.isnan\(Y\)"),
        (np.full((3, M), "yes"), r"mask must be boolean, .* got dtype <U3"),
        (np.ones((2, M), dtype=bool), r"of the shape of Y, 3 rows of 4 values; got .*\(2, 4\)"),
        (np.ones(M, dtype=bool), r"got dtype bool of shape \(4,\).*np.broadcast_to\(mask, Y.shape"),
        # As many values, but in another order.
        (np.ones((3, 2, 2), dtype=bool), r"of the shape of Y.*got dtype bool of shape \(3, 2, 2\)"),
        (
            np.arange(3)[:, None] * np.ones((3, M)) == 1,
            r"mask leaves 2 row\(s\) without a single measured value: row 0, 2\.",
        ),
    ],
)
def test_mask(build, mask, message):
    with pytest.raises(ValueError, match=message):
        build().reconstruct(Y_GOOD, mask=mask)


@pytest.mark.parametrize("kind", [float, np.uint8, torch.tensor], ids=["float", "int", "torch"])
def test_mask_of_zeros_and_ones(build, kind):
    mask = np.array([[True, False, True, True], [True] * M, [False, True] * 2])
    given = torch.tensor(mask).int() if kind is torch.tensor else mask.astype(kind)
    want = build().reconstruct(np.where(mask, Y_GOOD, np.nan))
    for Y in (Y_GOOD, np.where(mask, Y_GOOD, 1e6)):
        got = build().reconstruct(Y, mask=given)
        np.testing.assert_array_equal(got.x, want.x)
        assert got.n_observed.tolist() == [3, 4, 2]


def test_width_differs_from_what_fit_saw():
    model = AIPORegressor(Denoising(), prior=GaussianPrior(np.zeros(D), np.eye(D)))
    model.fit(np.ones((3, D)))
    with pytest.raises(ValueError, match="X has 5 features, but AIPORegressor is expecting 6"):
        model.predict(np.ones((3, D - 1)))


def test_score_with_images_of_another_size():
    # (Steps too few to converge: the warning must not get lost in the error.)
    model = AIPORegressor(
        Denoising(),
        prior=GaussianPrior(np.zeros(D), np.eye(D)),
        solver="adam",
        schedule="linear",
        init="mle",
        max_evals=10,
    )
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="clean images of 6 features"):
        model.score(np.ones((3, D)), np.ones((3, D - 1)))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="y holds 2 images for 3 meas"):
        model.score(np.ones((3, D)), np.ones((2, D)))


@pytest.mark.parametrize(
    "make, name, meant",
    [
        (AIPORegressor, "max_eval", "max_evals"),
        (AIPORegressor, "alpha", "lam"),
        (AIPOTransformer, "lambda_", "lam"),
        (FixedLambdaMAP, "max_iter", "max_evals"),
        (AIPORegressorCV, "lam", "lams"),
        (FlowPrior, "epochs", "max_epochs"),
        (FlowPrior, "lr", "learning_rate"),
        (GaussianPrior, "cov", "covariance"),
        (CompressedSensing, "seed", "random_state"),
        (MatrixOperator, "matrix", "A"),
        (LeastSquaresOperator, "rigde", "ridge"),
        (GaussianNoise, "std", "sigma"),
        (GeometricSchedule, "stages", "n_stages"),
        (Adam, "learning_rat", "learning_rate"),
        (ReconstructionScorer, "range", "data_range"),
    ],
)
def test_misspelt_parameters(make, name, meant):
    message = f"^{make.__name__} has no parameter '{name}'. Did you mean '{meant}'.* It takes .*"
    with pytest.raises(TypeError, match=message + rf"\b{meant}\b"):
        make(**{name: 1})
    with pytest.raises(TypeError, match=rf"{make.__name__} has no parameter 'wxyz'\. It takes "):
        make(wxyz=1)


def test_too_many_parameters_by_position():
    message = r"AIPORegressor takes 2 by position \(op, lam\), got 3.* as in prior="
    with pytest.raises(TypeError, match=message):
        AIPORegressor(Denoising(), 1.0, GaussianPrior())
    with pytest.raises(TypeError, match="takes 3 by position .n_stages, share, tol., go"):
        LinearSchedule(1, 2, 3, 4)
    for make in (Denoising, DirectSchedule):
        with pytest.raises(TypeError, match=f"{make.__name__} takes 0 by position, got 1"):
            make(3)
        with pytest.raises(TypeError, match="no parameter 'x'. It takes no parameters."):
            make(x=3)


def test_misspelt_parameters_of_a_path():
    prior = GaussianPrior(np.zeros(D), np.eye(D))
    with pytest.raises(TypeError, match="no parameter 'max_eval'. Did you mean 'max_evals'"):
        aipo_path(np.ones((3, D)), Denoising(), prior, max_eval=10)


def test_subclasses_may_take_what_they_like():
    class Mine(AIPORegressor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args[1:], **{k: v for k, v in kwargs.items() if k != "extra"})

    assert Mine("first", Denoising(), lam=2.0, extra=1).lam == 2.0
    with pytest.raises(TypeError, match="^Renamed has no parameter 'prior'. It takes op."):
        type("Renamed", (AIPORegressor,), {"__init__": lambda self, op: None})(prior=1)


@pytest.mark.parametrize("prior", [FlowPrior(), GaussianPrior()], ids=["flow", "gaussian"])
def test_a_transformer_without_a_whole_row_to_train_on(prior):
    model = AIPOTransformer(Inpainting(), prior=prior)
    Y = np.ones((3, D))
    Y[:, 1] = np.nan
    message = r"all of these 3 have missing values. Pass a fitted prior, .*fit\(X_clean\)"
    with pytest.raises(ValueError, match=message):
        model.fit(Y)
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((3, D)), mask=~np.isnan(Y))
