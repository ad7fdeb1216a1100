"""A linear probe: can the right one of two candidates be read off a model's hidden states, whatever the model says?

A probe that reads well proves nothing by itself: the states of an untrained model, or the bare words, may be enough.
Its number belongs beside theirs, and beside the same probe on shuffled labels (Hewitt & Liang 2019).
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from palimpsest.errors import DataError

Features = NDArray[np.float32]
DEFINITION = "linear_probe@pairs"
FOLDS = 5
PENALTIES = tuple(float(c) for c in np.logspace(-4, 1, 6))
"""Inverse strengths of the L2 penalty that cross-validation chooses from."""


def probe_accuracy(train: Features, right: NDArray[np.int64], test: Features, test_right: NDArray[np.int64]) -> float:
    """Share of test questions at which the probe finds the right candidate likelier than the other.

    The probe is a logistic regression from one candidate's standardised features to whether it is the right one. Its
    penalty is chosen by cross-validation in which a question's two candidates stay together.

    Args:
        train: [n, 2, d] features of both candidates of n questions.
        right: [n] which candidate is right, 0 or 1.
        test: [m, 2, d] those of other questions.
        test_right: [m].

    Raises:
        DataError: fewer questions than folds, or a feature that is not finite.
    """
    if len(train) < FOLDS:
        raise DataError(f"{len(train)} questions are too few for a probe; give at least {FOLDS}")
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise DataError("a hidden state is not finite; the model is broken there")
    n, _, width = train.shape
    labels = (np.arange(2) == right[:, None]).reshape(-1).astype(np.int64)
    folds = GroupKFold(FOLDS).split(labels, labels, np.repeat(np.arange(n), 2))
    probe = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=PENALTIES,
            cv=list(folds),
            scoring="neg_log_loss",
            max_iter=500,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
        ),
    )
    with threadpool_limits(1):  # the matrices are small: more threads would only wait for each other
        probe.fit(train.reshape(-1, width), labels)
    scores = probe.decision_function(test.reshape(-1, width)).reshape(-1, 2)
    return float((scores.argmax(1) == test_right).mean())
