"""A classifier with exits from end to end, on tiny networks: compaction, padding, promises, files, bad input."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from tests.early_exit.test_stack import encoder
from tests.models.tiny_families import tiny, tiny_tokenizer
from torch import nn

from palimpsest.data.batches import Encoded, collate
from palimpsest.early_exit.calibration import calibrated, drop_interval, fewest_examples, operating_points
from palimpsest.early_exit.classification import classify
from palimpsest.early_exit.classifier import CONSISTENTEE, ExitClassifier
from palimpsest.early_exit.encoder import Encoder
from palimpsest.early_exit.examples import Examples, encode_examples, read_examples
from palimpsest.early_exit.exit_table import ExitTable
from palimpsest.early_exit.heads import pooled, read_at
from palimpsest.early_exit.policy_training import Observations, PolicySettings, fit_policy
from palimpsest.early_exit.rules import Confident, Fixed, Learned, Patience, exits_by, oracle, thresholds
from palimpsest.early_exit.training import ExitTraining, weighted_sum
from palimpsest.errors import DataError, ModelError, SpecError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

RULES = [Fixed(0), Fixed(), Confident("entropy", -1.0), Confident("margin", 0.05), Patience(1)]
FEW = PolicySettings(steps=60, batch_size=32)


def model(family: str = "llama") -> LanguageModel | Encoder:
    if family == "bert":
        return Encoder(encoder("bert"), tiny_tokenizer())
    network = tiny(family)
    return LanguageModel(network, tiny_tokenizer(), Anatomy.of(network))


def examples(n: int = 40, seed: int = 0) -> Examples:
    """Rows of unlike lengths whose class is that of their last token's and first token's sum."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    ids = [tuple(torch.randint(4, 48, (length,), generator=generator).tolist()) for length in lengths]
    labels = torch.tensor([(row[0] + row[-1]) % 2 for row in ids])
    return Examples(tuple(Encoded(row, len(row), len(row)) for row in ids), labels, ("even", "odd"))


def fitted(family: str = "llama", **more: object) -> ExitClassifier:
    exits = ExitClassifier.of(model(family), ("even", "odd"))
    exits.fit_heads(examples(), ExitTraining(steps=20, batch_size=16))
    return exits.fit_policy(examples(seed=1), FEW)


def table(logits: list[list[list[float]]], labels: list[int]) -> ExitTable:
    values = torch.tensor(logits)
    return ExitTable(
        tuple(range(1, values.shape[1] + 1)), torch.zeros(*values.shape[:2], 4), values, torch.tensor(labels)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_are_told_the_same_alone_together_and_moved_together(family: str, rule: object) -> None:
    exits, rows = fitted(family), examples(20, seed=3).rows
    alone = exits.classify(rows, rule=rule, batch_size=1)  # type: ignore[arg-type]
    for batch_size, compact in ((7, True), (7, False), (20, True)):
        found = exits.classify(rows, rule=rule, batch_size=batch_size, compact=compact)  # type: ignore[arg-type]
        assert found.layers.equal(alone.layers) and found.labels.equal(alone.labels)
        torch.testing.assert_close(found.logits, alone.logits, atol=1e-4, rtol=1e-4)


def test_a_head_is_asked_of_the_rows_that_leave_unless_the_rule_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exits, rows, asked = fitted(), examples(20, seed=3).rows, []
    at = exits.heads.at
    monkeypatch.setattr(exits.heads, "at", lambda exit, states: asked.append(len(states)) or at(exit, states))
    found = exits.classify(rows, rule=Learned(exits.policy, 0.3))  # type: ignore[arg-type]
    assert sum(asked) == len(rows) and len(found.layers.unique()) > 1
    asked.clear()
    exits.classify(rows, rule=Confident("entropy", 0.0), compact=False)
    assert sum(asked) == len(rows) * len(exits.layers)


def test_the_batch_and_the_table_leave_at_the_same_exits() -> None:
    exits, data = fitted(), examples(30, seed=4)
    seen = exits.table(data)
    for rule in [*RULES, Learned(exits.policy, 0.3)]:  # type: ignore[arg-type]
        found, expected = exits.classify(data.rows, rule=rule), exits_by(rule, seen)
        assert found.layers.equal(expected + 1)
        said = seen.said.gather(1, expected[:, None])[:, 0]
        assert found.labels.equal(said)
        assert seen.accuracy(expected) == pytest.approx(float((said == data.labels).float().mean()))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_head_reads_the_last_token_of_a_decoder_and_the_first_of_an_encoder(lengths: list[int]) -> None:
    rows = [Encoded(tuple(range(1, length + 1)), length, length) for length in lengths]
    for side in ("left", "right"):
        batch = collate(rows, range(len(rows)), side=side)  # type: ignore[arg-type]
        hidden = batch.ids[..., None].float()
        assert pooled(hidden, read_at(batch.attention, True))[:, 0].tolist() == lengths
        assert pooled(hidden, read_at(batch.attention, False))[:, 0].tolist() == [1] * len(lengths)


def test_rules_on_a_table_made_by_hand() -> None:
    sure, torn, other = [4.0, 0.0], [0.1, 0.0], [0.0, 1.0]
    by_hand = table([[torn, sure, sure], [other, other, sure], [torn, other, torn]], [0, 1, 1])
    assert exits_by(Confident("max_probability", 0.9), by_hand).tolist() == [1, 2, 2]
    assert exits_by(Confident("margin", 0.4), by_hand).tolist() == [1, 0, 1]
    assert exits_by(Confident("entropy", -0.6), by_hand).tolist() == [1, 0, 1]
    assert exits_by(Patience(1), by_hand).tolist() == [1, 1, 2]
    assert exits_by(Fixed(1), by_hand).tolist() == [1, 1, 1]
    assert oracle(by_hand).tolist() == [0, 0, 1]
    assert by_hand.mean_layers(torch.tensor([0, 1, 2])) == 2
    assert thresholds("max_probability", by_hand, 5) == sorted(thresholds("max_probability", by_hand, 5))


def test_the_weighted_sum_weighs_by_depth() -> None:
    logits, labels = torch.randn(5, 3, 4), torch.randint(4, (5,))
    each = [nn.functional.cross_entropy(logits[:, exit], labels) for exit in range(3)]
    torch.testing.assert_close(weighted_sum(logits, labels), (each[0] + 2 * each[1] + 3 * each[2]) / 6)
    torch.testing.assert_close(weighted_sum(logits, labels, "uniform"), sum(each) / 3)
    per_exit = torch.stack([labels, labels, labels], 1)
    torch.testing.assert_close(weighted_sum(logits, per_exit), weighted_sum(logits, labels))


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_a_policy_goes_deep_where_depth_helps_and_stops_where_nothing_does(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(3, (600,), generator=generator)  # decided early, decided late, never
    states = torch.randn(600, 4, 8, generator=generator) * 0.1 + nn.functional.one_hot(kind, 8)[:, None].float()
    by_kind = torch.tensor([[0.05, 0.05, 0.05, 0.05], [2.0, 2.0, 0.05, 0.05], [2.0, 2.0, 2.0, 2.0]])
    times = torch.tensor([0.25, 0.5, 0.75, 1.0])
    training = PolicySettings(estimator, prices=(0.1, 10), steps=300, batch_size=128, learning_rate=1e-2)  # type: ignore[arg-type]
    policy = fit_policy(Observations(states, by_kind[kind], times), training)
    flat = ExitTable((1, 2, 3, 4), states, torch.zeros(600, 4, 2), kind)
    exits = exits_by(Learned(policy, 0.5), flat)
    assert [round(float(exits[kind == one].float().mean()), 1) for one in range(3)] == [0.0, 2.0, 0.0]
    assert exits_by(Learned(policy, 8.0), flat).float().mean() < 0.05
    assert policy.state_dict()["inner"].equal(
        fit_policy(Observations(states, by_kind[kind], times), training).state_dict()["inner"]
    )


@pytest.mark.parametrize("settings", [PolicySettings(), CONSISTENTEE])
def test_the_joint_stage_changes_network_heads_and_policy(settings: PolicySettings) -> None:
    settings = replace(settings, steps=20, batch_size=16)
    exits = ExitClassifier.of(model(), ("even", "odd"))
    exits.fit_heads(examples(), ExitTraining(steps=3, batch_size=8), train_model=True)
    exits.fit_policy(examples(), settings)
    before = [exits.model.weights_hash(), exits.heads.maps[0].weight.clone(), exits.policy.inner.clone()]  # type: ignore[union-attr]
    exits.fit_joint(examples(), ExitTraining(steps=4, batch_size=8, learning_rate=1e-2))
    assert exits.model.weights_hash() != before[0]
    assert not exits.heads.maps[0].weight.equal(before[1]) and not exits.policy.inner.equal(before[2])  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in exits.policy.parameters())  # type: ignore[union-attr]


def test_exits_are_saved_and_read_and_belong_to_one_model(tmp_path: Path) -> None:
    exits, data = fitted(), examples(600, seed=6)
    exits.calibrate(data, target_layers=2.5)
    exits.save(tmp_path / "exits")
    again = ExitClassifier.load(tmp_path / "exits", model())
    assert again.point == exits.point and again.settings == exits.settings
    assert again.classify(data.rows[:50]).logits.equal(exits.classify(data.rows[:50]).logits)
    with pytest.raises(ModelError, match="another model"):
        ExitClassifier.load(tmp_path / "exits", LanguageModel(tiny("llama", seed=1), tiny_tokenizer(), None))  # type: ignore[arg-type]
    (tmp_path / "exits" / "exits.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        ExitClassifier.load(tmp_path / "exits", model())
    with pytest.raises(ModelError, match=r"no exits.json there; make exits with `palimpsest exit fit`"):
        ExitClassifier.load(tmp_path, model())


def outcomes(n: int, lost: int, won: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(n) < lost, (np.arange(n) >= lost) & (np.arange(n) < lost + won)


@given(st.integers(2, 400), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_the_interval_of_the_drop_ends_where_the_score_is_two_deviations(n: int, lost: int, won: int) -> None:
    """The score's deviation is under the likeliest shares given the drop, found here by maximising the likelihood."""
    lost, won = min(lost, n), min(won, n - min(lost, n))
    low, high = drop_interval(*outcomes(n, lost, won))
    assert low - 1e-9 <= (lost - won) / n <= high + 1e-9
    back = drop_interval(*reversed(outcomes(n, lost, won)))
    assert back == pytest.approx((-high, -low), abs=1e-6)
    for drop in (low, high):
        least, most = max(0.0, -drop), (1 - drop) / 2

        def cost(winning: float, drop: float = drop) -> float:
            shares = np.array([winning + drop, winning, 1 - 2 * winning - drop])
            counts = np.array([lost, won, n - lost - won])
            return -float(counts @ np.log(np.maximum(shares, 1e-300)))

        found = optimize.minimize_scalar(cost, bounds=(least, most), method="bounded", options={"xatol": 1e-12}).x
        best = min((found, least, most), key=cost)
        deviation = math.sqrt(max(n * (2 * best + drop - drop**2), 0.0))
        if deviation > 1e-3 and abs(drop) < 0.999:
            assert abs(lost - won - n * drop) / deviation == pytest.approx(1.96, abs=0.02)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, truth, held = np.random.default_rng(0), 0.01, 0
    for _ in range(400):
        drawn = rng.multinomial(1000, [0.03, 0.02, 0.95])
        low, high = drop_interval(*outcomes(1000, drawn[0], drawn[1]))
        held += low <= truth <= high
    assert 0.92 < held / 400 < 0.98


def test_a_promise_that_so_few_examples_cannot_show_is_refused() -> None:
    exits = fitted()
    n = fewest_examples(0.05)
    nothing = [drop_interval(*outcomes(count, 0, 0))[1] for count in (n, n - 1)]
    assert nothing[0] <= 0.05 + 1e-9 < nothing[1]
    with pytest.raises(DataError, match=f"{n - 1} held-out examples cannot show a drop below 0.05; give at least {n}"):
        exits.calibrate(examples(n - 1, seed=7), max_drop=0.05)
    with pytest.raises(SpecError, match="ask for one of"):
        exits.calibrate(examples(10), max_drop=0.1, target_layers=2)
    with pytest.raises(DataError, match="no price is so dear"):
        exits.calibrate(examples(10), target_layers=0.5)


def test_trying_prices_stops_at_the_first_that_fails() -> None:
    exits = fitted()
    points = operating_points(exits.policy, exits.table(examples(500, seed=8)), exits.times, (0.01, 3.0), 5)  # type: ignore[arg-type]
    drops = [0.001, 0.002, 0.5, 0.001, 0.001]
    made = [type(point)(**{**vars(point), "drop_high": drop}) for point, drop in zip(points, drops, strict=True)]
    assert calibrated(made, max_drop=0.01) == made[1]
    with pytest.raises(DataError, match="even the cheapest price"):
        calibrated(made[2:], max_drop=0.01)


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"exits after \[3, 9\]; this model has blocks 1 to 3"):
        ExitClassifier.of(model(), ("a", "b"), [9])
    with pytest.raises(SpecError, match="1 class"):
        ExitClassifier.of(model(), ("a",))
    exits = ExitClassifier.of(model(), ("a", "b"))
    with pytest.raises(SpecError, match="call fit_policy first"):
        exits.calibrate(examples(), max_drop=0.1)
    with pytest.raises(SpecError, match="call calibrate"):
        fitted().classify(examples().rows)
    with pytest.raises(SpecError, match="2 times for 3 exits"):
        exits.fit_policy(examples(), times=[1.0, 2.0])
    with pytest.raises(DataError, match="label 'c' is none of the classes a, b"):
        encode_examples(["w4 w5"], ["c"], tiny_tokenizer(), classes=("a", "b"))
    with pytest.raises(DataError, match="text 2 of 2 is empty"):
        encode_examples(["w4 w5", ""], ["a", "b"], tiny_tokenizer())
    with pytest.raises(SpecError, match="prices are 2 to 1"):
        PolicySettings(prices=(2, 1))
    (tmp_path / "rows.jsonl").write_text('{"text": "w4", "label": "a"}\n{"text": "w5"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: row 2: field 'label' is missing"):
        read_examples(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        read_examples(tmp_path / "none.jsonl")


def test_logits_that_are_not_numbers_are_an_error_that_names_the_row() -> None:
    exits = fitted()
    with torch.no_grad():
        exits.model.network.get_input_embeddings().weight[47] = math.nan
    rows = [Encoded(ids, 2, 2) for ids in ((4, 5), (6, 47), (7, 8))]
    with pytest.raises(ModelError, match="row 2: its logits are not finite"):
        classify(exits.stack, exits.layers, exits.heads, Fixed(), rows)


def test_a_policy_needs_something_to_decide() -> None:
    exits = ExitClassifier.of(model(), ("even", "odd")).only_last()
    with pytest.raises(
        SpecError, match=f"the only exit is after all {exits.stack.n_layers} blocks, so there is nothing"
    ):
        exits.fit_policy(examples(), FEW)
