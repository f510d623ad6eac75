"""The training loop: does it learn a density, and what does it keep when things go wrong?"""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from skaipo import FlowPrior, _progress, _training
from skaipo._progress import Progress
from skaipo._training import TrainingDivergedError, dequantized, mean_log_prob, train_flow
from skaipo.flows import Glow, RealNVP
from skaipo.priors import _flow

ARCHITECTURES = [RealNVP, Glow]
SMALL = dict(n_steps=2, hidden_channels=8, max_epochs=3, batch_size=32, random_state=0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they bring at these sizes, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixture(n, seed):
    """Two long, tilted bumps far from the origin: nothing that one normal could be."""
    rng = np.random.default_rng(seed)
    bump = rng.integers(2, size=n)
    scale = np.array([[1.0, 0.2], [0.3, 1.2]])[bump]
    return np.array([[3.0, -4.0], [7.0, -1.0]])[bump] + scale * rng.standard_normal((n, 2))


def small_flow(architecture=RealNVP, event_shape=(2,)):
    return architecture(event_shape, n_steps=2, hidden_channels=8)


def same_state(flow, state):
    return all(torch.equal(value, state[key]) for key, value in flow.state_dict().items())


def is_finite(flow):
    return all(bool(value.isfinite().all()) for value in flow.state_dict().values())


@pytest.fixture
def batches(monkeypatch):
    """What the training steps see: the arguments of log_prob where gradients are on."""
    seen = []
    log_prob = RealNVP.log_prob

    def record(self, x):
        if torch.is_grad_enabled():
            seen.append(x.detach().clone())
        return log_prob(self, x)

    monkeypatch.setattr(RealNVP, "log_prob", record)
    return seen


# ---------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("flow", ["realnvp", "glow"])
def test_learns_a_mixture_about_as_well_as_its_own_model(flow):
    """Against the right parametric family, fitted by EM; one normal would fail by far."""
    train, test = mixture(1200, 0), mixture(1000, 1)
    target = GaussianMixture(2, random_state=0).fit(train).score(test)
    margin = 0.12
    assert GaussianMixture(1).fit(train).score(test) < target - 3 * margin
    prior = FlowPrior(
        flow, n_steps=4, hidden_channels=24, max_epochs=12, learning_rate=1.5e-2, random_state=0
    ).fit(train)
    history = [record["train_nll"] for record in prior.history_]
    assert history[-1] < history[0] - 0.2
    assert target - margin < prior.score(test) < target + margin


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeps_the_best_weights_of_the_validation(architecture):
    x = torch.tensor(mixture(80, 0), dtype=torch.float32)
    x_val = torch.tensor(mixture(100, 1), dtype=torch.float32)
    flow = architecture((2,), n_steps=4, hidden_channels=64)
    history = train_flow(
        flow, x, x_val, max_epochs=30, learning_rate=4e-2, warmup_steps=5, ema_decay=0.5
    )
    scores = [record["val_nll"] for record in history]
    best = int(np.argmin(scores))
    assert 0 < best < len(scores) - 1  # otherwise first or last weights would do as well
    assert scores[-1] > scores[best] + 1e-3
    assert -mean_log_prob(flow, x_val) / 2 == pytest.approx(scores[best], rel=1e-9)
    assert not flow.training
    assert not any(parameter.requires_grad for parameter in flow.parameters())


def test_keeps_the_start_when_training_only_harms():
    """The initialised flow is validated too: a bad learning rate cannot leave less than it."""
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    flow = small_flow()
    start = []

    def remember(epoch, record):
        start.append(record["val_nll"])

    history = train_flow(
        flow, x, x[:20], max_epochs=4, learning_rate=0.5, warmup_steps=1, callback=remember
    )
    fresh = small_flow()
    fresh.initialize(x)
    initial = -mean_log_prob(fresh, x[:20]) / 2
    assert start == [record["val_nll"] for record in history]
    assert min(start) > initial
    assert -mean_log_prob(flow, x[:20]) / 2 == pytest.approx(initial, rel=1e-5)


def test_without_validation_the_last_average_is_kept():
    x = torch.tensor(mixture(64, 0), dtype=torch.float32)
    for decay, same in ((0.0, True), (0.9, False)):
        torch.manual_seed(0)
        flow = small_flow()
        last = {}

        def remember(epoch, record, flow=flow, last=last):
            last.update(copy.deepcopy(flow.state_dict()))

        history = train_flow(flow, x, max_epochs=3, ema_decay=decay, callback=remember)
        assert "val_nll" not in history[-1]
        assert same_state(flow, last) == same


def test_average_is_the_exponential_one():
    """Recomputed from the raw weights after each step: decay min(ema_decay, t / (t + 10))."""
    torch.manual_seed(0)
    x = torch.tensor(mixture(32, 0), dtype=torch.float32)
    flow = small_flow()
    raw = []

    def remember(epoch, record):
        raw.append(copy.deepcopy(flow.state_dict()))

    start = small_flow()
    start.load_state_dict(flow.state_dict())
    generator = torch.Generator().manual_seed(0)
    start.initialize(x[torch.randperm(32, generator=generator)])
    average = {key: value.double() for key, value in start.state_dict().items()}
    train_flow(flow, x, max_epochs=12, batch_size=32, ema_decay=0.4, callback=remember)
    assert len(raw) == 12  # one step per epoch
    for step, state in enumerate(raw, 1):
        decay = min(0.4, step / (step + 10))
        for key in average:
            average[key] = decay * average[key] + (1 - decay) * state[key].double()
    for key, value in flow.state_dict().items():
        torch.testing.assert_close(value.double(), average[key], rtol=1e-5, atol=1e-6)


def test_mean_log_prob_does_not_depend_on_the_chunks():
    flow = small_flow().double()
    x = torch.randn(23, 2, dtype=torch.float64)
    want = float(flow.log_prob(x).detach().mean())
    for size in (1, 5, 23, 256):
        assert mean_log_prob(flow, x, batch_size=size) == pytest.approx(want, rel=1e-12)


def test_warm_up_and_cosine_decay_of_the_learning_rate():
    x = torch.tensor(mixture(64, 0), dtype=torch.float32)
    history = train_flow(
        small_flow(), x, max_epochs=20, batch_size=32, learning_rate=1e-3, warmup_steps=10
    )
    rates = np.array([record["learning_rate"] for record in history])
    # The rate of the last step of each epoch, two steps to an epoch.
    step = 2 * np.arange(1, 21) - 1
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * step / 40)) / 2
    np.testing.assert_allclose(rates, 1e-3 * np.minimum(1, (step + 1) / 10) * cosine, rtol=1e-6)


# ---------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("flow", ["realnvp", "glow"])
def test_random_state_decides_everything(flow):
    X = mixture(80, 0)

    def fit(random_state):
        options = SMALL | dict(dropout=0.2, dequantize=0.3, random_state=random_state)
        return FlowPrior(flow, **options).fit(X)

    first = fit(3)
    torch.manual_seed(99)  # torch's own generator plays no part
    torch.rand(5)
    again, other = fit(3), fit(4)
    assert np.array_equal(first.score_samples(X), again.score_samples(X))
    assert [r["train_nll"] for r in first.history_] == [r["train_nll"] for r in again.history_]
    assert not np.array_equal(first.score_samples(X), other.score_samples(X))
    instance = fit(np.random.RandomState(3))
    assert np.array_equal(first.score_samples(X), instance.score_samples(X))


def test_fit_leaves_the_global_generators_alone():
    legacy = np.random.mtrand._rand  # what scikit-learn falls back on
    torch_state, numpy_state = torch.get_rng_state(), legacy.get_state()
    FlowPrior("glow", **SMALL | dict(dropout=0.2, dequantize=1.0)).fit(mixture(40, 0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(legacy.get_state()[1], numpy_state[1])
    assert legacy.get_state()[2:] == numpy_state[2:]


def test_fit_does_not_write_to_its_data():
    X = mixture(40, 0)
    tensor = torch.tensor(X, dtype=torch.float32)
    before = tensor.clone()
    FlowPrior(**SMALL | dict(dequantize=1.0)).fit(tensor)
    assert torch.equal(tensor, before)


# ---------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("flow", ["realnvp", "glow"])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_absurd_learning_rate_is_reported_and_leaves_finite_weights(flow, early_stopping):
    X = mixture(60, 0)
    prior = FlowPrior(
        flow, **SMALL | dict(learning_rate=1e6, max_epochs=50, early_stopping=early_stopping)
    )
    with pytest.raises(TrainingDivergedError, match="Lower learning_rate .now 1e\\+06") as told:
        prior.fit(X)
    assert ("validation NLL" in str(told.value)) == early_stopping
    assert is_finite(prior.flow_) and not prior.flow_.training
    # No worse than a normal of the whole data's mean and one standard deviation, about.
    baseline = -2 * (math.log(X.std()) + 0.5 * math.log(2 * math.pi) + 0.5)
    assert prior.score(X) > baseline - 0.5


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("bad", ["nan", "inf", "exploding", "gradient"])
def test_diverged_training_keeps_what_the_last_good_epoch_had(monkeypatch, bad, validated):
    x = torch.tensor(mixture(64, 0), dtype=torch.float32)
    x_val = torch.tensor(mixture(64, 1), dtype=torch.float32) if validated else None
    log_prob = RealNVP.log_prob
    steps = []

    def fail_late(self, x):
        value = log_prob(self, x)
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) > 11:  # in the last of the third epoch's four steps
                zero = self.levels[0][0].bias - self.levels[0][0].bias.detach()
                offset = {"nan": math.nan, "inf": -math.inf, "exploding": -1e4, "gradient": 0.0}
                root = zero.sum().sqrt() if bad == "gradient" else 0.0  # slope infinite, value 0
                return value + offset[bad] + root
        return value

    monkeypatch.setattr(RealNVP, "log_prob", fail_late)

    def reference(epochs):
        """The same training, stopped in time (the schedule's length is the same)."""
        torch.manual_seed(5)
        flow = small_flow()
        history = []
        train_flow(
            flow,
            x,
            x_val,
            max_epochs=9,
            batch_size=16,
            warmup_steps=1,
            callback=lambda epoch, record: history.append(record) or epoch == epochs,
        )
        return flow, history

    good, records = reference(2)
    steps.clear()
    torch.manual_seed(5)
    flow, history = small_flow(), []
    with pytest.raises(TrainingDivergedError, match="Training stopped in epoch 3: the .* became"):
        train_flow(
            flow,
            x,
            x_val,
            max_epochs=9,
            batch_size=16,
            warmup_steps=1,
            callback=lambda epoch, record: history.append(record),
        )
    assert len(history) == 2
    assert [r["train_nll"] for r in history] == [r["train_nll"] for r in records]
    assert is_finite(flow) and same_state(flow, good.state_dict())
    assert not flow.training


def test_diverged_error_is_a_runtime_error():
    assert issubclass(TrainingDivergedError, RuntimeError)


# ---------------------------------------------------------------------------------- dequantisation


@pytest.mark.parametrize(
    "dequantize, integers, level",
    [
        ("auto", True, 1.0),
        ("auto", False, 0.0),
        (None, True, 0.0),
        (0.5, False, 0.5),
        (2, True, 2.0),
        (0, True, 0.0),
    ],
)
def test_dequantisation_level(dequantize, integers, level, batches):
    X = np.round(10 * mixture(40, 0)) if integers else mixture(40, 0)
    prior = FlowPrior(**SMALL | dict(dequantize=dequantize, early_stopping=False)).fit(X)
    assert prior.dequantize_level_ == level
    # The noise belongs to what is standardised.
    variance = X.astype(np.float32).astype(float).var() + level**2 / 12
    assert float(prior.flow_.scale) == pytest.approx(math.sqrt(variance), rel=1e-6)
    assert float(prior.flow_.loc) == pytest.approx(X.mean(), rel=1e-6)
    seen = torch.cat(batches).double()
    distance = (seen[:, None] - torch.tensor(X)).abs().amax(2).amin(1)
    assert distance.max() <= level / 2 + 1e-5
    if level:
        assert distance.max() > 0.3 * level
        # Drawn anew: no two of the batches repeat a row.
        assert len(torch.unique(seen, dim=0)) == len(seen)


def test_grey_levels_of_integer_type_are_dequantised():
    X = np.random.default_rng(0).integers(0, 17, size=(40, 3)).astype(np.uint8)
    assert FlowPrior(**SMALL).fit(X).dequantize_level_ == 1.0


@pytest.mark.parametrize("dequantize", [-1.0, "on", [1.0], math.nan])
def test_dequantisation_level_must_be_one(dequantize):
    with pytest.raises(ValueError, match="dequantize must be 'auto', None or the width of a level"):
        FlowPrior(**SMALL | dict(dequantize=dequantize)).fit(mixture(40, 0))


def test_noise_is_uniform_and_centred():
    x = torch.full((400, 50), 7.0)
    noise = dequantized(x, 0.5, torch.Generator().manual_seed(0)) - 7
    n = noise.numel()
    assert noise.min() >= -0.25 and noise.max() <= 0.25
    assert abs(float(noise.mean())) < 5 * 0.5 / math.sqrt(12 * n)
    assert float(noise.var()) == pytest.approx(0.5**2 / 12, rel=0.02)
    quarters = torch.histc(noise, 4, -0.25, 0.25) / n
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.02)
    assert dequantized(x, 0.0, None) is x


# ---------------------------------------------------------------------------------- flips


@pytest.mark.parametrize("flips", [True, False])
def test_horizontal_flips_only_mirror(flips, batches):
    X = torch.randn(24, 2, 4, 4)
    options = SMALL | dict(horizontal_flips=flips, early_stopping=False, batch_size=8)
    FlowPrior(**options).fit(X)
    seen = torch.cat(batches)
    assert seen.shape == (3 * 24, 2, 4, 4)

    def among(images):
        return ((seen[:, None] - images).abs().flatten(2).amax(2) == 0).any(1)

    original, mirrored = among(X), among(X.flip(-1))
    assert (original ^ mirrored).all()
    share = float(mirrored.float().mean())
    assert 0.25 < share < 0.75 if flips else share == 0


def test_flips_of_vectors_are_refused():
    with pytest.raises(ValueError, match=r"needs images, but the samples have shape \(2,\)"):
        FlowPrior(**SMALL | dict(horizontal_flips=True)).fit(mixture(40, 0))


# ---------------------------------------------------------------------------------- stopping


def test_max_minutes_stops_and_still_anneals(monkeypatch):
    """With a clock that goes on by a second whenever it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(_training, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    x = torch.tensor(mixture(64, 0), dtype=torch.float32)
    history = train_flow(
        small_flow(), x, max_epochs=10_000, max_minutes=1.0, batch_size=32, warmup_steps=5
    )
    assert 2 < len(history) < 40
    assert history[-1]["seconds"] >= 60
    rates = [record["learning_rate"] for record in history]
    assert rates[-1] < 0.1 * max(rates)


def test_tiny_max_minutes_still_trains_an_epoch():
    prior = FlowPrior(**SMALL | dict(max_minutes=1e-9)).fit(mixture(40, 0))
    assert len(prior.history_) == 1 and is_finite(prior.flow_)


def test_early_stopping_waits_for_as_many_epochs_as_told():
    torch.manual_seed(0)
    x, x_val = (torch.tensor(mixture(n, n), dtype=torch.float32) for n in (40, 60))
    flow = RealNVP((2,), n_steps=4, hidden_channels=64)
    options = dict(max_epochs=300, learning_rate=2e-2, warmup_steps=5, ema_decay=0.5)
    history = train_flow(flow, x, x_val, n_iter_no_change=4, **options)
    scores = [record["val_nll"] for record in history]
    assert 4 < len(scores) < 300
    assert len(scores) - 1 - int(np.argmin(scores)) == 4
    # It did not stop before: no earlier stretch of four was without a gain.
    best = np.minimum.accumulate(scores)
    assert all(best[i + 4] < best[i] for i in range(len(best) - 5))


def test_callback_stops():
    x = torch.tensor(mixture(40, 0), dtype=torch.float32)
    history = train_flow(small_flow(), x, max_epochs=50, callback=lambda epoch, record: epoch == 3)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert set(history[0]) == {"epoch", "train_nll", "learning_rate", "seconds"}


@pytest.mark.parametrize(
    "n, fraction, early_stopping, n_val",
    [
        (40, 0.1, True, 4),
        (40, 0.25, True, 10),
        (40, 0.001, True, 1),
        (40, 0.25, False, 0),
        (9, 0.5, True, 0),  # too few to set any apart
        (10, 0.95, True, 8),  # two are left to train on
    ],
)
def test_validation_set(monkeypatch, n, fraction, early_stopping, n_val):
    sets = {}

    def record(flow, x, x_val, **options):
        sets.update(train=x, val=x_val)
        return train_flow(flow, x, x_val, **options)

    monkeypatch.setattr(_flow, "train_flow", record)
    X = mixture(n, 0).astype(np.float32)
    prior = FlowPrior(
        **SMALL | dict(validation_fraction=fraction, early_stopping=early_stopping)
    ).fit(X)
    assert ("val_nll" in prior.history_[0]) == (n_val > 0)
    train = sets["train"].numpy()
    val = np.empty((0, 2)) if sets["val"] is None else sets["val"].numpy()
    assert len(train) == n - n_val and len(val) == n_val
    both = np.concatenate((train, val))
    assert np.array_equal(np.unique(both, axis=0), np.unique(X, axis=0))


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [0.5, -0.1, 1e6 + 0.25])
def test_constant_data_has_no_density(value):
    with pytest.raises(ValueError, match="All values of X are equal"):
        FlowPrior(**SMALL).fit(np.full((33, 3), value))


def test_values_beyond_float32_are_refused():
    with pytest.raises(ValueError, match="beyond 3.4e.38, the largest number in float32"):
        FlowPrior(**SMALL).fit(1e300 * mixture(40, 0))
    large = FlowPrior(**SMALL).fit(1e15 * mixture(40, 0))
    assert np.isfinite(large.score(1e15 * mixture(40, 0)))


def test_constant_columns_and_constant_grey_levels_are_fine():
    X = mixture(40, 0)
    X[:, 1] = 5.5
    prior = FlowPrior(**SMALL).fit(X)
    assert np.isfinite(prior.score_samples(X)).all()
    prior = FlowPrior(**SMALL).fit(np.zeros((33, 3)))
    assert prior.dequantize_level_ == 1 and np.isfinite(prior.score(np.zeros((33, 3))))


def test_one_sample_is_too_few_and_two_are_enough():
    with pytest.raises(ValueError, match="at least 2 samples to train on, got n_samples=1"):
        FlowPrior(**SMALL).fit(mixture(1, 0))
    assert np.isfinite(FlowPrior(**SMALL).fit(mixture(2, 0)).score(mixture(5, 0)))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("max_epochs", 0, "max_epochs must be an integer of at least 1, got 0"),
        ("batch_size", 2.5, "batch_size must be an integer of at least 1, got 2.5"),
        ("n_steps", -1, "n_steps must be"),
        ("hidden_channels", "8", "hidden_channels must be an integer .* got '8'"),
        ("learning_rate", 0, r"learning_rate must lie in \(0, inf\), got 0"),
        ("learning_rate", math.nan, "learning_rate must lie"),
        ("validation_fraction", 1.0, r"validation_fraction must lie in \(0, 1\), got 1.0"),
        ("validation_fraction", "half", "validation_fraction must lie"),
        ("n_iter_no_change", 0, "n_iter_no_change must be an integer of at least 1, got 0"),
        ("bound", 0.0, r"bound must lie in \(0, inf\), got 0.0"),
        ("dropout", 1.0, r"dropout must lie in \[0, 1\), got 1.0"),
        ("ema_decay", 1, r"ema_decay must lie in \[0, 1\), got 1"),
        ("ema_decay", -0.1, "ema_decay must lie"),
        ("weight_decay", -1e-3, r"weight_decay must lie in \[0, inf\), got -0.001"),
        ("max_minutes", 0, "max_minutes must be None or a number above 0, got 0"),
        ("max_minutes", "1", "max_minutes must be"),
        ("n_levels", 2, "at least 4 features, got n_features=2"),
        ("flow", "nice", "Unknown flow 'nice'"),
    ],
)
def test_parameters_out_of_range(option, value, message):
    with pytest.raises(ValueError, match=message):
        FlowPrior(**SMALL | {option: value}).fit(mixture(40, 0))


@pytest.mark.parametrize("flow", [None, 3, RealNVP])
def test_flow_must_be_a_name_or_a_module(flow):
    with pytest.raises(TypeError, match="flow must be 'realnvp', 'glow' or a trained flow module"):
        FlowPrior(flow).fit(mixture(40, 0))


# ---------------------------------------------------------------------------------- progress


@pytest.fixture(params=["rich", "plain"])
def output(request, monkeypatch):
    if request.param == "rich":
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)  # import then raises
    return request.param


def test_verbose_shows_progress_on_standard_error(output, capsys):
    prior = FlowPrior(**SMALL | dict(verbose=1)).fit(mixture(40, 0))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Training" in err and "100%" in err
    bits = prior.history_[-1]["val_nll"] / math.log(2)
    assert f"{bits:.3f} bits/dim" in err


def test_silent_by_default(output, capsys):
    FlowPrior(**SMALL).fit(mixture(40, 0))
    assert capsys.readouterr() == ("", "")


def test_progress_survives_an_error_inside(output, capsys):
    with pytest.raises(KeyError), Progress("Job", 10) as bar:
        bar.update(3, "so far")
        raise KeyError
    assert ("so far" in capsys.readouterr().err) == (output == "rich")


def test_plain_lines_come_at_intervals_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    now = [0.0]
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("Job", 8, interval=10) as bar:
        for done in range(1, 9):
            now[0] += 4
            bar.update(done, f"step {done}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "Job: 38% step 3",
        "Job: 75% step 6",
        "Job: 100% step 8",
    ]
    assert lines[0].endswith("(12 s, about 20 s left)") and lines[-1].endswith("about 0 s left)")


def test_disabled_progress_prints_nothing(output, capsys):
    with Progress("Job", 2, enabled=False) as bar:
        bar.update(2, "done")
    assert capsys.readouterr() == ("", "")
