"""Many workers, one answer: whatever n_jobs, backend, batch_size, order of rows, or cluster."""

import os
import signal
import threading
import time

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from problems import drop_entries, random_flow
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
    aipo_path,
)
from skaipo.flows import Flow, Glow, RealNVP
from skaipo.metrics import discrepancy_scorer
from skaipo.noise import GaussianNoise
from skaipo.objective import MAPObjective
from skaipo.operators import Denoising, Inpainting

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SIGMA = 0.5
N = 10


@pytest.fixture(scope="module")
def prior():
    """Images in float32, what users have; kernels then sum in an order of their own."""
    return FlowPrior(flow=random_flow(Glow, (1, 4, 4), torch.float32))


@pytest.fixture(scope="module")
def X(prior):
    return prior.sample(N, random_state=0)


@pytest.fixture(scope="module")
def Y(X):
    return drop_entries(X + SIGMA * np.random.default_rng(1).normal(size=X.shape))


MODELS = {
    "default": dict(),
    "adam": dict(solver="adam", schedule="linear", init="mle", mle_solver="pgd"),
    "lbfgs in z": dict(solver="lbfgs", space="latent"),
    "geometric": dict(schedule="geometric"),
    "lattice": dict(schedule="lattice"),
    "smoothed": dict(smoothing=0.3),
}


def filler(prior, name="adam", **params):
    common = dict(prior=prior, noise=GaussianNoise(SIGMA), max_evals=12, batch_size=4)
    return AIPORegressor(Inpainting(), **{**common, **MODELS[name], **params})


@pytest.mark.parametrize("name", MODELS)
def test_workers_do_not_change_the_answer(name, prior, Y):
    expected = filler(prior, name).reconstruct(Y, history=True)
    assert not np.array_equal(expected.x, np.nan_to_num(Y))
    for backend in ("loky", "threading"):
        with joblib.parallel_config(backend=backend, n_jobs=2):
            result = filler(prior, name).reconstruct(Y, history=True)
        for field in ("x", "objective", "misfit", "log_prob", "n_evals", "status"):
            np.testing.assert_array_equal(getattr(result, field), getattr(expected, field))
        for a, b in zip(result.objective_history, expected.objective_history, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_a_batch_does_not_change_the_answer(name, prior, Y):
    expected = filler(prior, name, batch_size=64).predict(Y)
    for batch_size, n in ((1, 3), (5, N)):
        other = filler(prior, name, batch_size=batch_size)
        np.testing.assert_array_equal(other.predict(Y[:n]), expected[:n])


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_rows_does_not_change_the_answer(name, prior, Y):
    order = np.random.default_rng(2).permutation(N)
    model = filler(prior, name, batch_size=64)
    expected = model.predict(Y)
    np.testing.assert_array_equal(model.predict(Y[order]), expected[order])


def test_vectors_in_float32_agree_to_rounding_and_in_float64_exactly():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 0)):
        vectors = FlowPrior(flow=random_flow(RealNVP, (6,), dtype))
        Y = vectors.sample(N, random_state=0) + 0.3
        model = AIPORegressor(Denoising(), prior=vectors, max_evals=20)
        expected = model.predict(Y)
        for batch_size in (1, 5):
            other = clone(model).set_params(batch_size=batch_size, n_jobs=2)
            np.testing.assert_allclose(other.predict(Y), expected, rtol=0, atol=tolerance)


def test_random_starts_do_not_depend_on_chunks(prior, Y):
    model = FixedLambdaMAP(
        Inpainting(), init="random", prior=prior, max_evals=10, random_state=3, batch_size=64
    )
    expected = model.predict(Y)
    split = clone(model).set_params(batch_size=5, n_jobs=2)
    np.testing.assert_array_equal(split.predict(Y), expected)
    assert not np.array_equal(clone(model).set_params(random_state=4).predict(Y), expected)


@pytest.mark.parametrize("kind", ["torch", "pandas", "image"])
def test_kinds_of_data_in_parallel(kind, prior, Y):
    expected = filler(prior).predict(Y)
    given = {
        "torch": lambda: torch.tensor(Y),
        "pandas": lambda: pd.DataFrame(Y),
        "image": lambda: Y.reshape(N, 1, 4, 4),
    }[kind]()
    out = filler(prior, n_jobs=2).predict(given)
    assert isinstance(out, torch.Tensor) is (kind == "torch")
    np.testing.assert_array_equal(np.asarray(out).reshape(N, -1), expected)


def test_path_and_cross_validation_in_parallel(prior, X, Y):
    params = dict(noise=GaussianNoise(SIGMA), max_evals=16, batch_size=4)
    lams = [0.1, 1.0]
    paths = [
        aipo_path(Y, Inpainting(), prior, lams=lams, n_jobs=n_jobs, **params)[1]
        for n_jobs in (1, 2)
    ]
    np.testing.assert_array_equal(*paths)
    searches = [
        AIPORegressorCV(Inpainting(), lams=lams, cv=2, prior=prior, n_jobs=n_jobs, **params)
        for n_jobs in (1, 2)
    ]
    one, two = (search.fit(Y, X) for search in searches)
    np.testing.assert_array_equal(one.mse_path_, two.mse_path_)
    assert one.lam_ == two.lam_ and one.n_evals_ == two.n_evals_


@pytest.mark.parametrize("outer, inner", [(2, 1), (1, 2)])
def test_searches_in_parallel(outer, inner, prior, X, Y):
    grid = [{"lam": [lam], "noise__sigma": [sigma]} for lam, sigma in ((0.1, 0.3), (1.0, 0.6))]
    expected = GridSearchCV(filler(prior), grid, cv=2).fit(Y, X)
    search = GridSearchCV(filler(prior, n_jobs=inner), grid, cv=2, n_jobs=outer).fit(Y, X)
    for key in ("split0_test_score", "split1_test_score"):
        np.testing.assert_array_equal(search.cv_results_[key], expected.cv_results_[key])
    assert search.best_params_ == expected.best_params_
    np.testing.assert_array_equal(search.predict(Y), expected.predict(Y))


def test_searches_that_train_in_parallel(X):
    Y = X + SIGMA * np.random.default_rng(1).normal(size=X.shape)
    model = filler(GaussianPrior()).set_params(op=Denoising())
    results = [
        GridSearchCV(model, {"prior__shrinkage": [0.1, 0.9]}, cv=2, n_jobs=n_jobs).fit(Y, X)
        for n_jobs in (1, 2)
    ]
    one, two = (search.cv_results_["mean_test_score"] for search in results)
    np.testing.assert_array_equal(one, two)
    assert one[0] != one[1]


def test_joblib_decides_where(prior, Y, monkeypatch):
    # Nobody asked for workers: the rows are solved in this process, on this thread.
    seen = []
    monkeypatch.setattr(MAPObjective, "evaluate", _spied(MAPObjective.evaluate, seen))
    filler(prior).predict(Y)
    here = (os.getpid(), threading.get_ident())
    assert seen and set(seen) == {here}
    seen.clear()
    with joblib.parallel_config(backend="threading", n_jobs=2):
        filler(prior).predict(Y)
    assert seen and here not in seen and {pid for pid, _ in seen} == {os.getpid()}
    seen.clear()
    with joblib.parallel_config(backend="loky", n_jobs=2):
        filler(prior).predict(Y)
    # In other processes, which the spy cannot report from.
    assert here not in seen


def _spied(method, seen):
    def spy(self, *args, **kwargs):
        seen.append((os.getpid(), threading.get_ident()))
        return method(self, *args, **kwargs)

    return spy


def test_a_users_own_flow_reaches_the_workers():
    class Halved(Flow):
        def _normalize(self, x):
            return 2 * x, x.new_full((len(x),), 6 * np.log(2))

        def _generate(self, z):
            return z / 2, z.new_full((len(z),), -6 * np.log(2))

    Halved.__module__, Halved.__qualname__ = "__main__", "Halved"
    prior = FlowPrior(flow=Halved((6,)))
    Y = np.random.default_rng(0).normal(size=(8, 6))
    model = AIPORegressor(Denoising(), prior=prior, solver="lbfgs", max_evals=40, batch_size=2)
    expected = model.predict(Y)
    # ||y - x||^2 + 2 ||x||^2
    np.testing.assert_allclose(expected, Y / 3, atol=1e-3)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        np.testing.assert_array_equal(model.predict(Y), expected)


def test_workers_save_what_they_solve(prior, Y, tmp_path, monkeypatch):
    """In other processes, with a relative path; the number of workers makes no other run."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    expected = filler(prior).predict(Y, checkpoint="a")
    first, *others = sorted(folder.glob("chunk-*.npz"))
    assert len(others) == 2
    for path in others:
        path.unlink()
    kept = first.stat().st_mtime_ns
    found = filler(prior, n_jobs=2, verbose=1).predict(Y, checkpoint="a")
    np.testing.assert_array_equal(found, expected)
    assert all(path.exists() for path in others) and first.stat().st_mtime_ns == kept


def test_weights_travel_as_one_file(tmp_path, monkeypatch):
    # (By joblib's own settings, so that the workers of the tests above will do.)
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path))
    flow = RealNVP((6,), n_steps=4, hidden_channels=256).eval().requires_grad_(False)
    model = AIPORegressor(Denoising(), prior=FlowPrior(flow=flow), max_evals=8)
    Y = np.random.default_rng(0).normal(size=(2, 6))
    expected = model.predict(Y)
    folder = str(tmp_path)

    def work(task):
        # Tasks overlap, so that all of the files that there are can be seen.
        time.sleep(0.05)
        files = [
            os.path.getsize(os.path.join(root, name))
            for root, _, names in os.walk(folder)
            for name in names
        ]
        return os.getpid(), files, task.predict(Y)

    results = joblib.Parallel(n_jobs=2, backend="loky")(
        joblib.delayed(work)(clone(model)) for _ in range(12)
    )
    for pid, files, predicted in results:
        assert pid != os.getpid()
        assert len(files) == 1 and files[0] > 1_000_000
        np.testing.assert_array_equal(predicted, expected)


@pytest.fixture(scope="module")
def client():
    """Two workers of a real cluster on this machine, each its own process."""
    distributed = pytest.importorskip("dask.distributed")
    cluster = distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        host="127.0.0.1",
    )
    with cluster, distributed.Client(cluster) as client:
        client.wait_for_workers(2)
        yield client


def _row_by_row(prior, max_evals=8):
    # tol=0: no row stops early, so that the work is there to be interrupted.
    return filler(prior, batch_size=1, max_evals=max_evals, tol=0.0)


def test_a_cluster_gives_the_same_answer(client, prior, X, Y):
    expected = _row_by_row(prior).predict(Y)
    before = sum(client.run(_tasks_done).values())
    with joblib.parallel_config(backend="dask"):
        np.testing.assert_array_equal(_row_by_row(prior).predict(Y), expected)
        grid = {"lam": [0.1, 1.0]}
        search = GridSearchCV(filler(prior), grid, scoring=discrepancy_scorer, cv=2, refit=False)
        search.fit(Y)
    assert sum(client.run(_tasks_done).values()) > before
    alone = clone(search).fit(Y)
    np.testing.assert_array_equal(
        search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )


def _tasks_done(dask_worker):
    return dask_worker.state.transition_counter


def test_a_worker_may_die(client, prior, Y):
    model = _row_by_row(prior, max_evals=20)
    expected = model.predict(Y)
    pids = client.run(os.getpid)
    assert len(pids) == 2
    victim, pid = next(iter(pids.items()))
    killed = threading.Event()

    def kill_when_it_works():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if client.processing().get(victim):
                os.kill(pid, signal.SIGKILL)
                killed.set()
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_when_it_works)
    with joblib.parallel_config(backend="dask"):
        killer.start()
        result = model.predict(Y)
        killer.join()
    assert killed.is_set()
    np.testing.assert_array_equal(result, expected)
