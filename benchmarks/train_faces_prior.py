"""Train a flow on the faces of ``shared/data/faces64.npz`` and report bits per dimension.

    python benchmarks/train_faces_prior.py --size 32 --minutes 20 --flow glow

Writes the prior, a CSV row and a sheet of samples to ``benchmarks/results``. The weights are for
research use only (the data is non-commercial) and are never committed.
"""

import argparse
import csv
import math
import platform
from pathlib import Path

import numpy as np
import sklearn
import torch

import skaipo
from skaipo import FlowPrior

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "faces64.npz"
N_VALIDATION = 40


def load_faces(split, size=64, path=DATA):
    """Faces as float32 integers 0..255, ``(n, 3, size, size)``, average-pooled from 64x64.

    Parameters
    ----------
    split : {"train", "validation", "test", "ood"}
        The last ``N_VALIDATION`` of the file's training faces are "validation": no prior sees
        them, and settings such as lambda are chosen on them.
    size : int, default=64
        A divisor of 64.
    path : path-like
    """
    images = np.load(path)["train" if split == "validation" else split]
    if split in ("train", "validation"):
        images = images[-N_VALIDATION:] if split == "validation" else images[:-N_VALIDATION]
    images = images.transpose(0, 3, 1, 2).astype(np.float32)
    n, c, side, _ = images.shape
    factor = side // size
    pooled = images.reshape(n, c, size, factor, size, factor).mean((3, 5))
    return np.round(pooled)


def sample_sheet(prior, path, rows=4, columns=8, temperature=0.7, seed=0):
    """Draw samples to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = prior.event_shape_
    x = prior.sample(rows * columns, random_state=seed, temperature=temperature)
    images = np.clip(x.reshape(rows, columns, *shape) / 255, 0, 1).transpose(0, 3, 1, 4, 2)
    sheet = images.reshape(rows * shape[1], columns * shape[2], shape[0])
    plt.imsave(path, np.kron(sheet, np.ones((3, 3, 1))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--flow", choices=["glow", "realnvp"], default="glow")
    parser.add_argument("--n-steps", type=int, default=8)
    parser.add_argument("--n-levels", type=int, default=3)
    parser.add_argument("--hidden-channels", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train = load_faces("train", args.size, args.data)
    test = load_faces("test", args.size, args.data)
    prior = FlowPrior(
        args.flow,
        n_steps=args.n_steps,
        n_levels=args.n_levels,
        hidden_channels=args.hidden_channels,
        horizontal_flips=True,
        max_epochs=100_000,
        max_minutes=args.minutes,
        learning_rate=args.learning_rate,
        n_iter_no_change=60,
        random_state=args.seed,
        verbose=1,
    ).fit(train)
    d = math.prod(prior.event_shape_)
    noise = np.random.default_rng(args.seed).uniform(-0.5, 0.5, test.shape)
    bits = -prior.score_samples(test + noise) / d / math.log(2)
    spread = bits.std(ddof=1) / math.sqrt(len(bits))
    print(
        f"{args.flow} {args.size}x{args.size}: {bits.mean():.3f} bits/dim on {len(bits)} held-out "
        f"faces (standard error {spread:.3f}) after {len(prior.history_)} epochs, "
        f"{prior.history_[-1]['seconds'] / 60:.1f} minutes"
    )
    stem = f"faces_{args.flow}_{args.size}"
    prior.save(args.out / f"{stem}.safetensors")
    sample_sheet(prior, args.out / f"{stem}_samples.png")
    row = dict(
        flow=args.flow,
        size=args.size,
        n_steps=args.n_steps,
        n_levels=args.n_levels,
        hidden_channels=args.hidden_channels,
        learning_rate=args.learning_rate,
        minutes=args.minutes,
        epochs=len(prior.history_),
        seed=args.seed,
        bits_per_dim=round(float(bits.mean()), 4),
        standard_error=round(float(spread), 4),
        validation_bits_per_dim=round(min(r["val_nll"] for r in prior.history_) / math.log(2), 4),
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        skaipo=skaipo.__version__,
        torch=torch.__version__,
        sklearn=sklearn.__version__,
    )
    with open(args.out / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
