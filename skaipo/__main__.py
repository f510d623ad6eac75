"""The command line: ``skaipo demo``."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from skaipo import __version__
from skaipo._progress import Progress
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.estimators import AIPORegressor, FixedLambdaMAP
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import CompressedSensing, Denoising, Inpainting
from skaipo.plotting import plot_image_rows

__all__ = ["main"]


def _tasks(seed):
    """Name, operator and noise of the demo's three tasks, in grey levels 0..16."""
    mask = np.random.default_rng(seed).permutation(64) < 32
    return [
        ("denoising, sigma 2", Denoising(), GaussianNoise(2.0)),
        (
            "inpainting, half missing, sigma 1",
            Inpainting(mask.reshape(1, 8, 8)),
            GaussianNoise(1.0),
        ),
        ("compressed sensing, 24 of 64, sigma 0.5", CompressedSensing(24), GaussianNoise(0.5)),
    ]


def _methods(op, noise, **options):
    options = dict(prior=options.pop("prior"), noise=noise, **options)
    fixed = {
        f"fixed lambda, {init} start": FixedLambdaMAP(op, 1.0, init=init, random_state=0, **options)
        for init in ("mle", "zero", "random")
    }
    # Algorithm 1 in practice, as its authors run it.
    paper = dict(solver="adam", schedule="linear", init="mle", mle_solver="pgd")
    return {
        "skaipo's default": AIPORegressor(op, 1.0, **options),
        "AIPO as in the paper": AIPORegressor(op, 1.0, **paper, **options),
        **fixed,
    }


def paired_interval(difference, n_resamples=2000, seed=0):
    """Mean and 95 % bootstrap interval of paired differences."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(difference), size=(n_resamples, len(difference)))
    low, high = np.quantile(difference[rows].mean(1), [0.025, 0.975])
    return difference.mean(), low, high


def demo(n_images=36, max_evals=300, seed=0, output="skaipo-demo.png", shown=12):
    """Reconstruct held-out digits by every method; print a table and draw a figure.

    Returns
    -------
    rows : list of dict
        One per task and method.
    """
    prior = load_digits_prior()
    _, X, _, _ = load_digits_split()
    X = X[:n_images]
    print(
        f"{len(X)} held-out digits, lambda = 1, at most {max_evals} flow evaluations per digit, "
        f"starts included\n\nThe last column is the default's PSNR minus the method's: the mean of "
        f"the paired\ndifferences and its 95 % bootstrap interval; above zero the default is "
        f"better. (Compare\nobjectives with smoothing=0: by default the density is averaged over "
        f"half a grey level\nwhere it is rough.)\n"
    )
    table, pictures = [], []
    lines = []
    with Progress("Reconstructing", 15, enabled=True) as bar:
        for task, op, noise in _tasks(seed):
            Y = noise.add_noise(op(X), random_state=seed)
            measured = op.bind((1, 8, 8))
            pictures.append((task.capitalize(), None))
            pictures.append(("truth", X[:shown].reshape(-1, 8, 8)))
            seen = (
                np.where(measured.measured_, Y, np.nan)
                if measured.n_measurements_ == 64
                # What a measurement of another size says about each pixel: its back-projection.
                else Y @ measured.matrix_
            )
            pictures.append(("measurement", seen[:shown].reshape(-1, 8, 8)))
            default = None
            for name, model in _methods(op, noise, prior=prior, max_evals=max_evals).items():
                bar.update(len(table), f"{task}: {name}")
                start = time.perf_counter()
                result = model.reconstruct(Y)
                seconds = time.perf_counter() - start
                psnr = psnr_score(X, result.x, data_range=16, per_image=True)
                default = psnr if default is None else default
                mean, low, high = paired_interval(default - psnr)
                table.append(
                    dict(
                        task=task,
                        method=name,
                        psnr=float(psnr.mean()),
                        objective=float(result.objective.mean()),
                        n_evals=float(result.n_evals.mean()),
                        seconds=seconds,
                        difference=mean,
                        low=low,
                        high=high,
                    )
                )
                pictures.append((name, result.x[:shown].reshape(-1, 8, 8)))
        bar.update(15, "done")
    header = f"{'method':28s} {'PSNR dB':>8s} {'objective':>10s} {'evals':>6s} {'seconds':>8s}"
    for row in table:
        if not lines or row["task"] != task:
            task = row["task"]
            lines += ["", f"{task}", f"{header}   default minus this, dB"]
        versus = (
            ""
            if row["method"] == "skaipo's default"
            else (f"   {row['difference']:+8.2f} [{row['low']:.2f}, {row['high']:.2f}]")
        )
        lines.append(
            f"{row['method']:28s} {row['psnr']:8.2f} {row['objective']:10.3f} "
            f"{row['n_evals']:6.0f} {row['seconds']:8.2f}{versus}"
        )
    print("\n".join(lines[1:]))
    try:
        plot_image_rows(pictures, output, vmin=0, vmax=16)
        print(f"\nFigure: {Path(output).resolve()}")
    except ImportError as error:
        print(f"\nNo figure: {error}")
    return table


def main(argv=None):
    """Entry point of the command ``skaipo``."""
    parser = argparse.ArgumentParser(
        prog="skaipo",
        description="Reconstruct images from corrupted measurements with a normalizing flow prior.",
    )
    parser.add_argument("--version", action="version", version=f"skaipo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    command = commands.add_parser(
        "demo", help="denoise, inpaint and recover held-out digits; print a table, draw a figure"
    )
    command.add_argument("--quick", action="store_true", help="a few digits and evaluations")
    command.add_argument("--images", type=int, help="number of digits, at most 360 (default 36)")
    command.add_argument("--max-evals", type=int, help="evaluations per digit (default 300)")
    command.add_argument("--seed", type=int, default=0, help="of the mask and the noise")
    command.add_argument("--output", default="skaipo-demo.png", help="path of the figure")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    images, evals = (8, 40) if args.quick else (36, 300)
    images = images if args.images is None else args.images
    evals = evals if args.max_evals is None else args.max_evals
    if not 1 <= images <= 360:
        parser.error(f"--images must lie in 1..360, got {images}")
    if evals < 4:
        parser.error(f"--max-evals must be at least 4, got {evals}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must lie in 0..2**32 - 1, got {args.seed}")
    # Now, not after a minute of work.
    folder, suffix = Path(args.output).parent, Path(args.output).suffix
    if suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--output must end in .png, .pdf or .svg, got {args.output!r}")
    if not folder.is_dir():
        parser.error(f"--output: there is no folder {str(folder)!r}")
    demo(images, evals, args.seed, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
