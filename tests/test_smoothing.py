"""The smoothed density against closed forms and quadrature, and what is reported of it."""

import warnings

import numpy as np
import pytest
import torch
from problems import (
    any_flow,
    any_operator,
    drop_entries,
    gaussian_prior,
    make_objective,
    random_flow,
)
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from test_theory import TwoModes

from skaipo import AIPORegressor, AIPORegressorCV, FixedLambdaMAP, FlowPrior, aipo_path
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.flows import Glow
from skaipo.noise import GaussianNoise
from skaipo.objective import MAPObjective
from skaipo.operators import CompressedSensing, Denoising, Inpainting, PhaseRetrieval
from skaipo.solvers import (
    LBFGS,
    Adam,
    GradientDescent,
    Hybrid,
    LatticeSchedule,
    Method,
    TheorySchedule,
    minimize,
)

NOISE = GaussianNoise(0.4)


def smoothed(flow, smoothing, n=3, op="compressed"):
    """An objective that is smoothed, and a point to look at it from."""
    flow = any_flow(flow)
    op = any_operator(op, flow.n_features)
    m = op.bind(flow.event_shape).n_measurements_
    rng = np.random.default_rng(1)
    objective = make_objective(flow, op, NOISE, rng.normal(size=(n, m)))
    objective.smoothing = smoothing
    return objective, torch.as_tensor(rng.normal(size=(n, flow.n_features)))


# ------------------------------------------------------------------------------- one evaluation


def test_two_evaluations_see_opposite_noise():
    """Under a Gaussian the mean gradient of the two is that of the density, to rounding."""
    objective, x = smoothed("gaussian", 0.7)
    exact = objective.exactly().evaluate(x)
    assert objective.n_evals.tolist() == [1, 1, 1], "the counters are shared"
    objective.n_evals.zero_()
    first, second, third = (objective.evaluate(x) for _ in range(3))
    assert not torch.allclose(first.grad_prior, exact.grad_prior, rtol=0.01)
    assert not torch.allclose(first.grad_prior, third.grad_prior, rtol=0.01)
    torch.testing.assert_close((first.grad_prior + second.grad_prior) / 2, exact.grad_prior)
    # Nothing else is touched.
    for evaluation in (first, second, third):
        torch.testing.assert_close(evaluation.data, exact.data, rtol=0, atol=0)
        torch.testing.assert_close(evaluation.grad_data, exact.grad_data, rtol=0, atol=0)
        torch.testing.assert_close(evaluation.x, x, rtol=0, atol=0)


@pytest.mark.parametrize("flow", ["gaussian", "realnvp", "glow"])
def test_evaluations_are_unbiased(flow):
    scale = 0.3
    objective, x = smoothed(flow, scale)
    seen = [objective.evaluate(x) for _ in range(240)]
    # (Means of pairs, which do not depend on each other.)
    values = torch.stack([e.prior for e in seen]).numpy().reshape(120, 2, -1).mean(1)
    gradients = torch.stack([e.grad_prior for e in seen]).numpy()
    # Other noise, and autograd in place of the objective's own gradient.
    noise = scale * np.random.default_rng(5).normal(size=(2000, *x.shape))
    point = x.clone().requires_grad_()
    log_prob = objective.flow.log_prob((point + torch.as_tensor(noise)).flatten(0, 1))
    expected = -log_prob.reshape(2000, -1).detach().numpy()
    (gradient,) = torch.autograd.grad(-log_prob.mean() * len(x), point)
    error = values.std(0) / np.sqrt(120)
    other = np.hypot(error, expected.std(0) / np.sqrt(2000))
    assert (abs(values.mean(0) - expected.mean(0)) <= 5 * other).all()
    pairs = gradients.reshape(120, 2, *x.shape).mean(1)
    spread = pairs.std(0) / np.sqrt(120) + gradients.std(0) / np.sqrt(2000)
    assert (abs(pairs.mean(0) - gradient.numpy()) <= 5 * spread + 1e-9).all()
    if flow == "gaussian":
        precision = np.linalg.inv(gaussian_prior().covariance_)
        exact = objective.exactly().evaluate(x).prior.numpy() + scale**2 / 2 * np.trace(precision)
        assert (abs(values.mean(0) - exact) <= 5 * error).all()


def test_a_row_sees_what_its_own_count_says():
    objective, x = smoothed("realnvp", 0.5)
    alone = [objective.evaluate(x) for _ in range(6)]
    objective.n_evals.zero_()
    # One row runs ahead: the rest must see the same as before.
    ahead = torch.tensor([1])
    for k in range(3):
        again = objective.evaluate(x[ahead], ahead)
        torch.testing.assert_close(again.prior, alone[k].prior[ahead], rtol=1e-12, atol=0)
    mixed = objective.evaluate(x)
    expected = torch.stack([alone[k].prior[i] for i, k in enumerate((0, 3, 0))])
    torch.testing.assert_close(mixed.prior, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------ the result


class Spike(TwoModes):
    """A broad distribution with a narrow peak on its flank."""

    weights, means, width = (0.92, 0.08), (0.0, 1.5), (1.0, 0.08)


def test_a_peak_finer_than_the_smoothing_is_not_fallen_for():
    """Against the smoothed objective by quadrature, on a grid."""
    prior, noise, scale = FlowPrior(flow=Spike()), GaussianNoise(0.7), 0.3
    Y = np.array([[1.2], [1.5], [-0.5]])
    grid = np.linspace(-4, 4, 4001)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    around = grid[:, None] + scale * nodes
    log_prob = prior.score_samples(around.reshape(-1, 1)).reshape(around.shape)
    misfit = (Y - grid) ** 2 / (2 * 0.7**2)
    smooth = misfit - log_prob @ weights / weights.sum()
    exact = misfit - prior.score_samples(grid[:, None])
    # Without smoothing two of the three end in the peak, which holds 8 % of the probability.
    assert (abs(grid[exact.argmin(1)] - 1.5) < 0.02).tolist() == [True, True, False]

    def excess(x):
        at = [np.interp(one, grid, row) for one, row in zip(x, smooth, strict=True)]
        return np.array(at) - smooth.min(1)

    assert (excess(grid[exact.argmin(1)])[:2] > [0.2, 0.05]).all()
    model = AIPORegressor(Denoising(), prior=prior, noise=noise, smoothing=scale)
    for solver, max_evals in (("adam", 600), ("hybrid", 800)):
        x = model.set_params(solver=solver, max_evals=max_evals).predict(Y)[:, 0]
        assert excess(x).max() < 0.01
        assert x[0] < 1.2 and x[1] < 1.35


def images(n=6):
    """A prior of small images, and measurements of its samples with missing entries."""
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    op = Inpainting()
    return prior, op, drop_entries(op(prior.sample(n, random_state=2)))


STARTS = {
    "direct": (AIPORegressor, {}),
    "adam": (AIPORegressor, dict(solver="adam", schedule="linear", init="mle")),
    "paper": (FixedLambdaMAP, dict(init="zero")),
    "lattice": (AIPORegressor, dict(schedule="lattice")),
    "geometric": (AIPORegressor, dict(schedule="geometric")),
    "several": (AIPORegressor, dict(n_starts=4)),
    "no linear operator": (AIPORegressor, dict(op=PhaseRetrieval(np.eye(16)[::2]))),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_numbers_of_a_reconstruction_are_those_of_the_exact_objective(name):
    prior, op, Y = images()
    estimator, params = STARTS[name]
    params = dict(op=op, prior=prior, noise=NOISE, max_evals=32, random_state=0) | params
    if "op" in STARTS[name][1]:
        Y = params["op"](prior.sample(6, random_state=2))
    model = estimator(lam=0.7, smoothing=0.2, **params)
    result = model.reconstruct(Y, history=True)
    clean = params["op"](result.x)
    misfit = np.nansum((Y - clean) ** 2, axis=1) / (2 * 0.4**2)
    log_prob = prior.score_samples(result.x)
    np.testing.assert_allclose(result.misfit, misfit, rtol=1e-6)
    np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-6)
    np.testing.assert_allclose(result.objective, misfit - 0.7 * log_prob, rtol=1e-6)
    assert (result.n_evals <= 32).all()
    # A gradient with noise in it vanishes nowhere.
    assert not np.isin(result.status, ["converged", "diverged"]).any()
    again = model.reconstruct(Y)
    assert np.array_equal(result.x, again.x)
    exact = estimator(lam=0.7, **params).reconstruct(Y)
    assert not np.allclose(exact.x, result.x, atol=1e-4), "it is another objective"


def test_every_evaluation_is_counted(monkeypatch):
    prior, op, Y = images(n=8)  # 8 rows: no padding
    evaluator, rows = prior.flow_.compile_for_inference(), []
    original = type(evaluator).linearize

    def counting(self, x):
        rows.append(len(x))
        return original(self, x)

    monkeypatch.setattr(type(evaluator), "linearize", counting)
    result = AIPORegressor(op, prior=prior, noise=NOISE, smoothing=0.2, max_evals=40).reconstruct(Y)
    assert sum(rows) == result.n_evals.sum() == 40 * 8
    rows.clear()
    *_, n_evals = aipo_path(
        Y,
        op,
        prior,
        lams=[0.1, 2.0],
        noise=NOISE,
        smoothing=0.2,
        max_evals=80,
        return_details=True,
    )
    assert sum(rows) == n_evals


@pytest.mark.parametrize("n_starts, max_evals, lam", [(1, 4, 0.7), (1, 13, 0.0), (2, 16, 0.7)])
@pytest.mark.parametrize("name", STARTS)
def test_the_budget_holds_whatever_the_start(name, n_starts, max_evals, lam):
    prior, op, Y = images(n=3)
    estimator, params = STARTS[name]
    params = dict(op=op, prior=prior, noise=NOISE, random_state=0) | params
    if "op" in STARTS[name][1]:
        Y = params["op"](prior.sample(3, random_state=2))
    params |= dict(n_starts=n_starts, max_evals=max_evals, smoothing=0.2)
    result = estimator(lam=lam, **params).reconstruct(Y)
    assert (result.n_evals <= max_evals).all() and np.isfinite(result.x).all()
    if n_starts == 1:
        assert result.disagreement is None


def test_several_starts_are_compared_by_the_smoothed_objective():
    """With steps that lead nowhere: one of the starts is taken as it is."""
    model = AIPORegressor(
        Denoising(),
        prior=FlowPrior(flow=Spike()),
        noise=GaussianNoise(0.7),
        solver=GradientDescent(lipschitz=1e9),
        schedule="direct",
        n_starts=3,
        max_evals=36,
    )
    Y = np.array([[1.5]])
    # By the exact objective the measurement wins, which is in the peak.
    exact = model.set_params(smoothing=0).reconstruct(Y)
    assert exact.x[0, 0] == pytest.approx(1.5, abs=1e-3)
    several = model.set_params(smoothing=2.5).reconstruct(Y)
    assert several.x[0, 0] < 1.2
    assert (several.n_evals <= 36).all()


def test_no_row_is_left_with_a_budget_to_spend():
    """L-BFGS hands over what the noise makes it give up, at whatever stage."""
    prior, op, _ = images()
    Y = drop_entries(op(prior.sample(48, random_state=5)))
    model = AIPORegressor(op, 0.1, prior=prior, noise=GaussianNoise(0.1), smoothing=0.2)
    for schedule, max_evals in (("lattice", 121), ("direct", 60)):
        result = model.set_params(schedule=schedule, max_evals=max_evals).reconstruct(Y)
        assert (result.status == "budget").all()
        if schedule == "direct":
            assert (result.n_evals == 60).all()


def test_the_lattice_does_not_depend_on_smoothing(monkeypatch):
    prior, op, Y = images()
    seen = []
    original = LatticeSchedule.lattice

    def recording(self, objective, max_evals):
        seen.append(max_evals)
        return original(self, objective, max_evals)

    monkeypatch.setattr(LatticeSchedule, "lattice", recording)
    AIPORegressor(
        op, prior=prior, noise=NOISE, smoothing=0.3, schedule="lattice", max_evals=60
    ).reconstruct(Y)
    assert set(seen) == {60}


def test_what_has_run_away_is_not_returned():
    prior = gaussian_prior()
    Y = prior.sample(3, random_state=0)
    model = AIPORegressor(
        Denoising(),
        prior=prior,
        noise=NOISE,
        smoothing=0.1,
        solver=GradientDescent(lipschitz=3.0),
        max_evals=200,
    )
    exact = clone(model).set_params(smoothing=0).reconstruct(Y)
    assert (model.reconstruct(Y).objective < exact.objective + 200).all()


def image_rows():
    prior, op, Y = images(n=7)
    return AIPORegressor(op, prior=prior, noise=NOISE, smoothing=0.3, max_evals=30), Y


def digit_rows():
    """Some of them go over from the exact density to averages."""
    prior, noise, Y = digits(n=7)
    solver = Hybrid(LBFGS(give_up=0.02))
    return AIPORegressor(Denoising(), prior=prior, noise=noise, solver=solver, max_evals=24), Y


@pytest.mark.parametrize("case", [image_rows, digit_rows])
def test_rows_do_not_depend_on_each_other(case):
    model, Y = case()
    together = model.reconstruct(Y)
    others = np.arange(7) != 3
    for poison in (np.nan, 1e30, 7.0):
        beside = Y.copy()
        beside[3, 1:] = poison
        beside[3, 0] = 0.0 if np.isnan(poison) else poison
        assert np.array_equal(model.reconstruct(beside).x[others], together.x[others])
    assert np.array_equal(model.set_params(batch_size=3).reconstruct(Y).x, together.x)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    prior, op, Y = images()
    model = AIPORegressor(op, prior=prior, noise=NOISE, smoothing=0.3, max_evals=40, batch_size=2)
    whole = model.reconstruct(Y, checkpoint=tmp_path)
    chunk = sorted(tmp_path.glob("chunk-*.npz"))[1]
    chunk.unlink()
    again = model.reconstruct(Y, checkpoint=tmp_path)
    assert chunk.exists()
    assert np.array_equal(again.x, whole.x) and np.array_equal(again.objective, whole.objective)
    assert again.smoothed.all() and len(again.smoothed) == len(Y)


def test_an_operator_of_each_row():
    """As if each row were solved for by itself, with its own operator."""
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    X = prior.sample(2, random_state=2)
    masks = np.random.default_rng(0).random(X.shape) < 0.7
    params = dict(prior=prior, noise=NOISE, smoothing=0.3, max_evals=30)
    together = AIPORegressor(Inpainting(), **params).reconstruct(X, op_params=masks)
    for i, mask in enumerate(masks):
        alone = AIPORegressor(Inpainting(), **params).reconstruct(X[[i]], op_params=mask[None])
        np.testing.assert_array_equal(together.x[i], alone.x[0])
        clean = AIPORegressor(Inpainting(mask), **params).reconstruct(X[[i]])
        np.testing.assert_allclose(together.objective[i], clean.objective[0], rtol=0.05)


class OneWay(TwoModes):
    """A flow that cannot sample."""

    has_inverse = False

    def _generate(self, z):
        raise AssertionError("there is no direction from latents to data")


def test_a_flow_without_inverse():
    Y = np.array([[1.4], [-2.3]])
    both = FlowPrior(flow=TwoModes())
    results = [
        AIPORegressor(
            Denoising(), prior=prior, noise=NOISE, smoothing=0.1, max_evals=150
        ).reconstruct(Y)
        for prior in (both, FlowPrior(flow=OneWay()).fit(both.sample(200, random_state=0)))
    ]
    np.testing.assert_allclose(results[0].x, results[1].x, atol=0.02)


@pytest.mark.parametrize("schedule", ["lattice", "geometric"])
def test_a_point_of_the_path_is_the_single_solve(schedule):
    prior, op, Y = images()
    params = dict(prior=prior, noise=NOISE, schedule=schedule, smoothing=0.3, max_evals=60)
    lams, path, results, _ = aipo_path(Y, op, lams=[0.02, 0.5, 30.0], return_details=True, **params)
    for lam, x, result in zip(lams, path, results, strict=True):
        single = AIPORegressor(op, float(lam), **params).reconstruct(Y)
        assert np.array_equal(x, single.x)
        assert np.array_equal(result.n_evals, single.n_evals)


def test_at_lambda_zero_there_is_nothing_to_smooth():
    prior, op, Y = images()
    params = dict(prior=prior, noise=NOISE, max_evals=120)
    exact = AIPORegressor(op, 0.0, **params).reconstruct(Y)
    result = AIPORegressor(op, 0.0, smoothing=0.3, **params).reconstruct(Y)
    # (One evaluation less is left for the search.)
    np.testing.assert_allclose(result.misfit, 0, atol=1e-6)
    np.testing.assert_allclose(result.log_prob, exact.log_prob, rtol=0.02)
    assert (result.status == "converged").any()
    # Where lambda does not move the density does not count at all.
    params = dict(prior=prior, noise=NOISE, solver="hybrid", init="zero", max_evals=60)
    exact = FixedLambdaMAP(op, 0.0, **params).reconstruct(Y)
    result = FixedLambdaMAP(op, 0.0, smoothing=0.3, **params).reconstruct(Y)
    assert np.array_equal(result.x, exact.x) and np.array_equal(result.status, exact.status)


def test_no_warning_of_what_is_always_so(recwarn):
    prior, op, Y = images()
    model = AIPORegressor(op, prior=prior, noise=GaussianNoise(2.0), smoothing=0.3, max_evals=60)
    model.predict(Y)
    assert not [str(w.message) for w in recwarn]
    # L-BFGS alone takes the noise for the end of the way.
    with pytest.warns(ConvergenceWarning, match=r"6 of 6 rows stalled.*solver='hybrid'"):
        model.set_params(solver="lbfgs", max_evals=2000).predict(Y)


def test_lambda_is_chosen_for_the_smoothed_objective():
    prior, op, Y = images(n=10)
    X = prior.sample(10, random_state=2)
    search = AIPORegressorCV(
        op, lams=[0.1, 1.0], prior=prior, noise=NOISE, smoothing=0.3, max_evals=40, cv=2
    ).fit(Y, X)
    one = AIPORegressor(op, search.lam_, prior=prior, noise=NOISE, smoothing=0.3, max_evals=40)
    assert np.array_equal(search.predict(Y), one.predict(Y))


# ------------------------------------------------------- where the objective is rough: "auto"


class Rough(Adam):
    """Adam that calls every row rough, from the first step."""

    def rough_rows(self, memory, like):
        return torch.ones_like(like, dtype=torch.bool)


def digits(n):
    clean = load_digits_split()[1][:n]
    noise = GaussianNoise(3.0)
    return load_digits_prior(), noise, noise.add_noise(clean, random_state=0)


@pytest.mark.parametrize("schedule", ["direct", "lattice"])
def test_auto_is_exact_where_rows_converge_and_told_exactly_elsewhere(schedule):
    prior, noise = FlowPrior(flow=Spike(), dequantize=0.6), GaussianNoise(0.7)
    Y = np.linspace(-3, 3, 48)[:, None]
    params = dict(prior=prior, noise=noise, max_evals=120, schedule=schedule)
    result = AIPORegressor(Denoising(), **params).reconstruct(Y)
    exact = AIPORegressor(Denoising(), smoothing=0, **params).reconstruct(Y)
    assert (result.n_evals <= 120).all()
    converged, short = result.status == "converged", result.status == "budget"
    assert converged.sum() >= 40 and short.sum() >= 2, "on its flank the peak is rough"
    np.testing.assert_array_equal(result.x[converged], exact.x[converged])
    assert (np.abs(result.x - exact.x)[short] > 0.01).sum() >= 2, "it is another objective"
    misfit = ((Y - result.x) ** 2).sum(1) / (2 * 0.7**2)
    log_prob = prior.score_samples(result.x)
    np.testing.assert_allclose(result.log_prob, log_prob, rtol=1e-5)
    np.testing.assert_allclose(result.objective, misfit - log_prob, rtol=1e-5)


def test_auto_averages_over_half_a_level():
    """As with that number for all rows, where all of them are rough."""
    settings = dict(noise=GaussianNoise(0.7), solver=Rough(), max_evals=600)
    Y = np.array([[1.2], [1.5], [-0.5]])
    prior = FlowPrior(flow=Spike(), dequantize=0.6)
    auto = AIPORegressor(Denoising(), prior=prior, **settings)
    number = clone(auto).set_params(smoothing=0.3).reconstruct(Y)
    exact = clone(auto).set_params(smoothing=0).reconstruct(Y)
    result = auto.reconstruct(Y)
    np.testing.assert_allclose(result.x, number.x, atol=0.05)
    assert np.abs(result.x - exact.x)[:2].min() > 0.15
    assert (result.n_evals == 600).all()


@pytest.mark.parametrize(
    "params, prior_params",
    [
        ({}, dict(dequantize=None)),
        ({}, {}),  # "auto": a wrapped flow does not tell
        (dict(penalty="latent"), dict(dequantize=0.6)),
        (dict(schedule="adaptive"), dict(dequantize=0.6)),
        (dict(schedule="geometric"), dict(dequantize=0.6)),
        (dict(schedule="linear"), dict(dequantize=0.6)),
        (dict(solver=Hybrid(rough=LBFGS())), dict(dequantize=0.6)),
        (dict(solver="adam"), dict(dequantize=0.6)),
    ],
)
def test_auto_is_exact_otherwise(params, prior_params):
    prior = FlowPrior(flow=Spike(), **prior_params)
    settings = dict(prior=prior, noise=GaussianNoise(0.7), solver=Rough(), max_evals=24) | params
    Y = np.array([[1.2], [1.5], [-0.5]])
    results = [
        AIPORegressor(Denoising(), smoothing=smoothing, **settings).reconstruct(Y)
        for smoothing in ("auto", 0)
    ]
    np.testing.assert_array_equal(results[0].x, results[1].x)
    np.testing.assert_array_equal(results[0].n_evals, results[1].n_evals)


def test_priors_keep_the_width_of_a_level(tmp_path):
    prior = load_digits_prior()
    assert prior.dequantize_width == prior.freeze().dequantize_width == 1.0
    wrapped = FlowPrior(flow=random_flow(Glow, (1, 4, 4)), dequantize=0.5)
    assert clone(wrapped).dequantize_width == wrapped.freeze().dequantize_width == 0.5
    wrapped.save(tmp_path / "prior.safetensors")
    assert FlowPrior.load(tmp_path / "prior.safetensors").dequantize_width == 0.5
    # Another flow, of which nothing is known.
    assert prior.set_params(flow=random_flow(Glow, (1, 8, 8))).dequantize_width == 0
    assert gaussian_prior().dequantize_width == 0


def test_auto_evaluates_as_often_as_it_says(monkeypatch):
    prior, noise, Y = digits(n=8)  # 8 rows: no padding
    rows = []
    original = MAPObjective.evaluate

    def counting(self, u, *args):
        rows.append(len(u))
        return original(self, u, *args)

    monkeypatch.setattr(MAPObjective, "evaluate", counting)
    solver = Hybrid(smooth=LBFGS(give_up=0.02))
    for max_evals in (4, 5, 12, 41):
        rows.clear()
        model = AIPORegressor(
            Denoising(), prior=prior, noise=noise, solver=solver, max_evals=max_evals
        )
        result = model.reconstruct(Y)
        assert sum(rows) == result.n_evals.sum()
        assert (result.n_evals <= max_evals).all()


class RoughFrom(Hybrid):
    """Hands the rows below 1 over at once, and the others never."""

    def start(self, objective, u, evaluation, lam):
        memory = super().start(objective, u, evaluation, lam)
        memory["changed"] = objective.y[:, 0] < 1
        return memory


def test_rows_that_are_averaged_are_marked_and_counted():
    prior = FlowPrior(flow=Spike(), dequantize=0.6)
    Y = np.array([[1.2], [-0.5], [1.5], [0.3], [-0.2]])
    settings = dict(noise=GaussianNoise(0.7), prior=prior, solver=RoughFrom(), max_evals=12)
    model = AIPORegressor(Denoising(), batch_size=2, **settings)
    sentence = "too rough for L-BFGS: they are solved by its average"
    for params, marks, said in (
        ({}, [0, 1, 0, 1, 1], f"In 3 of the 5 the density is {sentence}"),
        (dict(n_starts=2, max_evals=24), [0, 1, 0, 1, 1], "In 3 of the 5"),
        (dict(smoothing=0), [0] * 5, None),
        (dict(smoothing=0.3), [1] * 5, None),
        (dict(smoothing=0.3, lam=0), [0] * 5, None),
    ):
        changed = clone(model).set_params(**params)
        result = changed.reconstruct(Y)
        assert result.smoothed.tolist() == marks, params
        assert not (result.smoothed & (result.status == "converged")).any()
        assert result.rows([3, 0]).smoothed.tolist() == [marks[3], marks[0]]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ConvergenceWarning)
            changed.predict(Y)
        text = " ".join(str(warning.message) for warning in seen)
        assert said in text if said else "too rough" not in text, params
        # That more evaluations will do is said where a row could converge.
        left = ~result.smoothed & np.isin(result.status, ["budget", "stalled"])
        assert ("Raise max_evals" in text) == left.any(), params
    # Along a path all three lambdas, of which the search chooses one.
    search = AIPORegressorCV(
        Denoising(), lams=[0.5, 1.0, 2.0], cv=5, schedule="lattice", **settings
    )
    with pytest.warns(ConvergenceWarning, match=f"In 9 of the .* the density is {sentence}"):
        search.fit(Y, Y)


class Scripted(Method):
    """Goes through given values of a single pixel; from a given step on it calls a row rough."""

    def __init__(self, ways, rough_from):
        self.ways, self.rough_from = torch.as_tensor(ways), torch.as_tensor(rough_from)

    def start(self, objective, u, evaluation, lam):
        return dict(way=torch.arange(len(u)), step=torch.zeros(len(u), dtype=torch.long))

    def propose(self, memory, u, evaluation, lam, progress):
        memory["step"] = memory["step"] + 1
        return self.ways[memory["way"], memory["step"]][:, None].to(u)

    def update(self, memory, u, evaluation, trial, trial_evaluation, lam, ok):
        return ok

    def rough_rows(self, memory, like):
        return memory["step"] >= self.rough_from[memory["way"]]


def scripted(ways, rough_from, max_evals):
    """What :func:`minimize` makes of such rows, under a misfit of ``x^2 / 2`` and little else."""
    flow, op = gaussian_prior(1).flow_, Denoising()
    objective = make_objective(flow, op, GaussianNoise(1.0), np.zeros((len(ways), 1)))
    objective.smoothing, objective.rough_only = 1e-3, True
    u = torch.as_tensor([[way[0]] for way in ways], dtype=torch.float64)
    lam = torch.full((len(ways),), 1e-3, dtype=torch.float64)
    method = Scripted(ways, rough_from)
    return minimize(objective, u, lam, method, max_evals=max_evals, tol=0.0), objective.n_evals


def test_what_runs_away_does_so_with_and_without_neighbours():
    """The guard knows how low the row was before it was averaged, and asks no other row."""
    runs_away, quiet = [100.0, 1.0, 0.5, 0.4, *[60.0] * 6], [10.0, *[5.0] * 9]
    alone, _ = scripted([runs_away], [4], max_evals=8)
    beside, _ = scripted([runs_away, quiet], [4, 1], max_evals=8)
    np.testing.assert_allclose(alone.u.ravel(), [0.4], rtol=1e-6)
    np.testing.assert_allclose(beside.u.ravel(), [0.4, 5.0], rtol=1e-6)


class HandedOver(Adam):
    """Adam that calls all rows rough when asked, for the n-th time, whether they have stalled."""

    def __init__(self, at=1):
        super().__init__(learning_rate=0.1)
        self.at = at

    def start(self, objective, u, evaluation, lam):
        asked = torch.zeros(len(u), dtype=torch.long)
        return super().start(objective, u, evaluation, lam) | dict(asked=asked)

    def stalled(self, memory, idle):
        memory["asked"] = memory["asked"] + 1
        return torch.zeros_like(idle, dtype=torch.bool)

    def rough_rows(self, memory, like):
        return memory["asked"] >= self.at


@pytest.mark.parametrize("at", range(1, 9))
def test_the_exact_look_is_within_the_budget(at):
    """Whenever a row is handed over, which happens after the check of the budget."""
    prior = FlowPrior(flow=Spike(), dequantize=0.6)
    model = AIPORegressor(Denoising(), prior=prior, noise=NOISE, solver=HandedOver(at), max_evals=9)
    result = model.reconstruct(np.array([[1.2], [-0.5]]))
    assert (result.n_evals <= 9).all() and (result.n_evals >= 8).all()
    np.testing.assert_allclose(result.log_prob, prior.score_samples(result.x), rtol=1e-9)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(smoothing=-1.0), r"smoothing must be a finite number >= 0.*got -1\.0"),
        (dict(smoothing=np.nan), r"smoothing must be a finite number >= 0.*got nan"),
        (dict(smoothing=np.inf), r"smoothing must be a finite number >= 0.*got inf"),
        (dict(smoothing="half"), r"smoothing must be 'auto' or a finite number >= 0.*got 'half'"),
        (dict(smoothing=True), r"smoothing must be a finite number >= 0.*got True"),
        (dict(smoothing=0.5, space="latent"), r"needs space='image'.*got space='latent'"),
        (dict(smoothing=0.5, penalty="latent"), r"penalty='density', got .*penalty='latent'"),
        (
            dict(smoothing=0.5, n_starts=2, max_evals=15),
            r"at least 8 for each of the n_starts=2 starts with smoothing, got 15",
        ),
        (dict(smoothing=0.5, schedule="adaptive"), r"schedule='adaptive' goes by gradients"),
        (
            dict(smoothing=0.5, schedule=TheorySchedule(L=2, sigma=1, delta=1, C=1, epsilon=0.1)),
            r"goes by gradients that vanish: take another schedule",
        ),
    ],
)
def test_bad_smoothing(params, message):
    model = AIPORegressor(CompressedSensing(3), prior=gaussian_prior(6), **params)
    with pytest.raises(ValueError, match=message):
        model.predict(np.zeros((2, 3)))


def test_the_objective_refuses_what_it_cannot_smooth():
    objective, _ = smoothed("gaussian", 0.0)
    with pytest.raises(ValueError, match=r"needs space='image' and penalty='density', got space="):
        type(objective)(
            objective.flow,
            objective.op,
            objective.noise,
            objective.y,
            space="latent",
            smoothing=0.1,
        )
