"""
Choose lambda: GridSearchCV and AIPORegressorCV
===============================================

Lambda is an ordinary hyperparameter, and :class:`~sklearn.model_selection.GridSearchCV` chooses it
like any other. :class:`~skaipo.AIPORegressorCV` makes the same choice along one path of
reconstructions, as :class:`~sklearn.linear_model.LassoCV` does for Lasso. This example runs both
and compares their choice, their scores and their cost.
"""

# %%
# Noisy digits, and a grid of lambdas.

import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold

from skaipo import AIPORegressor, AIPORegressorCV
from skaipo.datasets import load_digits_prior, load_digits_split
from skaipo.metrics import psnr_score, reconstruction_error
from skaipo.noise import GaussianNoise
from skaipo.operators import Denoising

X = load_digits_split()[1]
X, X_new = X[:24], X[24:40]
op, noise = Denoising(), GaussianNoise(3.0)
Y, Y_new = (noise.add_noise(op(x), random_state=seed) for seed, x in enumerate((X, X_new)))

lams = np.geomspace(0.1, 4, 5)
cv = KFold(2, shuffle=True, random_state=0)
params = dict(prior=load_digits_prior(device="cpu"), noise=noise, max_evals=100)
warnings.simplefilter("ignore", ConvergenceWarning)  # a small budget, for speed

# %%
# ``GridSearchCV`` needs a scorer. This one returns the evaluations of the flow as well, the unit of
# cost that does not depend on the machine; ``scoring="neg_mean_squared_error"`` would do if
# nobody asked for them.


def error_and_evaluations(estimator, Y, X):
    result = estimator.reconstruct(Y)
    return {"score": -reconstruction_error(X, result.x), "n_evals": result.n_evals.sum()}


start = time.perf_counter()
grid = GridSearchCV(
    AIPORegressor(op, schedule="geometric", **params),
    {"lam": lams},
    scoring=error_and_evaluations,
    refit="score",
    cv=cv,
)
grid.fit(Y, X)
grid_seconds = time.perf_counter() - start
grid_evals = int(sum(grid.cv_results_[f"split{k}_test_n_evals"].sum() for k in range(2)))

# %%
# The same by ``AIPORegressorCV``. The lambdas of its grid branch off from one common sequence
# of ascending lambdas, the same for every grid. That makes each point of the path equal to a single
# solve with ``schedule="geometric"``, so that nothing is traded for the speed.

start = time.perf_counter()
search = AIPORegressorCV(op, lams=lams, cv=cv, **params).fit(Y, X)
search_seconds = time.perf_counter() - start

difference = np.abs(search.cv_results_["mean_test_score"] - grid.cv_results_["mean_test_score"])
print(f"{'':16s} {'lambda':>8s} {'evaluations':>12s} {'seconds':>8s}")
print(f"{'GridSearchCV':16s} {grid.best_params_['lam']:8.3g} {grid_evals:12d} {grid_seconds:8.2f}")
print(f"{'AIPORegressorCV':16s} {search.lam_:8.3g} {search.n_evals_:12d} {search_seconds:8.2f}")
print(f"largest difference of their mean scores: {difference.max():.1e}")

# %%
# Both are estimators: ``predict`` reconstructs new measurements at the lambda that was chosen. A
# point of the path has part of the evaluations only; ``AIPORegressorCV`` spends all of them at that
# lambda and comes closer to the minimum. (A lower objective need not be a higher PSNR.)

objective = {}
for name, model in {"GridSearchCV": grid.best_estimator_, "AIPORegressorCV": search}.items():
    result = model.reconstruct(Y_new)
    objective[name] = result.objective.mean()
    psnr = psnr_score(X_new, result.x, data_range=16)
    print(f"{name:16s} mean objective {objective[name]:6.2f}, PSNR {psnr:.2f} dB")

# %%
# On the left the errors of both lie on each other: the dots are ``GridSearchCV``, the line is
# ``AIPORegressorCV``; the thin lines are its folds. Too small a lambda trusts noisy
# measurements, too large a one ignores them. On the right, the cost. Grid search starts every
# lambda from scratch; on the path the way up is shared.

orange, grey = "#d1603d", "#5b6b80"
figure, (curve, evals, seconds) = plt.subplots(
    1, 3, figsize=(10.5, 3.8), width_ratios=[2.6, 1, 1], layout="constrained"
)
curve.plot(lams, search.mse_path_, color=orange, linewidth=0.8, alpha=0.5)
curve.plot(lams, search.mse_path_.mean(axis=1), color=orange, linewidth=2, label="AIPORegressorCV")
curve.plot(lams, -grid.cv_results_["mean_test_score"], "o", color=grey, label="GridSearchCV")
curve.axvline(search.lam_, color="black", linestyle=":", linewidth=1)
label = dict(ha="right", va="top", fontsize=9)
curve.text(search.lam_ / 1.1, curve.get_ylim()[1], "chosen by both", **label)
curve.set(xscale="log", xlabel="lambda", ylabel="mean squared error, held-out folds")
curve.legend(loc="upper right", fontsize=9)
names = ["GridSearchCV", "AIPO-\nRegressorCV"]
for axes, values, title, form in (
    (evals, [grid_evals, search.n_evals_], "flow evaluations", "{:.0f}"),
    (seconds, [grid_seconds, search_seconds], "seconds", "{:.2f}"),
):
    axes.bar_label(axes.bar(names, values, color=[grey, orange]), fmt=form, fontsize=9)
    axes.set(title=title, yticks=[])
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.12)
for axes in (curve, evals, seconds):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
