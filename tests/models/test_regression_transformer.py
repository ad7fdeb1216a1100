"""The transformer that does regression in context: causal in both layouts, trained by the step, killed and gone on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from palimpsest.errors import SpecError, TrainingError
from palimpsest.models.regression_transformer import (
    Layout,
    RegressionArchitecture,
    RegressionTransformer,
    predict_regression,
    train_regression,
)
from palimpsest.models.training import TrainingSettings

POINTS, DIM = 6, 2
SETTINGS = TrainingSettings(steps=12, learning_rate=3e-3, weight_decay=0.0, warmup=0, schedule="constant")
LAYOUTS = get_args(Layout)


def network(layout: Layout = "paired", seed: int = 0) -> RegressionTransformer:
    return RegressionTransformer(RegressionArchitecture(DIM, POINTS, 2, 16, 2, layout), seed)


def pairs(step: int, n: int = 32) -> tuple[Tensor, Tensor]:
    """Tasks w = (1, -1) times a random size, without noise."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n, POINTS, DIM, generator=generator)
    return x, torch.randn(n, 1, generator=generator) * (x[..., 0] - x[..., 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", range(POINTS))
def test_a_prediction_sees_its_x_and_the_pairs_before_and_nothing_else(layout: Layout, place: int) -> None:
    x, y = pairs(0)
    x.requires_grad_(), y.requires_grad_()
    network(layout)(x, y)[:, place].sum().backward()
    assert x.grad is not None and y.grad is not None
    assert (x.grad.abs().sum((0, 2)) > 0).tolist() == [at <= place for at in range(POINTS)]
    assert (y.grad.abs().sum(0) > 0).tolist() == [at < place for at in range(POINTS)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_do_not_depend_on_the_batch_or_the_prompts_length(layout: Layout) -> None:
    x, y = pairs(1)
    model = network(layout)
    whole = predict_regression(model, x, y)
    assert whole.shape == y.shape and whole.dtype == torch.float64
    assert torch.allclose(predict_regression(model, x, y, batch_size=5), whole, atol=1e-6)
    assert torch.allclose(predict_regression(model, x[:, :3], y[:, :3]), whole[:, :3], atol=1e-6)


def test_the_seed_decides_the_weights_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = network(seed=1), network(seed=1), network(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.positions, again.positions) and not torch.equal(one.positions, other.positions)


def test_the_paper_sized_network_has_the_blocks_of_the_paper() -> None:
    """12 blocks of width 256 have 9.48 M parameters, as GPT-2's do."""
    size = RegressionArchitecture(dim=20, points=41, layers=12, width=256, heads=8)
    blocks = RegressionTransformer(size, 0).blocks
    assert sum(value.numel() for value in blocks.parameters()) == 12 * (12 * 256**2 + 13 * 256)


def test_label_scaling_scales_there_and_back() -> None:
    x, y = pairs(2)
    model = network()
    scaled = predict_regression(model, x, y, scale=2.0)
    assert torch.allclose(scaled, predict_regression(model, x, 2 * y) / 2, atol=1e-7)
    assert not torch.allclose(scaled, predict_regression(model, x, y), atol=1e-3)

    class Linear(RegressionTransformer):
        """Predicts 0.3 of the label before: homogeneous, so that scaling changes nothing."""

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return 0.3 * torch.nn.functional.pad(y[:, :-1], (1, 0))

    homogeneous = Linear(RegressionArchitecture(DIM, POINTS, 1, 4, 1), 0)
    assert torch.allclose(predict_regression(homogeneous, x, y, scale=3.0), predict_regression(homogeneous, x, y))


def test_it_learns_to_read_the_task_off_the_pairs() -> None:
    """These tasks have one unknown, which a single pair tells: the first y is beyond knowing, the last is not."""
    longer = replace(SETTINGS, steps=200, learning_rate=5e-3, warmup=20, schedule="cosine")
    model = train_regression(network(), pairs, longer)
    x, y = pairs(10_000, n=400)
    errors = (predict_regression(model, x, y) - y).square().mean(0)
    assert errors[0] > 0.8 * y[:, 0].square().mean() and errors[-1] < 0.3 * y[:, -1].square().mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_layout_learns_one_task_by_heart(layout: Layout) -> None:
    """Then y follows from its x alone, at every place."""

    def one_task(step: int) -> tuple[Tensor, Tensor]:
        x, _ = pairs(step)
        return x, x[..., 0] - x[..., 1]

    model = train_regression(network(layout), one_task, replace(SETTINGS, steps=80, learning_rate=1e-2))
    x, y = one_task(10_000)
    assert ((predict_regression(model, x, y) - y).square().mean(0) < 0.2 * y.square().mean(0)).all()


@pytest.mark.parametrize("rate", [None, 0.02], ids=["adam", "muon"])
def test_training_follows_from_the_seed_and_goes_on_after_a_kill(rate: float | None, tmp_path: Path) -> None:
    settings = replace(SETTINGS, muon_learning_rate=rate)
    whole = train_regression(network(), pairs, settings)

    def killed(step: int) -> tuple[Tensor, Tensor]:
        if step == 9:
            raise KeyboardInterrupt
        return pairs(step)

    with pytest.raises(KeyboardInterrupt):
        train_regression(network(), killed, settings, checkpoint=tmp_path / "run", checkpoint_every=4)
    asked: list[int] = []

    def watched(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return pairs(step)

    resumed = train_regression(network(), watched, settings, checkpoint=tmp_path / "run", checkpoint_every=4)
    assert asked == [8, 9, 10, 11] and not (tmp_path / "run").exists()
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_runs_checkpoint_is_not_taken_up(tmp_path: Path) -> None:
    def killed(step: int) -> tuple[Tensor, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return pairs(step)

    with pytest.raises(KeyboardInterrupt):
        train_regression(network(), killed, SETTINGS, checkpoint=tmp_path / "run", checkpoint_every=4, identity="a")
    asked: list[int] = []

    def watched(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return pairs(step)

    train_regression(network(), watched, SETTINGS, checkpoint=tmp_path / "run", checkpoint_every=4, identity="b")
    assert asked[0] == 0


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(SpecError, match="training needs `steps`"):
        train_regression(network(), pairs, TrainingSettings())
    with pytest.raises(SpecError, match="width 10 cannot be shared out to 4 heads"):
        RegressionArchitecture(width=10)
    with pytest.raises(SpecError, match="layers is 0"):
        RegressionArchitecture(layers=0)
    with pytest.raises(TrainingError, match="step 1 of 12: the loss is nan"):
        train_regression(network(), lambda step: (pairs(step)[0], pairs(step)[1] * math.nan), SETTINGS)


def test_muon_takes_the_blocks_matrices_and_no_others() -> None:
    """Seen by giving AdamW, which takes the rest, a rate that moves nothing."""
    settings = replace(SETTINGS, steps=1, muon_learning_rate=0.1, learning_rate=1e-9)
    before, after = network(), train_regression(network(), pairs, settings)
    moved = {
        name for name, value in after.named_parameters() if (value - before.get_parameter(name)).abs().max() > 1e-4
    }
    assert moved == {name for name, value in before.blocks.named_parameters(prefix="blocks") if value.ndim == 2}
