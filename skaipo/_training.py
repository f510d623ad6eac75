"""Maximum-likelihood training of flows."""

import copy
import math
import time

import torch

from skaipo._progress import Progress

__all__ = ["TrainingDivergedError", "mean_log_prob", "train_flow"]

# Of the loss in nats per dimension; longer gradients are clipped.
_MAX_GRAD_NORM = 1.0


class TrainingDivergedError(RuntimeError):
    """The training loss became non-finite or exploded. The last good weights were kept."""


def mean_log_prob(flow, x, batch_size=256):
    """Mean log-density of a batch in nats, without gradients, chunk by chunk."""
    with torch.no_grad():
        total = sum(flow.log_prob(chunk).double().sum() for chunk in x.split(batch_size))
    return float(total) / len(x)


def dequantized(x, level, generator):
    """Add uniform noise of one quantisation level, centred, so that no bias enters the density."""
    if not level:
        return x
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return x + level * (noise - 0.5)


def train_flow(
    flow,
    x_train,
    x_val=None,
    *,
    level=0.0,
    horizontal_flips=False,
    max_epochs=100,
    max_minutes=None,
    batch_size=64,
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_steps=100,
    ema_decay=0.99,
    n_iter_no_change=None,
    seed=0,
    verbose=0,
    callback=None,
):
    """Train a flow in place by maximum likelihood.

    Adam with decoupled weight decay; the learning rate warms up linearly, then follows half a
    cosine down to 1 % of its peak. What is validated and kept is an exponential moving average of
    the weights, which scores better than the last iterate on small data.

    Parameters
    ----------
    flow : Flow
        Its ActNorm layers are initialised from the first data drawn.
    x_train : torch.Tensor of shape (n, *event_shape)
    x_val : torch.Tensor of shape (n_val, *event_shape), default=None
        Without it, the last averaged weights are kept.
    level : float, default=0
        Width of the uniform dequantisation noise, drawn anew for every batch.
    horizontal_flips : bool, default=False
        Mirror each training image with probability one half (images only).
    max_epochs : int
    max_minutes : float, default=None
        Stop after this much time; the learning rate decays towards whichever limit is nearer.
    batch_size : int
    learning_rate : float
        Peak rate.
    weight_decay : float
    warmup_steps : int
    ema_decay : float in [0, 1)
        0 keeps the raw weights.
    n_iter_no_change : int, default=None
        Stop when the validation score has not improved for so many epochs.
    seed : int
    verbose : int
    callback : callable, default=None
        Called as ``callback(epoch, record)`` after each epoch; a true value stops training.

    Returns
    -------
    history : list of dict
        Per epoch: ``epoch``, ``train_nll``, ``val_nll`` (nats per dimension), ``learning_rate``,
        ``seconds``.

    Raises
    ------
    TrainingDivergedError
        On a non-finite or exploding loss. The flow then holds the best weights seen so far, without
        validation those after the last whole epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = len(x_train), flow.n_features
    batch_size = min(batch_size, n)
    if hasattr(flow, "initialize"):
        first = torch.randperm(n, generator=generator)[:512].to(x_train.device)
        flow.initialize(dequantized(x_train[first], level, generator))
    if x_val is not None:
        x_val = dequantized(x_val, level, generator)

    averaged = copy.deepcopy(flow).eval().requires_grad_(False)
    pairs = list(zip(averaged.parameters(), flow.parameters(), strict=True))
    optimizer = torch.optim.AdamW(
        flow.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99)
    )
    best_state = copy.deepcopy(averaged.state_dict())
    best_nll = -mean_log_prob(averaged, x_val) / d if x_val is not None else math.inf
    n_batches = math.ceil(n / batch_size)
    start, step, stale, history = time.monotonic(), 0, 0, []
    initial_nll = None

    def progress_fraction():
        done = step / (max_epochs * n_batches)
        if max_minutes is not None:
            done = max(done, (time.monotonic() - start) / (60.0 * max_minutes))
        return min(done, 1.0)

    def finish():
        flow.load_state_dict(best_state)
        flow.eval().requires_grad_(False)

    def diverged(what):
        finish()
        kept = "The weights after the last whole epoch are kept"
        if x_val is not None:
            kept = "The best weights so far are kept "
            kept += f"(validation NLL {best_nll:.4g} nats per dimension)"
        return TrainingDivergedError(
            f"Training stopped in epoch {len(history) + 1}: {what}. {kept}. Lower learning_rate "
            f"(now {learning_rate:g}), or look for outliers and constant values in the data."
        )

    with Progress("Training", 1.0, enabled=verbose > 0) as bar:
        for epoch in range(1, max_epochs + 1):
            flow.train()
            order = torch.randperm(n, generator=generator).to(x_train.device)
            losses = []
            for rows in order.split(batch_size):
                x = dequantized(x_train[rows], level, generator)
                if horizontal_flips:
                    mirror = torch.rand(len(x), generator=generator).to(x.device) < 0.5
                    x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
                fraction = progress_fraction()
                rate = learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))
                rate *= min(1.0, (step + 1) / max(1, warmup_steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                loss = -flow.log_prob(x).mean() / d
                value = loss.item()
                if initial_nll is None:
                    initial_nll = value
                if not math.isfinite(value) or value > initial_nll + 100.0:
                    raise diverged(f"the training loss became {value}")
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), _MAX_GRAD_NORM)
                if not math.isfinite(norm):
                    raise diverged(f"the norm of the gradient became {float(norm)}")
                optimizer.step()
                losses.append(value)
                step += 1
                # The average forgets the start quickly at first (as in torch's swa examples).
                decay = min(ema_decay, step / (step + 10.0))
                with torch.no_grad():
                    for average, parameter in pairs:
                        average.lerp_(parameter, 1.0 - decay)
                if progress_fraction() >= 1.0 and step >= warmup_steps:
                    break
            record = dict(
                epoch=epoch,
                train_nll=sum(losses) / len(losses),
                learning_rate=rate,
                seconds=time.monotonic() - start,
            )
            if x_val is None:
                best_state = copy.deepcopy(averaged.state_dict())
            else:
                nll = -mean_log_prob(averaged, x_val) / d
                record["val_nll"] = nll
                if nll < best_nll:
                    best_nll, best_state, stale = nll, copy.deepcopy(averaged.state_dict()), 0
                else:
                    stale += 1
            history.append(record)
            shown = record.get("val_nll", record["train_nll"])
            bar.update(progress_fraction(), f"{shown / math.log(2):.3f} bits/dim")
            if callback is not None and callback(epoch, record):
                break
            if n_iter_no_change is not None and stale >= n_iter_no_change:
                break
            if progress_fraction() >= 1.0:
                break
    finish()
    return history
