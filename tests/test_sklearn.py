"""Scikit-learn's own checks, over every public estimator."""

import numpy as np
import pytest
from problems import random_flow
from sklearn.utils.estimator_checks import parametrize_with_checks

import skaipo
from skaipo import (
    AIPORegressor,
    AIPORegressorCV,
    AIPOTransformer,
    FixedLambdaMAP,
    FlowPrior,
    GaussianPrior,
)
from skaipo.operators import Denoising, LeastSquaresOperator

# The checks look at interfaces: budgets and flows are as small as they can be.
pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:.*flow.*:UserWarning"),
]


def given():
    """A prior that is ready without fit, and therefore of a fixed width, three."""
    return GaussianPrior(np.zeros(3), np.eye(3))


LEARNT = [
    AIPORegressor(LeastSquaresOperator(), prior=GaussianPrior(), max_evals=4),
    FixedLambdaMAP(LeastSquaresOperator(), prior=GaussianPrior(), max_evals=4),
    AIPOTransformer(Denoising(), prior=GaussianPrior(), max_evals=4),
    AIPORegressorCV(LeastSquaresOperator(), prior=GaussianPrior(), lams=[1.0], cv=2, max_evals=4),
    FlowPrior(n_steps=1, hidden_channels=4, max_epochs=1),
    GaussianPrior(),
]
READY = [
    AIPORegressor(Denoising(), prior=given(), max_evals=4),
    AIPOTransformer(Denoising(), prior=given(), max_evals=4),
    FlowPrior(flow=random_flow(event_shape=(3,))),
    given(),
]

WIDTH = "the given prior has 3 features, and the check's data another number"
TARGET = "the check's target is one number per row, and the given prior has 3"
UNFIT = "is fitted without fit: its flow or its moments are given"

# By the width of X, in all that hold a given prior.
OF_WIDTH = {
    "check_dtype_object",
    "check_estimators_dtypes",
    "check_estimators_fit_returns_self",
    "check_estimators_overwrite_params",
    "check_fit2d_1feature",
    "check_fit2d_1sample",
    "check_fit_check_is_fitted",
    "check_fit_idempotent",
    "check_n_features_in",
    "check_n_features_in_after_fitting",
    "check_positive_only_tag_during_fit",
    "check_readonly_memmap_input",
}
OF_REGRESSORS_WIDTH = {
    "check_regressor_data_not_an_array",
    "check_regressor_multioutput",
    "check_regressors_int",
    "check_regressors_no_decision_function",
    "check_regressors_train",
}
# X has three columns here, y has one.
OF_TARGET = {
    "check_dict_unchanged",
    "check_dont_overwrite_parameters",
    "check_estimators_pickle",
    "check_f_contiguous_array_estimator",
    "check_fit2d_predict1d",
    "check_fit_score_takes_y",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_pipeline_consistency",
    "check_supervised_y_2d",
}


def by_nature(estimator):
    """The names of the checks that cannot pass, with the reason."""
    if any(estimator is one for one in LEARNT):
        return {}
    reasons = dict.fromkeys(OF_WIDTH, WIDTH)
    if hasattr(estimator, "predict"):
        reasons |= dict.fromkeys(OF_REGRESSORS_WIDTH, WIDTH)
        reasons |= dict.fromkeys(OF_TARGET, TARGET)
    elif isinstance(estimator, AIPOTransformer):
        reasons["check_transformers_unfitted_stateless"] = WIDTH
    else:
        reasons["check_fit_check_is_fitted"] = UNFIT
    return reasons


@parametrize_with_checks(LEARNT + READY)
def test_scikit_learns_checks(estimator, check):
    if check.func.__name__ not in by_nature(estimator):
        check(estimator)
        return
    # Not marked as xfail: pytest would write 43 tracebacks out of scikit-learn's longest modules.
    with pytest.raises((ValueError, AssertionError)):
        check(estimator)


def test_every_public_estimator_is_checked():
    public = {
        getattr(skaipo, name) for name in skaipo.__all__ if hasattr(getattr(skaipo, name), "fit")
    }
    assert {type(estimator) for estimator in LEARNT} == public
