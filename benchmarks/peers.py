"""What a user would pick instead, on the same faces, masks and measurements.

    pip install scikit-image PyWavelets
    python benchmarks/train_faces_prior.py --size 32 --minutes 25 --flow glow
    python benchmarks/peers.py                    # about an hour on one core
    python benchmarks/peers.py --tasks "denoise .1" --images 20

Total variation (Chambolle) and wavelet shrinkage for denoising and biharmonic inpainting, all of
scikit-image; the Lasso in a DCT basis of scikit-learn for compressed sensing; the closed-form MAP
under a Gaussian with the training faces' mean and covariance; the procedure of GlowIP (Asim et al.,
2020); deepinv's TV-regularised least squares where deepinv is installed, for inpainting and
compressed sensing; and skaipo, as it comes and with ``smoothing=0``.

Every method's parameter is chosen on validation faces, and its images are clipped to 0..255. What a
method gave per image is kept in ``benchmarks/results/peers/`` and not computed again; rows with
means and paired bootstrap intervals go to ``benchmarks/results/peers.csv``. The faces are for
research use only.
"""

import argparse
import csv
import json
import platform
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import sklearn
import torch
from scipy.fft import idctn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from solvers import EXACT, RESULTS, SHAPE, TASKS, measure
from solvers import METHODS as SOLVERS
from train_faces_prior import DATA, load_faces

import skaipo
from skaipo import AIPORegressor, FlowPrior
from skaipo.__main__ import paired_interval
from skaipo.metrics import psnr_score

LAMS = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0, 1.41, 2.0)


class Setting:
    """One task: its operator and noise, the images, and what methods may learn from."""

    def __init__(self, task, args):
        self.task, self.args = task, args
        self.sigma = 255 * TASKS[task][1]

    def images(self, split, n):
        return load_faces(split, 32, self.args.data)[:n]

    @property
    def prior(self):
        return face_prior()


@lru_cache
def face_prior():
    return FlowPrior.load(RESULTS / "faces_glow_32.safetensors")


@lru_cache
def gaussian_moments(data):
    """Mean and Ledoit-Wolf covariance of the training faces and their mirror images."""
    from sklearn.covariance import ledoit_wolf

    x = load_faces("train", 32, data)
    x = np.concatenate((x, x[..., ::-1])).reshape(2 * len(x), -1).astype(np.float64)
    return x.mean(0), ledoit_wolf(x)[0]


# ----------------------------------------------------------------------------------- the methods
# Each is called as method(setting, op, noise, y, parameter) and returns images (n, 3, 32, 32).


def channels_last(x):
    return x.reshape(-1, *SHAPE).transpose(0, 2, 3, 1)


def channels_first(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def chambolle(setting, op, noise, y, weight):
    from skimage.restoration import denoise_tv_chambolle

    images = channels_last(y) / 255
    return 255 * channels_first(
        [denoise_tv_chambolle(image, weight=weight, channel_axis=-1) for image in images]
    )


def wavelet(setting, op, noise, y, threshold):
    """BayesShrink with the true noise level, times a factor."""
    from skimage.restoration import denoise_wavelet

    images = channels_last(y) / 255
    options = dict(channel_axis=-1, convert2ycbcr=True, rescale_sigma=True, method="BayesShrink")
    return 255 * channels_first(
        [
            denoise_wavelet(image, sigma=threshold * setting.sigma / 255, **options)
            for image in images
        ]
    )


def biharmonic(setting, op, noise, y, weight):
    """Filled in, then denoised by total variation where the weight is not zero."""
    from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic

    filled, missing = [], ~op.bind(SHAPE).measured_.reshape(SHAPE).all(0)
    for image in channels_last(y) / 255:
        image = inpaint_biharmonic(np.nan_to_num(image), missing, channel_axis=-1)
        if weight:
            image = denoise_tv_chambolle(image, weight=weight, channel_axis=-1)
        filled.append(image)
    return 255 * channels_first(filled)


def lasso(setting, op, noise, y, alpha):
    """Sparse in the DCT of each channel; the mean of the training faces is not penalised."""
    mean = gaussian_moments(setting.args.data)[0]
    d = len(mean)
    basis = idctn(np.eye(d).reshape(d, *SHAPE), axes=(2, 3), norm="ortho").reshape(d, d)
    matrix = op(basis)  # rows: measurements of each basis image
    offset = op(np.zeros((1, d)))
    residual = y - op(mean[None])
    model = Lasso(alpha=alpha, fit_intercept=False, max_iter=2000, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes = np.stack([model.fit((matrix - offset).T, row).coef_ for row in residual])
    return (codes @ basis + mean).reshape(-1, *SHAPE)


def gaussian(setting, op, noise, y, lam):
    """The posterior mean under the Gaussian prior; all rows lack the same measurements."""
    mean, covariance = gaussian_moments(setting.args.data)
    d = len(mean)
    y = np.asarray(y, float).reshape(len(y), -1)
    seen = ~np.isnan(y).any(0)
    offset = op(np.zeros((1, d)))
    A = (op(np.eye(d)) - offset).reshape(d, -1)[:, seen].T
    gram = A @ covariance @ A.T + lam * setting.sigma**2 * np.eye(len(A))
    residual = (y - offset.reshape(1, -1))[:, seen] - mean @ A.T
    return (mean + np.linalg.solve(gram, residual.T).T @ A @ covariance).reshape(-1, *SHAPE)


def glow_ip(setting, op, noise, y, lam):
    make, _ = SOLVERS["GlowIP"]
    result = make(op, noise, setting.prior, lam, setting.args.evals, 0.01).reconstruct(y)
    return result.x.reshape(-1, *SHAPE)


def deepinv_tv(setting, op, noise, y, lam):
    """Least squares with total variation by proximal gradient steps of deepinv."""
    import deepinv

    d = int(np.prod(SHAPE))
    y = torch.as_tensor(np.asarray(y, np.float32).reshape(len(y), -1)) / 255
    seen = ~y.isnan().any(0)
    offset = op(np.zeros((1, d), np.float32)).reshape(1, -1)
    A = torch.as_tensor((op(np.eye(d, dtype=np.float32)) - offset).reshape(d, -1).T)[seen]
    y = y[:, seen] - torch.as_tensor(offset)[:, seen] / 255
    step = 1 / float(torch.linalg.matrix_norm(A, 2)) ** 2
    prior = deepinv.optim.TVPrior(n_it_max=50)
    x = (step * y @ A).reshape(-1, *SHAPE)
    for _ in range(200):
        gradient = ((x.flatten(1) @ A.T - y) @ A).reshape(x.shape)
        x = prior.prox(x - step * gradient, gamma=step * lam)
    return 255 * x.detach().numpy()


def skaipos(setting, op, noise, y, lam, **settings):
    settings = dict(noise=noise, max_evals=setting.args.evals, **settings)
    model = AIPORegressor(op, lam, prior=setting.prior, **settings)
    return model.reconstruct(y).x.reshape(-1, *SHAPE)


WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
DENOISERS = {
    "TV (Chambolle)": (chambolle, WEIGHTS[1:]),
    "wavelets": (wavelet, (0.3, 0.5, 1.0, 1.5, 2.0, 3.0)),
}
OURS = "skaipo"
COMMON = {
    OURS: (skaipos, LAMS),
    EXACT: (partial(skaipos, smoothing=0), LAMS),
    "Gaussian MAP": (gaussian, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    "GlowIP": (glow_ip, (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)),
}
# (For denoising it is Chambolle's problem once more.)
DEEPINV = {"TV (deepinv)": (deepinv_tv, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0))}
PEERS = {
    "denoise .1": {**COMMON, **DENOISERS},
    "denoise .2": {**COMMON, **DENOISERS},
    "inpaint": {**COMMON, "biharmonic": (biharmonic, WEIGHTS), **DEEPINV},
    "cs": {**COMMON, "Lasso, DCT": (lasso, (0.01, 0.03, 0.1, 0.3, 1.0)), **DEEPINV},
}


# ------------------------------------------------------------------------------------- the cells


def solve(setting, split, n, name, method, parameter):
    """PSNR and seconds per image, from the store if they are there."""
    store = RESULTS / "peers"
    store.mkdir(parents=True, exist_ok=True)
    key = f"{setting.task}-{split}{n}-{name}-{parameter:g}-{setting.args.evals}"
    path = store / ("".join(c if c.isalnum() else "-" for c in key) + ".json")
    if path.exists():
        return {k: np.array(v) for k, v in json.loads(path.read_text()).items()}
    x = setting.images(split, n)
    op, noise, y = measure(setting.task, x, setting.args.seed)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = method(setting, op, noise, y, parameter)
    seconds = (time.perf_counter() - start) / n
    shown = np.clip(np.where(np.isfinite(result), result, 0.0), 0, 255)
    psnr = psnr_score(x, shown, data_range=255, per_image=True)
    path.write_text(json.dumps(dict(psnr=psnr.tolist(), seconds=seconds)))
    print(
        f"{setting.task:11s}{split}{n} {name:16s} {parameter:<6g} {psnr.mean():6.2f} dB "
        f"{seconds:7.3f} s per image",
        flush=True,
    )
    return dict(psnr=psnr, seconds=seconds)


def tuned(setting, name, method, grid):
    """The parameter of highest mean PSNR on validation faces, walking along the grid."""
    n = setting.args.validation
    score = lru_cache(
        lambda k: solve(setting, "validation", n, name, method, grid[k])["psnr"].mean()
    )
    k = len(grid) // 2
    while True:
        best = max((i for i in (k - 1, k, k + 1) if 0 <= i < len(grid)), key=score)
        if best == k:
            return grid[k]
        k = best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--evals", type=int, default=100, help="of skaipo and GlowIP")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        setting, cells = Setting(task, args), {}
        for name, (method, grid) in PEERS[task].items():
            try:
                parameter = tuned(setting, name, method, grid)
                cell = solve(setting, "test", args.images, name, method, parameter)
            except ImportError as error:
                print(f"{task:11s}{name}: left out, {error}", flush=True)
                continue
            cells[name] = cell
            gain = paired_interval(cells[OURS]["psnr"] - cell["psnr"], seed=args.seed)
            rows.append(
                dict(
                    task=task, method=name, parameter=parameter, images=args.images,
                    psnr=round(float(cell["psnr"].mean()), 3),
                    sd=round(float(cell["psnr"].std()), 3),
                    skaipo_minus_it=round(gain[0], 3),
                    skaipo_minus_it_low=round(gain[1], 3),
                    skaipo_minus_it_high=round(gain[2], 3),
                    seconds_per_image=round(float(cell["seconds"]), 4),
                )
            )  # fmt: skip
    extra = dict(
        seed=args.seed,
        evals=args.evals,
        skaipo=skaipo.__version__,
        sklearn=sklearn.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    path = RESULTS / "peers.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *extra])
        writer.writeheader()
        writer.writerows({**row, **extra} for row in rows)
    for row in rows:
        low, high = row["skaipo_minus_it_low"], row["skaipo_minus_it_high"]
        print(
            f"{row['task']:11s}{row['method']:16s}{row['psnr']:7.2f} dB  "
            f"{row['skaipo_minus_it']:+.2f} [{low:+.2f}, {high:+.2f}]  "
            f"{row['seconds_per_image']:.3f} s"
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
