"""Compare solvers of the MAP problem on 32 x 32 faces: quality against flow evaluations.

    python benchmarks/train_faces_prior.py --size 32 --minutes 25 --flow glow
    python benchmarks/train_faces_prior.py --size 32 --minutes 25 --flow realnvp
    python benchmarks/solvers.py                # everything: about three hours on one core
    python benchmarks/solvers.py --parts compare --tasks cs --images 100

Parts: ``tune`` (lambda, and Adam's learning rate, per method on 40 validation faces), ``compare``
(every method at ``--budgets`` evaluations, everything counted, on test faces), ``reach`` (whether
skaipo reaches with 300 evaluations the objective that Adam ends at after 500 + 1000),
``continuation`` (schedules and starts inside the engine, at equal evaluations), ``path`` (20
lambdas against single solves), ``smoothing`` (PSNR against lambda and smoothing on validation
faces), ``curves`` (objective and PSNR against the budget).

What a solve gave per image is kept in ``benchmarks/results/solvers/`` and not solved again; rows
with means and bootstrap intervals go to ``benchmarks/results/solvers.csv``.
"""

import argparse
import csv
import hashlib
import json
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.exceptions import ConvergenceWarning
from train_faces_prior import DATA, load_faces

import skaipo
from skaipo import AIPORegressor, FixedLambdaMAP, FlowPrior, aipo_path
from skaipo.__main__ import paired_interval
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.objective import MAPObjective
from skaipo.operators import CompressedSensing, Denoising, Inpainting
from skaipo.solvers import Adam

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHAPE = (3, 32, 32)
D = 3 * 32 * 32
EXACT = "skaipo, exact"
PARTS = ("tune", "compare", "reach", "continuation", "path", "smoothing", "curves")
# In Bayes units: at 1 the objective is the negative log-posterior.
LAMS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
# In grey levels; "auto" is half of one where the density is rough.
SMOOTHING = (0, 0.25, 0.5, 1, "auto")
TASKS = {
    "denoise .1": (lambda: Denoising(), 0.1),
    "denoise .2": (lambda: Denoising(), 0.2),
    "inpaint": (lambda: Inpainting(_half()), 0.05),
    "cs": (lambda: CompressedSensing(D // 5, random_state=2), 0.05),
}


def _half():
    """Half of the pixels, the same in every colour."""
    return np.broadcast_to(np.random.default_rng(1).random((32, 32)) < 0.5, SHAPE).copy()


def measure(task, x, seed):
    """Operator, noise model and noisy measurements of faces ``x`` in 0..255."""
    make, sigma = TASKS[task]
    op, noise = make(), GaussianNoise(255 * sigma)
    return op, noise, noise.add_noise(op(x.reshape(len(x), -1)), random_state=seed)


# ---------------------------------------------------------------------------------- the methods


def adam(estimator, init, **params):
    """Adam in x: the paper's AIPO (from the MLE, linear) and its baselines (fixed lambda)."""

    def make(op, noise, prior, lam, budget, rate):
        return estimator(
            op,
            lam,
            prior=prior,
            noise=noise,
            solver=Adam(rate),
            init=init,
            mle_solver="pgd",
            random_state=0,
            max_evals=budget,
            **params,
        )

    return make


def default(op, noise, prior, lam, budget, rate):
    """skaipo as it comes."""
    return AIPORegressor(op, lam, prior=prior, noise=noise, max_evals=budget)


def exact(op, noise, prior, lam, budget, rate):
    """The same by the exact density throughout, where it is rough as well."""
    return default(op, noise, prior, lam, budget, rate).set_params(smoothing=0)


class GlowIP:
    """The procedure of Asim et al. (2020): torch's L-BFGS on the whole batch, in z, from zero.

    Data term plus ``lam ||z||^2 / 2``, summed over the batch into one problem; no line search, as
    in their code, and its learning rate is the step's length.
    """

    def __init__(self, op, noise, prior, lam, budget, rate):
        self.op, self.noise, self.prior = op, noise, prior
        self.lam, self.budget, self.rate = lam, budget, rate

    def reconstruct(self, Y):
        """Reconstruct all rows as one problem; rows that end in NaN stay NaN."""
        op = self.op.bind(SHAPE)
        y = torch.as_tensor(Y, dtype=torch.float32)
        objective = MAPObjective(
            self.prior.flow_, op, self.noise.bind(y.shape[1]), y, "latent", "latent"
        )
        lam = torch.full((len(y),), self.lam)
        z = torch.zeros(len(y), D, requires_grad=True)
        optimiser = torch.optim.LBFGS([z], lr=self.rate, max_iter=self.budget, history_size=100)
        optimiser.param_groups[0].update(max_eval=self.budget - 1, tolerance_change=0)

        def closure():
            evaluation = objective.evaluate(z.detach())
            z.grad = evaluation.gradient(lam) / len(y)
            return evaluation.value(lam).mean()

        optimiser.step(closure)
        x = objective.image(z.detach())
        return skaipo.Reconstruction(
            x=x.numpy(),
            objective=np.full(len(y), np.nan),
            misfit=np.full(len(y), np.nan),
            log_prob=np.full(len(y), np.nan),
            n_evals=objective.n_evals.numpy(),
            n_observed=np.full(len(y), y.shape[1]),
            status=np.where(np.isfinite(x.numpy()).all(1), "budget", "diverged"),
            lam=self.lam,
        )


METHODS = {
    "skaipo": (default, (None,)),
    EXACT: (exact, (None,)),
    "AIPO, Adam": (adam(AIPORegressor, "mle", schedule="linear"), RATES),
    # As it would be run where nobody tunes the learning rate.
    **{
        f"AIPO, Adam at {rate:g}": (adam(AIPORegressor, "mle", schedule="linear"), (rate,))
        for rate in (0.02, 0.05, 0.1)
    },
    "Adam, mle": (adam(FixedLambdaMAP, "mle"), RATES),
    "Adam, zero": (adam(FixedLambdaMAP, "zero"), RATES),
    "Adam, random": (adam(FixedLambdaMAP, "random"), RATES),
    "GlowIP": (GlowIP, (0.01, 0.1, 1.0)),
}


# ------------------------------------------------------------------------------------- the cells


class Bench:
    """Solves with a cache: one file per cell, with the numbers of every image."""

    def __init__(self, args):
        self.args = args
        self.store = RESULTS / "solvers"
        self.store.mkdir(parents=True, exist_ok=True)
        self.faces, self.priors, self.table = {}, {}, []

    def prior(self, flow):
        if flow not in self.priors:
            self.priors[flow] = FlowPrior.load(self.weights(flow))
        return self.priors[flow]

    def weights(self, flow):
        return RESULTS / f"faces_{flow}_32.safetensors"

    def images(self, split, n):
        if split not in self.faces:
            self.faces[split] = load_faces(split, 32, self.args.data)
        return self.faces[split][:n]

    def solve(self, flow, task, split, n, name, make):
        """Objective, PSNR, evaluations and seconds per image of one method on one task."""
        key = "".join(c if c.isalnum() else "-" for c in f"{flow}-{task}-{split}{n}-{name}")
        path = self.store / f"{key}.json"
        if path.exists():
            return {k: np.array(v) for k, v in json.loads(path.read_text()).items()}
        x = self.images(split, n)
        op, noise, y = measure(task, x, self.args.seed)
        prior = self.prior(flow)
        model = make(op, noise, prior)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = model.reconstruct(y)
        seconds = time.perf_counter() - start
        cell = dict(
            psnr=psnr_score(x, result.x, data_range=255, per_image=True),
            objective=result.objective,
            n_evals=result.n_evals,
            seconds=np.full(n, seconds / n),
        )
        path.write_text(json.dumps({k: np.asarray(v, float).tolist() for k, v in cell.items()}))
        print(
            f"{flow:8s}{task:11s}{split}{n} {name:34s} {np.nanmean(cell['psnr']):6.2f} dB"
            f"  objective {np.mean(cell['objective']):9.1f}  {np.max(cell['n_evals']):5.0f} "
            f"evaluations {seconds:6.0f} s",
            flush=True,
        )
        return {k: np.asarray(v, float) for k, v in cell.items()}

    def method(self, flow, task, split, n, method, lam, budget, rate):
        """One of ``METHODS``."""
        make, _ = METHODS[method]
        name = f"{method} {budget} lam {lam:g}" + ("" if rate is None else f" rate {rate:g}")
        return self.solve(
            flow,
            task,
            split,
            n,
            name,
            lambda op, noise, prior: make(op, noise, prior, lam, budget, rate),
        )

    def tuned(self, flow, task, method, budget):
        """Lambda and learning rate of highest mean PSNR on validation faces, by coordinates."""
        # A long budget costs a lot more, and its best lambda is as plain on fewer images.
        n = self.args.validation if budget <= 300 else min(16, self.args.validation)

        def score(lam, rate):
            psnr = self.method(flow, task, "validation", n, method, lam, budget, rate)["psnr"]
            return float(np.mean(np.where(np.isfinite(psnr), psnr, 0.0)))

        rates = METHODS[method][1]
        k, r = LAMS.index(0.5), len(rates) // 2
        best = score(LAMS[k], rates[r])

        def climb(at, size, value):
            """Walk uphill along one of the grids."""
            nonlocal best
            for direction in (-1, 1):
                start = at
                while 0 <= at + direction < size and value(at + direction) > best:
                    at += direction
                    best = value(at)
                if at != start:
                    break
            return at

        r = climb(r, len(rates), lambda i: score(LAMS[k], rates[i]))
        k = climb(k, len(LAMS), lambda i: score(LAMS[i], rates[r]))
        r = climb(r, len(rates), lambda i: score(LAMS[k], rates[i]))
        lam, rate = LAMS[k], rates[r]
        # Between the points of the grids.
        for factor in (2**0.5, 2**0.25):
            lam = max((lam, lam / factor, lam * factor), key=lambda lam: score(lam, rate))
            if len(rates) > 1:
                near = (rate, rate / factor, rate * factor)
                rate = max(near, key=lambda rate: score(lam, rate))
        return lam, rate

    # --------------------------------------------------------------------------------- parts

    def row(self, part, flow, task, what, **numbers):
        self.table.append(dict(part=part, flow=flow, task=task, what=what, **numbers))

    def tune(self, flow, task):
        for budget in self.args.budgets:
            for method in self.args.methods:
                lam, rate = self.tuned(flow, task, method, budget)
                self.row("tune", flow, task, method, budget=budget, lam=lam, rate=rate)

    def compare(self, flow, task):
        for budget in self.args.budgets:
            n = self.args.images if budget <= 300 else min(self.args.images, self.args.long_images)
            base, ours = None, {}
            for method in ("AIPO, Adam", *(m for m in self.args.methods if m != "AIPO, Adam")):
                lam, rate = self.tuned(flow, task, method, budget)
                cell = self.method(flow, task, "test", n, method, lam, budget, rate)
                base = cell if base is None else base
                failed = int((~(cell["psnr"] > 10)).sum())
                mean, low, high = interval(cell["psnr"], self.args.seed)
                gain = interval(cell["psnr"] - base["psnr"], self.args.seed)
                ours[method] = cell["psnr"]
                pair = {}
                if method not in ("skaipo", "AIPO, Adam") and "skaipo" in ours:
                    pair = interval(ours["skaipo"] - cell["psnr"], self.args.seed)
                    names = ("default_minus_it", "default_minus_it_low", "default_minus_it_high")
                    pair = dict(zip(names, pair, strict=True))
                self.row(
                    "compare",
                    flow,
                    task,
                    method,
                    budget=budget,
                    images=n,
                    lam=lam,
                    rate=rate,
                    psnr=mean,
                    psnr_low=low,
                    psnr_high=high,
                    gain=gain[0],
                    gain_low=gain[1],
                    gain_high=gain[2],
                    objective=float(np.mean(cell["objective"])),
                    n_evals=float(np.max(cell["n_evals"])),
                    seconds=float(cell["seconds"][0]),
                    failed=failed,
                    **pair,
                )

    def reach(self, flow, task):
        n = self.args.reach_images
        lam, _ = self.tuned("glow", task, EXACT, 100)
        adam = [
            self.method(flow, task, "test", n, "AIPO, Adam", lam, 1500, rate)
            for rate in self.args.reach_rates
        ]
        ours = self.method(flow, task, "test", n, EXACT, lam, 300, None)
        for rate, cell in zip(self.args.reach_rates, adam, strict=True):
            share = interval(ours["objective"] <= cell["objective"], self.args.seed)
            excess = ours["objective"] / cell["objective"] - 1
            self.row(
                "reach",
                flow,
                task,
                f"skaipo at 300 against AIPO, Adam at 500 + 1000, rate {rate:g}",
                images=n,
                lam=lam,
                rate=rate,
                share=share[0],
                share_low=share[1],
                share_high=share[2],
                excess=float(np.median(excess)),
                excess_worst=float(excess.max()),
                seconds=float(ours["seconds"][0]),
                seconds_adam=float(cell["seconds"][0]),
            )

    def continuation(self, flow, task):
        n = self.args.validation // 2
        lam, _ = self.tuned(flow, task, EXACT, 100)
        for budget in self.args.continuation_budgets:
            for init in ("gaussian", "mle"):
                for schedule in ("direct", "linear", "geometric", "adaptive"):

                    def make(op, noise, prior, budget=budget, init=init, schedule=schedule):
                        return AIPORegressor(
                            op,
                            lam,
                            prior=prior,
                            noise=noise,
                            smoothing=0,
                            init=init,
                            schedule=schedule,
                            max_evals=budget,
                        )

                    name = f"{schedule} from {init} {budget} lam {lam:g}"
                    cell = self.solve(flow, task, "validation", n, name, make)
                    mean, low, high = interval(cell["objective"], self.args.seed)
                    self.row(
                        "continuation",
                        flow,
                        task,
                        f"{schedule} from {init}",
                        budget=budget,
                        images=n,
                        lam=lam,
                        objective=mean,
                        objective_low=low,
                        objective_high=high,
                        psnr=float(np.mean(cell["psnr"])),
                        n_evals=float(np.max(cell["n_evals"])),
                        seconds=float(cell["seconds"][0]),
                    )

    def path(self, flow, task):
        x = self.images("test", self.args.path_images)
        op, noise, y = measure(task, x, self.args.seed)
        prior = self.prior(flow)
        # (That a point equals the single solve with the path's schedule is what the tests check.)
        options = dict(noise=noise, smoothing=0)
        lams, _, along, spent = aipo_path(y, op, prior, return_details=True, **options)
        cheap = aipo_path(
            y, op, prior, schedule="geometric", max_evals=300, return_details=True, **options
        )
        ways = {"lattice": (along, spent), "geometric": cheap[2:], "single": ({}, 0)}
        for k in range(1, len(lams), 2):
            single = AIPORegressor(op, float(lams[k]), prior=prior, **options).reconstruct(y)
            ways["single"][0][k] = single
        singles, _ = ways["single"]
        evaluations = np.mean([result.n_evals.mean() for result in singles.values()])
        flat = np.asarray(x).reshape(len(x), -1)
        for way, (results, spent) in ways.items():
            errors = {k: np.mean((results[k].x.reshape(len(x), -1) - flat) ** 2) for k in singles}
            choice = min(errors, key=errors.get)
            self.row("path", flow, task, f"{way}: lambda of least error", lam=lams[choice])
            if way == "single":
                continue
            excess = np.array(
                [results[k].objective / single.objective - 1 for k, single in singles.items()]
            )
            means = [
                results[k].objective.mean() / single.objective.mean() - 1
                for k, single in singles.items()
            ]
            self.row(
                "path",
                flow,
                task,
                f"20 lambdas, {way}, against the default's single solves",
                images=len(x),
                excess=float(np.median(excess)),
                excess_worst=float(excess.max()),
                excess_mean=float(max(means)),
                share=float(np.mean(excess <= 0.005)),
                n_evals=spent / len(x),
                ratio=spent / len(x) / float(evaluations),
            )

    def smoothing(self, flow, task):
        n = self.args.smoothing_images
        for scale in SMOOTHING:
            for lam in LAMS:

                def make(op, noise, prior, lam=lam, scale=scale):
                    return default(op, noise, prior, lam, 100, None).set_params(smoothing=scale)

                name = f"skaipo, smoothing {scale} 100 lam {lam:g}"
                cell = self.solve(flow, task, "validation", n, name, make)
                mean, low, high = interval(cell["psnr"], self.args.seed)
                self.row(
                    "smoothing",
                    flow,
                    task,
                    f"smoothing {scale}, lambda {lam:g}",
                    budget=100,
                    images=n,
                    lam=lam,
                    psnr=mean,
                    psnr_low=low,
                    psnr_high=high,
                    objective=float(np.mean(cell["objective"])),
                    seconds=float(cell["seconds"][0]),
                )

    def curves(self, flow, task):
        n = self.args.validation // 2
        lams = {m: self.tuned(flow, task, m, 100) for m in (EXACT, "AIPO, Adam")}
        lines = {}
        for method, (_, rate) in lams.items():
            # At one lambda: suboptimality compares one objective.
            lam = lams[EXACT][0]
            for budget in self.args.curve:
                cell = self.method(flow, task, "validation", n, method, lam, budget, rate)
                lines.setdefault(method, []).append(cell)
        best = np.min([c["objective"] for cells in lines.values() for c in cells], axis=0)
        for method, cells in lines.items():
            for budget, cell in zip(self.args.curve, cells, strict=True):
                gap = interval(cell["objective"] / best - 1, self.args.seed)
                self.row(
                    "curves",
                    flow,
                    task,
                    method,
                    budget=budget,
                    images=n,
                    lam=lams[EXACT][0],
                    excess=gap[0],
                    excess_low=gap[1],
                    excess_high=gap[2],
                    psnr=float(np.mean(cell["psnr"])),
                    seconds=float(cell["seconds"][0]),
                )


def interval(values, seed):
    """Mean over images and its 95 % bootstrap interval; failures count as zero."""
    values = np.asarray(values, dtype=float)
    return [
        float(v) for v in paired_interval(np.where(np.isfinite(values), values, 0.0), seed=seed)
    ]


def draw(rows, path):
    """Suboptimality and PSNR against evaluations and seconds per image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["part"] == "curves"]
    names = list(dict.fromkeys((row["flow"], row["task"]) for row in rows))
    figure, axes = plt.subplots(
        3, len(names), figsize=(3.4 * len(names), 8), squeeze=False, layout="constrained"
    )
    for column, (flow, task) in zip(axes.T, names, strict=True):
        mine = [row for row in rows if (row["flow"], row["task"]) == (flow, task)]
        for method in dict.fromkeys(row["what"] for row in mine):
            line = [row for row in mine if row["what"] == method]
            label = {EXACT: "skaipo, smoothing=0", "AIPO, Adam": "the paper's AIPO"}[method]
            for axis, x, y in zip(
                column,
                ("budget", "seconds", "budget"),
                ("excess", "excess", "psnr"),
                strict=True,
            ):
                points = [[float(r[name]) for r in line] for name in (x, y)]
                axis.plot(*points, ".-", label=label)
        for axis in column[:2]:
            # The best of all is zero above the best.
            axis.set_yscale("symlog", linthresh=1e-3)
            axis.set_ylim(bottom=0)
        for axis in column:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter("")
        for axis in column[::2]:
            budgets = sorted({int(row["budget"]) for row in mine})
            axis.set_xticks(budgets, [str(budget) for budget in budgets])
        column[0].set_title(f"{task}, {flow}")
        for axis, label in zip(
            column,
            ("evaluations per image", "seconds per image", "evaluations per image"),
            strict=True,
        ):
            axis.set_xlabel(label)
    for axis, label in zip(
        axes[:, 0],
        ("objective above the best", "objective above the best", "PSNR in dB"),
        strict=True,
    ):
        axis.set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--flows", nargs="+", default=["glow", "realnvp"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[100])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--long-images", type=int, default=32, help="beyond 300 evaluations")
    parser.add_argument("--reach-images", type=int, default=32)
    parser.add_argument("--reach-rates", nargs="+", type=float, default=[0.02])
    parser.add_argument("--continuation-budgets", nargs="+", type=int, default=[100, 300])
    parser.add_argument("--path-images", type=int, default=8)
    parser.add_argument("--smoothing-images", type=int, default=12)
    parser.add_argument("--validation", type=int, default=40)
    parser.add_argument("--curve", nargs="+", type=int, default=[30, 100, 300, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    bench = Bench(args)
    for part in args.parts:
        for flow in args.flows:
            for task in args.tasks:
                getattr(bench, part)(flow, task)
    versions = dict(
        seed=args.seed,
        threads=torch.get_num_threads(),
        skaipo=skaipo.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        sklearn=sklearn.__version__,
        machine=f"{platform.machine()} {platform.system()}",
    )
    path = RESULTS / "solvers.csv"
    identity = ("part", "flow", "task", "what", "budget", "images")
    rows = []
    if path.exists():
        with path.open() as file:
            rows = list(csv.DictReader(file))
    fresh = [
        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (row | versions).items()}
        | dict(prior=hashlib.sha256(bench.weights(row["flow"]).read_bytes()).hexdigest()[:8])
        for row in bench.table
    ]
    keys = {tuple(str(row.get(k, "")) for k in identity) for row in fresh}
    rows = [r for r in rows if tuple(str(r.get(k) or "") for k in identity) not in keys] + fresh
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    for row in fresh:
        print({k: v for k, v in row.items() if k not in versions and v != ""})
    if "curves" in args.parts:
        draw(rows, HERE.parent / "docs" / "images" / "solvers.png")


if __name__ == "__main__":
    main()
