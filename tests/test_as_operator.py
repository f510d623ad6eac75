"""What as_operator accepts, what it finds out by itself, and how it refuses the rest."""

import copy
import functools
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import gaussian_filter
from scipy.sparse.linalg import LinearOperator
from sklearn.base import clone
from torch import nn

from skaipo import AIPORegressor, FixedLambdaMAP, GaussianPrior
from skaipo.noise import GaussianNoise, SquaredError
from skaipo.operators import Denoising, NonlinearOperator, as_operator
from skaipo.operators._foreign import facts_about
from skaipo.operators._products import ProductsOperator

SHAPE = (1, 4, 4)
D = 16
NOISE = np.random.default_rng(1)
MATRIX = np.random.default_rng(0).standard_normal((6, D))


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def products(matvec=None, rmatvec=None, **kwargs):
    matvec = (lambda x: MATRIX @ x) if matvec is None else matvec
    rmatvec = (lambda y: MATRIX.T @ y) if rmatvec is None else rmatvec
    return LinearOperator((6, D), matvec=matvec, rmatvec=rmatvec, **{"dtype": float} | kwargs)


def bound(obj, shape=SHAPE, **kwargs):
    return as_operator(obj, **kwargs).bind(shape)


def gaussian_prior(shape=SHAPE):
    return GaussianPrior(np.zeros(D), np.eye(D) + 0.5, event_shape=shape)


class Physics:
    """The interface of deepinv's physics, as much as is used, and traps around it."""

    def __init__(self, noise_model=None, adjoint=True):
        self.noise_model = noise_model
        if adjoint:
            self.A_adjoint = lambda y: nn.functional.conv_transpose2d(y, self.kernel.to(y))
        self.kernel = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2)

    def A(self, x):
        assert x.ndim == 4
        return nn.functional.conv2d(x, self.kernel.to(x))

    def __call__(self, x):
        return self.A(x) + torch.randn(1)


class GaussianNoiseModel:
    def __init__(self, sigma):
        self.sigma = sigma
        self.noise_model = lambda x: x


GaussianNoiseModel.__name__ = "GaussianNoise"


# ---------------------------------------------------------------------- what it finds out


def test_checks_once_for_as_long_as_the_object_lives(monkeypatch):
    calls = []

    def matvec(x):
        calls.append(1)
        return MATRIX @ x

    obj = products(matvec)
    bound(obj)
    first = len(calls)
    bound(obj)
    assert first > 5 and len(calls) == first
    assert facts_about(obj)
    monkeypatch.setattr(ProductsOperator, "_examine", None)  # (another call would fail)
    model = AIPORegressor(obj, prior=gaussian_prior()).fit()
    assert_allclose(model.predict(np.ones((1, 6))), model.predict(np.ones((1, 6))))
    fresh = products(matvec)
    assert not facts_about(fresh)


def test_shapes_are_found_or_given():
    assert bound(lambda x: x[:, :, 1:]).measurement_shape_ == (1, 3, 4)
    assert bound(lambda x: x.sum((1, 2, 3))).measurement_shape_ == (1,)
    op = as_operator(lambda x: x.reshape(-1, 2, 8)[:, :1], in_shape=(4, 4), out_shape=(2, 4))
    op = op.bind((D,))
    assert op.measurement_shape_ == (2, 4) and op(np.ones((3, D))).shape == (3, 8)
    assert op(np.ones((3, 4, 4))).shape == (3, 2, 4)  # other images than the bound ones


def test_images_in_images_out():
    op = as_operator(lambda x: x[:, :, ::2])
    model = AIPORegressor(op, prior=gaussian_prior(), max_evals=40)
    assert model.predict(np.ones((2, 1, 2, 4))).shape == (2, 1, 4, 4)
    assert model.predict(np.ones((2, 8))).shape == (2, D)


def test_single_precision_goes_in_and_what_came_comes_out():
    weights = torch.from_numpy(MATRIX).float()
    seen = []

    def f(x):
        seen.append(x.dtype)
        return x.flatten(1) @ weights.T

    op = bound(f)
    assert op.precision_ == torch.float32 and seen[-1] == torch.float32
    x = randn(3, D)
    assert op.forward(x).dtype == torch.float64
    assert_allclose(op.forward(x), x @ torch.from_numpy(MATRIX).T, atol=1e-5)
    assert op.adjoint(randn(2, 6)).dtype == torch.float64


def test_a_module_serves_double_precision_and_is_left_as_it_is():
    module = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Dropout(0.5))
    before = copy.deepcopy(module.state_dict())
    op = bound(module)
    x = randn(3, D)
    exact = nn.functional.conv2d(x.reshape(3, *SHAPE), module[0].weight.detach().double())
    assert_allclose(op.forward(x), exact.flatten(1), atol=1e-12)
    assert op.precision_ == torch.float64
    assert module.training and module[0].weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[0].weight.grad is None and module[0].weight.requires_grad


def test_complex_weights_of_a_module_stay_complex():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("phase", torch.exp(1j * torch.arange(16.0).reshape(1, 1, 4, 4)))

        def forward(self, x):
            return torch.view_as_real(self.phase * x).flatten(1)

    module = Fourier()
    x = randn(2, D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op = bound(module.double())
        y = op.forward(x)
    assert_allclose(y, torch.view_as_real(module.phase * x.reshape(2, *SHAPE)).flatten(1))
    assert y.reshape(2, D, 2)[..., 1].abs().max() > 0.1


def test_batches_go_through_matmat_if_it_works():
    calls = {"matvec": 0, "matmat": 0}

    def matvec(x):
        calls["matvec"] += 1
        return MATRIX @ x

    def matmat(x):
        calls["matmat"] += 1
        return MATRIX @ x

    op = bound(products(matvec, matmat=matmat))
    calls.update(matvec=0, matmat=0)
    op.forward(randn(20, D))
    assert calls == {"matvec": 0, "matmat": 1}
    # One that works for single vectors only.
    op = bound(products(matvec, matmat=lambda x: MATRIX @ x.reshape(D)))
    calls.update(matvec=0)
    x = randn(20, D)
    assert_allclose(op.forward(x), x @ torch.from_numpy(MATRIX).T, atol=1e-12)
    assert calls["matvec"] == 20
    # One that mixes columns is wrong, and not used.
    op = bound(products(matvec, matmat=lambda x: MATRIX @ x + x.mean()))
    assert_allclose(op.forward(x), x @ torch.from_numpy(MATRIX).T, atol=1e-12)


def test_what_is_not_linear_becomes_a_nonlinear_operator():
    for f in (lambda x: x.clamp(0, 50), torch.sin, lambda x: x.sqrt(), nn.Tanh()):
        op = bound(f)
        assert type(op).__name__ == "NonlinearOperator" and not op.is_linear
        x = torch.rand(2, D, dtype=torch.float64)
        assert_allclose(op.forward(x), f(x))
    flat = as_operator(lambda x: x.square(), in_shape=(2, 8), out_shape=(4, 4)).bind((D,))
    assert flat.measurement_shape_ == (4, 4) and not flat.is_linear
    Y = np.clip(np.random.default_rng(0).normal(0.5, 0.4, (2, D)), 0, 1)
    model = FixedLambdaMAP(lambda x: x.clamp(-5, 5), 0.1, prior=gaussian_prior(), init="zero")
    assert_allclose(
        model.predict(Y),
        FixedLambdaMAP(Denoising(), 0.1, prior=gaussian_prior()).predict(Y),
        atol=1e-2,
    )


def test_modules_and_objects_are_told_apart():
    class Both:
        def forward(self, x):
            return 2 * x

        def __call__(self, x):
            return x + torch.randn(())

    x = randn(1, D)
    assert_allclose(bound(Both()).forward(x), 2 * x)
    assert_allclose(bound(functools.partial(torch.mul, other=3.0)).forward(x), 3 * x)
    assert_allclose(bound(torch.vmap(lambda image: image.cumsum(0))).forward(x), x)


# ----------------------------------------------------------------------------- deepinv's physics


@pytest.mark.parametrize("adjoint", [True, False])
def test_physics_measure_without_their_noise(adjoint):
    physics = Physics(GaussianNoiseModel(torch.tensor(0.25)), adjoint)
    if not adjoint:
        physics.A_adjoint = lambda y: 1 / 0  # says nothing useful: autograd does it
    op = bound(physics)
    x, y = randn(3, D), randn(3, 9)
    assert torch.equal(op.forward(x), op.forward(x)) and op.measurement_shape_ == (1, 3, 3)
    assert_allclose((op.forward(x) * y).sum(1), (x * op.adjoint(y)).sum(1), atol=1e-12)
    assert op.implied_sigma == 0.25
    assert bound(physics, (4, 4)).in_shape_ == (1, 4, 4)
    with pytest.raises(ValueError, match=r"takes images \(C, H, W\), .*in_shape=\(C, H, W\)"):
        bound(physics, (D,))
    assert bound(physics, (D,), in_shape=SHAPE).n_measurements_ == 9


def test_the_sigma_of_physics_is_the_noise_of_an_estimator_without():
    Y = np.random.default_rng(0).standard_normal((3, 9))
    named = AIPORegressor(Physics(), prior=gaussian_prior(), noise=GaussianNoise(0.3)).predict(Y)
    physics = Physics(GaussianNoiseModel(0.3))
    assert_allclose(AIPORegressor(physics, prior=gaussian_prior()).predict(Y), named, atol=1e-6)
    # An explicit one wins, and a sigma of zero or a tensor of many is none.
    explicit = AIPORegressor(physics, prior=gaussian_prior(), noise=SquaredError()).predict(Y)
    assert np.abs(explicit - named).max() > 1e-2
    for sigma in (0.0, torch.ones(3), None):
        other = AIPORegressor(Physics(GaussianNoiseModel(sigma)), prior=gaussian_prior())
        assert_allclose(other.predict(Y), explicit, atol=1e-6)


def test_physics_with_lambdas_pickle_and_keep_their_sigma():
    physics = Physics(GaussianNoiseModel(0.25))
    with pytest.raises(AttributeError):
        pickle.dumps(physics)
    x = randn(2, D)
    op = bound(physics)
    for again in (op, as_operator(physics)):
        again = pickle.loads(pickle.dumps(again)).bind(SHAPE)
        assert torch.equal(again.forward(x), op.forward(x)) and again.implied_sigma == 0.25


# ------------------------------------------------------------------------------------- refusals


class Changing:
    def __init__(self):
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * (1 + 0.01 * self.n)


class WrongAdjoint:
    def __init__(self, factor):
        self.factor = factor

    def forward(self, x):
        return 2.0 * x

    def adjoint(self, y):
        return self.factor * y


class Nothing:
    def forward(self, x):
        return x.clamp(0, 1)

    def adjoint(self, y):
        return y


def in_place(x):
    x *= 2
    return x


REFUSED = {
    "another number of pixels": (
        lambda: LinearOperator((6, 9), matvec=lambda x: x[:6], rmatvec=lambda y: y, dtype=float),
        ValueError,
        r"shape \(6, 9\): it measures images of 9 features.*have 16.*prior of 9 features",
    ),
    "complex": (
        lambda: products(dtype=complex),
        TypeError,
        "is complex .complex128.*Stack the real and imaginary",
    ),
    "no adjoint": (
        lambda: LinearOperator((6, D), matvec=lambda x: MATRIX @ x, dtype=float),
        ValueError,
        r"no adjoint that works: rmatvec failed.*LinearOperator\(\(6, 16\), matvec, rmatvec\)",
    ),
    "wrong rmatvec": (
        lambda: products(rmatvec=lambda y: 2 * MATRIX.T @ y),
        ValueError,
        r"adjoint of \w+ is not its transpose: <f\(x\), y> = .* a relative error of \d.*rmatvec",
    ),
    "broken matvec": (
        lambda: products(matvec=lambda x: x[:5] @ np.ones(4)),
        ValueError,
        "matvec failed on an image of 16 random numbers",
    ),
    "products that are not linear": (
        lambda: products(matvec=lambda x: np.abs(MATRIX @ x)),
        ValueError,
        r"is not linear: .* differ by \d\.\de.\d\d of their size. Write f in torch",
    ),
    "products with a constant": (
        lambda: products(matvec=lambda x: MATRIX @ x + 1),
        ValueError,
        "adds a constant",
    ),
    "products with noise": (
        lambda: products(matvec=lambda x: MATRIX @ x + NOISE.standard_normal(6)),
        ValueError,
        r"gives two answers for the same image: they differ by \d",
    ),
    "noise": (
        lambda: lambda x: x + 0.1 * torch.randn_like(x),
        ValueError,
        r"two answers for the same image: they differ by \d.\de-0[12] .*leave the noise out",
    ),
    "memory": (Changing, ValueError, "two answers for the same image"),
    "mean over the batch": (
        lambda: lambda x: x - x.mean(0),
        ValueError,
        r"differently when it comes alone: by \d.*no mean over the batch",
    ),
    "NaN": (
        lambda: lambda x: x / torch.zeros_like(x),
        ValueError,
        "gives 48 of 48 measurements that are NaN or infinite",
    ),
    "in place": (lambda: in_place, ValueError, "function in_place changes its input in place"),
    "numpy": (
        lambda: lambda x: x.numpy(),
        TypeError,
        "returned ndarray, not a tensor.*scipy.sparse.linalg.LinearOperator",
    ),
    "several": (lambda: lambda x: (x, x), TypeError, "returned tuple, not a tensor"),
    "complex tensor": (lambda: torch.fft.fft2, TypeError, "complex numbers .*view_as_real"),
    "a single image": (
        lambda: lambda x: x[0],
        ValueError,
        r"made \(1, 4, 4\) of a batch \(3, 1, 4, 4\): the first axis must stay.*torch.vmap",
    ),
    "another layout": (
        lambda: lambda x: x @ torch.ones(D, 2),
        ValueError,
        r"failed on a batch of images of shape \(3, 1, 4, 4\): RuntimeError: .*It works on images "
        r"of shape \(16,\): .*as_operator\(f, in_shape=\(16,\)\)",
    ),
    "neither layout": (
        lambda: lambda x: x @ torch.ones(9, 2),
        ValueError,
        r"images of shape \(3, 1, 4, 4\): RuntimeError: .*Pass in_shape.*torch.vmap\(f\)",
    ),
    "a ufunc": (lambda: np.sqrt, TypeError, r"op is the numpy function sqrt.*Use torch.sqrt; or"),
    "a function of numpy": (lambda: np.cumsum, TypeError, "function cumsum.*Use torch.cumsum; or"),
    "a function of scipy": (
        lambda: gaussian_filter,
        TypeError,
        "the scipy function gaussian_filter.*Use a torch function; or, .*LinearOperator",
    ),
    "a ufunc inside": (
        lambda: lambda x: np.tanh(x),
        ValueError,
        r"fn failed on two images .*: it leaves torch for numpy.*torch.sqrt for np.sqrt",
    ),
    "fails with a gradient": (
        lambda: lambda x: x.square() if not x.requires_grad else 1 / 0,
        ValueError,
        "ZeroDivisionError: .*It works where no gradient is asked for.",
    ),
    "a linear ufunc inside": (
        lambda: lambda x: np.multiply(x, 2),
        TypeError,
        "gives no gradient: write it in torch without leaving torch",
    ),
    "adjoint of another scale": (
        lambda: WrongAdjoint(1.0),
        ValueError,
        r"adjoint of WrongAdjoint is not its transpose.*automatic differentiation gives the exact",
    ),
    "adjoint that is NaN": (lambda: WrongAdjoint(np.nan), ValueError, "gives numbers that are NaN"),
    "an adjoint of what is not linear": (
        Nothing,
        ValueError,
        "Nothing has an adjoint but is not linear: .*as a function",
    ),
    "detached": (
        lambda: lambda x: 2 * x.detach(),
        TypeError,
        "gives no gradient: write it in torch",
    ),
    "half detached": (
        lambda: lambda x: x + x.detach(),
        ValueError,
        "not its transpose: .* detached from the graph",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_what_failed(what):
    make, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        bound(make())


def test_an_adjoint_that_is_slightly_wrong():
    bound(WrongAdjoint(2.0))
    with pytest.raises(ValueError, match="a relative error of 1.2e-08 where 1e-09 is rounding"):
        bound(WrongAdjoint(2.0 + 4e-7 / 2))


@pytest.mark.parametrize(
    ("obj", "what"),
    [
        (None, "NoneType"),
        ("blur", "str"),
        ([1.0], "list"),
        ([[1.0], [2.0, 3.0]], "list"),
        ([["1.0"]], "list"),
        ([[Denoising()]], "list"),
        (nn.Tanh, r"the class Tanh; did you mean Tanh\(...\)"),
        (GaussianPrior(), "GaussianPrior"),
    ],
)
def test_what_cannot_measure(obj, what):
    with pytest.raises(TypeError, match=f"LinearOperator or PyLops.*deepinv Physics.*got {what}"):
        as_operator(obj)


def test_nested_lists_are_a_matrix():
    A = [[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]]
    x = np.array([[1.0, 0.0, -1.0]])
    for given in (A, tuple(map(tuple, A))):
        np.testing.assert_array_equal(as_operator(given)(x), x @ np.transpose(A))
    prior = GaussianPrior(np.zeros(3), np.eye(3))
    noise = GaussianNoise(0.5)
    model, same = (AIPORegressor(op, prior=prior, noise=noise) for op in (A, np.array(A)))
    np.testing.assert_array_equal(clone(model).predict([[1.0, 2.0]]), same.predict([[1.0, 2.0]]))


def test_wrong_shapes():
    f = lambda x: x[:, :, 1:]  # noqa: E731
    with pytest.raises(ValueError, match=r"shape \(2, 4\) \(8 features\), but .*\(1, 4, 4\)"):
        bound(f, in_shape=(2, 4))
    with pytest.raises(ValueError, match=r"out_shape=\(5,\) has 5 entries, but .*\(1, 3, 4\)"):
        bound(f, out_shape=(5,))
    with pytest.raises(TypeError, match="in_shape must be a tuple of sizes, got 'wide'"):
        bound(f, in_shape="wide")
    with pytest.raises(ValueError, match=r"out_shape must hold positive sizes, got \(0, 3\)"):
        bound(f, out_shape=(0, 3))
    with pytest.raises(TypeError, match="this Denoising knows its own"):
        as_operator(Denoising(), in_shape=SHAPE)


def mean_of_colours(x):
    n, height, width, channels = x.shape
    assert channels == 3, "channels last"
    return x.mean(-1)


@pytest.mark.parametrize("bend", [False, True], ids=["linear", "not linear"])
def test_functions_of_another_layout_are_told_what_to_do(bend):
    """What the message says to pass is right: what is measured then is that of the image."""
    image = np.random.default_rng(0).uniform(0.1, 1.0, (2, 3, 4, 4))

    def last(x):
        return mean_of_colours(x).square() if bend else mean_of_colours(x)

    def convolve(x):
        y = nn.functional.conv2d(x, torch.ones(1, 3, 2, 2).to(x))
        return y.square() if bend else y

    def error(op, shape):
        with pytest.raises(ValueError) as caught:
            op.bind(shape)
        return str(caught.value)

    for make in (as_operator, NonlinearOperator):
        message = error(make(last), (3, 4, 4))
        assert "works on images with their channels last, (4, 4, 3)" in message
        assert "(x.movedim(1, -1))" in message
        message = error(make(convolve), (48,))
        assert "works on images of shape (3, 4, 4)" in message and "in_shape=(3, 4, 4))" in message
        message = error(make(convolve), (30,))
        assert "vectors of 30 numbers" in message
        assert "in_shape=(C, H, W)), C * H * W = 30" in message
    turned = bound(lambda x: last(x.movedim(1, -1)), (3, 4, 4))
    want = image.mean(1) ** 2 if bend else image.mean(1)
    assert_allclose(turned(image).reshape(2, 4, 4), want, atol=1e-6)
    flat = bound(convolve, (48,), in_shape=(3, 4, 4))
    assert_allclose(flat(image.reshape(2, 48)), bound(convolve, (3, 4, 4))(image).reshape(2, 9))
    # A shape alone does not turn an image: it would be scrambled.
    with pytest.raises(ValueError, match=r"in_shape=\(4, 4, 3\) has the axes .* in another order"):
        bound(last, (3, 4, 4), in_shape=(4, 4, 3))
    assert bound(lambda x: x[:, :2], in_shape=(4, 4, 1)).n_measurements_ == 8


def test_what_no_pickle_takes_is_told():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def forward(self, x):
            with self.lock:
                return 2 * x

    op = bound(Locked())
    with pytest.raises(TypeError, match="Locked does not pickle: .*n_jobs.*n_jobs=1"):
        pickle.dumps(op)
    # Where nothing has to be pickled it works.
    model = AIPORegressor(Locked(), prior=gaussian_prior())
    with pytest.raises(TypeError, match="op of this AIPORegressor does not pickle: .*n_jobs=1"):
        pickle.dumps(model)
    assert model.predict(np.ones((1, D))).shape == (1, D)


def test_estimators_pickle_with_lambdas_inside():
    Y = np.ones((2, 9))
    for op in (lambda x: (2 * x)[..., 1:, 1:], Physics(GaussianNoiseModel(0.25))):
        model = AIPORegressor(op, prior=gaussian_prior()).fit()
        again = pickle.loads(pickle.dumps(model))
        assert type(again.op) is type(op) and np.array_equal(again.predict(Y), model.predict(Y))
        assert model.op is op and copy.copy(model).op is op and clone(model).op is op
        assert copy.copy(as_operator(op)).obj is op
    plain = pickle.loads(pickle.dumps(AIPORegressor(double, prior=gaussian_prior())))
    assert plain.op is double


def test_checkpoints_know_the_lambdas_of_a_library(tmp_path):
    """Those of a class of a module, as deepinv's physics have them; not those of a notebook."""
    model = AIPORegressor(Physics(), prior=gaussian_prior(), max_evals=10)
    Y = np.ones((2, 9))
    first = model.reconstruct(Y, checkpoint=tmp_path)
    model.set_params(op=Physics())
    assert np.array_equal(first.x, model.reconstruct(Y, checkpoint=tmp_path).x)
    other = Physics()
    other.A_adjoint = lambda y: nn.functional.conv_transpose2d(y, 1.0 * other.kernel.to(y))
    with pytest.raises(ValueError, match="belongs to another run"):
        model.set_params(op=other).reconstruct(Y, checkpoint=tmp_path)


def test_checkpoints_need_functions_that_can_be_told_apart(tmp_path):
    model = AIPORegressor(lambda x: 2 * x, prior=gaussian_prior())
    model.op.__module__ = "__main__"
    with pytest.raises(TypeError, match="checkpoint needs a picklable operator.*top level"):
        model.reconstruct(np.ones((1, D)), checkpoint=tmp_path / "a")
    model = AIPORegressor(double, prior=gaussian_prior())
    first = model.reconstruct(np.ones((2, D)), checkpoint=tmp_path / "b")
    again = model.reconstruct(np.ones((2, D)), checkpoint=tmp_path / "b")
    assert np.array_equal(first.x, again.x)


def double(x):
    return 2 * x


def test_nothing_foreign_is_imported_or_needed():
    """Without loading any that is there, and with every optional library blocked."""
    code = (
        "import sys\n"
        "names = ('pylops', 'deepinv', 'zuko', 'normflows', 'nflows', 'FrEIA', 'torchvision')\n"
        "import numpy as np, torch\n"
        "from scipy.sparse.linalg import aslinearoperator\n"
        "from skaipo import AIPORegressor, GaussianPrior\n"
        "prior = GaussianPrior(np.zeros(3), np.eye(3))\n"
        "twice = lambda x: 2 * x\n"
        "for there in (True, False):\n"
        "    for op in (np.eye(3), aslinearoperator(np.eye(3)), twice, torch.nn.Identity()):\n"
        "        AIPORegressor(op, prior=prior).predict(np.ones((1, 3)))\n"
        "    assert not any(sys.modules.get(name) for name in names)\n"
        "    sys.modules.update(dict.fromkeys(names))\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
