"""
A Glow from normflows as a prior
================================

You have trained a flow with another library, and want to reconstruct with it. This example trains
a small Glow with `normflows <https://github.com/VincentStimper/normflows>`_, as its documentation
does, knowing nothing of skaipo, and then hands it over in three lines.
"""

# %%
# The multi-scale architecture of Glow, two levels for images of 8 x 8 pixels: squeeze, three
# steps of flow, half of the channels leave; squeeze, three more. In normflows the layers are listed
# from the latents to the image. The base distributions are Gaussians with locations and scales of
# their own, which are trained as well.

import math
import warnings

import matplotlib.pyplot as plt
import normflows as nf
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from skaipo import AIPORegressor, FlowPrior, GaussianPrior
from skaipo.datasets import load_digits_split
from skaipo.metrics import psnr_score
from skaipo.noise import GaussianNoise
from skaipo.operators import Inpainting

torch.manual_seed(0)


def level(channels):
    steps = [nf.flows.GlowBlock(channels, 32, use_lu=False) for _ in range(3)]
    return [*steps, nf.flows.Squeeze()]


glow = nf.MultiscaleFlow(
    [nf.distributions.GlowBase((8, 2, 2)), nf.distributions.GlowBase((2, 4, 4))],
    [level(8), level(4)],
    [nf.flows.Merge()],
    class_cond=False,
)

# %%
# Maximum likelihood on the training digits, whose integer grey levels get uniform noise of one
# level. The flow is trained in the units of the data, 0 to 16: its first ActNorm takes care of
# them. Some seconds on one core are enough for a flow of 22 000 parameters to be useful.

X_train, X_test, _, _ = load_digits_split()
images = torch.tensor(X_train, dtype=torch.float32).reshape(-1, 1, 8, 8)
epochs, batch_size = 14, 64
steps = epochs * (len(images) // batch_size)
optimizer = torch.optim.Adam(glow.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
for _ in range(epochs):
    order = torch.randperm(len(images))[: steps // epochs * batch_size]
    for rows in order.split(batch_size):
        batch = images[rows] + torch.rand(batch_size, 1, 8, 8) - 0.5
        loss = glow.forward_kld(batch, None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(glow.parameters(), 50.0)
        optimizer.step()
        schedule.step()

# %%
# That was normflows. Three lines take the flow to reconstructions of digits of which half of the
# pixels are missing, and the rest is noisy:

X = X_test[:40]
noise = GaussianNoise(1.0)
missing = np.random.default_rng(0).random(X.shape).argsort(axis=1) < 32
Y = np.where(missing, np.nan, noise.add_noise(X, random_state=0))
warnings.simplefilter("ignore", ConvergenceWarning)  # some digits stop at 80 evaluations

prior = FlowPrior(flow=glow)
model = AIPORegressor(Inpainting(), 1.0, prior=prior, noise=noise, max_evals=80)
x = model.predict(Y)

# %%
# When it is wrapped, the flow is tried at random points: the two directions must be inverses of
# each other, the log-determinants those of the Jacobian by autograd, and the density that of
# normflows itself. What is not as skaipo wants it is adapted: latents come as a list of tensors,
# one for each level, from Gaussians that are not standard.

latents = prior.transform(X_test)
print(f"latents: {latents.shape}, mean {latents.mean():.2f}, deviation {latents.std():.2f}")
with torch.no_grad():
    theirs = glow.log_prob(torch.tensor(X, dtype=torch.float32).reshape(-1, 1, 8, 8), None)
difference = np.abs(prior.score_samples(X.astype(np.float32)) - theirs.numpy()).max()
print(f"log-densities by skaipo and by normflows differ by at most {difference:.0e} nats")

# %%
# For comparison: a Gaussian with the moments of the training digits, in the same estimator. The
# score is the log-density of held-out digits in bits per pixel; higher is better.

rng = np.random.default_rng(1)
gaussian = GaussianPrior().fit(X_train + rng.uniform(-0.5, 0.5, X_train.shape))
by_gaussian = AIPORegressor(Inpainting(), 1.0, prior=gaussian, noise=noise).predict(Y)
reconstructed = {"Gaussian": by_gaussian, "Glow": x}
held_out = X_test + rng.uniform(-0.5, 0.5, X_test.shape)
bits, psnr = {}, {}
for name, each in {"Gaussian": gaussian, "Glow": prior}.items():
    bits[name] = each.score(held_out) / 64 / math.log(2)
    psnr[name] = psnr_score(X, reconstructed[name], data_range=16)
    print(f"{name:9s} {bits[name]:.2f} bits per pixel, {psnr[name]:.2f} dB")

# %%
# Where pixels are missing the Gaussian's strokes fade into grey. The flow has learnt that pixels
# are black or bright, and something of how strokes go on. Its samples, at a temperature of 0.7,
# show how far a training of seconds goes.

shown = 10
samples = prior.sample(shown, random_state=0, temperature=0.7)
rows = {
    "truth": X,
    "measured": Y,
    f"Gaussian\n{psnr['Gaussian']:.1f} dB": by_gaussian,
    f"Glow of normflows\n{psnr['Glow']:.1f} dB": x,
    "its samples": samples,
}
figure, grid = plt.subplots(len(rows), shown, figsize=(8.4, 4.4), layout="constrained")
colours = plt.get_cmap("gray").with_extremes(bad="tab:blue")
for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
    for axes, picture in zip(axes_row, pictures, strict=False):
        axes.imshow(picture.reshape(8, 8), cmap=colours, vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
figure.suptitle("Half of the pixels are missing (blue)")
plt.show()
