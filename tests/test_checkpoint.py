"""Checkpoints: killed at any moment, a run goes on and gives the same bits; runs never mix."""

import contextlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from dataclasses import make_dataclass
from pathlib import Path

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from problems import drop_entries, gaussian_prior, random_flow
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
)
from skaipo._checkpoint import Checkpoint, describe_run
from skaipo._fingerprint import fingerprint
from skaipo.flows import Glow, RealNVP
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising, Inpainting, MatrixOperator
from skaipo.solvers import LBFGS, Adam, GeometricSchedule

ROOT = Path(__file__).resolve().parents[1]
D, N, N_CHUNKS = 6, 8, 3
FIELDS = ("x", "objective", "misfit", "log_prob", "n_evals", "n_observed", "status", "smoothed")

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture
def Y():
    return measurements()


def measurements():
    return drop_entries(np.random.default_rng(0).normal(size=(N, D)))


def model(cls=AIPORegressor, **params):
    common = dict(prior=gaussian_prior(D), noise=GaussianNoise(0.5), max_evals=8, batch_size=3)
    return cls(**{"op": Denoising(), **common, **params})


def assert_same(a, b):
    for field in FIELDS:
        one, two = getattr(a, field), getattr(b, field)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two, strict=isinstance(one, np.ndarray))
    for field in ("lam_history", "objective_history"):
        one, two = getattr(a, field), getattr(b, field)
        assert (one is None) is (two is None)
        for p, q in zip(one or (), two or (), strict=True):
            np.testing.assert_array_equal(p, q, strict=True)


def chunks(folder):
    return sorted(Path(folder).glob("chunk-*.npz"))


def stamps(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in chunks(folder)}


@contextlib.contextmanager
def no_solves(monkeypatch):
    """Fail where a chunk is solved."""

    def refuse(*args):
        raise AssertionError("a finished chunk was solved again")

    with monkeypatch.context() as patch:
        patch.setattr("skaipo.estimators._base.solve_chunk", refuse)
        yield


# ------------------------------------------------------------------------------ the same bits

MODELS = {
    "aipo": lambda: model(),
    "the paper's": lambda: model(
        solver="adam", schedule="linear", init="mle", mle_solver="pgd", max_evals=12
    ),
    "several starts": lambda: model(n_starts=4, max_evals=16, random_state=0),
    "adaptive": lambda: model(schedule="adaptive", init="mle"),
    "latent lbfgs": lambda: model(solver="lbfgs", space="latent", schedule="lattice"),
    "fixed lambda": lambda: model(FixedLambdaMAP, init="zero"),
    "random": lambda: model(FixedLambdaMAP, init="random", random_state=3),
    "transformer": lambda: model(AIPOTransformer),
}


@pytest.mark.parametrize(
    "name, history", [("aipo", False), ("random", False), *((name, True) for name in MODELS)]
)
def test_resumes_with_the_same_bits(name, history, Y, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    expected = MODELS[name]().reconstruct(Y, history=history)
    assert_same(MODELS[name]().reconstruct(Y, history=history, checkpoint=folder), expected)
    assert len(chunks(folder)) == N_CHUNKS
    with no_solves(monkeypatch):
        assert_same(MODELS[name]().reconstruct(Y, history=history, checkpoint=folder), expected)
    for k in (2, 0):
        chunks(folder)[k].unlink()
    kept = stamps(folder)
    assert_same(MODELS[name]().reconstruct(Y, history=history, checkpoint=str(folder)), expected)
    assert len(chunks(folder)) == N_CHUNKS
    assert kept.items() <= stamps(folder).items()


def test_predict_and_transform(Y, tmp_path, monkeypatch):
    X = np.random.default_rng(1).normal(size=(N, D))
    mask = np.random.default_rng(2).random(Y.shape) < 0.8
    mask[:, 0] = True
    Y = np.nan_to_num(Y)
    search = model(AIPORegressorCV, lams=[0.1, 1.0], cv=2).fit(Y, X)
    for k, fitted in enumerate([model(), model(FixedLambdaMAP), search, model(AIPOTransformer)]):
        method = fitted.transform if k == 3 else fitted.predict
        expected = method(Y, mask)
        np.testing.assert_array_equal(method(Y, mask, tmp_path / str(k)), expected)
        with no_solves(monkeypatch):
            again = method(Y, mask=mask, checkpoint=tmp_path / str(k))
        np.testing.assert_array_equal(again, expected)
    pipeline = make_pipeline(model())
    np.testing.assert_array_equal(
        pipeline.predict(Y, mask=mask, checkpoint=tmp_path / "0"), model().predict(Y, mask)
    )


def test_a_tensor_and_an_array_of_the_same_numbers_are_the_same_run(Y, tmp_path, monkeypatch):
    expected = model().predict(torch.tensor(Y))
    model().predict(Y, checkpoint=tmp_path / "a")
    with no_solves(monkeypatch):
        out = model().predict(torch.tensor(Y), checkpoint=tmp_path / "a")
    assert isinstance(out, torch.Tensor) and torch.equal(out, expected)


def test_images_of_a_flow(tmp_path, monkeypatch):
    # Both what solving caches in the flow, and another copy of its weights, are the same prior.
    def make():
        prior = FlowPrior(flow=random_flow(Glow, (1, 4, 4), torch.float32))
        return model(op=Inpainting(np.arange(16) % 2 == 0), prior=prior)

    Y = np.random.default_rng(0).normal(size=(4, 1, 4, 4)).astype(np.float32)
    first = make()
    expected = first.predict(Y, checkpoint=tmp_path / "a")
    with no_solves(monkeypatch):
        for other in (first, clone(first), make(), pickle.loads(pickle.dumps(first))):
            out = other.predict(Y, checkpoint=tmp_path / "a")
            np.testing.assert_array_equal(out, expected, strict=True)


def test_saved_by_the_workers(Y, tmp_path, monkeypatch):
    expected = model().reconstruct(Y, history=True)
    threads, save = set(), Checkpoint.save
    with joblib.parallel_config(backend="threading", n_jobs=2), monkeypatch.context() as patch:
        patch.setattr(
            Checkpoint, "save", lambda *a: (threads.add(threading.get_ident()), save(*a))[1]
        )
        result = model().reconstruct(Y, history=True, checkpoint=tmp_path / "a")
    assert_same(result, expected)
    assert threads and threading.get_ident() not in threads


# -------------------------------------------------------------------------------------- kill -9

SCRIPT = """
import sys, warnings
import numpy as np
from skaipo import AIPORegressor
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.noise import GaussianNoise
from skaipo.operators import Inpainting
from skaipo.solvers import Adam

def run(checkpoint=None):
    warnings.simplefilter("ignore")
    Y = load_digits_split()[1][:{n}]
    solver = Adam()
    # Iterated in another order in every process.
    solver.tags = {{"one", "two", "three", "four"}}
    model = AIPORegressor(
        Inpainting(np.arange(64) % 3 > 0), prior=load_digits_prior("cpu"), noise=GaussianNoise(1.0),
        solver=solver, max_evals=4, batch_size=1,
    )
    return model.reconstruct(Y, history=True, checkpoint=checkpoint)

if __name__ == "__main__":
    run(sys.argv[1])
"""


def test_killed_three_times(tmp_path):
    n = 16
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(n=n))
    folder = tmp_path / "checkpoint"
    command = [sys.executable, str(script), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    delays = np.random.default_rng(0).uniform(0, 0.2, size=3)
    kept, killed = {}, 0
    for delay in delays:
        process = subprocess.Popen(command, env=env)
        while len(chunks(folder)) <= len(kept) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
        # What was finished before has not been touched, and there is more of it.
        assert kept.items() <= stamps(folder).items()
        kept = stamps(folder)
        if killed == 1:
            assert 0 < len(kept) < n
    assert killed
    # This process is the fourth, and as good as any.
    namespace = {"__name__": "script"}
    exec(compile(script.read_text(), "script", "exec"), namespace)
    result = namespace["run"](folder)
    assert kept.items() <= stamps(folder).items()
    assert len(chunks(folder)) == n
    assert_same(result, namespace["run"]())


def test_what_a_killed_process_leaves_is_harmless(Y, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    # Before there was a manifest, and half written.
    old, new = folder / ".skaipo-0123.tmp", folder / ".skaipo-4567.tmp"
    for path in (old, new):
        path.write_bytes(b"PK half a file")
    os.utime(old, (time.time() - 5000,) * 2)
    expected = model().predict(Y)
    np.testing.assert_array_equal(model().predict(Y, checkpoint=folder), expected)
    # The other one may be that of a process that is still at work.
    assert not old.exists() and new.exists()
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        new.name,
        *(path.name for path in chunks(folder)),
    }


def test_two_processes_in_one_directory(Y, tmp_path):
    expected = model().predict(Y)
    results, errors = [], []
    barrier = threading.Barrier(4)

    def work(noise):
        one = model(noise=noise)
        barrier.wait()
        try:
            results.append((noise, one.predict(Y, checkpoint=tmp_path / "a")))
        except ValueError as error:
            errors.append(str(error))

    # Two runs that are the same and two that are not start together: one pair wins.
    noises = [GaussianNoise(0.5), GaussianNoise(0.5), None, None]
    threads = [threading.Thread(target=work, args=(noise,)) for noise in noises]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 2 and len(errors) == 2
    assert all("noise" in error for error in errors)
    (first, x), (second, same) = results
    assert type(first) is type(second)
    np.testing.assert_array_equal(x, same)
    np.testing.assert_array_equal(x, expected if first else model(noise=None).predict(Y))


def test_without_links_chunks_of_two_runs_do_not_mix(Y, tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    other = model(lam=2.0)
    other.predict(Y, checkpoint=tmp_path / "b")
    model().predict(Y, checkpoint=tmp_path / "a")
    os.replace(chunks(tmp_path / "b")[1], chunks(tmp_path / "a")[1])
    with pytest.warns(UserWarning, match="chunk-000001.npz' cannot be read .it is of another run"):
        result = model().predict(Y, checkpoint=tmp_path / "a")
    np.testing.assert_array_equal(result, model().predict(Y))


# ---------------------------------------------------------------------------------- other runs


class Halved(Denoising):
    """A user's own operator, with something in it that no version tells."""

    def __init__(self, note=None):
        self.note = note


CHANGES = {
    "lam": (dict(lam=2.0), r"lams \(\[1\.0\] there, \[2\.0\] here\)"),
    "max_evals": (dict(max_evals=13), r"max_evals \(8 there, 13 here\)"),
    "tol": (dict(tol=1e-3), r"tol \(0\.0001 there, 0\.001 here\)"),
    "batch_size": (dict(batch_size=4), r"batch_size \(3 there, 4 here\)"),
    "space": (dict(space="latent"), r"space \('image' there, 'latent' here\)"),
    "penalty": (dict(penalty="latent"), "penalty"),
    "smoothing": (dict(smoothing=0.5), r"smoothing \(0\.0 there, 0\.5 here\)"),
    "solver": (dict(solver="lbfgs"), r"method \(Hybrid\(\) there, LBFGS\(\) here\)"),
    "solver's parameter": (dict(solver=Adam(0.03)), "method .*learning_rate=0.03"),
    "schedule": (dict(schedule="geometric"), r"schedule \(DirectSchedule\(\) there, Geometric"),
    "init": (dict(init="mle"), r"start \(\['gaussian'\] there, \['mle'\] here\)"),
    "n_starts": (dict(n_starts=2), r"start \(\['gaussian'\] there, \['gaussian', 'zero'\] here\)"),
    "mle_solver": (dict(mle_solver="pgd"), r"mle_solver \('lbfgs' there, 'pgd' here\)"),
    "operator": (dict(op=Inpainting(np.arange(D) > 0)), r"op \(Denoising\(\) there, Inpainting"),
    "noise": (dict(noise=GaussianNoise(0.6)), r"noise \(GaussianNoise\(sigma=0\.5\) there"),
    "prior": (dict(prior=gaussian_prior(D, seed=1)), r"prior \(other contents\)"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that is over; what is refused leaves it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    model().predict(measurements(), checkpoint=folder)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused(name, Y, finished):
    params, message = CHANGES[name]
    before = stamps(finished)
    with pytest.raises(
        ValueError, match=f"belongs to another run. What differs: {message}"
    ) as info:
        model(**params).predict(Y, checkpoint=finished)
    assert ";" not in str(info.value).partition("differs:")[2]
    assert "Pass another directory, or delete this one" in str(info.value)
    assert stamps(finished) == before


def test_other_measurements_are_refused(Y, tmp_path):
    model().predict(Y, checkpoint=tmp_path / "a")
    value, nan, mask = Y.copy(), Y.copy(), np.ones(Y.shape, dtype=bool)
    spot = tuple(np.argwhere(np.isfinite(Y[:, 0]) & np.isfinite(Y[:, 1]))[0]) + (0,)
    value[spot] = np.nextafter(value[spot], 9)
    nan[spot], mask[spot] = np.nan, False
    for other in (value, nan, Y[:7], Y[::-1]):
        with pytest.raises(ValueError, match=r"What differs: measurements \(.*\)\. Pass another"):
            model().predict(other, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match="What differs: measurements"):
        model().predict(Y, mask, checkpoint=tmp_path / "a")
    # NaN and a mask say the same thing.
    model().predict(Y, mask, checkpoint=tmp_path / "b")
    model().predict(nan, checkpoint=tmp_path / "b")


def test_several_differences_are_all_named(Y, tmp_path):
    model().predict(Y, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match=r"max_evals .*; history \(False there, True here\)\."):
        model(max_evals=14).reconstruct(Y, history=True, checkpoint=tmp_path / "a")
    with pytest.raises(ValueError, match=r"schedule .*; start \(\['gaussian'\] there, \['zero'\]"):
        model(FixedLambdaMAP, init="zero").predict(Y, checkpoint=tmp_path / "a")


def test_other_versions_and_precisions_are_refused(Y, tmp_path, monkeypatch):
    model().predict(Y, checkpoint=tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        with pytest.raises(ValueError, match=r"differs: version of torch \(.* there, 9.9.9 here\)"):
            model().predict(Y, checkpoint=tmp_path / "a")
        patch.setattr("importlib.metadata.version", lambda name: "77")
        with pytest.raises(ValueError, match="version of skaipo .*; version of torch"):
            model().predict(Y, checkpoint=tmp_path / "a")
    single = model(prior=FlowPrior(flow=random_flow(dtype=torch.float32)))
    double = model(prior=FlowPrior(flow=random_flow(dtype=torch.float64)))
    single.predict(Y, checkpoint=tmp_path / "b")
    with pytest.raises(ValueError, match=r"dtype \('torch.float32' there, 'torch.float64' here\)"):
        double.predict(Y, checkpoint=tmp_path / "b")


def test_every_field_of_a_problem_counts(Y):
    # Those too that this version does not have yet.
    Wider = make_dataclass("Wider", ["prior", "op", "n_starts", "extra"])
    y = torch.tensor(Y)
    args = (gaussian_prior(D), Denoising().bind((D,)))
    run = describe_run(Wider(*args, np.int64(2), LBFGS()), y, "mle", 3)
    assert run["n_starts"] == 2 and run["extra"]["is"] == "LBFGS()"
    assert json.loads(json.dumps(run)) == run


def test_the_source_of_a_users_operator_counts(tmp_path, monkeypatch):
    path = tmp_path / "their_operator.py"
    text = "class Op:\n    def __init__(self):\n        self.a = 1\n\n    def f(self, x):\n        "
    prints = []
    monkeypatch.syspath_prepend(tmp_path)
    for body in ("return x  # as it is\n", "return x\n", "return 2 * x\n"):
        path.write_text(text + body)
        code = "import their_operator as t; from skaipo._fingerprint import fingerprint as f"
        namespace = {}
        sys.modules.pop("their_operator", None)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        exec(code, namespace)
        sys.dont_write_bytecode = before
        prints.append(namespace["f"](namespace["t"].Op()))
    sys.modules.pop("their_operator")
    assert prints[0] == prints[1] != prints[2]


def test_the_values_that_an_operator_reads_count(tmp_path):
    """Also where there is no source to be read, as at a prompt."""
    text = """
from skaipo._fingerprint import fingerprint
{values}
def f(x, k={k}):
    global calls
    calls += 1
    return A * x * {factor} + k
class Op:
    def f(self, x):
        return A * x * {factor}
found = fingerprint(f), fingerprint(Op())
"""
    same = dict(values="import numpy as np; A, calls = np.ones(2), 0", k=1, factor=1)
    variants = [
        same,
        {**same, "values": "import numpy as np; A, calls = np.ones(2), 5"},
        {**same, "values": "import numpy as np; A, calls = np.zeros(2), 0"},
        {**same, "k": 2},
        {**same, "factor": 3},
    ]
    prints = []
    for variant in variants:
        module = types.ModuleType("__prompt__")
        sys.modules["__prompt__"] = module
        exec(text.format(**variant), vars(module))
        prints.append(module.found)
    del sys.modules["__prompt__"]
    first, counted, array, default, code = prints
    # What it counts itself says nothing of what it does.
    assert counted == first
    assert array[0] != first[0] and array[1] != first[1]
    assert default[0] != first[0] and default[1] == first[1]
    assert code[0] != first[0] and code[1] != first[1]


def test_fingerprints_are_by_value():
    a = np.arange(3.0)
    assert fingerprint([a, a]) == fingerprint([a, a.copy()])
    assert fingerprint({"x": 1, "y": {3, 4}}) == fingerprint({"y": {4, 3}, "x": 1})
    looped = [1]
    looped.append(looped)
    matrix = sp.random(5, 4, 0.5, "csr", random_state=0)
    before = fingerprint(matrix)
    assert matrix.has_sorted_indices and matrix.has_canonical_format
    assert fingerprint(matrix) == before
    op = MatrixOperator(np.eye(3)).bind((3,))
    before = fingerprint(op)
    op.norm()
    op.forward(torch.ones(1, 3))
    assert fingerprint(op) == before
    values = [
        *(None, True, 1, 1.0, -0.0, 0.0, "1", b"1", (), [], [1], (1,), [[1], []], [[], [1]]),
        *(a, a.astype(np.float32), a[:, None], a + 1, torch.tensor(a), torch.tensor(a).conj()),
        *(torch.empty(0), torch.tensor(1.0), np.array([None, "x"], dtype=object), Halved, np.add),
        *(looped, matrix, matrix * 2, np.random.RandomState(0), np.random.RandomState(1)),
        *(np.float64(1), np.dtype("f4"), torch.float32, len, Adam.start, Path("a"), range(3)),
    ]
    prints = [fingerprint(value) for value in values]
    # (The conjugate of real numbers is the one pair here that is equal.)
    assert len(set(prints)) == len(values) - 1


# -------------------------------------------------------------------------------- random starts


def test_random_starts_need_an_integer(Y, tmp_path):
    start = model(FixedLambdaMAP, init="random")
    with pytest.raises(ValueError, match="needs an integer random_state .* got None"):
        start.predict(Y, checkpoint=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    start.set_params(random_state=0).predict(Y, checkpoint=tmp_path / "a")
    hint = "start .other contents.*Random starts are the same again only if random_state is an int"
    with pytest.raises(ValueError, match=hint):
        start.set_params(random_state=1).predict(Y, checkpoint=tmp_path / "a")
    # A generator that has moved on is another start as well.
    moving = clone(start).set_params(random_state=np.random.RandomState(0))
    moving.random_state.rand()
    with pytest.raises(ValueError, match=hint):
        moving.predict(Y, checkpoint=tmp_path / "a")


# ------------------------------------------------------------------------------- broken and alien


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def _empty(path):
    path.write_bytes(b"")


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)


def _pickled(path):
    path.write_bytes(pickle.dumps([1, 2]))


@pytest.mark.parametrize("damage", [_truncate, _empty, _flip, _pickled])
def test_a_broken_chunk_is_solved_again(damage, Y, tmp_path, monkeypatch):
    expected = model().reconstruct(Y, history=True, checkpoint=tmp_path)
    before = stamps(tmp_path)
    damage(chunks(tmp_path)[2])
    with pytest.warns(UserWarning, match="chunk-000002.npz' cannot be read .* is solved again"):
        assert_same(model().reconstruct(Y, history=True, checkpoint=tmp_path), expected)
    after = stamps(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["chunk-000002.npz"]
    with no_solves(monkeypatch):
        assert_same(model().reconstruct(Y, history=True, checkpoint=tmp_path), expected)


def test_a_users_own_files_are_left_alone(Y, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds files \(thesis.tex\) but no manifest.json"):
        model().predict(Y, checkpoint=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError):
        model().predict(Y, checkpoint=tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"name": "my web app"}', '{"format": 2, "run": 3}']
)
def test_a_manifest_of_something_else(text, Y, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="not skaipo's, or is damaged .* Pass another directory"):
        model().predict(Y, checkpoint=tmp_path)
    # (Chunks of format 1 do not say which rows were smoothed.)
    for other in (1, 3):
        (tmp_path / "manifest.json").write_text(f'{{"format": {other}, "run": {{}}}}')
        with pytest.raises(ValueError, match=f"has format {other}, this version of skaipo reads 2"):
            model().predict(Y, checkpoint=tmp_path)


def test_the_manifest_is_for_people_too(Y, tmp_path):
    model(solver=Adam(0.03), schedule=GeometricSchedule()).predict(Y, checkpoint=tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "Adam(learning_rate=0.03)" in text and "8 rows of 6 values" in text
    assert re.search(r'"torch": "\d', text) and len(text.splitlines()) > 20
    for word in ("n_jobs", "verbose"):
        assert word not in text
    # No pickle anywhere.
    for path in chunks(tmp_path):
        with np.load(path, allow_pickle=False) as file:
            assert all(not file[name].dtype.hasobject for name in file.files)


@pytest.mark.parametrize("path", [True, 3, ["a"]])
def test_what_is_no_path(path, Y):
    with pytest.raises(TypeError, match="checkpoint must be the path of a directory"):
        model().predict(Y, checkpoint=path)
    with pytest.raises(ValueError, match="checkpoint must be the path .* empty string"):
        model().predict(Y, checkpoint="")


@pytest.mark.parametrize("note", [lambda x: x, threading.Lock(), (i for i in [1])])
def test_what_cannot_be_pickled(note, Y, tmp_path):
    with pytest.raises(TypeError, match="checkpoint needs a picklable operator, .*Halved"):
        model(op=Halved(note)).predict(Y, checkpoint=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_an_error(Y, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model().predict(Y, checkpoint=tmp_path / "a")
    chunks(tmp_path / "a")[0].unlink()
    # A limit of the size of files fails like a full disk, in the middle of a write.
    for folder in ("a", "b"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        try:
            with pytest.raises(OSError):
                model().predict(Y, checkpoint=tmp_path / folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / folder).glob(".skaipo-*"))
    # And when there is room again, it goes on.
    np.testing.assert_array_equal(model().predict(Y, checkpoint=tmp_path / "a"), model().predict(Y))
    with pytest.raises(OSError):
        model().predict(Y, checkpoint="/proc/skaipo")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory(Y, tmp_path):
    expected = model().predict(Y, checkpoint=tmp_path)
    tmp_path.chmod(0o500)
    try:
        # There is nothing to write.
        np.testing.assert_array_equal(model().predict(Y, checkpoint=tmp_path), expected)
        tmp_path.chmod(0o700)
        chunks(tmp_path)[0].unlink()
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            model().predict(Y, checkpoint=tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_any_result_comes_back_as_it_was(tmp_path):
    store = Checkpoint(tmp_path, {"a": 1})
    ragged = [np.arange(3.0), np.empty(0), np.arange(2.0)]
    result = (
        {
            "arrays": ("x", "status"),
            "x": np.eye(2, dtype=np.float32),
            "status": np.array(["a", "bc"]),
        },
        [
            [ragged, ragged[:1]],
            [np.ones((2, 3)), np.ones((0, 3))],
            [np.array(1.0), np.arange(2)],
            [],
        ],
        [np.float32(0.1), np.nan, 0.1, -0.0, 7, True, None, "é", (), {}],
    )
    store.save(3, result)
    _assert_identical(pickle.loads(pickle.dumps(store)).load(3), result)
    assert store.load(2) is None
    for wrong in (np.array([None]), {1: 2}, object()):
        with pytest.raises(TypeError, match="A checkpoint"):
            store.save(4, wrong)
    assert len(list(tmp_path.iterdir())) == 2


def _assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray | np.generic):
        np.testing.assert_array_equal(a, b, strict=True)
        assert not isinstance(a, np.ndarray) or a.flags.writeable
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            _assert_identical(one, two)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _assert_identical(a[key], b[key])
    else:
        assert repr(a) == repr(b)


def test_a_prior_that_was_loaded_is_the_one_that_was_saved(Y, tmp_path, monkeypatch):
    prior = GaussianPrior().fit(np.random.default_rng(0).normal(size=(50, D)))
    flow = FlowPrior(flow=random_flow(RealNVP, (D,), torch.float32))
    flow.save(tmp_path / "prior.safetensors")
    pairs = [
        (prior, pickle.loads(pickle.dumps(prior))),
        (flow, FlowPrior.load(tmp_path / "prior.safetensors", device="cpu")),
    ]
    for k, (one, two) in enumerate(pairs):
        expected = model(prior=one).predict(Y, checkpoint=tmp_path / str(k))
        with no_solves(monkeypatch):
            again = model(prior=two).predict(Y, checkpoint=tmp_path / str(k))
        np.testing.assert_array_equal(again, expected)
