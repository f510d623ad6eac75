"""Data and a trained prior to start with."""

from importlib.resources import as_file, files

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skaipo.priors import FlowPrior

__all__ = ["load_digits_prior", "load_digits_split"]


def load_digits_split():
    """Scikit-learn's 8x8 digits, split the way that the shipped prior was trained.

    The split is ``train_test_split(test_size=360, random_state=0, stratify=labels)``: 1437
    training digits, all that the shipped prior has seen, and 360 held-out ones.

    Returns
    -------
    X_train : ndarray of shape (1437, 64)
        Grey levels, integers 0..16 as floats.
    X_test : ndarray of shape (360, 64)
    labels_train : ndarray of shape (1437,)
    labels_test : ndarray of shape (360,)

    Examples
    --------
    >>> from skaipo.datasets import load_digits_split
    >>> X_train, X_test, labels_train, labels_test = load_digits_split()
    >>> X_test.shape
    (360, 64)
    """
    X, labels = load_digits(return_X_y=True)
    return train_test_split(X, labels, test_size=360, random_state=0, stratify=labels)


def load_digits_prior(device="auto"):
    """Load the prior that ships with the package: a Glow for the 8x8 digits, grey levels 0..16.

    It was trained by ``benchmarks/train_digits_prior.py`` on the training part of
    :func:`load_digits_split`, with uniform dequantisation of one grey level.

    Parameters
    ----------
    device : str or torch.device, default="auto"

    Returns
    -------
    prior : FlowPrior
        Fitted, with ``event_shape_ == (1, 8, 8)``.

    Examples
    --------
    >>> from skaipo.datasets import load_digits_prior
    >>> load_digits_prior().sample(3, random_state=0).shape
    (3, 64)
    """
    with as_file(files("skaipo") / "data" / "digits_glow.safetensors") as path:
        return FlowPrior.load(path, device=device)
