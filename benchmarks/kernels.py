"""Time and memory of a flow's value and input gradient: the kernels, the plain layers, normflows.

    pip install normflows
    python benchmarks/kernels.py                     # about 15 minutes on two cores
    python benchmarks/kernels.py --parts speed --batches 1 16 --sizes 32 --depths 8
    python benchmarks/kernels.py --device cuda

Parts: ``speed`` (milliseconds per image, for x -> z and for z -> x, and the share of the peak of a
matrix product on the same machine in the same run), ``memory`` (the growth of the process's
resident memory in one evaluation, each in a process of its own), ``training`` (images per second),
``reconstruct`` (1000 digits, and 200 faces where their prior was trained, with and without the
kernels). Rows go to ``benchmarks/results/kernels.csv``.

normflows gets the same weights: those of the convolutions, of the 1x1 convolutions' factors and of
ActNorm. Its coupling subtracts and divides where the one here multiplies and adds, and has no
network at its splits; the work is the same up to that. Methods take turns, several evaluations at a
time, and each round gives one ratio: the median is reported with the smallest and the largest.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import skaipo
from skaipo.flows import Glow
from skaipo.flows._frozen import FrozenEvaluator
from skaipo.flows._frozen._native import library

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PARTS = ("speed", "memory", "training", "reconstruct")
HIDDEN = 64


def build(size, depth, seed=0):
    """A Glow of three levels with noise on all of its parameters; some 1 for the identity."""
    torch.manual_seed(seed)
    flow = Glow((3, size, size), n_steps=depth, n_levels=3, hidden_channels=HIDDEN)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) / (depth / 8) ** 0.5)
    return flow.eval()


def build_normflows(flow):
    """The same architecture and weights in normflows."""
    import normflows as nf

    channels, size, _ = flow.event_shape
    levels, depth = flow.n_levels, flow.config()["n_steps"]
    bases, merges, flows = [], [], []
    for i in range(levels):
        blocks = [
            nf.flows.GlowBlock(
                channels * 2 ** (levels + 1 - i), HIDDEN, scale_map="exp", split_mode="channel"
            )
            for _ in range(depth)
        ]
        flows.append([*blocks, nf.flows.Squeeze()])
        side = size // 2 ** (levels - i)
        if i > 0:
            merges.append(nf.flows.Merge())
            bases.append(nf.distributions.DiagGaussian((channels * 2 ** (levels - i), side, side)))
        else:
            bases.append(nf.distributions.DiagGaussian((channels * 2 ** (levels + 1), side, side)))
    model = nf.MultiscaleFlow(bases, flows, merges)
    with torch.no_grad():
        for level, blocks in enumerate(reversed(flows)):
            layers = [m for m in flow.levels[level] if type(m).__name__ != "Squeeze"]
            for step, block in enumerate(reversed(blocks[:-1])):
                norm, linear, coupling = layers[3 * step : 3 * step + 3]
                theirs = {type(m).__name__: m for m in block.flows}
                actnorm, mix = theirs["ActNorm"], theirs["Invertible1x1Conv"]
                actnorm.s.copy_(-norm.log_scale.view_as(actnorm.s))
                actnorm.t.copy_(-norm.bias.view_as(actnorm.t))
                actnorm.data_dep_init_done.fill_(1.0)
                mix.P.copy_(linear.permutation)
                mix.L.copy_(linear.lower.tril(-1))
                mix.U.copy_(linear.upper.triu(1))
                mix.log_S.copy_(linear.log_diagonal)
                mix.sign_S.copy_(linear.sign)
                nets = [m for m in theirs["AffineCouplingBlock"].modules()]
                convolutions = [m for m in nets if isinstance(m, torch.nn.Conv2d)]
                ours = [m for m in coupling.net if isinstance(m, torch.nn.Conv2d)]
                for a, b in zip(convolutions[:2], ours[:2], strict=True):
                    a.weight.copy_(b.weight)
                    a.bias.copy_(b.bias)
                for name in ("weight", "bias"):
                    scale, shift = getattr(ours[2], name).chunk(2)
                    getattr(convolutions[2], name)[0::2] = shift
                    getattr(convolutions[2], name)[1::2] = scale
    return model.eval()


def gradient_of(log_prob):
    """Value and input gradient by autograd."""

    def run(x):
        x = x.detach().requires_grad_()
        value = log_prob(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    return run


def density(evaluator):
    """x -> log p(x) and its gradient."""

    def run(x):
        z, log_det, pull = evaluator.linearize(x.flatten(1))
        return log_det - 0.5 * z.square().sum(1), pull((-z, 1.0))[0]

    return run


def latent(evaluator, apart):
    """z -> x -> an objective of x and log p(x), and its gradient in z, of both terms apart or not.

    The data term is the squared distance from zero: next to nothing beside the flow.
    """

    def run(z):
        z = z.flatten(1)
        x, log_det, pull = evaluator.linearize_inverse(z)
        value = 0.5 * x.square().sum(1) + log_det + 0.5 * z.square().sum(1)
        if apart:
            grad_data, grad_log_det = pull((x, 0.0), (None, 1.0))
            return value, grad_data + grad_log_det + z
        return value, pull((x, 1.0))[0] + z

    return run


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, x, seconds, device):
    """Seconds per call, over as many calls as fill the time; the first is not counted."""
    function(x)
    synchronize(device)
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        function(x)
        synchronize(device)
        calls += 1
    return (time.perf_counter() - start) / calls


def gemm_peak(device, seconds=0.5):
    """FLOP/s of a single-precision product of two 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return 2 * 2048**3 / min(timed(lambda _: a @ b, None, seconds / 3, device) for _ in range(3))


def speed(args, rows):
    peak, known = 0.0, len(rows)
    for size in args.sizes:
        for depth in args.depths:
            flow = build(size, depth)
            theirs = build_normflows(flow).requires_grad_(False).to(args.device)
            flow = flow.requires_grad_(False).to(args.device)
            store, again = (FrozenEvaluator(flow, memory) for memory in ("store", "recompute"))
            uncompiled = FrozenEvaluator(flow, "store", native=False)
            methods = {
                "normflows": gradient_of(lambda x, m=theirs: m.log_prob(x, None)),
                "plain layers": gradient_of(flow.log_prob),
                "kernels": density(store),
                "kernels, recomputing": density(again),
                "kernels, not compiled": density(uncompiled),
                "kernels, z -> x": latent(store, False),
                "kernels, z -> x, terms apart": latent(store, True),
            }
            x = torch.randn(2, 3, size, size, device=args.device, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                flow.log_prob(x).sum().backward()
            flop = counter.get_total_flops() / 2
            check(methods, torch.randn(16, 3, size, size, device=args.device))
            for batch in args.batches:
                if size**2 * depth * batch > args.work:
                    print(f"{size}x{size} K={depth} batch {batch}: left out, see --work")
                    continue
                x = torch.randn(batch, 3, size, size, device=args.device)
                times = {name: [] for name in methods}
                for _ in range(args.rounds):
                    for name, run in methods.items():
                        times[name].append(timed(run, x, args.seconds, args.device))
                # The best of the whole run: one measurement may meet a busy machine.
                with torch.no_grad():
                    peak = max(peak, gemm_peak(args.device))
                report(args, rows, times, size, depth, batch, flop)
    print(f"peak of a matrix product: {peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    for row in rows[known:]:
        row["gemm_share"] = round(1e9 * row["gflops"] / peak, 3)


def check(methods, x):
    """The kernels give what the plain layers do."""
    value, gradient = methods["plain layers"](x)
    for name in ("kernels", "kernels, recomputing", "kernels, not compiled"):
        ours, ours_gradient = methods[name](x)
        constant = (value - ours).mean()  # the normaliser
        assert ((value - ours - constant).abs() <= 1e-4 * value.abs()).all()
        difference = (ours_gradient.view_as(gradient) - gradient).flatten(1).norm(dim=1)
        # A unit of a ReLU network that is within rounding of zero can be on in one and off in the
        # other; of ten thousands of them, some are.
        assert float((difference / gradient.flatten(1).norm(dim=1)).median()) < 1e-3


def report(args, rows, times, size, depth, batch, flop):
    for name, values in times.items():
        ratios = [a / b for a, b in zip(times["normflows"], values, strict=True)]
        relative = [b / a for a, b in zip(times["kernels"], values, strict=True)]
        ms = 1e3 * median(values) / batch
        gflops = 1e-9 * flop * batch / median(values)
        rows.append(
            dict(
                part="speed", device=args.device, size=size, depth=depth, batch=batch, method=name,
                ms_per_image=round(ms, 4), speedup=round(median(ratios), 3),
                speedup_low=round(min(ratios), 3), speedup_high=round(max(ratios), 3),
                time_over_kernels=round(median(relative), 3), gflops=round(gflops, 2),
            )
        )  # fmt: skip
        print(
            f"{size}x{size} K={depth} batch {batch:3d} {name:30s} {ms:8.3f} ms per image  "
            f"x{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] of normflows' speed, "
            f"{median(relative):.2f} times the kernels' time, {gflops:.0f} GFLOP/s",
            flush=True,
        )


# ------------------------------------------------------------------------------------- memory

MEMORY_METHODS = ("normflows", "plain layers", "kernels", "kernels, recomputing")


def prepared(method, size, depth, device):
    """The method's function of a batch, for :func:`build`'s flow."""
    flow = build(size, depth).requires_grad_(False)
    if method == "normflows":
        model = build_normflows(flow).requires_grad_(False).to(device)
        return gradient_of(lambda x: model.log_prob(x, None))
    flow = flow.to(device)
    if method == "plain layers":
        return gradient_of(flow.log_prob)
    return density(FrozenEvaluator(flow, "store" if method == "kernels" else "recompute"))


def evaluate_once(method, size, depth, batch):
    """Run in a process of its own: growth of the resident memory in MiB, and seconds."""
    torch.set_num_threads(int(os.environ["BENCHMARK_THREADS"]))
    run = prepared(method, size, depth, "cpu")
    x = torch.randn(batch, 3, size, size)
    run(x[:1])  # code and tables that are loaded at the first call
    before = resident()
    seconds = []
    with PeakMeter() as meter:
        for _ in range(3):
            start = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - start)
    print(json.dumps([(meter.peak - before) / 2**20, min(seconds)]))


def resident():
    """Resident bytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMeter:
    """The largest resident memory while the block runs, looked at every millisecond."""

    def __enter__(self):
        import threading

        self.peak, self._stop = resident(), False

        def watch():
            while not self._stop:
                self.peak = max(self.peak, resident())
                time.sleep(1e-3)

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop = True
        self._thread.join()


def cuda_once(method, size, depth, batch):
    """Peak of allocated memory beyond the weights in MiB, and seconds."""
    run = prepared(method, size, depth, "cuda")
    x = torch.randn(batch, 3, size, size, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(run, x, 1.0, "cuda")
    return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds


def memory(args, rows):
    size, batch = 64, 16
    for depth in (8, 32, 64):
        results = {}
        for method in MEMORY_METHODS:
            if args.device == "cuda":
                results[method] = cuda_once(method, size, depth, batch)
                continue
            command = [sys.executable, __file__, "--once", method, str(size), str(depth)]
            environment = {**os.environ, "BENCHMARK_THREADS": str(torch.get_num_threads())}
            output = subprocess.run(
                [*command, str(batch)], env=environment, check=True, stdout=subprocess.PIPE
            )
            results[method] = json.loads(output.stdout)
        plain = results["plain layers"]
        for method, (mib, seconds) in results.items():
            rows.append(
                dict(
                    part="memory", device=args.device, size=size, depth=depth, batch=batch,
                    method=method, peak_mib=round(mib, 1), seconds=round(seconds, 4),
                    memory_of_plain=round(mib / plain[0], 4),
                    time_of_plain=round(seconds / plain[1], 3),
                )
            )  # fmt: skip
            print(
                f"K={depth} {size}x{size} batch {batch} {method:22s} {mib:8.1f} MiB "
                f"({plain[0] / mib:.1f} times less than the plain layers), {seconds:.2f} s "
                f"({seconds / plain[1]:.2f} times theirs)",
                flush=True,
            )


# ----------------------------------------------------------------------- training, reconstruct


def training(args, rows):
    flow = build(32, 8).train().to(args.device)
    theirs = build_normflows(flow).train().to(args.device)
    x = torch.randn(64, 3, 32, 32, device=args.device)

    def step(model, log_prob):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def run(x):
            optimizer.zero_grad()
            (-log_prob(x).mean()).backward()
            optimizer.step()

        return run

    methods = {
        "normflows": step(theirs, lambda x: theirs.log_prob(x, None)),
        "skaipo": step(flow, flow.log_prob),
    }
    times = {name: [] for name in methods}
    for _ in range(args.rounds):
        for name, run in methods.items():
            times[name].append(timed(run, x, max(args.seconds, 2.0), args.device))
    ratios = [a / b for a, b in zip(times["normflows"], times["skaipo"], strict=True)]
    for name, values in times.items():
        rate = len(x) / median(values)
        low, high = (min(ratios), max(ratios)) if name == "skaipo" else (1.0, 1.0)
        middle = median(ratios) if name == "skaipo" else 1.0
        rows.append(
            dict(
                part="training", device=args.device, size=32, depth=8, batch=len(x), method=name,
                images_per_second=round(rate, 1), speedup=round(middle, 3),
                speedup_low=round(low, 3), speedup_high=round(high, 3),
            )
        )  # fmt: skip
        print(
            f"training {name:10s} {rate:7.1f} images per second, x{middle:.2f} [{low:.2f}, "
            f"{high:.2f}]",
            flush=True,
        )


def reconstruct(args, rows):
    """Compressed sensing with the default settings, with the kernels and without."""
    from train_faces_prior import load_faces

    from skaipo import AIPORegressor, FlowPrior
    from skaipo.datasets import load_digits_prior, load_digits_split
    from skaipo.noise import GaussianNoise
    from skaipo.operators import CompressedSensing

    digits = load_digits_split()[0][: args.digits]
    problems = {"digits": (load_digits_prior(device=args.device), digits, 32, 1.0)}
    path = RESULTS / "faces_glow_32.safetensors"
    if path.exists():
        faces = load_faces("train", 32)[: args.faces].reshape(-1, 3072)
        problems["faces"] = (FlowPrior.load(path, device=args.device), faces, 614, 12.75)
    for name, (prior, X, measurements, sigma) in problems.items():
        op, noise = CompressedSensing(measurements, random_state=0), GaussianNoise(sigma)
        Y = noise.add_noise(op(X), random_state=0)
        times, results = {}, {}
        kinds = ("reference", "fused", *(["native"] if library() else []))
        for kernels in kinds:
            os.environ["SKAIPO_KERNELS"] = kernels
            settings = dict(noise=noise, max_evals=args.evals, smoothing=0)
            model = AIPORegressor(op, 1.0, prior=prior, **settings)
            start = time.perf_counter()
            results[kernels] = model.reconstruct(Y)
            times[kernels] = time.perf_counter() - start
        a, b = (results[k].objective for k in ("reference", kinds[-1]))
        for kernels, seconds in times.items():
            rows.append(
                dict(
                    part="reconstruct", device=args.device, method=f"{name}, {kernels}",
                    batch=len(X), seconds=round(seconds, 1),
                    speedup=round(times["reference"] / seconds, 3),
                )
            )  # fmt: skip
            print(
                f"reconstruct {len(X)} {name}, {kernels:9s}: {seconds:7.1f} s, mean objective "
                f"{results[kernels].objective.mean():.2f}, mean evaluations "
                f"{results[kernels].n_evals.mean():.0f}",
                flush=True,
            )
        print(f"    median relative difference {np.median(np.abs(a - b) / np.abs(a)):.1e}")


def write(rows, args):
    """Replace the rows of the parts that were run; those of other parts stay."""
    extra = dict(
        threads=torch.get_num_threads(),
        machine=torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        skaipo=skaipo.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("kernels.csv" if args.device == "cpu" else f"kernels_{args.device}.csv")
    fresh = {row["part"] for row in rows}
    kept = []
    if path.exists():
        with open(path) as file:
            kept = [row for row in csv.DictReader(file) if row["part"] not in fresh]
    rows = sorted(kept + [{**row, **extra} for row in rows], key=lambda r: PARTS.index(r["part"]))
    columns = [key for row in rows for key in row if key not in extra]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(columns), *extra])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per method and round")
    parser.add_argument(
        "--work", type=int, default=2**21, help="largest size^2 x K x batch; 2^25 for all rows"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--digits", type=int, default=1000)
    parser.add_argument("--faces", type=int, default=200)
    parser.add_argument("--evals", type=int, default=100)
    parser.add_argument("--once", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        method, *numbers = args.once
        evaluate_once(method, *map(int, numbers))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for part in PARTS:
        if part in args.parts:
            globals()[part](args, rows)
            write(rows, args)


if __name__ == "__main__":
    main()
