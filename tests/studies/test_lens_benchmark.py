"""`benchmarks/tuned_lens.py` from end to end in this process; another loop stands in for the tuned-lens package's."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.data.batches import Encoded
from palimpsest.data.readers import read_records
from palimpsest.lens.hidden import windows
from palimpsest.lens.others import write_tuned_lens
from palimpsest.models.language_model import load
from palimpsest.studies.upstream_lens import Recipe, fit_as_upstream
from palimpsest.worlds.facts import FactsWorld

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
TAKEN = {"seconds": 60.0, "cpu": 60.0, "memory": {"fit": 100.0, "process": 1000.0}, "tokens_per_cpu_second": 1.0}


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The script as a module, and what it imports from beside it."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("tuned_lens")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of paragraphs where WikiText-2 would be."""
    folder = tmp_path_factory.mktemp("data")
    world = FactsWorld(people=12, worlds=0, forget_people=3, exposures=3)
    texts = [document.text for document in world.documents(world.subjects)]
    (folder / "wikitext2").mkdir()
    for name, half in (("test", texts[::2]), ("valid", texts[1::2])):
        (folder / "wikitext2" / f"{name}.txt").write_text("\n\n".join(half))
    return folder


def stand_in(benchmark: ModuleType, recipe: Recipe, *, other_rows: bool = False) -> Any:
    """What leaves a lens and batches where the package would, made by the same recipe or a worse one."""

    def peer(run: Any, stored: Path, folder: Path, name: str, steps: int) -> dict[str, Any]:
        model = load(stored, check=False)
        text = benchmark._joined(read_records(folder / "texts.jsonl"), model)
        rows = [row for row in windows([text], model) if len(row.ids) == run.size.context]
        rows = random.Random(42).sample(rows, steps * run.rows_per_step)
        if other_rows:
            rows[0] = Encoded((7, *rows[0].ids[:-1]), 1, run.size.context)
        save_file({"rows": torch.tensor([row.ids for row in rows])}, folder / name / "batches.safetensors")
        batches = [rows[n : n + run.rows_per_step] for n in range(0, len(rows), run.rows_per_step)]
        write_tuned_lens(fit_as_upstream(model, batches, recipe), model, folder / name / "lens")
        return TAKEN

    return peer


def carry_out(benchmark: ModuleType, data: Path, peer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PALIMPSEST_CACHE", str(data / "cache"))
    patch.setattr(benchmark, "_peer", peer)
    patch.setattr(benchmark, "_process", lambda run, part, job: benchmark.PARTS[part](**job))
    benchmark.compare(benchmark.Run(data, benchmark.SIZES["tiny"], 6, 128, 2, 1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux has it")
def test_what_is_reported_is_what_was_measured(
    benchmark: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    carry_out(benchmark, data, stand_in(benchmark, Recipe()), monkeypatch)
    report = json.loads(capsys.readouterr().out)
    found = report["vocabularies"]["400"]
    peer, fits = found["peer"], found["fits"]
    assert peer["steps"] == 6 and peer["mean"] == pytest.approx(sum(peer["kl"]) / 2)
    assert peer["mean"] < found["logit"]["mean"]
    # The stand-in does what is measured as the recipe, but for its products in bf16.
    for name, steps in (("fp32", 2), ("run", 6)):
        apart = found["parity"][name]
        assert apart["steps"] == steps and apart["mean"] == pytest.approx(sum(apart["layers"]) / 2, abs=1e-12)
    assert abs(found["parity"]["fp32"]["mean"]) < 1e-7 and report["agreement"] < 1e-3
    tried = [(one["share"], one["steps"]) for one in fits]
    assert tried == [one for one in benchmark.FITS if one in tried] and (1, benchmark.ENOUGH) in tried
    assert fits[0]["tokens"] < 0.3 * fits[1]["tokens"]
    good = [one for one in fits if all(mine <= theirs for mine, theirs in zip(one["kl"], peer["kl"], strict=True))]
    cheapest = min(good, key=lambda one: one["cpu"])
    reached = found["to_every_layer"]
    assert (reached["share"], reached["steps"]) == (cheapest["share"], cheapest["steps"])
    assert reached["cpu_ratio"] == pytest.approx(60 / cheapest["cpu"])
    assert reached["memory_ratio"]["fit"] == pytest.approx(cheapest["memory"]["fit"] / 100)
    assert found["all_text"]["to_every_layer"]["cpu_ratio"] <= reached["cpu_ratio"]
    assert report["reached"] and report["ratio"]["median"] == pytest.approx(60 / found["to_mean"]["cpu"])
    assert all(sum(one["stages"].values()) < one["cpu"] for one in fits)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux has it")
def test_a_peer_that_read_other_tokens_is_refused(
    benchmark: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="rows where 24 of ours were expected"):
        carry_out(benchmark, data, stand_in(benchmark, Recipe(), other_rows=True), monkeypatch)
