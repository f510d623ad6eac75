"""The digits, their split, and the prior that ships with the package."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

from skaipo import FlowPrior
from skaipo.datasets import load_digits_prior, load_digits_split


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


@pytest.fixture(scope="module")
def prior():
    return load_digits_prior(device="cpu")


def test_the_split_is_fixed(split):
    X_train, X_test, labels_train, labels_test = split
    assert X_train.shape == (1437, 64) and X_test.shape == (360, 64)
    assert labels_train.shape == (1437,) and labels_test.shape == (360,)
    for first, second in zip(split, load_digits_split(), strict=True):
        np.testing.assert_array_equal(first, second)
    # The shipped prior was trained on this training part: another split would leak into it.
    assert labels_test[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert X_test.sum() == 112350
    assert X_train.min() == 0 and X_train.max() == 16
    assert (X_train == X_train.round()).all()


def test_the_parts_are_disjoint_and_complete(split):
    X_train, X_test, labels_train, labels_test = split
    X, labels = load_digits(return_X_y=True)
    together = np.column_stack(
        (np.vstack((X_train, X_test)), np.concatenate((labels_train, labels_test)))
    )
    whole = np.column_stack((X, labels))
    np.testing.assert_array_equal(
        together[np.lexsort(together.T)], whole[np.lexsort(whole.T)], "a permutation of all digits"
    )
    assert not {row.tobytes() for row in X_train} & {row.tobytes() for row in X_test}
    shares = np.bincount(labels_test) / np.bincount(labels)
    np.testing.assert_allclose(shares, 360 / 1797, atol=0.005)


def test_the_prior_is_ready(prior):
    assert isinstance(prior, FlowPrior)
    assert prior.event_shape_ == (1, 8, 8)
    flow = prior.flow_
    assert not flow.training
    assert all(not parameter.requires_grad for parameter in flow.parameters())
    assert {p.dtype for p in flow.parameters()} == {torch.float32}


def test_the_weights_are_small():
    folder = files("skaipo") / "data"
    sizes = [entry.stat().st_size for entry in folder.iterdir() if entry.name != "__init__.py"]
    assert 10_000 < sum(sizes) < 1_000_000


def test_loading_twice_gives_the_same_prior(prior, split):
    again = load_digits_prior(device="cpu")
    assert again is not prior
    X = split[1][:10]
    np.testing.assert_array_equal(again.score_samples(X), prior.score_samples(X))


def test_it_is_a_bijection_on_held_out_digits(prior, split):
    X = split[1][:50]
    Z = prior.transform(X)
    assert Z.shape == (50, 64)
    np.testing.assert_allclose(prior.inverse_transform(Z), X, atol=0.01)


def test_it_beats_a_gaussian_mixture_on_held_out_digits(prior, split):
    """Both on the density of grey levels with uniform noise, which is what the prior models.

    The mixture that is tuned on the training digits gets -119.5 nats, the prior -94.4.
    """
    X_train, X_test, _, _ = split
    rng = np.random.default_rng(0)
    mixture = GaussianMixture(10, reg_covar=0.1, random_state=0, max_iter=30)
    mixture.fit(X_train + rng.uniform(-0.5, 0.5, X_train.shape))
    X = X_test + rng.uniform(-0.5, 0.5, X_test.shape)
    difference = prior.score_samples(X) - mixture.score_samples(X)
    error = difference.std() / np.sqrt(len(difference))
    assert difference.mean() > 10 + 4 * error
    assert (difference > 0).mean() > 0.8
    # Not by having seen them: held-out digits are about as likely as those of training.
    assert prior.score(X_train[:360]) - prior.score(X_test) < 12


def test_samples_look_like_digits(prior, split):
    """By their mean picture and by their grey levels; noise or a constant would fail."""
    samples = prior.sample(400, random_state=0)
    truth = split[0]
    assert samples.shape == (400, 64) and np.isfinite(samples).all()
    assert np.corrcoef(samples.mean(0), truth.mean(0))[0, 1] > 0.97
    assert np.abs(samples.mean(0) - truth.mean(0)).max() < 2.5
    inside = (samples > -2) & (samples < 18)
    assert inside.mean() > 0.95
    np.testing.assert_array_equal(samples, prior.sample(400, random_state=0))
