"""The adapter, loaded by PEFT itself, adds exactly what the report says that it adds."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models.tiny_families import tiny_model
from toy_request import same_weights, toy_update, weights_of

from palimpsest.errors import SpecError, StorageError, UpdateError
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.unlearn.adapter import AdapterReport, export_adapter
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

peft = pytest.importorskip("peft", reason="PEFT is not installed")
# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(4, 24).reshape(2, 10)


def everything(model: LanguageModel, seed: int = 1, size: float = 0.1) -> Update:
    """A random change of every parameter, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    delta = {name: size * torch.randn(value.shape, generator=generator) for name, value in weights_of(model).items()}
    return Update(delta, {"method": {"name": "toy"}, "base_weights": model.weights_hash()})


def truncated(change: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of that rank, by numpy in float64."""
    u, s, vh = np.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_hand(update: Update, report: AdapterReport, rank: int) -> dict[str, np.ndarray]:
    """What must be added to each weight."""
    return {
        name: truncated(update.delta[name].double().numpy() * update.factor, rank)
        for name in update.delta
        if name.removesuffix(".weight") in report.modules
    }


def logits_of(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def with_peft(model: LanguageModel, folder: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(model.copy().network, folder).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize(("rank", "factor"), [(3, 1.0), (16, 1.0), (2, -0.5)])
def test_peft_computes_what_weights_with_the_product_added_compute(family, rank, factor, tmp_path):
    model = tiny_model(family)
    update = everything(model).scale(factor)
    before = model.fingerprint()
    report = export_adapter(update, model, tmp_path / "adapter", rank)
    assert model.fingerprint() == before and report.rank == rank
    changed = model.copy()
    parameters = dict(changed.network.named_parameters())
    with torch.no_grad():
        for name, product in by_hand(update, report, rank).items():
            parameters[name].add_(torch.from_numpy(product).float())
    found = with_peft(model, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(found), logits_of(changed.network), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(found), logits_of(model.network), atol=1e-2)
    merged = found.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(changed.network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_at_full_rank_nothing_of_a_linear_map_is_lost(family, tmp_path):
    model = tiny_model(family)
    update = toy_update(model, only="mlp")
    report = export_adapter(update, model, tmp_path / "adapter", 1000)
    assert report.rank == 16  # of a 16 by 24 matrix: there is no more
    assert report.residual < 1e-5 and max(report.modules.values()) < 1e-5 and report.left_out == {}
    assert {f"{name}.weight" for name in report.modules} == set(update.delta)
    with update.applied(model.copy()) as changed:
        found = with_peft(model, tmp_path / "adapter")
        torch.testing.assert_close(logits_of(found), logits_of(changed.network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_report_says_how_much_is_lost_and_where(family, rank, tmp_path):
    model = tiny_model(family)
    update = everything(model).scale(0.7)
    report = export_adapter(update, model, tmp_path / "adapter", rank)
    exact = {name: value.double().numpy() * 0.7 for name, value in update.delta.items()}
    total = sum((value**2).sum() for value in exact.values())
    lost = 0.0
    for name, product in by_hand(update, report, rank).items():
        rest = np.linalg.norm(exact[name] - product)
        assert report.modules[name.removesuffix(".weight")] == pytest.approx(
            rest / np.linalg.norm(exact[name]), rel=1e-5
        )
        lost += rest**2
    carried = {f"{name}.weight" for name in report.modules}
    assert set(report.left_out) == set(exact) - carried
    for name, share in report.left_out.items():
        assert share == pytest.approx((exact[name] ** 2).sum() / total, rel=1e-5)
    lost += sum(report.left_out.values()) * total
    assert report.residual == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    # Which ones: what is not the weight of a linear map.
    kinds = {type(model.network.get_submodule(name.rpartition(".")[0])).__name__ for name in carried}
    assert kinds == ({"Linear"} if family == "llama" else {"Conv1D"})
    assert any("norm" in name or "ln_" in name for name in report.left_out)
    assert any("embed" in name or "wte" in name for name in report.left_out)
    assert report.update == update.identity and report.loss is None


def test_a_tied_unembedding_is_left_out_and_an_untied_one_is_carried(tmp_path):
    tied, untied = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama", tie_word_embeddings=False)
    one = export_adapter(everything(tied), tied, tmp_path / "tied", 2)
    other = export_adapter(everything(untied), untied, tmp_path / "untied", 2)
    assert "lm_head" not in one.modules and "model.embed_tokens.weight" in one.left_out
    assert "lm_head" in other.modules
    assert logits_of(with_peft(tied, tmp_path / "tied")).isfinite().all()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_conv1d_and_linear_in_one_model(tmp_path):
    """PEFT has one setting for both and mends it by module, with a warning."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    update = Update({name: value for name, value in everything(model).delta.items() if value.ndim == 2}, {})
    update = replace(update, provenance={"base_weights": model.weights_hash()})
    report = export_adapter(update, model, tmp_path / "adapter", 16)
    assert "lm_head" in report.modules and "transformer.h.0.mlp.c_fc" in report.modules
    assert max(report.modules.values()) < 1e-5
    changed = model.copy()
    carried = {name: change for name, change in update.delta.items() if name not in report.left_out}
    replace(update, delta=carried).apply(changed)
    found = with_peft(model, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(found), logits_of(changed.network), rtol=1e-4, atol=1e-4)


def test_the_folder_is_pefts_and_the_report_lies_in_it(tmp_path):
    model = tiny_model("gpt2")
    model.save(tmp_path / "model")
    model = load(tmp_path / "model", check=False)
    update = toy_update(model, only="c_proj")
    report = export_adapter(update, model, tmp_path / "adapter", 4)
    names = {"adapter_config.json", "adapter_model.safetensors", "adapter_report.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.bias, config.fan_in_fan_out) == (4, 4, "none", True)
    assert config.target_modules == set(report.modules) and config.base_model_name_or_path == str(tmp_path / "model")
    assert json.loads((tmp_path / "adapter" / "adapter_report.json").read_text()) == asdict(report)
    # What PEFT saves of it has the same names and the same numbers.
    loaded = with_peft(model, tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "saved")
    ours, theirs = (peft.utils.load_peft_weights(tmp_path / name) for name in ("adapter", "saved"))
    assert same_weights(ours, theirs)
    assert loaded.peft_config["default"].inference_mode


def test_what_is_lost_is_measured_on_the_request(trained, tmp_path):
    model, request = trained.full, trained.request
    update = RandomLabels(learning_rate=1e-3).run(model, request, Stop(40, 0.2))
    before = model.weights_hash()
    report = export_adapter(update, model, tmp_path / "adapter", 4, request=request)
    assert model.weights_hash() == before and model.updates == []
    full = update.apply(model.copy())
    adapted = model.copy()
    merged = with_peft(model, tmp_path / "adapter").merge_and_unload()
    adapted.network.load_state_dict(merged.state_dict())
    expected = (
        kl_per_item(full, adapted, request.retain_held_out).mean().item(),
        answer_probability(full, request.forget).mean().item(),
        answer_probability(adapted, request.forget).mean().item(),
    )
    found = report.loss
    assert (found.retain_kl, found.update_forget_probability, found.adapter_forget_probability) == pytest.approx(
        expected, rel=1e-3
    )
    # More rank, less loss: at full rank only what is no linear map is missing.
    whole = export_adapter(update, model, tmp_path / "whole", 64, request=request)
    assert whole.residual < report.residual and whole.loss.retain_kl < report.loss.retain_kl


# Mistakes


def test_a_rank_below_1_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(SpecError, match="rank is 0"):
        export_adapter(toy_update(model), model, tmp_path / "adapter", 0)
    assert not (tmp_path / "adapter").exists()


def test_an_update_of_another_model_or_one_that_is_in_is_refused(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    update = toy_update(model)
    with pytest.raises(UpdateError, match="was made for other weights"):
        export_adapter(update, other, tmp_path / "adapter")
    with pytest.raises(UpdateError, match=r"changes model\..* no such parameter"):
        export_adapter(update, tiny_model("gpt2"), tmp_path / "adapter")
    with update.applied(model), pytest.raises(UpdateError, match="is already in"):
        export_adapter(update, model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delta", [{}, {"model.norm.weight": torch.ones(16)}])
def test_an_update_without_a_linear_map_is_refused(delta, tmp_path):
    model = tiny_model("llama")
    update = replace(toy_update(model), delta=delta)
    with pytest.raises(UpdateError, match="changes no linear map") as error:
        export_adapter(update, model, tmp_path / "adapter")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_only_our_own_adapter_is_replaced(tmp_path):
    model = tiny_model("llama")
    folder = tmp_path / "adapter"
    export_adapter(toy_update(model), model, folder, 2)
    export_adapter(toy_update(model, 2), model, folder, 3)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    (folder / "adapter_report.json").unlink()  # then it is somebody's adapter
    with pytest.raises(StorageError, match="holds other files"):
        export_adapter(toy_update(model), model, folder, 2)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
