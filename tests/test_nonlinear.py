"""Operators that are not linear: their derivatives, their MLE, and reconstructions with them."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from problems import covering, gaussian_prior, make_objective, random_flow
from scipy.optimize import minimize as scipy_minimize
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor, FlowPrior, GaussianPrior
from skaipo.flows import Glow
from skaipo.noise import GaussianNoise, LaplaceNoise, PoissonNoise
from skaipo.operators import (
    Blur,
    Clipping,
    Compose,
    Inpainting,
    MaskedFourier,
    MatrixOperator,
    NonlinearOperator,
    PerSampleMatrix,
    PhaseRetrieval,
    Stack,
)
from skaipo.operators._nonlinear import Linearisation
from skaipo.solvers import misfit, mle_start, surrogate_of
from skaipo.solvers._gauss_newton import _newton_step

D = 6
MATRIX = np.random.default_rng(1).normal(size=(4, D)) / 2


def bent(x):
    return x + 0.1 * x**3


def squashed(x):
    return torch.tanh(x @ torch.from_numpy(MATRIX.T).to(x))


def scaled(x, params):
    return bent(params[:, None] * x)


OPERATORS = {
    "bent": lambda: NonlinearOperator(bent),
    "squashed": lambda: NonlinearOperator(squashed),
    "clipping": lambda: Clipping(-0.6, 1.1),
    "soft clipping": lambda: Clipping(-0.6, 1.1, softness=0.2),
    "magnitude": lambda: PhaseRetrieval(MATRIX),
    "intensity": lambda: PhaseRetrieval(MATRIX[:2] + 1j * MATRIX[2:], squared=True),
}
FORMULAS = {
    "bent": lambda x: x + 0.1 * x**3,
    "squashed": lambda x: np.tanh(x @ MATRIX.T),
    "clipping": lambda x: np.clip(x, -0.6, 1.1),
    "soft clipping": lambda x: (
        -0.6 + 0.2 * np.logaddexp(0, (x + 0.6) / 0.2) - 0.2 * np.logaddexp(0, (x - 1.1) / 0.2)
    ),
    "magnitude": lambda x: np.abs(x @ MATRIX.T),
    "intensity": lambda x: np.abs(x @ (MATRIX[:2] + 1j * MATRIX[2:]).T) ** 2,
}
ALL = pytest.mark.parametrize("name", OPERATORS)


def images(n=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, D))


# ---------------------------------------------------------------------------- the operators


@ALL
def test_formula_gradient_clone_and_pickle(name):
    op, x = OPERATORS[name](), images()
    y = op(x)
    assert np.allclose(y, FORMULAS[name](x), atol=1e-12)
    for other in (clone(op), pickle.loads(pickle.dumps(op)), op.bind((D,))):
        assert np.array_equal(other(x), y)
    bound = op.bind((D,))
    assert not bound.is_linear
    assert torch.autograd.gradcheck(bound.forward, torch.from_numpy(x).requires_grad_())
    for method in ("adjoint", "projector", "norm", "linear"):
        with pytest.raises(TypeError, match="is not linear"):
            getattr(bound, method)(*[torch.from_numpy(y)][: method != "norm"])


@ALL
def test_the_linearisation_is_the_jacobian(name):
    op, x = OPERATORS[name]().bind((D,)), torch.from_numpy(images(3))
    affine = Linearisation(op, x)
    rng = np.random.default_rng(5)
    v = torch.from_numpy(rng.normal(size=(3, D)))
    w = torch.from_numpy(rng.normal(size=(3, op.n_measurements_)))
    for i in range(3):
        one = x[i]
        jacobian = torch.autograd.functional.jacobian(lambda r: op.forward(r[None])[0], one)
        assert torch.allclose(affine.linear(v)[i], jacobian @ v[i], atol=1e-12)
        assert torch.allclose(affine.adjoint(w)[i], jacobian.T @ w[i], atol=1e-12)
        expected = op.forward(one[None])[0] + jacobian @ (v[i] - one)
        assert torch.allclose(affine.forward(v)[i], expected, atol=1e-12)
        dense = MatrixOperator(jacobian.numpy(), expected - jacobian @ v[i]).bind((D,))
        near = dense.projector(w[i][None])(v[i][None])[0]
        # (Where the rows of J are not dependent, or nearly zero.)
        if name in ("bent", "squashed", "magnitude"):
            assert torch.allclose(affine.projector(w)(v)[i], near, atol=1e-8)


def test_where_there_is_no_direction_the_gradient_is_zero():
    op = PhaseRetrieval(MATRIX).bind((D,))
    x = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.forward(x).sum(), x)
    assert (gradient == 0).all()
    affine = Linearisation(op, x)
    assert (affine.linear(torch.ones(1, D).double()) == 0).all()


def test_magnitudes_of_frequencies():
    rng = np.random.default_rng(0)
    mask, x = rng.random((4, 4)) < 0.6, rng.normal(size=(2, 1, 4, 4))
    op = PhaseRetrieval(MaskedFourier(mask))
    expected = np.abs(np.fft.fft2(x, norm="ortho")).reshape(2, 16)
    assert np.allclose(op(x)[:, mask.ravel()], expected[:, mask.ravel()])
    assert np.array_equal(op.bind((1, 4, 4)).measured_, mask.ravel())


def test_a_module_is_used_as_a_frozen_copy():
    module = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.Dropout(0.5), torch.nn.Tanh())
    op = NonlinearOperator(module)
    y = op(images())
    assert y.shape == (5, 3) and np.array_equal(op(images()), y)
    assert module.training and module[0].weight.requires_grad
    assert module[0].weight.dtype == torch.float32


class Stateful(torch.nn.Module):
    def forward(self, x):
        return x - 2 * x.mean(0)


@pytest.mark.parametrize(
    "fn, error, message",
    [
        (3, TypeError, "must be a function of a tensor of images .*, got int"),
        (lambda x: x.numpy(), ValueError, "fn failed on two images of shape .6,."),
        (lambda x: x.detach().numpy(), TypeError, "tensor of real floats, got ndarray"),
        (lambda x: torch.fft.fft(x), TypeError, "real floats, got a tensor of torch.complex64"),
        (lambda x: x[:1], ValueError, r"must keep the rows.*made \(1, 6\)"),
        (lambda x: x.detach(), ValueError, "in a way that autograd"),
        (torch.round, ValueError, "its gradient is zero"),
        (Stateful(), ValueError, "depends on the other images of the batch, by"),
    ],
)
def test_what_fn_must_not_do(fn, error, message):
    with pytest.raises(error, match=message):
        NonlinearOperator(fn).bind((D,))


@pytest.mark.parametrize(
    "op, message",
    [
        (Clipping(), "needs low, high or both"),
        (Clipping(2.0, 1.0), "needs low < high, got 2.0 and 1.0"),
        (Clipping(0.0, softness=-1), "softness. must be at least 0"),
        (Clipping(low="a"), "must be a finite number or None, got 'a'"),
        (NonlinearOperator(bent, out_shape=(3,)), "shape .6,., but out_shape is .3,."),
        (NonlinearOperator(bent, out_shape=()), "positive sizes"),
        (NonlinearOperator(scaled, takes_params=True), "needs out_shape"),
    ],
)
def test_wrong_parameters(op, message):
    with pytest.raises(ValueError, match=message):
        op.bind((D,))


def test_phase_retrieval_is_of_linear_measurements():
    with pytest.raises(TypeError, match="needs a linear operator, Clipping is not"):
        PhaseRetrieval(Clipping(0.0)).bind((D,))


# ------------------------------------------------------------- the start and the reconstruction


@ALL
def test_the_map_is_that_of_scipy(name):
    """Against the lowest that BFGS finds from many starts, by the plain formula."""
    space = ("image", "latent")[list(FORMULAS).index(name) % 2]
    prior, sigma, lam = gaussian_prior(D), 0.2, 0.8
    X = prior.sample(6, random_state=3)
    Y = GaussianNoise(sigma).add_noise(FORMULAS[name](X), random_state=4)
    model = AIPORegressor(
        OPERATORS[name](), lam, prior=prior, noise=GaussianNoise(sigma), space=space, tol=1e-6
    )
    result = model.reconstruct(Y)
    mean, precision = prior.mean, np.linalg.inv(prior.covariance)
    constant = 0.5 * np.linalg.slogdet(2 * np.pi * np.asarray(prior.covariance))[1]

    def objective(x, y):
        r, c = y - FORMULAS[name](x), x - mean
        q = np.einsum("ni,ij,nj->n", c, precision, c)
        return (r**2).sum(1) / (2 * sigma**2) + lam * (0.5 * q + constant)

    # All its finite differences in one call.
    steps = 1e-6 * np.concatenate((np.zeros((1, D)), np.eye(D), -np.eye(D)))

    def value_and_gradient(x, y):
        value, *around = objective(x + steps, y)
        return value, np.subtract(around[:D], around[D:]) / 2e-6

    def lowest(y):
        runs = (scipy_minimize(value_and_gradient, x, y, jac=True, method="BFGS") for x in starts)
        return min(run.fun for run in runs)

    starts = np.concatenate((prior.sample(7, random_state=5), [prior.mean]))
    best = np.array([lowest(y) for y in Y])
    np.testing.assert_allclose(result.objective, objective(result.x, Y), rtol=1e-9)
    # Where minima compete most rows find the lowest. (Hard kinks are for what the documentation
    # says of them.)
    share = {"bent": 1.0, "squashed": 1.0, "clipping": 0.2}.get(name, 0.8)
    assert (result.objective < best + 1e-3).mean() >= share, result.objective - best


def test_rows_do_not_depend_on_each_other():
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    op = PhaseRetrieval(np.random.default_rng(0).normal(size=(20, 16)))
    Y = op(prior.sample(5, random_state=0))
    Y[1, 3] = np.nan
    Y[2] = 1e30
    model = AIPORegressor(op, prior=prior, noise=GaussianNoise(0.3), max_evals=20)
    with np.errstate(all="ignore"):
        together = model.reconstruct(Y)
        alone = model.reconstruct(Y[[0, 1]])
    assert np.allclose(together.x[:2], alone.x, rtol=1e-6, atol=1e-6)
    assert np.isfinite(together.x[[0, 1, 3, 4]]).all()


def test_gauss_newton_steps_solve_the_linearised_problem():
    prior = gaussian_prior(D)
    op = NonlinearOperator(squashed).bind((D,))
    y, x = torch.from_numpy(op(images(4))), torch.from_numpy(images(4, seed=9))
    surrogate = surrogate_of(prior.flow_).to(x)
    lam, weight = torch.tensor([0.1, 0.5, 1.0, 5.0]).double(), torch.full_like(y, 4.0)
    step = _newton_step(Linearisation(op, x), surrogate, y, weight, lam, x)
    eye = torch.eye(D, dtype=torch.float64)
    precision = surrogate.precise(eye)
    assert torch.allclose(surrogate.cover(precision), eye, atol=1e-8)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda r: op.forward(r[None])[0], x[i])
        right = 4 * jacobian.T @ (y[i] - op.forward(x[i][None])[0])
        right = right - lam[i] * precision @ (x[i] - surrogate.mean)
        expected = torch.linalg.solve(4 * jacobian.T @ jacobian + lam[i] * precision, right)
        assert torch.allclose(step[i], expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------ lambda = 0


@pytest.mark.parametrize("solver", ["lbfgs", "pgd"])
def test_the_most_probable_image_that_fits(solver):
    prior = gaussian_prior(D)
    precision = np.linalg.inv(prior.covariance)
    X = prior.sample(6, random_state=0)
    Y = FORMULAS["squashed"](X)
    objective = make_objective(prior.flow_, NonlinearOperator(squashed), GaussianNoise(0.1), Y)
    x, converged = mle_start(objective, max_evals=400, solver=solver)
    assert (misfit(objective, x) < 1e-3).all()
    if solver == "lbfgs":
        assert converged.all()
    for i in range(6):

        def density(v):
            return 0.5 * (v - prior.mean) @ precision @ (v - prior.mean)

        constraint = {"type": "eq", "fun": lambda v, i=i: FORMULAS["squashed"](v[None])[0] - Y[i]}
        best = scipy_minimize(density, X[i], constraints=[constraint], method="SLSQP")
        assert density(x[i].numpy()) == pytest.approx(best.fun, rel=2e-2, abs=2e-2)


def test_what_no_image_explains_is_infeasible():
    prior = gaussian_prior(D)
    op = NonlinearOperator(squashed)
    Y = FORMULAS["squashed"](prior.sample(3, random_state=0))
    Y[1, 0] = 1.5  # beyond the range of tanh
    model = AIPORegressor(op, 0.0, prior=prior, noise=GaussianNoise(0.1), max_evals=300)
    result = model.reconstruct(Y)
    assert result.status[1] == "infeasible" and "infeasible 1" in repr(result)
    assert (result.status[[0, 2]] != "infeasible").all()
    # What is in reach is reached.
    r = FORMULAS["squashed"](result.x) - Y
    assert np.abs(r[[0, 2]]).max() < 1e-3 and abs(r[1, 0] + 0.5) < 0.1


@pytest.mark.parametrize("squared, unit", [(True, 1e-6), (True, 1e6), (False, 1e-6)])
def test_measurements_of_zero_are_explained_in_the_operators_units(squared, unit):
    """Of a residual relative to ``||y|| = 0`` nothing would ever be small enough."""
    covariance = unit**2 * np.diag(np.linspace(0.5, 2.0, D))
    prior = GaussianPrior(unit * np.ones(D), covariance)
    op = PhaseRetrieval(MATRIX, squared=squared)
    Y = op(prior.sample(3, random_state=0))
    Y[0], Y[2] = 0.0, -np.abs(Y[2])  # an image of the null space, and what no image explains
    noise = GaussianNoise(0.1 * unit ** (1 + squared))
    result = AIPORegressor(op, 0.0, prior=prior, noise=noise, max_evals=120).reconstruct(Y)
    assert (result.status != "infeasible").tolist() == [True, True, False]
    assert np.linalg.norm(op(result.x)[0]) < 1e-6 * np.linalg.norm(Y[1])


def test_zero_that_is_out_of_reach_is_infeasible():
    prior = gaussian_prior(D)
    op = NonlinearOperator(lambda x: x.square() + 0.01)
    model = AIPORegressor(op, 0.0, prior=prior, noise=GaussianNoise(0.1), max_evals=100)
    assert model.reconstruct(np.zeros((1, D))).status.tolist() == ["infeasible"]


def test_a_path_begins_at_zero():
    from skaipo import aipo_path

    prior, op = gaussian_prior(D), OPERATORS["magnitude"]()
    Y = FORMULAS["magnitude"](prior.sample(4, random_state=0))
    params = dict(noise=GaussianNoise(0.1), max_evals=90)
    lams, path = aipo_path(Y, op, prior, lams=[0.0, 0.1, 1.0], **params)
    single = AIPORegressor(op, 0.0, prior=prior, **params)
    assert np.array_equal(path[0], single.predict(Y)) and np.isfinite(path).all()


@pytest.mark.parametrize("noise", [PoissonNoise(gain=5.0, background=20.0), LaplaceNoise(0.1)])
def test_lambda_zero_with_other_noise(noise):
    prior = gaussian_prior(D)
    op = MatrixOperator(MATRIX)
    Y = noise.add_noise(op(prior.sample(5, random_state=0)), random_state=1)
    result = AIPORegressor(op, 0.0, prior=prior, noise=noise).reconstruct(Y)
    # The misfit is as small as it gets: four measurements of six unknowns can all be met.
    assert result.misfit.max() < 0.1 and np.isfinite(result.x).all()


# -------------------------------------------------------------------- parameters of each row


def test_every_row_has_its_own_operator():
    prior, rng = gaussian_prior(D), np.random.default_rng(0)
    op = NonlinearOperator(scaled, out_shape=D, takes_params=True)
    params, X = rng.uniform(0.5, 2.0, 3), prior.sample(3, random_state=0)
    Y = FORMULAS["bent"](params[:, None] * X)
    settings = dict(prior=prior, noise=GaussianNoise(0.1), max_evals=40, batch_size=2)
    X_hat = AIPORegressor(op, **settings).predict(Y, op_params=params)
    for i in range(3):
        own = NonlinearOperator(lambda x, s=params[i]: bent(s * x))
        alone = AIPORegressor(own, **settings).predict(Y[i : i + 1])
        assert np.allclose(X_hat[i], alone[0], atol=1e-5)


def test_parameters_go_where_they_are_needed(tmp_path):
    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    rng = np.random.default_rng(0)
    kernels = rng.dirichlet(np.ones(9), 6).reshape(6, 3, 3)
    X = prior.sample(6, random_state=0)
    op = Blur(kernel=None)
    Y = op(X.reshape(6, 1, 4, 4), params=kernels).reshape(6, 16)
    model = AIPORegressor(op, prior=prior, noise=GaussianNoise(0.1), max_evals=12)
    X_hat = model.predict(Y, op_params=kernels)
    order = np.array([3, 0, 5, 1])
    assert np.allclose(model.predict(Y[order], op_params=kernels[order]), X_hat[order], atol=1e-5)
    assert not np.allclose(model.predict(Y, op_params=kernels[::-1]), X_hat, atol=1e-2)
    with pytest.raises(ValueError, match="needs parameters for each row"):
        model.predict(Y)
    with pytest.raises(ValueError, match="expected 6 of them"):
        model.predict(Y, op_params=kernels[:5])
    with pytest.raises(TypeError, match="takes no parameters"):
        AIPORegressor(Blur(kernels[0]), prior=prior).predict(Y, op_params=kernels)
    # They are part of what a checkpoint's results depend on.
    kept = model.predict(Y, op_params=kernels, checkpoint=tmp_path / "run")
    assert np.array_equal(kept, X_hat)
    with pytest.raises(ValueError, match="op_params"):
        model.predict(Y, op_params=kernels[::-1], checkpoint=tmp_path / "run")


def test_searches_route_parameters_as_metadata():
    import sklearn
    from sklearn.model_selection import GridSearchCV

    from skaipo import AIPORegressorCV

    prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4)))
    kernels = np.random.default_rng(0).dirichlet(np.ones(9), 6).reshape(6, 3, 3)
    X = prior.sample(6, random_state=0)
    Y = Blur(None)(X.reshape(6, 1, 4, 4), params=kernels).reshape(6, 16)
    args = dict(prior=prior, noise=GaussianNoise(0.1), max_evals=8)
    with sklearn.config_context(enable_metadata_routing=True):
        model = AIPORegressor(Blur(None), **args).set_score_request(op_params=True)
        search = GridSearchCV(model, {"lam": [0.5]}, cv=2, error_score="raise")
        search.fit(Y, X, op_params=kernels)
    for fold, k in enumerate((slice(3), slice(3, 6))):
        by_hand = AIPORegressor(Blur(None), 0.5, **args).score(Y[k], X[k], op_params=kernels[k])
        assert np.allclose(search.cv_results_[f"split{fold}_test_score"], by_hand, atol=1e-6)
    path = AIPORegressorCV(Blur(None), lams=[0.5, 2.0], cv=2, **args).fit(Y, X, op_params=kernels)
    assert path.predict(Y, op_params=kernels).shape == X.shape


# ---------------------------------------------------------------------- where it could go wrong


def zero_mean_prior():
    return GaussianPrior(np.zeros(D), np.diag(np.linspace(0.5, 2.0, D)))


def test_a_symmetric_centre_is_no_end():
    # The magnitudes of data of mean zero have no slope at the mean: nothing may stay there.
    prior, rng = zero_mean_prior(), np.random.default_rng(0)
    op = PhaseRetrieval(rng.normal(size=(14, D)))
    X = prior.sample(10, random_state=1)
    noise = GaussianNoise(0.05)
    for options in (
        dict(init="zero"),
        dict(init="mle"),
        dict(solver="adam", schedule="linear", init="mle", mle_solver="pgd"),
    ):
        model = AIPORegressor(op, 1.0, prior=prior, noise=noise, max_evals=100, **options)
        result = model.reconstruct(op(X))
        assert (np.linalg.norm(result.x, axis=1) > 0.1).all(), options
    exact = AIPORegressor(op, 0.0, prior=prior, noise=noise).reconstruct(op(X))
    # (Which valley of the misfit it ends in is chance; it must not be the middle for all.)
    assert (exact.status != "infeasible").any()


@pytest.mark.parametrize(
    "space, n_starts, max_evals, schedule, lam",
    covering(["image", "latent"], [1, 2], [4, 5, 8, 13], ["direct", "linear"], [0.0, 1.0, 1e6]),
)
def test_small_budgets_are_kept(space, n_starts, max_evals, schedule, lam):
    # (Four for each start is the least that is taken.)
    max_evals = max(max_evals, 4 * n_starts)
    prior = gaussian_prior(D)
    model = AIPORegressor(
        NonlinearOperator(bent),
        lam,
        prior=prior,
        noise=GaussianNoise(0.1),
        space=space,
        n_starts=n_starts,
        max_evals=max_evals,
        schedule=schedule,
    )
    result = model.reconstruct(FORMULAS["bent"](images(3)))
    assert (result.n_evals <= max_evals).all()


@pytest.mark.parametrize("lam", [0.0, 1e-6])
def test_rows_are_the_same_alone(lam):
    prior = zero_mean_prior()
    op = PhaseRetrieval(MATRIX)
    Y = op(prior.sample(4, random_state=0))
    Y[[1, 3], 0] = np.nan
    model = AIPORegressor(op, lam, prior=prior, noise=GaussianNoise(0.1), max_evals=30)
    together = model.predict(Y)
    # One with a measurement missing, and one without.
    alone = np.concatenate([model.predict(Y[[1]]), model.predict(Y[[2]])])
    np.testing.assert_allclose(together[[1, 2]], alone, rtol=1e-12, atol=1e-12)


def test_a_row_whose_operator_overflows_does_not_stop_the_others():
    prior, rng = gaussian_prior(D), np.random.default_rng(0)
    op = PerSampleMatrix(4)
    matrices = rng.normal(size=(3, 4, D))
    Y = op(prior.sample(3, random_state=0), params=matrices)
    model = AIPORegressor(op, prior=prior, noise=GaussianNoise(0.1), max_evals=30)
    good = model.predict(Y, op_params=matrices)
    matrices[1] *= 1e200
    mixed = model.predict(Y, op_params=matrices)
    assert np.array_equal(mixed[[0, 2]], good[[0, 2]])


def test_complex_pairs_are_known_or_refused():
    rng = np.random.default_rng(0)
    mask, kernel = rng.random((4, 4)) < 0.6, rng.dirichlet(np.ones(9)).reshape(3, 3)
    x, blur = rng.normal(size=(2, 1, 4, 4)), Blur(kernel)
    frequencies = MaskedFourier(mask)
    y = PhaseRetrieval(Compose(frequencies, blur))(x)
    expected = np.abs(np.fft.fft2(blur(x), norm="ortho")).reshape(2, 16)
    assert np.allclose(y[:, mask.ravel()], expected[:, mask.ravel()])
    for op in (Stack([frequencies, blur]), Compose(Inpainting(np.ones((2, 4, 4))), frequencies)):
        with pytest.raises(TypeError, match="cannot tell which numbers"):
            PhaseRetrieval(op).bind((1, 4, 4))
    with pytest.raises(TypeError, match="the same for all rows"):
        PhaseRetrieval(PerSampleMatrix(4)).bind((D,))
    sparse = PhaseRetrieval(sp.csr_array(MATRIX[:2] + 1j * MATRIX[2:]), squared=True)
    assert np.allclose(sparse(images()), FORMULAS["intensity"](images()))


def test_what_is_not_explained_is_said_aloud():
    prior = gaussian_prior(D)
    Y = np.full((2, 4), 1.5)
    model = AIPORegressor(NonlinearOperator(squashed), 0.0, prior=prior, noise=GaussianNoise(0.1))
    model.set_params(max_evals=90)
    with pytest.warns(ConvergenceWarning, match="explains the measurements of 2 of 2 rows"):
        model.predict(Y)


def test_inference_mode_is_left_for_the_time_of_a_solve():
    prior = gaussian_prior(D)
    model = AIPORegressor(NonlinearOperator(bent), prior=prior, noise=GaussianNoise(0.1))
    model.set_params(max_evals=16)
    Y = FORMULAS["bent"](images(2))
    with torch.inference_mode():
        inside = model.predict(Y)
        prior.score_samples(images(2))
        tensor = model.predict(torch.from_numpy(Y))
    assert np.array_equal(inside, model.predict(Y)) and np.array_equal(inside, tensor.numpy())
