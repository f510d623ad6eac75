"""The gallery: every example runs, draws, does not warn, and shows what its text says."""

import ast
import runpy
import warnings
from pathlib import Path

import deepinv_here
import numpy as np
import pytest

plt = pytest.importorskip("matplotlib.pyplot")

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("plot_*.py"))


def denoise(names):
    psnr = names["psnr"]
    for name, values in psnr.items():
        if name == "nearest neighbours":
            assert psnr["AIPO"][0] > values[0] + 2 and abs(psnr["AIPO"][-1] - values[-1]) < 0.5
        elif name != "AIPO":
            assert np.subtract(psnr["AIPO"], values).min() > 1, name
    gain = {name: values[0] - values[-1] for name, values in psnr.items()}
    assert min(gain, key=gain.get) == "nearest neighbours"


def inpaint(names):
    holes, measured = ({k: v[i] for k, v in names["errors"].items()} for i in range(2))
    for kind in ("scattered", "block"):
        assert measured[kind, "AIPO"] < 0.8 < 0.9 < measured[kind, "5 neighbours"]
        assert holes[kind, "AIPO"] < holes[kind, "mean"]
    assert holes["scattered", "AIPO"] == pytest.approx(holes["scattered", "5 neighbours"], rel=0.2)
    assert holes["block", "5 neighbours"] < holes["block", "AIPO"]


def compressed_sensing(names):
    psnr = {name: np.array(values) for name, values in names["psnr"].items()}
    assert (psnr["AIPO"] > psnr["ridge"]).all()
    assert (psnr["ridge"] > psnr["Lasso, cosines"] + 5).all()
    assert (psnr["AIPO"] - psnr["ridge"])[1:].min() > 2
    assert np.median(names["needed"]) > 24


def lambda_path(names):
    psnr, best = names["psnr"], names["by_truth"]
    assert 0 < best < names["by_discrepancy"] < len(psnr) - 1
    assert psnr[best] - max(psnr[0], psnr[-1]) > 1
    assert np.diff(names["log_prob"]).min() > -1
    # The caution at the end: the single solve at the largest lambda, which is the last one made.
    assert names["result"].objective.mean() < 0.95 * names["path"][-1].objective.mean()
    assert names["psnr_score"](names["X"], names["result"].x, data_range=16) < psnr[-1] - 3


def grid_search(names):
    grid, search = names["grid"], names["search"]
    assert grid.best_params_["lam"] == search.lam_ not in (search.lams_[0], search.lams_[-1])
    assert names["difference"].max() < 1e-6
    assert search.n_evals_ < names["grid_evals"] / 2
    assert names["objective"]["AIPORegressorCV"] < names["objective"]["GridSearchCV"]


def classify_corrupted_digits(names):
    accuracy = names["accuracy"]
    assert accuracy["AIPOTransformer"] > accuracy["KNNImputer"]
    assert names["ceiling"] > max(accuracy.values())


def own_flow(names):
    for values in (names["bits"], names["psnr"]):
        assert values["Gaussian"] < values["copula"] < values["Glow"]
    assert abs(names["log_det"][0] - names["forth"].slogdet()[1]) < 1e-3
    assert names["error"] < 1e-2


def own_operator(names):
    psnr = {
        name: names["psnr_score"](names["X"], images, data_range=16)
        for name, images in names["pictures"].items()
        if name not in ("truth", "measured")
    }
    assert psnr["least squares"] < psnr["Tikhonov"] < psnr["AIPO"]
    op = names["op"]
    assert names["adjoint_error"](op.adjoint) < 1e-12 < 0.1 < names["adjoint_error"](op.forward)
    assert float((names["again"] - names["projected"]).abs().max()) < 1e-6
    matrix = op.forward(names["torch"].eye(64).double()).numpy().T
    assert op.norm() == pytest.approx(np.linalg.norm(matrix, 2))


def phase_retrieval(names):
    psnr = names["psnr"]
    assert psnr["AIPO"] > psnr["fixed lambda"] + 5 > psnr["alternating\nprojections"] + 5
    assert names["lower"].mean() > 0.8 and names["higher"].mean() < 0.1


def pylops(names):
    psnr = names["psnr"]
    assert psnr["smallest norm"] < psnr["sparse"] - 3 < psnr["AIPO"] - 6
    assert names["weights"].min() < names["weight"] < names["weights"].max()


def deepinv(names):
    psnr = names["psnr"]
    assert psnr["pseudo-inverse"] < psnr["measured"] < psnr["total variation"] < psnr["AIPO"] - 3
    assert names["weights"].min() < names["weight"] < names["weights"].max()


def normflows_glow(names):
    assert names["bits"]["Glow"] > names["bits"]["Gaussian"] + 0.2
    assert names["psnr"]["Glow"] > names["psnr"]["Gaussian"]
    assert names["latents"].shape == (360, 64) and abs(names["latents"].std() - 1) < 0.2
    assert names["difference"] < 1e-3


def zuko_flow(names):
    psnr = names["psnr"]
    assert psnr["the label"] > psnr["no label"] + 1 > psnr["a wrong label"] + 1.5


CLAIMS = {
    f"plot_{check.__name__}": check
    for check in (
        denoise,
        inpaint,
        compressed_sensing,
        lambda_path,
        grid_search,
        classify_corrupted_digits,
        own_flow,
        own_operator,
        phase_retrieval,
        pylops,
        deepinv,
        normflows_glow,
        zuko_flow,
    )
}
# Where the library is missing the example is skipped, as it is in the gallery.
NEEDS = {
    "plot_pylops": lambda: pytest.importorskip("pylops"),
    "plot_deepinv": deepinv_here.import_deepinv,
    "plot_normflows_glow": lambda: pytest.importorskip("normflows"),
    "plot_zuko_flow": lambda: pytest.importorskip("zuko"),
}


def test_every_example_is_checked():
    assert sorted(CLAIMS) == [path.stem for path in EXAMPLES]
    assert NEEDS.keys() <= CLAIMS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_header(path):
    """A title that is underlined in full, and a text: what the gallery takes for its index."""
    title, line, blank, *text = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    assert set(line) == {"="} and len(line) >= len(title)
    assert not blank and text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, monkeypatch, capsys):
    NEEDS.get(path.stem, lambda: None)()
    monkeypatch.setattr(plt, "show", lambda: None)
    backend = plt.get_backend()
    plt.switch_backend("agg")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = runpy.run_path(str(path))
            figures = [plt.figure(number) for number in plt.get_fignums()]
            assert figures
            for figure in figures:
                figure.canvas.draw()
                pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
                # A blank page is of one colour.
                assert min(pixels.shape[:2]) > 200 and pixels.std() > 10
        # Deprecations in other packages are not the example's.
        old = (DeprecationWarning, PendingDeprecationWarning)
        assert not [str(w.message) for w in caught if not issubclass(w.category, old)]
        assert capsys.readouterr().out
        CLAIMS[path.stem](names)
    finally:
        plt.close("all")
        plt.switch_backend(backend)
