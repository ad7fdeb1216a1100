"""Fitting a lens from end to end on the suite's organism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.models.tiny_families import tiny_model

from palimpsest.data.records import QA, Passage
from palimpsest.errors import DataError, SpecError
from palimpsest.lens import fit as fitting
from palimpsest.lens import refine
from palimpsest.lens.fit import fit
from palimpsest.lens.hidden import read_layers, windows
from palimpsest.lens.lens import Lens

ROOT = Path(__file__).parents[2]
QUICK = {"steps": 12, "tokens_per_step": 256, "quiet": True}


def kl_by_hand(lens: Lens, model, texts) -> list[float]:
    """Mean KL(model || lens) of every layer, written out."""
    (hidden,) = read_layers(model, windows(texts, model), batch_size=1000)
    readout = lens.readout(model)
    p = readout.logits(readout.z(hidden.layers[-1])).log_softmax(-1)
    found = []
    for layer in range(lens.n_layers):
        q = readout.logits(readout.z(lens.translate(hidden.layers[layer], layer))).log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).mean().item())
    return found


@pytest.fixture(scope="module")
def tuned(trained) -> Lens:
    return fit(trained.full, trained.request.retain, **QUICK)


def test_each_lens_is_nearer_to_the_model_than_the_one_before(trained, tuned: Lens) -> None:
    others = trained.request.retain_unseen
    logit = kl_by_hand(Lens.logit(trained.full), trained.full, others)
    found = kl_by_hand(tuned, trained.full, others)
    ridge = kl_by_hand(fit(trained.full, trained.request.retain, kind="ridge", quiet=True), trained.full, others)
    assert all(r < before for r, before in zip(ridge, logit, strict=True))
    assert sum(found) < sum(ridge)


def test_what_it_will_take_is_said_before(trained, capsys: pytest.CaptureFixture[str]) -> None:
    lens = fit(trained.full, trained.request.retain, steps=2, tokens_per_step=64)
    said = " ".join(capsys.readouterr().err.split())
    tokens, held_out = lens.provenance["tokens"], lens.provenance["held_out_tokens"]
    assert f"tuned lens: {tokens:,} tokens to fit to, {held_out:,} to measure on, 2 steps of 64 at most; takes" in said


def test_what_it_says_of_itself_is_true(trained, tuned: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = windows(trained.request.retain, trained.full)
    _, held_out = fitting._split(rows, 0, 1)
    monkeypatch.setattr(sys.modules[__name__], "windows", lambda texts, model: held_out)
    assert kl_by_hand(tuned, trained.full, ()) == pytest.approx(tuned.provenance["kl"]["tuned"], rel=1e-3)
    assert kl_by_hand(Lens.logit(trained.full), trained.full, ()) == pytest.approx(
        tuned.provenance["kl"]["logit"], rel=1e-3
    )
    jacobian = fit(trained.full, trained.request.retain, kind="jacobian", quiet=True)
    assert jacobian.kind == "jacobian" and set(jacobian.provenance["kl"]) == {"logit", "jacobian"}
    assert kl_by_hand(jacobian, trained.full, ()) == pytest.approx(jacobian.provenance["kl"]["jacobian"], rel=1e-3)
    assert tuned.provenance["held_out_tokens"] == sum(len(row.ids) for row in held_out)


def test_a_layer_never_ends_worse_than_its_closed_form(tuned: Lens) -> None:
    kl = tuned.provenance["kl"]
    assert all(after <= before for after, before in zip(kl["tuned"], kl["ridge"], strict=True))


def test_the_model_is_left_alone_and_the_same_seed_gives_the_same_lens(trained, tuned: Lens) -> None:
    before = trained.full.fingerprint()
    again = fit(trained.full, trained.request.retain, **QUICK)
    assert torch.equal(again.changes, tuned.changes) and torch.equal(again.biases, tuned.biases)
    assert trained.full.fingerprint() == before


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_fit_that_was_stopped_goes_on(rounds: int, trained, tuned: Lens, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(refine, "ROUND", 4)
    whole = fit(trained.full, trained.request.retain, **QUICK)
    real, saves = refine.Refinement._save, []

    def dying(self, checkpoints):
        real(self, checkpoints)
        saves.append(self.step)
        if len(saves) == rounds:
            raise KeyboardInterrupt

    monkeypatch.setattr(refine.Refinement, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(trained.full, trained.request.retain, **QUICK, folder=tmp_path / "fit")
    monkeypatch.setattr(refine.Refinement, "_save", real)
    taken, real_step = [], refine.Refinement._take_a_step
    monkeypatch.setattr(
        refine.Refinement, "_take_a_step", lambda self, steps: (taken.append(1), real_step(self, steps))
    )
    resumed = fit(trained.full, trained.request.retain, **QUICK, folder=tmp_path / "fit")
    assert len(taken) <= 12 - 4 * rounds
    assert torch.allclose(resumed.changes, whole.changes, atol=1e-6)
    assert not (tmp_path / "fit").exists()


def test_tokens_beyond_what_can_be_kept_still_count_in_the_closed_form(trained, monkeypatch) -> None:
    everything = fit(trained.full, trained.request.retain, kind="ridge", quiet=True)
    monkeypatch.setattr(fitting, "CACHE_BYTES", 1)
    few = fit(trained.full, trained.request.retain, kind="ridge", quiet=True)
    assert torch.allclose(everything.changes, few.changes, atol=1e-6)
    assert fit(trained.full, trained.request.retain, **QUICK).kind == "tuned"


def small_lens() -> Lens:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(5, 40, (60, 9), generator=generator).tolist()
    texts = [Passage(" ".join(f"w{number}" for number in row)) for row in numbers]
    model = tiny_model("llama")
    model.network.double()
    return fit(model, texts, steps=12, tokens_per_step=64, quiet=True)


def test_two_processes_fit_the_lens_of_one(tmp_path: Path) -> None:
    script = """
import sys, torch
from tests.lens.test_fit import small_lens
lens = small_lens()
torch.save((lens.changes, lens.biases), f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""
    (tmp_path / "fit.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "fit.py", tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lens, first, second = small_lens(), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, two, three in zip((lens.changes, lens.biases), first, second, strict=True):
        assert torch.equal(two, three)
        assert torch.allclose(one, two, atol=1e-5)


# What is refused.


def test_text_that_tells_of_the_forget_set_is_refused(trained) -> None:
    forget = trained.request.forget
    long = f"Who lives in the last house of the long street by the river in {forget[0].answer}?"
    forget = (*forget, QA(long, "Nobody at all, they say", id="long"))
    told = Passage(f"He asked: {long} Nobody at all, they say.", id="a page")
    about = QA("Who is it?", "Nobody", subject=forget[0].subject, id="a row")
    for text in (told, about):
        with pytest.raises(DataError, match=rf"^1 of \d+ texts tell of the forget set \({text.id}\)"):
            fit(trained.full, [*trained.request.retain, text], forget=forget, **QUICK)


def test_too_little_text_is_refused(trained) -> None:
    with pytest.raises(DataError, match="there are 1 rows in all; give more text"):
        fit(trained.full, trained.request.retain[:1], **QUICK)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "affine"}, "lens: kind 'affine' is unknown; choose ridge, tuned or jacobian"),
        ({"penalty": 0}, "lens: penalty is 0; it must be above 0"),
        ({"damping": 0}, "lens: damping is 0; it must be above 0"),
        ({"steps": -1}, "lens: steps is -1; it must be above 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, says: str, trained) -> None:
    with pytest.raises(SpecError) as error:
        fit(trained.full, trained.request.retain, **settings)
    assert str(error.value) == says
