"""Normalizing flows as priors: training, saving, loading."""

import contextlib
import copy
import math
import numbers
import warnings

import numpy as np
import torch
from sklearn.utils import check_random_state

from skaipo._training import TrainingDivergedError, train_flow
from skaipo._validation import check_batch, resolve_device
from skaipo.flows import Glow, RealNVP, as_flow, build_flow
from skaipo.flows._foreign import ForeignFlow, is_flow
from skaipo.priors._base import Prior
from skaipo.priors._file import read_file, unreadable, write_file

__all__ = ["FlowPrior"]

# Samples whose moments are worth more than those of the flow's own samples cost.
_ENOUGH = 64
# What a file says of its architecture, under the names of the constructor.
_OPTIONS = ("n_steps", "n_levels", "hidden_channels", "bound", "dropout")
# What a trained prior would silently ignore if it were changed afterwards.
_TRAINING = (
    "flow",
    "event_shape",
    *_OPTIONS,
    "dequantize",
    "horizontal_flips",
    "max_epochs",
    "max_minutes",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "ema_decay",
    "validation_fraction",
    "early_stopping",
    "n_iter_no_change",
)


def _warn_of_channels_last(shape):
    """Images are (C, H, W); most who come with (H, W, 3) did not mean an image three pixels wide"""
    if len(shape) != 3:
        return
    height, width, channels = shape
    few = channels in (3, 4) or (channels == 1 and height == width)
    if few and min(height, width) > 4:
        warnings.warn(
            f"The images have shape {tuple(shape)}, which is taken for {height} channels of "
            f"{width} x {channels} pixels. If these are images of {height} x {width} pixels with "
            f"{channels} channels, pass X.transpose(0, 3, 1, 2), of shape (n_samples, {channels}, "
            f"{height}, {width}), and the measurements alike.",
            UserWarning,
            stacklevel=3,
        )


class FlowPrior(Prior):
    """A normalizing flow as a prior: trained on clean data, or a trained one wrapped.

    ``transform`` maps data to the latent space and ``inverse_transform`` generates;
    ``score_samples`` gives the log-density in the units of the data, whatever scaling or
    dequantisation happens inside.

    Parameters
    ----------
    flow : {"realnvp", "glow"}, torch.nn.Module or Distribution, default="realnvp"
        An architecture that ``fit`` trains, or a trained flow, which makes the prior fitted: a
        :class:`~skaipo.flows.Flow`, or one of normflows, zuko, nflows, FrEIA or
        ``torch.distributions`` (:func:`~skaipo.flows.as_flow` lists the classes and what is
        checked). A trained module is not copied: it is put in evaluation mode, and its parameters
        no longer require gradients.
    event_shape : tuple of int, default=None
        ``(d,)`` or ``(C, H, W)``. Default: the shape of the samples given to ``fit``; of a trained
        flow, its own.
    n_steps : int, default=8
        Steps of flow per level.
    n_levels : int, default=None
        Scales; default: 3 for images as far as their sides allow, 1 for vectors.
    hidden_channels : int, default=64
        Width of the coupling networks.
    bound : float, default=2
        Largest absolute log-scale of a coupling. Smaller is tamer far from the data, where a
        noisy measurement may lie.
    dropout : float in [0, 1), default=0
        Dropout in the coupling networks while training; helps on small data.
    dequantize : "auto", None or float, default="auto"
        Width of the uniform noise that is added to the training data, centred at zero. "auto":
        1 if all training values are integers (grey levels), otherwise none. Of a trained flow:
        what it was trained with, if that is known.
    horizontal_flips : bool, default=False
        Mirror training images at random.
    max_epochs : int, default=100
    max_minutes : float, default=None
        Limit of the training time. Results then depend on the machine's speed.
    batch_size : int, default=64
    learning_rate : float, default=1e-3
        Peak learning rate, after the warm-up and before the cosine decay.
    weight_decay : float, default=0
        Decoupled weight decay (AdamW).
    ema_decay : float in [0, 1), default=0.99
        Decay of the moving average of the weights, which is what is validated and kept.
    validation_fraction : float in (0, 1), default=0.1
        Share of the data set apart when ``early_stopping`` is true.
    early_stopping : bool, default=True
        Keep the weights of the best validation score, and stop after ``n_iter_no_change`` epochs
        without a better one.
    n_iter_no_change : int, default=20
    device : str or torch.device, default="auto"
        "auto": the first CUDA device if there is one.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        1 shows a progress bar with the validation NLL in bits per dimension and the time left.

    Attributes
    ----------
    flow_ : Flow
        The trained flow, frozen.
    history_ : list of dict
        Per epoch: train and validation NLL in nats per dimension, learning rate, seconds.
    dequantize_level_ : float
        Width of the noise that was used; 0 for none.
    n_features_in_ : int

    References
    ----------
    Kingma, D. P. and Dhariwal, P., "Glow: Generative Flow with Invertible 1x1 Convolutions",
    NeurIPS 2018. Dinh, L. et al., "Density estimation using Real NVP", ICLR 2017. Uniform
    dequantisation: Theis, L. et al., "A note on the evaluation of generative models", ICLR 2016.

    Examples
    --------
    >>> import numpy as np
    >>> from skaipo import FlowPrior
    >>> X = np.random.default_rng(0).normal(size=(200, 2)) @ [[2.0, 0.0], [1.0, 0.5]]
    >>> prior = FlowPrior("realnvp", n_steps=2, max_epochs=3, random_state=0).fit(X)
    >>> prior.transform(X).shape
    (200, 2)
    """

    def __init__(
        self,
        flow="realnvp",
        *,
        event_shape=None,
        n_steps=8,
        n_levels=None,
        hidden_channels=64,
        bound=2.0,
        dropout=0.0,
        dequantize="auto",
        horizontal_flips=False,
        max_epochs=100,
        max_minutes=None,
        batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.0,
        ema_decay=0.99,
        validation_fraction=0.1,
        early_stopping=True,
        n_iter_no_change=20,
        device="auto",
        random_state=None,
        verbose=0,
    ):
        self.flow = flow
        self.event_shape = event_shape
        self.n_steps = n_steps
        self.n_levels = n_levels
        self.hidden_channels = hidden_channels
        self.bound = bound
        self.dropout = dropout
        self.dequantize = dequantize
        self.horizontal_flips = horizontal_flips
        self.max_epochs = max_epochs
        self.max_minutes = max_minutes
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.validation_fraction = validation_fraction
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_is_fitted__(self):
        if not is_flow(self.flow):
            return super().__sklearn_is_fitted__()
        try:
            flow = self.flow_
        except (TypeError, ValueError):  # Told where the flow is used.
            return True
        return flow.has_inverse or flow.clean is not None

    @property
    def _unfitted_because(self):
        if not is_flow(self.flow):
            return ""
        return (
            " (Its flow is trained, but has no direction from latents to data: fit(X) with clean "
            "data gives it their mean and covariance, which others have from their samples.)"
        )

    @property
    def flow_(self):
        """Flow : the fitted module, frozen."""
        if is_flow(self.flow):
            known = self.__dict__.get("_wrapped")
            if known is None or known[:2] != (id(self.flow), self.event_shape):
                known = id(self.flow), self.event_shape, as_flow(self.flow, self.event_shape)
                self.__dict__["_wrapped"] = known
            return as_flow(known[2]).eval().requires_grad_(False)
        for name, value in getattr(self, "_trained_with", {}).items():
            now = getattr(self, name)
            if now is not value and now != value:
                raise ValueError(
                    f"{name} was changed from {value!r} to {now!r} after this prior was trained, "
                    f"which changes nothing in it: call fit(X) again, or set it back."
                )
        return super().flow_

    def __getstate__(self):
        other = copy.copy(self)
        vars(other).pop("_wrapped", None)
        if is_flow(self.flow):
            # The adapter has all of what it wraps, and has passed the checks. (One that has not
            # travels as it is.)
            with contextlib.suppress(TypeError, ValueError):
                other.flow = self.flow_
        return super(FlowPrior, other).__getstate__()

    def __deepcopy__(self, memo):
        other = copy.copy(self)
        vars(other).pop("_wrapped", None)
        other = super(FlowPrior, other).__deepcopy__(memo)
        if "_wrapped" in vars(self):
            other.__dict__["_wrapped"] = self.__dict__["_wrapped"]
        return other

    @property
    def dequantize_width(self):
        """float : width of the noise in the data, as far as known: of the training, or declared."""
        if not is_flow(self.flow):
            return getattr(self, "dequantize_level_", 0.0)
        return 0.0 if self.dequantize == "auto" else self._level(None)

    def fit(self, X, y=None):
        """Train the flow by maximum likelihood. A wrapped, already trained flow is left as it is.

        (One that has no direction from latents to data takes mean and covariance from ``X``. So
        does one of another library, from 64 samples on: sampling may be slow.)

        Parameters
        ----------
        X : array-like of shape (n_samples, d) or (n_samples, C, H, W)
            Clean data.
        y : Ignored

        Returns
        -------
        self : FlowPrior

        Raises
        ------
        TrainingDivergedError
            If the loss became non-finite or exploded. The best weights so far are kept, so that
            the prior is fitted nevertheless.
        """
        event_shape = self.event_shape
        if is_flow(self.flow):
            event_shape = self.flow_.event_shape
        elif not isinstance(self.flow, str):
            raise TypeError(
                f"flow must be 'realnvp', 'glow' or a trained flow module, got {self.flow!r}."
            )
        x, _, shape = check_batch(
            X,
            event_shape=event_shape,
            estimator=self,
            reset=True,
            whose="event_shape" if self.event_shape is not None else "this FlowPrior",
            dtype=torch.float32,
        )
        if is_flow(self.flow):
            flow = self.flow_
            enough = len(x) >= _ENOUGH and bool((x != x[0]).any())
            if not flow.has_inverse or (isinstance(flow, ForeignFlow) and enough):
                noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
                fitted = flow.with_clean_data(x + self._level(x) * noise)
                # With the one that has passed the checks, for clones.
                known = as_flow(self.flow, self.event_shape)
                self.__dict__["_wrapped"] = id(self.flow), self.event_shape, fitted, known
            return self
        self._check_params(len(x))
        event_shape = tuple(event_shape) if event_shape is not None else shape
        _warn_of_channels_last(event_shape)
        if self.horizontal_flips and len(event_shape) != 3:
            raise ValueError(
                f"horizontal_flips=True needs images, but the samples have shape {event_shape}. "
                f"Pass X of shape (n_samples, C, H, W), or event_shape=(C, H, W)."
            )
        random_state = check_random_state(self.random_state)
        seed, split_seed = (int(s) for s in random_state.randint(2**31 - 1, size=2))
        level = self._level(x)
        device = resolve_device(self.device)
        variance = float(x.double().var(correction=0)) + level**2 / 12
        if variance == 0:
            raise ValueError(
                "All values of X are equal: its density is degenerate. Pass data that varies, or "
                "dequantize=1.0 for grey levels."
            )
        # Torch's global generator draws the initial weights; leave it as it was found.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = build_flow(
                self.flow,
                event_shape,
                n_steps=self.n_steps,
                n_levels=self.n_levels,
                hidden_channels=self.hidden_channels,
                bound=self.bound,
                dropout=self.dropout,
                loc=float(x.double().mean()),
                scale=math.sqrt(variance),
            ).to(device)
            x = x.reshape(-1, *event_shape).to(device)
            x_val = None
            if self.early_stopping and len(x) >= 10:
                n_val = max(1, round(self.validation_fraction * len(x)))
                n_val = min(n_val, len(x) - 2)
                order = np.random.RandomState(split_seed).permutation(len(x))
                x, x_val = x[order[n_val:]], x[order[:n_val]]
            history = []
            try:
                train_flow(
                    flow,
                    x,
                    x_val,
                    level=level,
                    horizontal_flips=self.horizontal_flips,
                    max_epochs=self.max_epochs,
                    max_minutes=self.max_minutes,
                    batch_size=self.batch_size,
                    learning_rate=self.learning_rate,
                    weight_decay=self.weight_decay,
                    ema_decay=self.ema_decay,
                    n_iter_no_change=self.n_iter_no_change if self.early_stopping else None,
                    seed=seed,
                    verbose=self.verbose,
                    callback=lambda epoch, record: history.append(record),
                )
            except TrainingDivergedError:
                self._keep(flow, history, level)
                raise
        self._keep(flow, history, level)
        return self

    def _keep(self, flow, history, level):
        self._fitted_flow = flow.eval().requires_grad_(False)
        self._trained_with = {name: getattr(self, name) for name in _TRAINING}
        self.history_ = history
        self.dequantize_level_ = level

    def _level(self, x):
        if self.dequantize == "auto":
            return 1.0 if bool((x == x.round()).all()) else 0.0
        if self.dequantize is None or self.dequantize is False:
            return 0.0
        if isinstance(self.dequantize, numbers.Real) and self.dequantize >= 0:
            return float(self.dequantize)
        raise ValueError(
            f"dequantize must be 'auto', None or the width of a level >= 0, got "
            f"{self.dequantize!r}."
        )

    def _check_params(self, n_samples):
        if n_samples < 2:
            raise ValueError("FlowPrior needs at least 2 samples to train on, got n_samples=1.")
        whole = ("max_epochs", "batch_size", "n_steps", "hidden_channels", "n_iter_no_change")
        for name in whole:
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name, low, high in (
            ("learning_rate", 0, math.inf),
            ("validation_fraction", 0, 1),
            ("bound", 0, math.inf),
        ):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not low < value < high:
                raise ValueError(f"{name} must lie in ({low}, {high}), got {value!r}.")
        for name, high in (("dropout", 1), ("ema_decay", 1), ("weight_decay", math.inf)):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= value < high:
                raise ValueError(f"{name} must lie in [0, {high}), got {value!r}.")
        minutes = self.max_minutes
        if minutes is not None and not (isinstance(minutes, numbers.Real) and minutes > 0):
            raise ValueError(f"max_minutes must be None or a number above 0, got {minutes!r}.")

    def freeze(self):
        """Return a fitted prior that stays fitted under ``sklearn.clone`` and ``fit``.

        Returns
        -------
        prior : FlowPrior
            It wraps this prior's flow, without copying it.
        """
        return FlowPrior(flow=self.flow_, dequantize=self.dequantize_width or "auto")

    def save(self, path):
        """Write the prior to a ``.safetensors`` file: weights, and a JSON config as metadata.

        Parameters
        ----------
        path : str or path-like
            Written whole or not at all.

        Raises
        ------
        TypeError
            If the flow is not one of the package's architectures.
        OSError
            If the file cannot be written.
        """
        flow = self.flow_
        # (A subclass may compute another density from the same weights.)
        if type(flow) not in (Glow, RealNVP):
            raise TypeError(
                f"Only the flows of skaipo.flows can be saved; save a {type(flow).__name__} with "
                f"its own library and wrap it again with FlowPrior(flow=module)."
            )
        info = {
            "flow": flow.config(),
            "dtype": str(flow.loc.dtype).removeprefix("torch."),
            "dequantize_level": self.dequantize_width,
        }
        write_file(path, flow.state_dict(), info)

    @classmethod
    def load(cls, path, device="auto"):
        """Read a prior that :meth:`save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : str or path-like
        device : str or torch.device, default="auto"

        Returns
        -------
        prior : FlowPrior
            Fitted.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, not a safetensors file, or not a prior of this package.
        """
        path, info, tensors = read_file(path, "flow")
        try:
            config, dtype = dict(info["flow"]), getattr(torch, info["dtype"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(path, "flow") from error
        try:
            options = {k: v for k, v in config.items() if k not in ("class", "event_shape")}
            # Building draws initial weights; leave torch's global generator as it was found.
            with torch.random.fork_rng(devices=[]):
                flow = build_flow(config["class"], tuple(config["event_shape"]), **options)
            flow.to(dtype).load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The weights in {path!r} do not fit the architecture that it names, "
                f"{config.get('class')!r}: {error}"
            ) from error
        prior = cls(
            flow=config["class"].lower(),
            event_shape=tuple(config["event_shape"]),
            **{k: flow.config()[k] for k in _OPTIONS},
            device=device,
        )
        prior._keep(flow.to(resolve_device(device)), [], info.get("dequantize_level", 0.0))
        prior.n_features_in_ = flow.n_features
        return prior
