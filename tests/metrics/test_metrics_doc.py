"""The table of metrics: every definition in the code stands in it, and its floors are those of the published data."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from tests.conftest import Organism

from palimpsest.audit.internals import Internals
from palimpsest.audit.measures import TOFU_SETS, measures
from palimpsest.metrics import bleu, cloze, entity, locality, multiple_choice, muse, probe
from palimpsest.metrics.membership import MembershipScores, membership_scores
from palimpsest.metrics.tofu import UtilityRatio, model_utility_definition
from palimpsest.metrics.truth_ratio import TruthRatio
from palimpsest.models.language_model import LanguageModel
from palimpsest.studies import forget_matrix

TABLE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
UDS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "uds_tofu_results"


def row(name: str) -> list[str]:
    """The cells of the row that begins with a name."""
    (line,) = [line for line in TABLE.splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])]


def test_every_definition_has_its_row() -> None:
    names = {f"truth_ratio@{name}" for name in get_args(TruthRatio)}
    names |= {muse.verbmem_definition(name) for name in get_args(muse.VerbMem)}
    names |= {muse.KNOWMEM, muse.PRIVLEAK, entity.DEFINITION, locality.DEFINITION}
    names |= {bleu.DEFINITION, cloze.DEFINITION, probe.DEFINITION, forget_matrix.DEFINITION}
    names |= {multiple_choice.definition(examples) for examples in (0, 5)}
    names |= {model_utility_definition(name) for name in get_args(UtilityRatio) if name != "open_unlearning"}
    missing = {name for name in names if f"| `{name}` |" not in TABLE}
    assert missing == set()


def test_every_measure_of_an_audit_is_explained() -> None:
    made = measures(
        gold=True,
        rewordings=True,
        truth_ratio="truth_ratio@tofu_paper",
        passages=["retain_unseen"],
        choices=["forget_choices"],
        tofu=True,
    )
    names = {measure.definition.split(":")[0].removesuffix("+answer") for measure in made}
    assert len(names) > 10 and TOFU_SETS
    assert {name for name in names if f"`{name}`" not in TABLE} == set()


def test_every_measure_of_the_internals_is_explained(trained: Organism) -> None:
    made = Internals(trained.request, trained.full, trained.gold).measures
    names = {measure.definition.split(":")[0] for measure in made}
    assert len(names) == 4
    assert all(len(row(name)) == 5 for name in names)


def test_every_attack_has_its_row(model: LanguageModel, records) -> None:  # type: ignore[no-untyped-def]
    found: MembershipScores = membership_scores(model, records[:2], reference=model, gradients=True)
    for attack in found.costs:
        name, cost, source, _ = row(re.sub(r"@0\.\d+", "@K", attack))
        assert name and cost and source


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])0?\.\d+", cell)]


def test_floors_on_tofu_are_those_of_the_authors_logs(tofu_logs: Path) -> None:
    golden = (tofu_logs / "GOLDEN.md").read_text()
    (line,) = re.findall(r"\| llama2-7b retain90 \|(.*)\|", golden)
    geo, arith, ratio_geo, ratio_arith = (float(cell) for cell in line.split("|"))
    (full,) = re.findall(r"\| llama2-7b full \|(.*)\|", golden)
    full_geo, full_arith = (float(cell) for cell in full.split("|")[:2])
    retain90 = golden.split("Components, llama2-7b retain90")[1]
    (probability,), (rouge,) = (re.findall(rf"forget\.json:{part}: ([\d.]+)", retain90) for part in ("prob", "rouge"))
    for name, expected in {
        "model_utility@tofu_paper": [arith, full_arith],
        "model_utility@geometric": [geo, full_geo],
        "truth_ratio@tofu_paper": [ratio_arith],
        "truth_ratio@geometric": [ratio_geo],
        "truth_ratio@tofu_aggregate": [ratio_geo],
        "truth_ratio@open_unlearning": [ratio_geo],
        "answer_probability@tofu": [float(probability)],
        "rougeL_recall@stem": [float(rouge)],
    }.items():
        assert numbers(row(name)[3]) == pytest.approx(expected, abs=6e-4), name


@pytest.mark.skipif(not UDS.is_dir(), reason="the folder ../shared/data is not beside this project")
def test_memorisation_floors_are_those_of_the_published_table() -> None:
    models = json.loads((UDS / "method_results.json").read_text())["models"]
    (retain,) = [model for model in models if model["model"] == "retain"]
    assert numbers(row("exact_memorization@teacher_forced")[3]) == pytest.approx([1 - retain["one_minus_em"]], abs=5e-3)
    strength = 1 - retain["one_minus_es"]
    assert numbers(row("extraction_strength@open_unlearning")[3]) == pytest.approx([strength], abs=5e-4)
    assert strength < numbers(row("extraction_strength@no_floor")[3])[0] < strength + 0.002


def test_floors_of_membership_are_muses_own_constants() -> None:
    news, books = (1 - muse.RETRAIN_AUC[corpus] for corpus in ("news", "books"))
    (line,) = re.findall(r"retrained\nmodels it is (\S+) \(News\) and (\S+) \(Books\)", TABLE)
    assert [float(number) for number in line] == pytest.approx([news, books], abs=5e-3)
