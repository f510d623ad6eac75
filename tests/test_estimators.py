"""The estimators against closed forms, and the promises about rows, budgets and results."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from problems import covering, gaussian_prior, random_flow
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
    _reconstruct,
)
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.flows import Glow
from skaipo.metrics import (
    discrepancy_scorer,
    psnr_scorer,
    reconstruction_error,
    reconstruction_error_scorer,
)
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting, MatrixOperator
from skaipo.solvers import Adam, GeometricSchedule, LinearSchedule

D = 6
MASK = np.array([True, False, True, True, False, True])
OPERATORS = {
    "denoising": Denoising(),
    "compressed": CompressedSensing(4),
    "inpainting": Inpainting(MASK),
    "matrix": MatrixOperator(np.random.default_rng(5).normal(size=(8, D))),
}
STARTS = {
    "aipo": lambda *a, **k: AIPORegressor(*a, **k),
    "geometric": lambda *a, **k: AIPORegressor(*a, schedule="geometric", **k),
    "lattice": lambda *a, **k: AIPORegressor(*a, schedule="lattice", **k),
    "mle": lambda *a, **k: FixedLambdaMAP(*a, init="mle", **k),
    "zero": lambda *a, **k: FixedLambdaMAP(*a, init="zero", **k),
    "random": lambda *a, **k: FixedLambdaMAP(*a, init="random", random_state=0, **k),
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def measure(op, prior, n=5, sigma=0.3, seed=0):
    return GaussianNoise(sigma).add_noise(op(prior.sample(n, random_state=seed)), seed)


# ---------------------------------------------------------------------- against closed forms


@pytest.mark.parametrize(
    "op, start, way, noise",
    covering(
        OPERATORS, STARTS, [("adam", "image"), ("lbfgs", "latent")], [None, GaussianNoise(0.3)]
    ),
)
def test_closed_form_map(op, start, way, noise):
    prior, op = gaussian_prior(D), OPERATORS[op]
    Y = measure(op, prior)
    solver, space = way
    lam = 1.0 if noise else 2 * 0.3**2
    if solver == "adam" and start != "aipo":
        # Slow for Adam: from afar, or by a schedule whose last stage is short by design.
        solver = "lbfgs"
    model = STARTS[start](
        op, lam, prior=prior, noise=noise, solver=solver, space=space, max_evals=300, tol=1e-6
    )
    exact = prior.map_estimate(Y, op, noise, lam)
    assert np.abs(model.predict(Y) - exact).max() <= 1e-4 * np.abs(exact).max()


def test_missing_measurements_are_left_out():
    prior, op, noise = gaussian_prior(D), OPERATORS["matrix"], GaussianNoise(0.3)
    Y = measure(op, prior)
    Y[1, 2] = Y[1, 5] = Y[3, 0] = np.nan
    model = AIPORegressor(op, prior=prior, noise=noise, solver="lbfgs", max_evals=600, tol=1e-8)
    result = model.reconstruct(Y)
    np.testing.assert_allclose(result.x, prior.map_estimate(Y, op, noise), atol=1e-5)
    assert result.n_observed.tolist() == [8, 6, 8, 7, 8]
    # By a mask instead of NaN, whatever the values there.
    junk = np.where(np.isnan(Y), 1e30, Y)
    assert np.array_equal(model.reconstruct(junk, mask=~np.isnan(Y)).x, result.x)


def test_lambda_zero_is_the_most_probable_image_that_explains_the_measurements():
    prior, op = gaussian_prior(D), OPERATORS["compressed"]
    Y = measure(op, prior)
    for mle_solver in ("lbfgs", "pgd"):
        model = AIPORegressor(op, 0.0, prior=prior, mle_solver=mle_solver, max_evals=900, tol=1e-7)
        result = model.reconstruct(Y)
        np.testing.assert_allclose(result.x, prior.map_estimate(Y, op, None, 0.0), atol=1e-5)
        np.testing.assert_allclose(op(result.x), Y, atol=1e-10)
        assert (result.status == "converged").all()
    # At a fixed lambda of zero any image that explains them will do.
    for init in ("gaussian", "zero"):
        model = FixedLambdaMAP(op, 0.0, prior=prior, solver="hybrid", init=init, tol=1e-6)
        result = model.set_params(max_evals=40).reconstruct(Y)
        # (Its only gradient is zero, or rounding: no row need be called converged.)
        assert (result.status != "diverged").all()
        np.testing.assert_allclose(op(result.x), Y, atol=1e-6)


# ---------------------------------------------------------------------- what reconstruct tells


@pytest.mark.parametrize(
    "start, space, penalty", covering(STARTS, ["image", "latent"], ["density", "latent"])
)
def test_the_numbers_of_a_reconstruction_are_true(start, space, penalty):
    prior = FlowPrior(flow=random_flow())
    op, noise, lam = OPERATORS["compressed"], GaussianNoise(0.4), 0.7
    Y = measure(op, prior)
    settings = dict(prior=prior, noise=noise, space=space, penalty=penalty, solver="lbfgs")
    model = STARTS[start](op, lam, max_evals=24, **settings)
    result = model.reconstruct(Y, history=True)
    misfit = ((Y - op(result.x)) ** 2).sum(1) / (2 * 0.4**2)
    log_prob = prior.score_samples(result.x)
    z = prior.transform(result.x)
    value = -log_prob if penalty == "density" else 0.5 * (z**2).sum(1)
    np.testing.assert_allclose(result.misfit, misfit, rtol=1e-8)
    np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-8)
    np.testing.assert_allclose(result.objective, misfit + lam * value, rtol=1e-8)
    assert (result.n_evals <= 24).all() and result.lam == lam
    assert sum(result.counts().values()) == len(Y)
    for i in range(len(Y)):
        lams, values = result.lam_history[i], result.objective_history[i]
        steps = np.diff(lams)
        # The middle of the lattice is above: lambda falls.
        assert ((steps <= 0) if start == "lattice" else (steps >= 0)).all() and lams[-1] == lam
        # Never worse than what the last stage has seen.
        assert result.objective[i] <= values[lams == lam].min() + 1e-6 * abs(values).max()
    text = repr(result)
    assert "5 samples" in text and "lam=0.7" in text and "mean evaluations" in text


@pytest.mark.parametrize("start", STARTS)
def test_rows_called_converged_are_stationary(start):
    prior = FlowPrior(flow=random_flow(smooth=True))
    op, noise = OPERATORS["compressed"], GaussianNoise(0.4)
    Y = measure(op, prior, n=12)
    model = STARTS[start](
        op, 1.0, prior=prior, noise=noise, solver="lbfgs", max_evals=250, tol=1e-5
    )
    result = model.reconstruct(Y)
    x = torch.tensor(result.x, requires_grad=True)
    misfit = ((torch.tensor(Y) - op.bind((D,)).forward(x)) ** 2).sum() / (2 * 0.4**2)
    (data,) = torch.autograd.grad(misfit, x)
    (density,) = torch.autograd.grad(-prior.flow_.log_prob(x).sum(), x)
    relative = (data + density).norm(dim=1) / (data.norm(dim=1) + density.norm(dim=1))
    converged = result.status == "converged"
    assert converged.sum() >= 6
    assert (relative.numpy()[converged] <= 1.0001e-5).all()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("op", ["denoising", "compressed"])
def test_every_evaluation_is_counted(monkeypatch, start, op):
    """Against a count of the rows that go through the flow with a gradient."""
    prior, op = FlowPrior(flow=random_flow()), OPERATORS[op]
    Y = measure(op, prior, n=16)  # 16 rows: no padding
    flow, rows = prior.flow_, []
    original = type(flow)._normalize

    def counting(self, x):
        if torch.is_grad_enabled():
            rows.append(len(x))
        return original(self, x)

    monkeypatch.setattr(type(flow), "_normalize", counting)
    model = STARTS[start](op, prior=prior, max_evals=20, tol=0.0)
    # No row leaves a stage early, nor the start: padded batches would be counted in full.
    if start == "aipo":
        model.set_params(schedule=LinearSchedule(tol=0.0))
    if start == "geometric":
        model.set_params(schedule=GeometricSchedule(tol=0.0))
    result = model.reconstruct(Y)
    # Zero and random starts generate their image by one pass more, without a gradient.
    free = 16 if start in ("zero", "random") else 0
    assert result.n_evals.sum() == sum(rows) + free
    assert (result.n_evals <= 20).all()


@pytest.mark.parametrize("init", ["gaussian", "mle"])
def test_a_lattice_looks_at_a_small_lambda_before_it_goes_down(init):
    prior, op = FlowPrior(flow=random_flow()), OPERATORS["compressed"]
    Y = measure(op, prior, sigma=0.4)
    settings = dict(prior=prior, noise=GaussianNoise(0.4), init=init, schedule="lattice", tol=1e-12)
    result = AIPORegressor(op, 0.02, max_evals=120, **settings).reconstruct(Y, history=True)
    assert (result.n_evals <= 120).all()
    for lams in result.lam_history:
        stages = list(dict.fromkeys(lams.tolist()))
        assert stages[0] == 1 and stages[1] < 0.1 < stages[2] < 1


@pytest.mark.parametrize(
    "init, space, schedule, max_evals, n_starts",
    covering(
        ["gaussian", "mle"],
        ["image", "latent"],
        ["direct", "adaptive", "linear", "geometric", "lattice"],
        [4, 7],
        [1, 3],
    ),
)
def test_the_smallest_budgets_hold(init, space, schedule, max_evals, n_starts):
    prior, op = gaussian_prior(D), OPERATORS["compressed"]
    model = AIPORegressor(op, prior=prior, space=space, schedule=schedule, init=init)
    model.set_params(n_starts=n_starts, max_evals=n_starts * max_evals, tol=0.0)
    result = model.reconstruct(measure(op, prior))
    assert (result.n_evals <= n_starts * max_evals).all()


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    "op, start, way",
    [
        ("denoising", "aipo", ("adam", "image")),
        ("inpainting", "aipo", ("lbfgs", "latent")),
        ("inpainting", "geometric", ("adam", "image")),
        ("denoising", "lattice", ("lbfgs", "latent")),
        ("denoising", "mle", ("lbfgs", "latent")),
        ("inpainting", "mle", ("adam", "image")),
    ],
)
def test_rows_do_not_depend_on_each_other(op, start, way):
    """Bit for bit in float32: alone, in small and large batches, beside a poisoned row.

    (With convolutions. Of dense layers BLAS rounds odd and even rows differently.)
    """
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4), dtype=torch.float32))
    op = {"denoising": Denoising(), "inpainting": Inpainting(np.arange(16) % 3 > 0)}[op]
    Y = measure(op, prior, n=20)
    settings = dict(prior=prior, noise=GaussianNoise(0.3), solver=way[0], space=way[1])
    model = STARTS[start](op, max_evals=15, **settings)
    whole = model.reconstruct(Y)
    other = clone(model).set_params(batch_size=11).reconstruct(Y)
    assert np.array_equal(other.x, whole.x) and np.array_equal(other.status, whole.status)
    few = clone(model).set_params(batch_size=1).reconstruct(Y[[6, 19]])
    assert np.array_equal(few.x, whole.x[[6, 19]])
    assert np.array_equal(few.status, whole.status[[6, 19]])
    order = np.random.default_rng(0).permutation(len(Y))
    assert np.array_equal(model.reconstruct(Y[order]).x, whole.x[order])
    poisoned = Y.copy()
    poisoned[3], poisoned[9], poisoned[12, 2:] = 1e30, 0.0, np.nan
    rest = np.setdiff1d(np.arange(len(Y)), [3, 9, 12])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.reconstruct(poisoned)
    assert np.array_equal(result.x[rest], whole.x[rest])
    assert np.array_equal(result.objective[rest], whole.objective[rest])
    assert result.status[3] == "diverged"


class Cliff(Glow):
    """A flow that overflows beyond a radius."""

    def _normalize(self, x):
        z, log_det = super()._normalize(x)
        norm = x.flatten(1).norm(dim=1)
        return z, torch.where(norm > 6.0, torch.nan, log_det)


def test_a_row_that_becomes_non_finite_is_rolled_back():
    torch.manual_seed(0)
    flow = Cliff((D,), n_steps=2, hidden_channels=8).double()
    prior = FlowPrior(flow=flow)
    Y = np.random.default_rng(0).normal(size=(4, D))
    # Steps so long that they fall off the cliff at once.
    model = FixedLambdaMAP(
        Denoising(), prior=prior, solver=Adam(learning_rate=8.0), init="zero", max_evals=60
    )
    result = model.reconstruct(Y)
    assert np.isfinite(result.x).all() and np.isfinite(result.objective).all()
    assert (np.linalg.norm(result.x, axis=1) <= 6.0).all()
    start = model.set_params(max_evals=4).reconstruct(Y)
    assert (result.objective < start.objective).all()


def test_diverged_rows_are_counted_in_a_warning():
    prior = FlowPrior(flow=random_flow(dtype=torch.float32))
    Y = measure(Denoising(), prior)
    Y[[1, 3]] = 1e30
    model = AIPORegressor(Denoising(), prior=prior, max_evals=20)
    with pytest.warns(ConvergenceWarning, match="2 of 5 rows diverged"):
        result = model.reconstruct(Y)
    assert (result.status == "diverged").tolist() == [False, True, False, True, False]


def test_rows_that_run_out_of_budget_are_counted_in_a_warning():
    prior = gaussian_prior(D)
    model = AIPORegressor(
        OPERATORS["compressed"], prior=prior, solver="adam", schedule="linear", max_evals=12
    )
    Y = measure(OPERATORS["compressed"], prior)
    with pytest.warns(ConvergenceWarning, match=r"5 of 5 rows stopped .* with max_evals=12"):
        model.predict(Y)


DIGITS = {
    "glow": lambda: load_digits_prior("cpu"),
    "gaussian": lambda: GaussianPrior().fit(load_digits_split()[0]),
}


@pytest.mark.parametrize("name", DIGITS)
def test_wrong_units_that_converge_are_told(name):
    prior, clean = DIGITS[name](), load_digits_split()[1][:8]
    noise, op = GaussianNoise(2.0), Denoising()
    Y = noise.add_noise(clean, random_state=0)
    told = r"8 of 8 results are far from .* residuals of \d.* sigma, .* in the same units"
    model = AIPORegressor(op, prior=prior, noise=noise, max_evals=20)
    for wrong in (model.reconstruct, model.predict):
        with pytest.warns(UserWarning, match=told):
            wrong(Y * 255 / 16)
    # Most rows, not some: an odd one is told by its status or by its numbers.
    mixed = np.where(np.arange(8)[:, None] < 4, 255 / 16, 1.0) * Y
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*far from what")
        model.reconstruct(mixed)
        # Without the size of the noise, nothing is known of the residual's.
        clone(model).set_params(noise=None).reconstruct(Y * 255 / 16)


@pytest.mark.parametrize("name", DIGITS)
def test_right_units_are_not_told_off(name):
    prior, clean = DIGITS[name](), load_digits_split()[1][:8]
    model = AIPORegressor(prior=prior, max_evals=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("error", "(?s).*far from what")
        for op, sigma, several in (
            (Denoising(), 0.1, (dict(space="latent", penalty="latent"), dict(lam=1e-3))),
            (Denoising(), 3.0, (dict(init="mle"), dict())),
            (CompressedSensing(24), 0.1, (dict(lam=0.0), dict())),
        ):
            noise = GaussianNoise(sigma)
            Y = noise.add_noise(op(clean), random_state=0)
            for params in (*several, dict(lam=1e3), dict(max_evals=4, init="zero")):
                clone(model).set_params(op=op, noise=noise, **params).reconstruct(Y)


@pytest.mark.parametrize("name", DIGITS)
def test_clean_images_in_other_units_are_told(name):
    """What is compared with them would be scored by the units: a search's lambda, say."""
    prior, clean = DIGITS[name](), load_digits_split()[1][:8]
    Y = clean + np.random.default_rng(0).normal(0, 2.0, clean.shape)
    told = r"The clean images lie between 0 and .*, those of the prior between .* in these as well"
    for other in (clean / 16, clean / 16 * 255, torch.as_tensor(clean / 16)):
        measured = torch.as_tensor(Y) if isinstance(other, torch.Tensor) else Y
        with pytest.warns(UserWarning, match=told):
            AIPORegressor(Denoising(), prior=prior, max_evals=20).fit(measured, other)
        with pytest.warns(UserWarning, match=told), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            AIPORegressorCV(Denoising(), lams=[0.5], cv=2, prior=prior, max_evals=20).fit(
                measured, other
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Darker, or plain, is not other units; an unfitted prior learns which they are.
        for same in (clean, clean / 3, np.zeros_like(clean), clean.astype(int)):
            AIPORegressor(Denoising(), prior=prior, max_evals=20).fit(Y, same)
        AIPORegressor(Denoising(), prior=GaussianPrior(), max_evals=20).fit(Y / 16, clean / 16)
    # The prior's units are those of its weights as they are.
    with torch.no_grad():
        prior.flow_.scale.div_(16)
        prior.flow_.loc.div_(16)
    with pytest.warns(UserWarning, match=told):
        AIPORegressor(Denoising(), prior=prior, max_evals=20).fit(Y, clean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AIPORegressor(Denoising(), prior=prior, max_evals=20).fit(Y / 16, clean / 16)


# ---------------------------------------------------------------------- starts


def test_starts_share_the_budget_and_the_best_is_kept():
    """Row by row against runs of one start each, with the same share of the evaluations."""
    prior, op, noise = FlowPrior(flow=random_flow()), OPERATORS["compressed"], GaussianNoise(0.4)
    Y = measure(op, prior, n=12)
    options = dict(prior=prior, noise=noise, batch_size=7, random_state=3)
    result = AIPORegressor(op, n_starts=4, max_evals=43, **options).reconstruct(Y, history=True)
    assert (result.n_evals <= 43).all()
    singles = [
        AIPORegressor(op, init=init, max_evals=43 // 4, **options).reconstruct(Y)
        for init in ("gaussian", "zero", "mle", "random")
    ]
    values = np.stack([single.objective for single in singles])
    assert np.array_equal(result.objective, values.min(0))
    assert np.array_equal(result.n_evals, sum(single.n_evals for single in singles))
    winner = values.argmin(0)
    assert len(set(winner)) > 1, "no start is the best for all rows"
    for key in ("x", "misfit", "log_prob", "status"):
        stacked = np.stack([getattr(single, key) for single in singles])
        assert np.array_equal(getattr(result, key), stacked[winner, np.arange(12)])
    distance = [np.sqrt(((single.x - result.x) ** 2).mean(1)) for single in singles]
    np.testing.assert_allclose(result.disagreement, np.max(distance, axis=0), rtol=1e-12)
    for i, single in enumerate(singles):
        assert single.disagreement is None, i
    assert "median disagreement of starts" in repr(result)
    assert result.rows([2, 0]).disagreement.tolist() == result.disagreement[[2, 0]].tolist()


def test_random_starts_are_reproducible():
    prior, op = FlowPrior(flow=random_flow()), OPERATORS["compressed"]
    Y = measure(op, prior, n=3)
    model = AIPORegressor(op, prior=prior, n_starts=5, max_evals=25, random_state=0)
    first = model.reconstruct(Y)
    for other in (model, clone(model).set_params(batch_size=2)):
        again = other.reconstruct(Y)
        np.testing.assert_allclose(again.x, first.x, atol=1e-6)
        np.testing.assert_allclose(again.disagreement, first.disagreement, atol=1e-5)
    changed = clone(model).set_params(random_state=1).reconstruct(Y)
    assert not np.array_equal(changed.disagreement, first.disagreement)
    assert clone(model).set_params(random_state=None).__sklearn_tags__().non_deterministic
    assert not model.__sklearn_tags__().non_deterministic


def test_starts_agree_where_the_minimum_is_unique():
    prior, op, noise = gaussian_prior(D), OPERATORS["compressed"], GaussianNoise(0.3)
    Y = measure(op, prior)
    for cls in (AIPORegressor, FixedLambdaMAP):
        model = cls(op, prior=prior, noise=noise, n_starts=4, solver="hybrid", random_state=0)
        result = model.set_params(max_evals=400, tol=1e-7).reconstruct(Y)
        assert (result.status == "converged").all()
        assert (result.disagreement < 1e-5).all()
        np.testing.assert_allclose(result.x, prior.map_estimate(Y, op, noise), atol=1e-5)


def test_starts_disagree_where_there_are_two_minima():
    from test_theory import TwoModes  # two normal distributions around -2 and 2

    prior, noise = FlowPrior(flow=TwoModes()), GaussianNoise(1.5)
    Y = np.array([[-0.4], [0.1], [0.5]])
    # By descent, which stays in its valley: the first Newton steps may leap into the other.
    options = dict(n_starts=5, max_evals=300, random_state=1, solver="gd")
    model = AIPORegressor(Denoising(), prior=prior, noise=noise, **options)
    result = model.reconstruct(Y)
    assert (result.disagreement > 2).all() and (result.disagreement < 6).all()
    grid = np.linspace(-6, 6, 24001)[:, None]
    values = (Y - grid.T) ** 2 / (2 * 1.5**2) - prior.score_samples(grid)
    np.testing.assert_allclose(result.x[:, 0], grid[values.argmin(1), 0], atol=1e-2)
    np.testing.assert_allclose(result.objective, values.min(1), atol=1e-4)


class Squares(Denoising):
    """A user's operator that is not linear."""

    is_linear = False

    def forward(self, x):
        return x + 0.1 * x.square()


def starts_used(monkeypatch, model, Y):
    """The starts that reach the solver."""
    seen, inner = [], _reconstruct.solve_chunk

    def solve(problem, y, starts, params=None):
        seen.append((starts, problem.surrogate is not None))
        return inner(problem, y, starts, params)

    monkeypatch.setattr("skaipo.estimators._base.solve_chunk", solve)
    result = model.reconstruct(Y)
    return seen[0], result


@pytest.mark.parametrize("solver", ["hybrid", "lbfgs", "adam"])
def test_the_start_that_fits_the_operator(monkeypatch, solver):
    prior = gaussian_prior(D)
    for op, start in (
        (Denoising(), "gaussian"),
        (OPERATORS["matrix"], "gaussian"),
        (Squares(), "gaussian"),
    ):
        Y = measure(op, prior)
        model = AIPORegressor(
            op, prior=prior, noise=GaussianNoise(0.3), solver=solver, max_evals=60
        )
        (starts, has_surrogate), result = starts_used(monkeypatch, model, Y)
        assert starts == [start] and has_surrogate
        assert np.isfinite(result.x).all() and (result.status != "diverged").all()
        if not op.is_linear:
            # A minimum, by the plain formula.
            x = torch.tensor(result.x, requires_grad=True)
            residual = torch.tensor(Y) - x - 0.1 * x.square()
            value = residual.square().sum() / (2 * 0.3**2) - prior.flow_.log_prob(x).sum()
            (gradient,) = torch.autograd.grad(value, x)
            converged = result.status == "converged"
            assert converged.all() or solver == "adam"
            assert (gradient.norm(dim=1).numpy() < (5.0 if solver == "adam" else 0.1)).all()


# ---------------------------------------------------------------------- forms of input


def test_layouts_and_types():
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    op = Inpainting(np.random.default_rng(0).random((1, 4, 4)) < 0.6)
    X = prior.sample(3, random_state=0)
    model = AIPORegressor(op, prior=prior, max_evals=6)
    flat = model.predict(op(X))
    assert flat.shape == (3, 16) and flat.dtype == np.float64
    images = model.predict(op(X).reshape(3, 1, 4, 4))
    assert images.shape == (3, 1, 4, 4) and np.array_equal(images.reshape(3, 16), flat)
    assert model.predict(op(X).astype(np.float32)).dtype == np.float32
    assert np.array_equal(model.predict(pd.DataFrame(op(X))), flat)
    tensor = torch.tensor(op(X), requires_grad=True)
    out = model.predict(tensor)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float64 and not out.requires_grad
    assert np.array_equal(out.numpy(), flat)
    Y = op(X)
    before = Y.copy()
    model.predict(Y)
    assert np.array_equal(Y, before)


def test_random_start_is_reproducible_whatever_the_chunks():
    prior, op = FlowPrior(flow=random_flow()), OPERATORS["compressed"]
    Y = measure(op, prior, n=10)
    model = FixedLambdaMAP(op, prior=prior, init="random", random_state=3, max_evals=8)
    first = model.predict(Y)
    assert np.array_equal(first, model.set_params(batch_size=3).predict(Y))
    assert not np.array_equal(first, model.set_params(random_state=4).predict(Y))


def test_pickle():
    prior, op = FlowPrior(flow=random_flow()), OPERATORS["compressed"]
    Y = measure(op, prior)
    model = AIPORegressor(op, prior=prior, max_evals=10)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(Y), model.predict(Y))


# ---------------------------------------------------------------------- score and search


def test_score_is_r2_pooled_over_pixels():
    prior, op = gaussian_prior(D), OPERATORS["denoising"]
    X = prior.sample(20, random_state=0)
    X[:, 2] = 1.5  # a constant pixel, on which an average of R2 values breaks
    Y = GaussianNoise(0.3).add_noise(X)
    model = AIPORegressor(op, prior=prior, noise=GaussianNoise(0.3), max_evals=100)
    predicted = model.predict(Y)
    expected = 1 - ((X - predicted) ** 2).sum() / ((X - X.mean(0)) ** 2).sum()
    assert model.score(Y, X) == pytest.approx(expected, abs=1e-12)
    weight = np.arange(20.0)
    mean = np.average(X, axis=0, weights=weight)
    residual = (weight @ (X - predicted) ** 2).sum()
    total = (weight @ (X - mean) ** 2).sum()
    assert model.score(Y, X, weight) == pytest.approx(1 - residual / total, abs=1e-12)


@pytest.mark.parametrize("scoring", [reconstruction_error_scorer, psnr_scorer])
def test_grid_search_finds_the_best_lambda(scoring):
    prior, op, noise = gaussian_prior(D), OPERATORS["compressed"], GaussianNoise(0.5)
    X = prior.sample(40, random_state=1)
    Y = noise.add_noise(op(X))
    lams = [0.01, 1.0, 100.0]
    model = AIPORegressor(op, prior=prior, noise=noise, solver="lbfgs", space="latent")
    model.set_params(max_evals=60)
    search = GridSearchCV(model, {"lam": lams}, scoring=scoring, cv=2, refit=False).fit(Y, X)
    errors = [reconstruction_error(X, prior.map_estimate(Y, op, noise, lam)) for lam in lams]
    assert search.best_params_ == {"lam": lams[int(np.argmin(errors))]}


def test_grid_search_without_ground_truth():
    prior, op, noise = gaussian_prior(D), OPERATORS["matrix"], GaussianNoise(0.5)
    Y = noise.add_noise(op(prior.sample(40, random_state=1)))
    model = AIPORegressor(op, prior=prior, noise=noise, solver="lbfgs", space="latent")
    model.set_params(max_evals=60)
    lams = [0.001, 1.0, 1000.0]
    search = GridSearchCV(model, {"lam": lams}, scoring=discrepancy_scorer, cv=2, refit=False)
    # Not the smallest, which the bare residual would choose.
    assert search.fit(Y).best_params_ == {"lam": 1.0}


def test_fitting_trains_an_unfitted_prior():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 3))
    Y = X + 0.1 * rng.normal(size=X.shape)
    for prior in (GaussianPrior(), FlowPrior(n_steps=2, hidden_channels=4, max_epochs=1)):
        model = AIPORegressor(Denoising(), prior=prior, max_evals=8).fit(Y, X)
        assert model.prior is prior and model.prior_ is not prior
        assert model.predict(Y).shape == X.shape
        with pytest.raises(AttributeError):
            _ = prior.n_features_in_


def test_transformer_trains_its_prior_on_whole_rows_and_says_so():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3))
    holes = X.copy()
    holes[[2, 5, 5], [0, 1, 2]] = np.nan
    model = AIPOTransformer(Inpainting(), 1e-3, prior=GaussianPrior(), max_evals=200)
    with pytest.warns(UserWarning, match="2 of 40 rows have missing values and are left out"):
        model.fit(holes, ["label"] * 40)
    expected = GaussianPrior().fit(np.delete(X, [2, 5], axis=0))
    np.testing.assert_allclose(model.prior_.covariance_, expected.covariance_)
    filled = model.transform(holes)
    seen = ~np.isnan(holes)
    np.testing.assert_allclose(filled[seen], X[seen], atol=0.05)
    assert np.isfinite(filled).all()


@pytest.mark.parametrize(
    "prior, hint", [("glow", 'FlowPrior."glow".'), (GaussianPrior, "GaussianPrior.."), (3, "got 3")]
)
def test_what_is_no_prior(prior, hint):
    model, Y = AIPORegressor(Denoising(), prior=prior), np.zeros((2, D))
    for call in (lambda: model.predict(Y), lambda: model.fit(Y, Y)):
        with pytest.raises(TypeError, match=f"must be a FlowPrior or GaussianPrior.*{hint}"):
            call()
