import json
import shutil
import traceback

import pytest
import torch
from tiny_families import WIDTH, tiny, tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from palimpsest.errors import ModelError
from palimpsest.models.language_model import LanguageModel, evaluating, load
from palimpsest.models.scoring import predict


def predictions(model):
    with evaluating(model) as network:
        return predict(network, tiny_batch(6, 4)).logits.clone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_model("llama").save(tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good model folder, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "model")


# Saving and loading.


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "olmoe"])
def test_what_is_saved_is_what_is_loaded(family, tmp_path):
    model = tiny_model(family)
    model.name, model.updates = "my model", ["abc", "def"]
    before, expected = model.fingerprint(), predictions(model)
    folder = model.save(tmp_path / "somewhere" / family)
    assert model.fingerprint() == before
    loaded = load(folder)
    assert loaded.fingerprint() == before
    assert torch.equal(predictions(loaded), expected)
    assert (loaded.name, loaded.updates) == ("my model", ["abc", "def"])
    assert not loaded.network.training
    assert loaded.anatomy.tied == model.anatomy.tied
    assert sorted(path.name for path in folder.parent.iterdir()) == [family]


def test_saving_over_a_folder_replaces_it(folder):
    (folder / "stale.txt").write_text("old")
    model = tiny_model("gpt2")
    model.save(folder)
    assert load(folder).fingerprint() == model.fingerprint()
    assert not (folder / "stale.txt").exists()


def test_a_folder_that_palimpsest_did_not_write_is_named_after_itself(folder):
    (folder / "palimpsest.json").unlink()
    loaded = load(folder)
    assert (loaded.name, loaded.updates) == ("model", [])


def test_bf16(saved):
    model = load(saved, precision="bf16")
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.bfloat16}
    exact = load(saved)
    assert model.fingerprint() != exact.fingerprint()
    rounded = {name: value.bfloat16() for name, value in exact.network.state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in model.network.state_dict().items())
    found = predictions(model)
    assert found.dtype == torch.float32
    assert 0 < (found - predictions(exact)).abs().max() < 0.1


@pytest.mark.parametrize("wanted", [True, False])
def test_loading_and_saving_show_no_bars_and_leave_the_users_setting(wanted, folder, capfd):
    was = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
        load(folder).save(folder)
        assert capfd.readouterr() == ("", "")
        AutoModelForCausalLM.from_pretrained(folder)
        assert ("Loading weights" in capfd.readouterr().err) is wanted
        shutil.rmtree(folder)
        with pytest.raises(ModelError):
            load(folder)
        assert logging.is_progress_bar_enabled() is wanted
    finally:
        (logging.enable_progress_bar if was else logging.disable_progress_bar)()


# The fingerprint.


def test_one_ulp_of_one_weight_changes_the_fingerprint(saved):
    model = load(saved)
    before = model.fingerprint()
    weight = model.network.model.layers[2].mlp.down_proj.weight.data
    original = weight[3, 4].clone()
    weight[3, 4] = torch.nextafter(original, torch.tensor(torch.inf))
    assert model.fingerprint() != before
    weight[3, 4] = original
    assert model.fingerprint() == before


def test_the_tokenizer_and_the_configuration_are_part_of_the_fingerprint(saved):
    model = load(saved)
    before = model.fingerprint()
    other = LanguageModel(model.network, tiny_tokenizer(first_word="another"), model.anatomy)
    assert other.fingerprint() != before
    model.tokenizer.chat_template = "{{ messages }}"
    assert model.fingerprint() != before
    model.tokenizer.chat_template = None
    assert model.fingerprint() == before
    model.network.config.rms_norm_eps *= 2
    assert model.fingerprint() != before


def test_padding_and_truncation_and_names_are_not(folder):
    model = load(folder)
    before = model.fingerprint()
    model.tokenizer(["w5", "w5 w6 w7"], padding=True, truncation=True, max_length=2)
    model.tokenizer.padding_side = "left"
    assert model.fingerprint() == before
    model.name = "another"
    assert model.fingerprint() == before
    moved = folder.rename(folder.with_name("moved"))
    assert load(moved).fingerprint() == before


def test_tied_weights_count_once_and_stay_tied(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    assert model.anatomy.tied
    assert sum(1 for _ in model.network.named_parameters()) == 29
    loaded = load(model.save(tmp_path / "tied"))
    assert loaded.anatomy.tied
    assert loaded.fingerprint() == model.fingerprint()
    untied = tiny("llama")
    untied.load_state_dict(model.network.state_dict())
    assert LanguageModel(untied, model.tokenizer, model.anatomy).weights_hash() != model.weights_hash()


# Copies.


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmoe"])
def test_a_copy_is_independent(family):
    model = tiny_model(family)
    model.updates = ["abc"]
    before, expected, random_state = model.fingerprint(), predictions(model), torch.get_rng_state()
    twin = model.copy("twin")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (twin.name, twin.updates, twin.fingerprint()) == ("twin", ["abc"], before)
    assert torch.equal(predictions(twin), expected)
    assert twin.anatomy.tied == model.anatomy.tied
    storages = [
        {value.untyped_storage().data_ptr() for value in m.network.state_dict().values()} for m in (model, twin)
    ]
    assert not storages[0] & storages[1]
    twin.updates.append("def")
    twin.network.config.use_cache = not twin.network.config.use_cache
    for parameter in twin.network.parameters():
        parameter.data.zero_()
    assert (model.fingerprint(), model.updates) == (before, ["abc"])
    assert set(twin.network.modules()) >= {*twin.anatomy.blocks, twin.anatomy.final_norm, twin.anatomy.unembedding}


def test_evaluating_puts_the_training_mode_back_after_an_exception():
    model = tiny_model("llama")
    model.network.train()
    with pytest.raises(ZeroDivisionError), evaluating(model) as network:
        assert not network.training and torch.is_inference_mode_enabled()
        _ = 1 / 0
    assert model.network.training and not torch.is_inference_mode_enabled()


# A folder that cannot be used gives one line.


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without(pattern):
    def remove(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return remove


def as_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def remove(folder):
    shutil.rmtree(folder)


def put_a_file_there(folder):
    shutil.rmtree(folder)
    folder.write_text("text")


BROKEN = {
    "no such folder": (remove, "there is no such model folder"),
    "a file": (put_a_file_there, "but this is a file"),
    "an empty folder": (empty, "no config.json there"),
    "no config": (without("config.json"), "no config.json there"),
    "no weights": (without("*.safetensors"), r"no \*.safetensors weights"),
    "a pickle": (as_pickle, r"the weights are a pickle \(pytorch_model.bin\)"),
    "weights cut short": (cut_short, "cannot be loaded as a causal language model"),
    "weights that are not safetensors": (write("model.safetensors", "text"), "cannot be loaded"),
    "config that is not JSON": (write("config.json", "{"), "cannot be loaded.*not a valid JSON"),
    "config without a type": (write("config.json", "{}"), "cannot be loaded.*model_type"),
    "config of an unknown type": (edit_config(model_type="nonesuch"), "cannot be loaded.*nonesuch"),
    "config that contradicts itself": (edit_config(num_attention_heads=3), "cannot be loaded.*not a multiple"),
    "config of a wider model": (edit_config(hidden_size=2 * WIDTH), "30 weights are missing or not of the shape"),
    "config of a deeper model": (
        edit_config(num_hidden_layers=5),
        "18 weights .* model.layers.3.input_layernorm.weight",
    ),
    "no tokenizer": (without("tokenizer*"), "its tokenizer cannot be loaded"),
    "a tokenizer that is none": (write("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "a note that is not JSON": (write("palimpsest.json", "{"), "palimpsest.json: not the JSON object"),
    "a note that is no object": (write("palimpsest.json", "[1]"), "palimpsest.json: not the JSON object"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(broken, folder):
    spoil, reason = BROKEN[broken]
    spoil(folder)
    with pytest.raises(ModelError, match=reason) as error:
        load(folder)
    message = str(error.value)
    assert message.startswith(str(folder))
    assert "\n" not in message and "Traceback" not in message and 'File "' not in message
    assert traceback.format_exception_only(error.value) == [f"palimpsest.errors.ModelError: {message}\n"]


def test_a_relative_path_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./nothing", "../nothing", "~/nothing", "some/where/deep"):
        with pytest.raises(ModelError, match=f"{path}: there is no such model folder"):
            load(path)


def test_an_architecture_that_cannot_be_named_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError, match="architecture 'mamba'"):
        load(tmp_path / "mamba")


def test_a_failed_self_check_stops_the_loading_unless_it_is_switched_off(tmp_path):
    model = tiny_model("llama")
    model.network.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    folder = model.save(tmp_path / "nan")
    with pytest.raises(ModelError, match="self-check"):
        load(folder)
    assert load(folder, check=False).fingerprint() == model.fingerprint()
