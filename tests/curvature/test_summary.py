"""What is said of rank, condition and too few tokens."""

import numpy as np
import pytest
from tests.curvature.dense_fisher import N_CARRYING, small_model, small_rows

from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.curvature.summary import ENOUGH, too_few_tokens


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_rank_and_condition_are_the_spectrums(kind: str) -> None:
    curvature = RetainCurvature.fit(small_model("gpt2"), small_rows(), kind=kind, quiet=True)
    mean = curvature.mean_eigenvalue
    for summary in curvature.summary():
        block = curvature.blocks[summary.name]
        spectrum = block.spectrum.numpy()
        assert summary.shape == spectrum.shape
        assert summary.condition == pytest.approx((spectrum.max() + mean) / (spectrum.min() + mean), rel=1e-6)
        if kind == "kfac":
            left, right = (values.numpy() for values in block.eigenvalues)
            assert summary.rank == np.linalg.matrix_rank(np.diag(left)) * np.linalg.matrix_rank(np.diag(right))


def test_a_factor_of_two_tokens_has_rank_two_at_most() -> None:
    curvature = RetainCurvature.fit(small_model("gpt2"), small_rows([(3, 2, 3)]), quiet=True)
    for summary in curvature.summary():
        assert summary.rank <= 2 * 2


def test_few_tokens_are_warned_of_and_enough_are_not(capsys) -> None:
    model = small_model("gpt2")
    curvature = RetainCurvature.fit(model, small_rows())
    widest = max(matrix.shape[1] for matrix in curvature.matrices)
    assert f"measured at {N_CARRYING} tokens" in curvature.warning and f"reads {widest} inputs" in curvature.warning
    assert "were never seen" not in curvature.warning  # 17 tokens, 13 inputs
    assert "warning: curvature was measured at" in capsys.readouterr().err
    assert too_few_tokens(curvature.matrices, ENOUGH * widest) == ""
    assert f"at least {widest - 5} of them were never seen" in too_few_tokens(curvature.matrices, 5)


def test_quiet_says_nothing(capsys) -> None:
    RetainCurvature.fit(small_model("gpt2"), small_rows(), quiet=True)
    assert capsys.readouterr() == ("", "")
