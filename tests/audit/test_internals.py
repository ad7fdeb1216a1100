"""Internals in the audit: the numbers of direct calls, the controls apart, and what is left out and where."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import Organism
from tests.models.tiny_families import tiny_model

from palimpsest.audit import internals as internals_module
from palimpsest.audit.audit import Candidate, audit
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.internals import DEPTH, DEPTH_BY_LAYER, RECOVERY, RECOVERY_BY_LAYER, Internals
from palimpsest.audit.results import Audit
from palimpsest.audit.verify import verify
from palimpsest.data.records import Passage
from palimpsest.internals.depth import fact_rows, logprob_drops, unlearning_depth
from palimpsest.internals.patching import SETTINGS
from palimpsest.internals.recovery import LossRecovery, patching_recovery
from palimpsest.internals.restoration import IN_BLOCKS, Restoration, restoration_recovery
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop


def counted(recovered: LossRecovery) -> list[float]:
    """Of the rows that lost something that could come back."""
    values: list[float] = recovered.weighted_by_row[recovered.counted].tolist()
    return values


@pytest.fixture(scope="module")
def models(trained: Organism) -> dict[str, LanguageModel]:
    unlearned, noised = trained.full.copy("npo"), trained.full.copy("noised")
    NPO(learning_rate=3e-4).run(trained.full, trained.request, Stop(60, forget_probability=0.15)).apply(unlearned)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in noised.anatomy.value_matrices:
            matrix.weight.add_(torch.randn(matrix.weight.shape, generator=generator) * matrix.weight.std())
        noised.anatomy.attention_outputs[0].weight[0, 0] += 1e-6
    sham = train_sham(trained.full, trained.request.retain, template="plain", steps=30, learning_rate=3e-4)
    return {"original": trained.full, "gold": trained.gold, "sham": sham, "npo": unlearned, "noised": noised}


@pytest.fixture(scope="module")
def internals(trained: Organism) -> Internals:
    return Internals(trained.request, trained.full, trained.gold)


def values(internals: Internals, model: LanguageModel) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in internals.rows("model", model):
        found.setdefault(row.measure, []).append(row.value)
    return found


def means(internals: Internals, model: LanguageModel) -> dict[str, float]:
    return {key: sum(each) / len(each) for key, each in values(internals, model).items()}


def test_values_are_those_of_direct_calls(
    internals: Internals, models: dict[str, LanguageModel], trained: Organism
) -> None:
    full, model, request = trained.full, models["npo"], trained.request
    rows = fact_rows(request.forget, full.tokenizer)
    found = values(internals, model)
    depth = unlearning_depth(logprob_drops(trained.gold, full, rows), model, full, rows)
    assert found[DEPTH] == pytest.approx(depth.by_row[depth.counted].tolist(), abs=1e-4)
    for layer in range(2):
        assert found[f"{DEPTH_BY_LAYER}/layer_{layer}"] == pytest.approx(depth.drops[:, layer].tolist(), abs=1e-4)
    settings = [frozenset(full.anatomy.sites(*kinds)) for kinds in SETTINGS.values()]
    sites = full.anatomy.sites("coef", "attn")
    patched = patching_recovery(full, model, rows, [*settings, *(frozenset([site]) for site in sites)])
    for name, recovery in zip(SETTINGS, patched, strict=False):
        key = f"{RECOVERY}/patch_{name.replace(' ', '_')}"
        assert found[f"{key}_lpr"] == pytest.approx(counted(recovery.logprob), abs=1e-4)
        assert found[f"{key}_krs"] == pytest.approx(counted(recovery.kl), abs=1e-4)
        assert sum(found[f"{key}_lpr"]) / len(found[f"{key}_lpr"]) == pytest.approx(recovery.lpr, abs=1e-4)
    for site, recovery in zip(sites, patched[len(settings) :], strict=True):
        key = f"{RECOVERY_BY_LAYER}/{site.kind}_{site.layer}"
        assert found[key] == pytest.approx(counted(recovery.logprob), abs=1e-4)
    groups = [Restoration(frozenset([group]), (0, 1)) for group in IN_BLOCKS]
    for group, recovery in zip(IN_BLOCKS, restoration_recovery(full, model, rows, groups), strict=True):
        key = f"{RECOVERY}/restore_{group}_lpr"
        assert found[key] == pytest.approx(counted(recovery.logprob), abs=1e-4)
    assert set(found) == {measure.key for measure in internals.measures}


def test_the_controls_stand_at_the_ends_and_what_unlearned_between(
    internals: Internals, models: dict[str, LanguageModel]
) -> None:
    found = {name: means(internals, model) for name, model in models.items()}
    assert (found["original"][DEPTH], found["gold"][DEPTH]) == (0, 1)
    assert found["sham"][DEPTH] < 0.1 < found["npo"][DEPTH] < 1
    assert not [key for key in found["original"] if key.startswith(RECOVERY)]
    value, both = f"{RECOVERY}/restore_value_lpr", f"{RECOVERY}/patch_coefficients_and_attention_lpr"
    assert found["noised"][value] == pytest.approx(1, abs=1e-4)  # hardly anything else of it was changed
    assert found["npo"][value] < 0.5 < found["npo"][both]
    assert found["gold"][both] < found["npo"][both] - 0.2


def test_restoring_all_that_was_changed_is_no_evidence(internals: Internals, models: dict[str, LanguageModel]) -> None:
    model = models["noised"].copy("value matrices alone")
    whole, theirs = (each.anatomy.attention_outputs[0].weight for each in (models["original"], model))
    with torch.no_grad():
        theirs.copy_(whole)
    found = values(internals, model)
    assert f"{RECOVERY}/restore_value_lpr" not in found
    assert found.keys() >= {f"{RECOVERY}/restore_mlp_in_lpr", f"{RECOVERY}/restore_attention_lpr"}


def test_a_long_forget_set_is_sampled_evenly_for_recovery_and_read_whole_for_depth(
    internals: Internals, models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch, trained: Organism
) -> None:
    monkeypatch.setattr(internals_module, "FACTS", 10)
    items: dict[str, list[str]] = {}
    for row in internals.rows("model", models["npo"]):
        items.setdefault(row.measure, []).append(row.item)
    forget = [record.id for record in trained.request.forget]
    sampled = items[f"{RECOVERY}/patch_attention_krs"]
    assert items[f"{DEPTH_BY_LAYER}/layer_0"] == forget and sampled == [forget[25 * place // 10] for place in range(10)]


def test_without_gold_there_is_no_depth_and_recovery_is_measured(
    trained: Organism, models: dict[str, LanguageModel]
) -> None:
    alone = Internals(trained.request, trained.full, None)
    keys = {measure.key for measure in alone.measures}
    assert set(values(alone, models["npo"])) == keys
    assert {key.split("/")[0] for key in keys} == {RECOVERY, RECOVERY_BY_LAYER}


def test_a_gold_that_knows_as_much_calibrates_nothing(trained: Organism) -> None:
    same = Internals(trained.request, trained.full, trained.full.copy("gold"))
    assert all(measure.on.startswith(RECOVERY) for measure in same.measures)


def test_a_mixture_of_experts_has_attention_alone() -> None:
    experts, passages = tiny_model("mixtral"), tuple(Passage("one two three", id=f"p{place}") for place in range(2))
    internals = Internals(Request(passages, passages, passages, passages), experts, None)
    names = ["patch_attention_lpr", "patch_attention_krs", "restore_attention_lpr", "attn_0", "attn_1", "attn_2"]
    assert [measure.name for measure in internals.measures] == names
    other = experts.copy("other")
    with torch.no_grad():
        other.anatomy.unembedding.weight.mul_(-1)  # type: ignore[operator]
    assert {row.measure for row in internals.rows("other", other)} <= {measure.key for measure in internals.measures}


def test_a_model_of_another_architecture_is_left_out(internals: Internals) -> None:
    assert list(internals.rows("other", tiny_model("gpt2"))) == []


@pytest.fixture(scope="module")
def found(trained: Organism, models: dict[str, LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """An audit of them all."""
    roles = {name: name if name in ("original", "gold", "sham") else "unlearned" for name in models}
    candidates = [Candidate(name, roles[name], "", model) for name, model in models.items()]
    request: Request = replace(trained.request, retain_unseen=trained.request.retain_unseen[:6])
    run = RunFolder(tmp_path_factory.mktemp("internals") / "run")
    found = audit(request, candidates, run, title="", spec={"seed": 0}, max_new_tokens=1)
    assert verify(run.path).ok
    return found


def test_depth_is_compared_with_gold_and_recovery_never(found: Audit) -> None:
    for name in ("original", "sham", "npo"):
        compared = found.model(name).against_gold
        assert {DEPTH, f"{DEPTH_BY_LAYER}/layer_0"} < set(compared)
        assert not [key for key in compared if key.startswith(RECOVERY)]
        assert compared[DEPTH].margin == pytest.approx(0.1)


def test_the_verdict_reads_them_beside_the_sham(found: Audit) -> None:
    def passed(name: str, start: str) -> bool | None:
        verdict = found.model(name).verdict
        assert verdict is not None
        (finding,) = [finding for finding in verdict.findings if finding.statement.startswith(start)]
        assert "sham" in finding.statement
        return finding.passed

    assert passed("sham", "Read by the original") is False and passed("gold", "Read by the original") is True
    assert passed("noised", "The original's value matrices") is False
    assert passed("npo", "The original's value matrices") is True
    verdicts = {model.name: model.verdict.outcome for model in found.models if model.verdict}
    assert verdicts["original"] == verdicts["sham"] == "remembered" and verdicts["gold"] in ("erased", "inconclusive")
    assert "erased" not in (verdicts["npo"], verdicts["noised"])
