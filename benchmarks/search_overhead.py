"""What a grid search over two processes costs beside the solves, with a large flow as prior.

    python benchmarks/search_overhead.py

60 fits (20 lambdas, 3 folds) of a flow of about 10 MB, with solves as short as they can be. The
overhead is the time of the search less the fit and score times of its candidates, divided by the
number of workers; each of these includes unpacking the weights. The pool is started beforehand,
as it is in any second search. While the search runs, joblib's temporary folder is watched for the
files that carry weights to the workers: one is enough for all of them.
"""

import argparse
import csv
import os
import pickle
import platform
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import sklearn
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import skaipo
from skaipo import AIPORegressor, FlowPrior
from skaipo.flows import RealNVP
from skaipo.metrics import reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising

RESULTS = Path(__file__).resolve().parent / "results" / "search_overhead.csv"


class Watch(threading.Thread):
    """Lists the large files that appear below a folder."""

    def __init__(self, folder, smallest=2**20):
        super().__init__(daemon=True)
        self.folder, self.smallest = folder, smallest
        self.files, self.done = {}, threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            for path in Path(self.folder).rglob("*"):
                try:
                    size = path.stat().st_size
                except FileNotFoundError:
                    continue
                if path.is_file() and size > self.smallest:
                    self.files[path.name] = max(size, self.files.get(path.name, 0))


def quiet_scorer(estimator, Y, X_true):
    """``reconstruct`` does not warn of the rows that are open at ``max_evals``; all are, here."""
    return -reconstruction_error(X_true, estimator.reconstruct(Y).x)


def warm_up(prior):
    """Import what the fits will need, and stay long enough for the next task to go elsewhere."""
    prior.score_samples(np.zeros((1, 64)))
    time.sleep(0.5)


def median_seconds(function, repeats=20):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-channels", type=int, default=470)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    flow = RealNVP((64,), n_steps=8, hidden_channels=args.hidden_channels).eval()
    megabytes = sum(t.nbytes for t in flow.state_dict().values()) / 1e6
    prior = FlowPrior(flow=flow)
    rng = np.random.default_rng(args.seed)
    X = rng.standard_normal((6, 64))
    Y = X + rng.standard_normal(X.shape)
    model = AIPORegressor(Denoising(), prior=prior, noise=GaussianNoise(1.0), max_evals=4)
    search = GridSearchCV(
        model,
        {"lam": np.geomspace(0.03, 10, 20)},
        cv=3,
        scoring=quiet_scorer,
        refit=False,
        n_jobs=args.jobs,
        error_score="raise",
    )
    about = dict(
        fits=60,
        flow=f"RealNVP, {megabytes:.1f} MB",
        jobs=args.jobs,
        seed=args.seed,
        skaipo=skaipo.__version__,
        sklearn=sklearn.__version__,
        torch=torch.__version__,
        joblib=joblib.__version__,
        machine=platform.machine(),
        threads=torch.get_num_threads(),
    )
    folder = tempfile.mkdtemp(prefix="skaipo-search-")
    os.environ["JOBLIB_TEMP_FOLDER"] = folder
    rows = []
    try:
        Parallel(n_jobs=args.jobs)(delayed(warm_up)(prior) for _ in range(2 * args.jobs))
        for repeat in range(args.repeats):
            watch = Watch(folder)
            watch.start()
            # A fresh copy of the module: nothing packed or dumped in an earlier repeat serves.
            search.estimator = clone(model).set_params(
                prior=FlowPrior(flow=pickle.loads(pickle.dumps(flow)))
            )
            start = time.perf_counter()
            search.fit(Y, X)
            seconds = time.perf_counter() - start
            watch.done.set()
            watch.join()
            results = search.cv_results_
            solves = 3 * (results["mean_fit_time"] + results["mean_score_time"]).sum()
            rows.append(
                dict(
                    repeat=repeat,
                    seconds=seconds,
                    seconds_solves=solves / args.jobs,
                    overhead=seconds - solves / args.jobs,
                    weight_files=len(watch.files),
                )
            )
            print(
                f"search {seconds:.2f} s, solves on {args.jobs} workers {solves / args.jobs:.2f} "
                f"s, overhead {rows[-1]['overhead']:.2f} s; files over 1 MiB: {len(watch.files)} "
                f"({', '.join(f'{size / 1e6:.1f} MB' for size in watch.files.values())})",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fresh = FlowPrior(flow=pickle.loads(pickle.dumps(flow)))
    start = time.perf_counter()
    pickle.dumps(fresh)
    times = dict(
        clone_ms=1e3 * median_seconds(lambda: clone(model)),
        first_pickle_ms=1e3 * (time.perf_counter() - start),
        pickle_ms=1e3 * median_seconds(lambda: pickle.dumps(fresh)),
    )
    data = pickle.dumps(fresh)
    times["unpickle_ms"] = 1e3 * median_seconds(lambda: pickle.loads(data).flow_)
    overheads = [row["overhead"] for row in rows]
    print(
        f"overhead of {about['fits']} fits: median {statistics.median(overheads):.2f} s (range "
        f"{min(overheads):.2f} to {max(overheads):.2f}; target: below 1)\n"
        f"clone {times['clone_ms']:.2f} ms, pickle {times['first_pickle_ms']:.1f} ms the first "
        f"time and {times['pickle_ms']:.1f} ms later, unpickle {times['unpickle_ms']:.1f} ms"
    )
    rows = [dict(row, **times, **about) for row in rows]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
