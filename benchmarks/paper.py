"""The experiments of Liu et al. (2023), "Optimization for Amortized Inverse Problems", run again.

    python benchmarks/paper.py --profile small     # make paper-small: minutes, on 2 cores
    python benchmarks/paper.py --profile full      # for a GPU
    python benchmarks/paper.py --profile full --plan
    python benchmarks/report.py                    # docs/benchmarks.md from the rows

Flows x tasks x lambdas x methods: AIPO (from the MLE, lambda rising in equal steps) against fixed
lambda from the MLE, from zero and from random latents, all by Adam in x and at equal numbers of
flow evaluations, starts included; and skaipo at a tenth of them, as it comes and with
``smoothing=0``. Lambda is in Bayes form: at 1 the objective is the negative log-posterior, in
nats.

The budget is the paper's: 500 iterations of projected gradient for the MLE where the measurements
leave a choice (compressed sensing, inpainting), which random and zero get as extra evaluations,
and 1000 for the optimisation; ``--evals`` scales both. Adam's learning rate is chosen for each
method on validation images, by the mean objective, among ``RATES`` and, where the best is at an
end of them, beyond.

Faces need the images (``--faces``) and the priors of ``train_faces_prior.py``; without them the
small profile takes scikit-learn's digits and the prior that ships with skaipo, so that it runs on a
fresh clone. What a solve gave per image is kept in ``benchmarks/results/paper/`` and not solved
again, so that a killed run goes on where it stopped: a finished solve is a file, and its name says
all that it depends on, with a digest of the prior's weights (but not skaipo's version: remove the
folder after a change to the solvers). Rows with means, standard deviations, paired win rates and
bootstrap intervals go to ``benchmarks/results/paper.csv``.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import time
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import sklearn
import torch
from joblib import Parallel, delayed
from scipy.ndimage import gaussian_filter
from sklearn.exceptions import ConvergenceWarning
from solvers import METHODS as SOLVERS
from train_faces_prior import DATA, load_faces

import skaipo
from skaipo import FlowPrior
from skaipo.__main__ import paired_interval
from skaipo.datasets import load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting
from skaipo.solvers import surrogate_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

AIPO, OURS, EXACT = "AIPO, Adam", "skaipo", "skaipo, exact"
BASELINES = ("Adam, mle", "Adam, zero", "Adam, random")
# These have a learning rate, which is tuned, and the whole budget.
PAPERS = (AIPO, *BASELINES)
METHODS = (*PAPERS, OURS, EXACT)
# Adam's, in standard deviations of the data; doubled or halved on where the best is at an end.
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
LAMS = (0.3, 0.5, 1.0, 1.5, 2.0)
EVALS = 1500
TENTH = 10
# Of the 64 x 64 x 3 images for which the paper counts its measurements.
PAPER_SIZE = 12288
N_VALIDATION_DIGITS = 40
METRICS = ("objective", "misfit", "psnr", "ssim", "n_evals", "seconds", "cpu_seconds")


# --------------------------------------------------------------------------------- the problems


def _half(shape, seed):
    """Half of the pixels, the same in every colour."""
    pixels = (
        np.random.default_rng(seed).permutation(math.prod(shape[1:])) < math.prod(shape[1:]) // 2
    )
    return np.broadcast_to(pixels.reshape(shape[1:]), shape).copy()


def _box(shape, seed):
    """All but a centred square of 0.3 times the image's side."""
    mask = np.ones(shape, dtype=bool)
    side = round(0.3 * shape[1])
    low = (shape[1] - side) // 2
    mask[:, low : low + side, low : low + side] = False
    return mask


def _sensing(m):
    def make(shape, seed):
        return CompressedSensing(round(m / PAPER_SIZE * math.prod(shape)), random_state=seed)

    return make


@dataclass(frozen=True)
class Task:
    """Operator as a function of the images' shape and a seed; sigma for images in 0..1."""

    operator: object
    sigma: float
    kind: str
    label: str


TASKS = {
    "denoising": Task(lambda shape, seed: Denoising(), 0.1, "denoising", "denoising"),
    "cs500": Task(_sensing(500), 0.05, "cs2500", "compressed sensing, m/n = 500/12288"),
    "cs1000": Task(_sensing(1000), 0.05, "cs2500", "compressed sensing, m/n = 1000/12288"),
    "cs2500": Task(_sensing(2500), 0.05, "cs2500", "compressed sensing, m/n = 2500/12288"),
    "inpainting": Task(
        lambda shape, seed: Inpainting(_half(shape, seed)),
        0.05,
        "inpainting",
        "inpainting, half missing",
    ),
    "box": Task(
        lambda shape, seed: Inpainting(_box(shape, seed)), 0.05, "inpainting", "inpainting, box"
    ),
}


def budget(task, evals):
    """Evaluations of the paper's methods: those for the MLE only where there is one to find."""
    return evals - evals // 3 if task == "denoising" else evals


# ------------------------------------------------------------------------------ images and priors


@dataclass(frozen=True)
class Source:
    """Where images and priors come from."""

    name: str
    faces: Path = DATA
    priors: Path = RESULTS

    @property
    def data_range(self):
        return 255.0 if self.name == "faces" else 16.0

    def weights(self, flow):
        """The prior's file."""
        if self.name == "digits":
            return Path(str(files("skaipo") / "data" / f"digits_{flow}.safetensors"))
        return self.priors / f"faces_{flow}_32.safetensors"

    def missing(self, flows):
        """Files that are not there."""
        needed = [self.weights(flow) for flow in flows]
        if self.name == "faces":
            needed.append(self.faces)
        return [path for path in needed if not path.is_file()]


@cache
def load_images(source, split):
    """Clean images (n, d), never seen by the prior."""
    if source.name == "faces":
        x = load_faces(split, 32, source.faces)
        return x.reshape(len(x), -1)
    _, x, _, _ = load_digits_split()
    return {"validation": x[:N_VALIDATION_DIGITS], "test": x[N_VALIDATION_DIGITS:], "ood": x[:0]}[
        split
    ]


@cache
def load_prior(source, flow):
    """The prior, with what skaipo estimates once per prior already estimated."""
    prior = FlowPrior.load(source.weights(flow), device="auto")
    surrogate_of(prior.flow_)
    return prior


@cache
def digest(path):
    """A few characters that tell one file from another."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def ssim(x, y, data_range):
    """Structural similarity of two images ``(c, h, w)`` (Wang et al., 2004).

    Their Gaussian window (sigma 1.5, 11 x 11) and constants, each colour by itself, averaged over
    the colours and over all pixels, with the image mirrored at its border.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)

    def blur(image):
        return gaussian_filter(image, (0, 1.5, 1.5), truncate=3.5)

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    return float((luminance * (2 * vxy + c2) / (vx + vy + c2)).mean())


# ------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Cell:
    """One solve: a method with all its settings on images ``start`` to ``stop`` of a split."""

    source: Source
    flow: str
    task: str
    lam: float
    method: str
    rate: float | None
    evals: int
    split: str
    start: int
    stop: int
    seed: int

    @property
    def max_evals(self):
        whole = budget(self.task, self.evals)
        return whole if self.method in PAPERS else max(4, whole // TENTH)

    def path(self, store):
        """Where the results are kept."""
        folder = f"{self.source.name}-{self.flow}-{digest(self.source.weights(self.flow))}"
        method = "".join(c for c in self.method if c.isalnum())
        rate = "" if self.rate is None else f"-rate{self.rate:g}"
        name = (
            f"{self.task}-lam{self.lam:g}-{method}{rate}-evals{self.max_evals}"
            f"-{self.split}{self.start}to{self.stop}-seed{self.seed}.json"
        )
        return store / folder / name

    def solve(self):
        """Numbers per image, a dict of lists."""
        prior = load_prior(self.source, self.flow)
        shape, task = prior.event_shape_, TASKS[self.task]
        x = load_images(self.source, self.split)[self.start : self.stop]
        noise = GaussianNoise(task.sigma * self.source.data_range)
        op = task.operator(shape, self.seed)
        clean = op.bind(shape)(x)
        # Image by image: its noise must not depend on the images that are solved along with it.
        y = np.concatenate(
            [
                noise.add_noise(
                    row[None], random_state=zlib.crc32(f"{self.seed} {self.split} {i}".encode())
                )
                for i, row in enumerate(np.asarray(clean), start=self.start)
            ]
        )
        make, _ = SOLVERS[self.method]
        model = make(op, noise, prior, self.lam, self.max_evals, self.rate)
        model.set_params(random_state=zlib.crc32(f"start {self.seed} {self.start}".encode()))
        begin, cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = model.reconstruct(y)
        seconds = (time.perf_counter() - begin) / len(x)
        cpu = (time.process_time() - cpu) / len(x)
        size = self.source.data_range
        numbers = dict(
            objective=result.objective,
            misfit=result.misfit,
            psnr=psnr_score(x, result.x, data_range=size, per_image=True),
            ssim=[
                ssim(a.reshape(shape), b.reshape(shape), size)
                for a, b in zip(x, result.x, strict=True)
            ],
            n_evals=result.n_evals,
            seconds=np.full(len(x), seconds),
            cpu_seconds=np.full(len(x), cpu),
        )
        return {k: np.asarray(v, dtype=float).tolist() for k, v in numbers.items()}

    def cached(self, store):
        """The results if they are there, else None."""
        path = self.path(store)
        return json.loads(path.read_text()) if path.is_file() else None

    def run(self, store):
        """The results, solved for if need be."""
        numbers = self.cached(store)
        if numbers is None:
            numbers = self.solve()
            path = self.path(store)
            path.parent.mkdir(parents=True, exist_ok=True)
            # A run killed here leaves no half of a file behind.
            draft = path.with_suffix(f".{os.getpid()}.tmp")
            draft.write_text(json.dumps(numbers))
            draft.replace(path)
            print(
                f"{self.flow:8s}{self.task:11s}lam {self.lam:<4g}{self.split} {self.start}.."
                f"{self.stop - 1} seed {self.seed} {self.method:13s}"
                f"{'' if self.rate is None else f'rate {self.rate:<6g}'}"
                f"{np.mean(numbers['psnr']):6.2f} dB  objective "
                f"{np.mean(numbers['objective']):10.1f}  {np.max(numbers['n_evals']):5.0f} "
                f"evaluations {sum(numbers['seconds']):6.1f} s",
                flush=True,
            )
        return numbers


class Missing(Exception):
    """A result that was asked for without solving is not there."""


@dataclass(frozen=True)
class Plan:
    """Which cells there are, and how to get at their results."""

    source: Source
    store: Path
    flows: tuple
    tasks: tuple
    lams: tuple
    splits: tuple
    images: int
    seeds: tuple
    evals: int
    chunk: int
    validation: int
    # Learning rates for every task and lambda, or one per kind of task, at lambda 1.
    tune_each: bool
    rates: tuple = RATES
    solve: bool = True

    def numbers(self, cell):
        """A cell's results; raises Missing where nothing may be solved."""
        if self.solve:
            return cell.run(self.store)
        found = cell.cached(self.store)
        if found is None:
            raise Missing(cell)
        return found

    def n_images(self, split):
        n = len(load_images(self.source, split))
        return n if split == "ood" else min(n, self.images)

    def tunings(self):
        """What learning rates are chosen for: (flow, task, lambda, method)."""
        return list(
            dict.fromkeys(
                self.tuning(flow, task, lam, method)
                for flow in self.flows
                for task in self.tasks
                for lam in self.lams
                for method in PAPERS
            )
        )

    def tuning(self, flow, task, lam, method):
        """Where the learning rate of a cell comes from."""
        return (
            (flow, task, lam, method) if self.tune_each else (flow, TASKS[task].kind, 1.0, method)
        )

    def tune(self, flow, task, lam, method):
        """The rate of lowest mean objective on validation images."""
        n = min(self.validation, len(load_images(self.source, "validation")))

        def cost(rate):
            cell = Cell(
                self.source, flow, task, lam, method, rate, self.evals, "validation", 0, n,
                seed=1000,
            )  # fmt: skip
            values = np.array(self.numbers(cell)["objective"])
            return float(values.mean()) if np.isfinite(values).all() else math.inf

        costs = {rate: cost(rate) for rate in sorted(self.rates)}
        for end, factor in ((min, 0.5), (max, 2.0)):
            # (Not for ever: where nothing works, nothing tells the rates apart.)
            while len(costs) < len(self.rates) + 4:
                best = min(costs, key=costs.get)
                if best != end(costs):
                    break
                costs[factor * best] = cost(factor * best)
        return min(costs, key=costs.get)

    def cells(self, flow, task, lam, split, method, seed, rate):
        """The chunks of one table entry."""
        n = self.n_images(split)
        return [
            Cell(
                self.source, flow, task, lam, method, rate, self.evals, split, start,
                min(start + self.chunk, n), seed,
            )
            for start in range(0, n, self.chunk)
        ]  # fmt: skip

    def groups(self):
        """Cells of the table: (flow, task, lambda, split), where there are images."""
        return [
            (flow, task, lam, split)
            for flow in self.flows
            for lam in self.lams
            for task in self.tasks
            for split in self.splits
            if self.n_images(split)
        ]

    def rate(self, flow, task, lam, method):
        """The learning rate of a table entry; None where there is none to choose."""
        return self.tune(*self.tuning(flow, task, lam, method)) if method in PAPERS else None

    def group(self, flow, task, lam, split):
        """Results of all methods: rates, and arrays of shape (n_seeds, n_images) by metric."""
        rates, results = {}, {}
        for method in METHODS:
            rates[method] = self.rate(flow, task, lam, method)
            by_seed = [
                [
                    self.numbers(cell)
                    for cell in self.cells(flow, task, lam, split, method, seed, rates[method])
                ]
                for seed in self.seeds
            ]
            results[method] = {
                metric: np.array([np.concatenate([c[metric] for c in row]) for row in by_seed])
                for metric in METRICS
            }
        return rates, results

    def run(self, n_jobs=1):
        """Solve all that is missing: first for the learning rates, then for the table."""
        with Parallel(n_jobs=n_jobs) as parallel:
            parallel(delayed(self.tune)(*tuning) for tuning in self.tunings())
            rates = {tuning: self.tune(*tuning) for tuning in self.tunings()}
            parallel(
                delayed(cell.run)(self.store)
                for seed in self.seeds
                for group in self.groups()
                for method in METHODS
                for cell in self.cells(
                    *group, method, seed, rates.get(self.tuning(*group[:3], method))
                )
            )

    def describe(self):
        """Number of cells and evaluations; for tuning, without rates beyond the ends."""
        tunings, groups = self.tunings(), self.groups()
        n = min(self.validation, len(load_images(self.source, "validation")))
        tuning = sum(len(self.rates) * n * budget(task, self.evals) for _, task, _, _ in tunings)
        solves = images = evaluations = 0
        for flow, task, lam, split in groups:
            chunks = self.cells(flow, task, lam, split, OURS, 0, None)
            solves += len(chunks) * len(METHODS) * len(self.seeds)
            images += self.n_images(split) * len(METHODS) * len(self.seeds)
            whole = budget(task, self.evals)
            per_image = len(PAPERS) * whole + (len(METHODS) - len(PAPERS)) * chunks[0].max_evals
            evaluations += self.n_images(split) * per_image * len(self.seeds)
        return dict(
            data=self.source.name,
            table_cells=len(groups) * len(METHODS),
            files=solves,
            reconstructions=images,
            evaluations=evaluations,
            learning_rates=len(tunings),
            evaluations_to_tune=tuning,
        )


# -------------------------------------------------------------------------------------- the rows


def summarise(results, seed=0):
    """Means, standard deviations and paired comparisons of one table cell.

    Parameters
    ----------
    results : dict of dict of ndarray of shape (n_seeds, n_images)
        Method, then metric.
    seed : int
        Of the bootstrap.

    Returns
    -------
    rows : dict of dict
        By method. ``gap`` is its objective minus AIPO's, with a 95 % bootstrap interval over images
        (an image's seeds are averaged first: they are not independent images), ``gap_median`` the
        median over images, as one image that diverges moves a mean at will; ``win`` is the share of
        the pairs in which AIPO's is lower. ``gain`` is the PSNR of skaipo's default minus the
        method's, and ``gain_exact`` that of skaipo without smoothing.
    """
    rows = {}
    for method, numbers in results.items():
        failed = ~(np.isfinite(numbers["objective"]) & np.isfinite(numbers["psnr"]))
        row = dict(failed=int(failed.sum()))
        for metric in METRICS:
            kept = numbers[metric][~failed]
            row[metric] = float(kept.mean()) if len(kept) else math.nan
            if metric not in ("n_evals", "seconds", "cpu_seconds"):
                row[f"{metric}_std"] = float(kept.std(ddof=1)) if len(kept) > 1 else math.nan
        if method != AIPO:
            theirs, ours = numbers["objective"], results[AIPO]["objective"]
            row["win"] = float(
                (
                    np.where(np.isfinite(ours), ours, np.inf)
                    < np.where(np.isfinite(theirs), theirs, np.inf)
                ).mean()
            )
            row |= _interval("gap", theirs - ours, seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                row["gap_median"] = float(np.nanmedian((theirs - ours).mean(0)))
        for name, ours in (("gain", OURS), ("gain_exact", EXACT)):
            if method != ours:
                row |= _interval(name, results[ours]["psnr"] - numbers["psnr"], seed)
        rows[method] = row
    return rows


def _interval(name, difference, seed):
    """Mean of paired differences and its interval, images with a failure left out."""
    per_image = difference.mean(0)
    per_image = per_image[np.isfinite(per_image)]
    values = paired_interval(per_image, seed=seed) if len(per_image) else (math.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(float, values), strict=True))


IDENTITY = ("data", "flow", "task", "lam", "split", "method", "evals", "images", "seeds")


def table(plan, versions):
    """CSV rows of all table cells whose results are there."""
    rows = []
    for flow, task, lam, split in plan.groups():
        try:
            rates, results = plan.group(flow, task, lam, split)
        except Missing:
            continue
        for method, numbers in summarise(results).items():
            rows.append(
                dict(
                    data=plan.source.name,
                    flow=flow,
                    task=task,
                    lam=lam,
                    split=split,
                    method=method,
                    evals=plan.evals,
                    images=plan.n_images(split),
                    seeds=" ".join(map(str, plan.seeds)),
                    rate="" if rates[method] is None else rates[method],
                    tuned="each" if plan.tune_each else "kind",
                    validation=plan.validation,
                    rates=" ".join(f"{rate:g}" for rate in plan.rates),
                    prior=digest(plan.source.weights(flow)),
                    **numbers,
                    **versions,
                )
            )
    return [
        {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]


def read_rows(path):
    """Rows of the CSV, as text."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write_rows(path, fresh):
    """Add rows to the CSV; those of the same identity are replaced."""

    def key(row):
        return tuple(row[name] for name in IDENTITY)

    replaced = {key(row) for row in fresh}
    rows = [row for row in read_rows(path) if key(row) not in replaced] + fresh
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def machine():
    """What ran: versions and hardware."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return dict(
        device=device,
        system=platform.system(),
        python=platform.python_version(),
        skaipo=skaipo.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
        sklearn=sklearn.__version__,
    )


PROFILES = {
    "small": dict(
        flows=["glow"],
        tasks=["denoising", "cs2500", "inpainting"],
        lams=[0.5, 1.0],
        splits=["test"],
        images=20,
        seeds=[0],
        evals=EVALS // 10,
        validation=16,
        # (The search goes on where the best is at an end.)
        rates=[0.05, 0.1, 0.2],
    ),
    "full": dict(
        flows=["glow", "realnvp"],
        tasks=list(TASKS),
        lams=list(LAMS),
        splits=["test", "ood"],
        images=200,
        seeds=[0, 1, 2],
        evals=EVALS,
        validation=40,
        rates=list(RATES),
    ),
}


def make_plan(args, parser):
    """Settings of the profile, changed by what the command line says."""
    settings = {
        name: getattr(args, name) if getattr(args, name) is not None else value
        for name, value in PROFILES[args.profile].items()
    }
    source = Source("faces", args.faces, args.priors)
    missing = source.missing(settings["flows"])
    if args.data == "digits" or (args.data is None and args.profile == "small" and missing):
        if args.data is None:
            print(f"No {', '.join(map(str, missing))}: running on the digits that ship.")
        source = Source("digits")
        missing = source.missing(settings["flows"])
        # They cost next to nothing.
        if args.evals is None:
            settings["evals"] = EVALS
    if missing:
        parser.error(
            f"there is no {', '.join(map(str, missing))}. --faces names the images, "
            f"train_faces_prior.py trains the priors; the digits have a Glow only."
        )
    chunk = args.chunk or (200 if torch.cuda.is_available() else 20)
    return Plan(
        source=source,
        store=args.store,
        chunk=chunk,
        tune_each=args.profile == "full",
        solve=not args.cached,
        **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()},
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=list(PROFILES), default="small")
    parser.add_argument("--data", choices=["faces", "digits"], help="default: faces if there")
    parser.add_argument("--faces", type=Path, default=DATA, help="faces64.npz")
    parser.add_argument("--priors", type=Path, default=RESULTS, help="folder of the faces' priors")
    parser.add_argument("--store", type=Path, default=RESULTS / "paper")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.csv")
    for name, options in (
        ("flows", dict(nargs="+", choices=["glow", "realnvp"])),
        ("tasks", dict(nargs="+", choices=list(TASKS))),
        ("lams", dict(nargs="+", type=float)),
        ("splits", dict(nargs="+", choices=["test", "ood", "validation"])),
        ("images", dict(type=int)),
        ("seeds", dict(nargs="+", type=int)),
        ("evals", dict(type=int, help="of the paper's methods, a third of it for the MLE")),
        ("validation", dict(type=int, help="images to tune the learning rates on")),
        ("rates", dict(nargs="+", type=float, help="learning rates to choose from")),
    ):
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--chunk", type=int, help="images per solve")
    parser.add_argument("--n-jobs", type=int, help="processes; default: one per core, one on a GPU")
    parser.add_argument("--plan", action="store_true", help="count cells and evaluations, and stop")
    parser.add_argument(
        "--cached", action="store_true", help="write rows of what is there; solve nothing"
    )
    args = parser.parse_args(argv)
    plan = make_plan(args, parser)
    if args.plan:
        for name, value in plan.describe().items():
            print(f"{name:22s}{value:>14,}" if isinstance(value, int) else f"{name:22s}{value:>14}")
        return
    n_jobs = args.n_jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    start = time.perf_counter()
    if plan.solve:
        plan.run(n_jobs)
    rows = table(plan, dict(profile=args.profile, n_jobs=n_jobs, **machine()))
    write_rows(args.out, rows)
    from report import render

    print(render(rows))
    print(f"{time.perf_counter() - start:.0f} s; {len(rows)} rows in {args.out}")


if __name__ == "__main__":
    # By its name: worker processes then import it, and keep the priors that they have loaded.
    import paper

    paper.main()
