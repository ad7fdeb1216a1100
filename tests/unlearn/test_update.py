import json
import os
import struct
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_request import draw_weights, same_weights, toy_model, toy_update, weights_of

from palimpsest.errors import StorageError, UpdateError
from palimpsest.models.language_model import load
from palimpsest.unlearn.update import Update, origins_in

MODEL = toy_model()
BASE = weights_of(MODEL)


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


def plus(base, *updates):
    """What the weights must be, by float64 arithmetic."""
    found = {name: value.double() for name, value in base.items()}
    for update in updates:
        for name, change in update.delta.items():
            found[name] = found[name] + change.double() * update.factor
    return {name: value.float() for name, value in found.items()}


def test_apply_adds_and_undo_takes_out_bit_for_bit():
    model, update = MODEL.copy(), toy_update(MODEL)
    assert update.apply(model) is model
    close(weights_of(model), plus(BASE, update))
    assert not same_weights(weights_of(model), BASE)
    assert model.updates == [update.identity]
    assert update.undo(model) is model
    assert same_weights(weights_of(model), BASE)
    assert model.updates == [] and model.fingerprint() == MODEL.fingerprint()
    update.apply(model)  # and again
    update.undo(model)
    assert same_weights(weights_of(model), BASE)


def test_a_bf16_model_gets_its_bytes_back():
    model = MODEL.copy()
    model.network.bfloat16()
    before = weights_of(model)
    update = toy_update(model)
    with update.scale(0.7).applied(model):
        assert not same_weights(weights_of(model), before)
        assert {value.dtype for value in weights_of(model).values()} == {torch.bfloat16}
    assert same_weights(weights_of(model), before)


def test_unchanged_parameters_are_left_out():
    update = toy_update(MODEL, only="down_proj")
    assert list(update.delta) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    assert Update.between(BASE, BASE, {}).delta == {}
    frozen = {name: value for name, value in BASE.items() if name not in update.delta}
    model = update.apply(MODEL.copy())
    assert same_weights({name: weights_of(model)[name] for name in frozen}, frozen)


def test_between_is_the_difference_however_the_gradient_stands():
    before = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(2)}
    after = {"a": torch.tensor([1.5, 1.0], requires_grad=True), "b": torch.ones(2)}
    update = Update.between(before, after, {})
    assert {name: value.tolist() for name, value in update.delta.items()} == {"a": [0.5, -1.0]}
    assert not update.delta["a"].requires_grad


@given(st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 2)), max_size=10))
@settings(deadline=None, max_examples=40)
def test_any_order_of_applying_and_undoing_leaves_the_sum_of_what_is_in(actions):
    model, updates = MODEL.copy(), [toy_update(MODEL, seed, only="mlp") for seed in range(3)]
    inside, neatly = [], True
    for action, number in actions:
        update = updates[number]
        if action == "+" and number not in inside and (neatly or inside):
            update.apply(model)
            inside.append(number)
        elif action == "-" and number in inside:
            neatly = neatly and inside[-1] == number
            update.undo(model)
            inside.remove(number)
        assert model.updates == [updates[number].identity for number in inside]
        close(weights_of(model), plus(BASE, *(updates[number] for number in inside)))
    if not inside and neatly:
        assert same_weights(weights_of(model), BASE)


def test_undo_takes_nothing_else_out():
    """Whatever changed the weights after the update, another update or training, stays."""
    model, first, second = MODEL.copy(), toy_update(MODEL, 1), toy_update(MODEL, 2)
    first.apply(model)
    second.apply(model)
    first.undo(model)
    close(weights_of(model), plus(BASE, second))
    second.undo(model)
    close(weights_of(model), BASE)

    model = first.apply(MODEL.copy())
    draw_weights(model, seed=8, size=0.05)
    trained = MODEL.copy()
    draw_weights(trained, seed=8, size=0.05)
    first.undo(model)
    close(weights_of(model), weights_of(trained))


def test_updates_of_other_parameters_are_undone_bit_for_bit_in_any_order():
    model, first, second = MODEL.copy(), toy_update(MODEL, 1, only="mlp"), toy_update(MODEL, 2, only="attn")
    for update in (first, second):
        update.apply(model)
    for update in (first, second):
        update.undo(model)
    assert same_weights(weights_of(model), BASE)


def test_applying_twice_is_refused():
    model, update = MODEL.copy("mine"), toy_update(MODEL)
    update.apply(model)
    inside = weights_of(model)
    with pytest.raises(UpdateError, match=r"\(toy 1\) is already in 'mine'; undo it before") as error:
        update.apply(model)
    assert "\n" not in str(error.value)
    assert same_weights(weights_of(model), inside) and len(model.updates) == 1
    with pytest.raises(UpdateError, match="already in"):
        update.apply(model.copy())  # a copy remembers


def test_undoing_what_is_not_in_is_refused():
    model, update = MODEL.copy(), toy_update(MODEL)
    with pytest.raises(UpdateError, match=r"is not in .* so it cannot be undone"):
        update.undo(model)
    update.apply(model)
    with pytest.raises(UpdateError, match="is not in"):
        update.scale(2).undo(model)


def test_another_models_update_is_refused():
    model, update = toy_model(seed=1), toy_update(MODEL)
    before = weights_of(model)
    with pytest.raises(UpdateError, match="was made for other weights than those of 'model'") as error:
        update.apply(model)
    assert "\n" not in str(error.value)
    assert same_weights(weights_of(model), before) and model.updates == []


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [("model.norm.weight", (3,), r"\(3,\), but 'model' has \(16,\)"), ("model.gone", (2, 2), "no such parameter")],
)
def test_changes_that_do_not_fit_are_refused(name, shape, found):
    model = MODEL.copy()
    good = toy_update(MODEL, only="mlp")
    update = Update({**good.delta, name: torch.ones(shape)}, good.provenance)
    with pytest.raises(UpdateError, match=found) as error:
        update.apply(model)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert same_weights(weights_of(model), BASE) and model.updates == []


def test_applied_undoes_even_after_an_exception():
    model, update = MODEL.copy(), toy_update(MODEL)
    with update.applied(model) as changed:
        assert changed is model and model.updates == [update.identity]
    assert same_weights(weights_of(model), BASE)
    with pytest.raises(ZeroDivisionError), update.applied(model):
        _ = 1 / 0
    assert same_weights(weights_of(model), BASE) and model.updates == []
    with ExitStack() as stack:
        for seed in range(3):
            stack.enter_context(toy_update(MODEL, seed).applied(model))
    assert same_weights(weights_of(model), BASE)


@pytest.mark.parametrize("factor", [-1.0, 0.5, 0.0, 3.0])
def test_scale_scales_the_change(factor):
    model, update = MODEL.copy(), toy_update(MODEL)
    scaled = update.scale(factor)
    assert scaled.identity != update.identity and update.factor == 1
    scaled.apply(model)
    exact = {name: value + factor * update.delta.get(name, torch.zeros(1)) for name, value in BASE.items()}
    close(weights_of(model), exact)
    scaled.undo(model)
    assert same_weights(weights_of(model), BASE)


def test_scales_multiply_and_the_negative_takes_the_update_out():
    model, update = MODEL.copy(), toy_update(MODEL)
    assert update.scale(0.5).scale(4).factor == 2
    assert update.scale(0.5).scale(2).identity == update.identity
    update.apply(model)
    update.scale(-1).apply(model)
    close(weights_of(model), BASE)
    assert len(model.updates) == 2


def test_a_change_is_added_in_fp32_and_rounded_once():
    """Half a unit in the last place of 1 is 2^-8: a change just above it moves a bf16 weight, though in bf16 the change
    itself would be rounded down to the tie, which goes to 1."""
    half = torch.full((2,), 2.0**-8, dtype=torch.bfloat16)
    update = Update({"w": half}, {}).scale(1 + 2**-9)
    assert update.added("w", torch.ones(2, dtype=torch.bfloat16)).tolist() == [1 + 2**-7] * 2
    assert Update({"w": half}, {}).added("w", torch.ones(2, dtype=torch.bfloat16)).tolist() == [1, 1]
    assert update.change("w").tolist() == [2**-8 + 2**-17] * 2 and update.change("w").dtype == torch.float32


def test_a_scaled_update_names_the_one_that_it_is_of():
    update = toy_update(MODEL)
    assert update.origins == (update.identity,) and ":" not in update.identity
    for factor in (-1.0, 0.5):
        scaled = update.scale(factor)
        assert scaled.origins == (update.identity,) and scaled.identity.endswith(f":{update.identity}")
    with update.scale(0.5).applied(MODEL.copy()) as model:
        assert origins_in(model) == {update.identity}
    assert origins_in(MODEL) == set()


def test_identity_is_what_and_from_what_not_how_long_it_took():
    update = toy_update(MODEL)

    def made(**changes):
        return Update(update.delta, update.provenance | changes).identity

    assert made(seconds=1.0) == made(seconds=2.0) == update.identity
    assert len({update.identity, made(base_weights="0"), made(method={"name": "x"}), made(request="r")}) == 4


# Sums


def bits(update):
    return {name: (change.dtype, change.numpy().tobytes()) for name, change in update.delta.items()}


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["", "mlp", "attn"]), st.sampled_from([-1.0, 0.3, 1.0, 2.5])),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=30)
def test_a_sum_is_what_its_parts_add_up_to_in_whatever_order(made, draw):
    parts = [toy_update(MODEL, seed, only=only).scale(factor) for seed, only, factor in made]
    parts = list({part.identity: part for part in parts}.values())
    whole = Update.compose(parts)
    close(weights_of(whole.apply(MODEL.copy())), plus(BASE, *parts))
    draw.shuffle(parts)
    again = Update.compose(parts)
    assert bits(again) == bits(whole) and again.identity == whole.identity and again.provenance == whole.provenance


def test_a_sum_applied_is_its_parts_applied_one_after_the_other_and_it_is_undone_bit_for_bit():
    parts = [toy_update(MODEL, 1, only="mlp"), toy_update(MODEL, 2).scale(-0.5), toy_update(MODEL, 3, only="attn")]
    one_by_one = MODEL.copy()
    for part in parts:
        part.apply(one_by_one)
    whole, model = Update.compose(parts), MODEL.copy()
    close(weights_of(whole.apply(model)), weights_of(one_by_one))
    assert model.updates == [whole.identity]
    assert same_weights(weights_of(whole.undo(model)), BASE) and model.updates == []


def test_a_sum_keeps_its_parts_provenance_also_on_the_disk(tmp_path):
    one, other = toy_update(MODEL, 1), toy_update(MODEL, 2).scale(0.5)
    whole = Update.compose([one, other])
    made = whole.provenance
    assert {part["identity"]: (part["factor"], part["provenance"]) for part in made["parts"]} == {
        one.identity: (1.0, one.provenance),
        other.identity: (0.5, other.provenance),
    }
    assert made["base_weights"] == MODEL.weights_hash() and whole.method == "toy 1+toy 2"
    assert set(whole.origins) == {one.identity, toy_update(MODEL, 2).identity}
    loaded = Update.load(whole.save(tmp_path / "sum"))
    assert (loaded.identity, loaded.provenance, bits(loaded)) == (whole.identity, made, bits(whole))
    model = whole.apply(MODEL.copy())
    assert origins_in(model) == set(whole.origins)
    with pytest.raises(UpdateError, match="already in"):
        loaded.apply(model)
    close(weights_of(loaded.undo(model)), BASE)


def test_a_sum_is_the_same_however_long_its_parts_took():
    def whole(seconds):
        parts = [toy_update(MODEL, seed) for seed in (1, 2)]
        return Update.compose([Update(part.delta, part.provenance | {"seconds": seconds}) for part in parts])

    assert whole(1.0).identity == whole(9.0).identity
    assert whole(9.0).provenance["seconds"] == 18


def test_an_update_and_its_negative_sum_to_nothing():
    update = toy_update(MODEL)
    nothing = Update.compose([update, update.scale(-1)])
    assert same_weights(weights_of(nothing.apply(MODEL.copy())), BASE)


def test_a_sum_of_bf16_changes_is_not_rounded_to_bf16():
    one, other = (torch.full((1,), value, dtype=torch.bfloat16) for value in (1.0, 2.0**-12))
    parts = [Update({"w": delta}, {"base_weights": "b", "of": of}) for of, delta in enumerate((one, other))]
    assert Update.compose(parts).delta["w"].item() == 1 + 2**-12


def test_what_is_no_sum_is_refused():
    update = toy_update(MODEL)
    odd = Update({**update.delta, "model.norm.weight": torch.ones(3)}, update.provenance | {"request": "odd"})
    fine = Update({"model.norm.weight": torch.ones(16)}, update.provenance | {"request": "fine"})
    for updates, says in (
        ([], "there are no updates to compose"),
        ([update, toy_update(MODEL)], rf"{update.identity} \(toy 1\) stands there twice"),
        ([update, toy_update(toy_model(seed=1))], "were made from different weights"),
        ([odd, fine], r"change model\.norm\.weight in two shapes"),
    ):
        with pytest.raises(UpdateError, match=says) as error:
            Update.compose(updates)
        assert "\n" not in str(error.value)


# On the disk


def test_saved_and_loaded_it_is_the_same(tmp_path):
    update = toy_update(MODEL).scale(0.5)
    assert update.save(tmp_path / "deep" / "update") == tmp_path / "deep" / "update"
    assert sorted(path.name for path in (tmp_path / "deep" / "update").iterdir()) == [
        "delta.safetensors",
        "update.json",
    ]
    loaded = Update.load(tmp_path / "deep" / "update")
    assert loaded.identity == update.identity and loaded.provenance == update.provenance and loaded.factor == 0.5
    assert same_weights(loaded.delta, update.delta)
    loaded.save(tmp_path / "again")
    for name in ("delta.safetensors", "update.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "update" / name).read_bytes()


def test_an_empty_update_is_an_update(tmp_path):
    update = Update.between(BASE, BASE, {"base_weights": MODEL.weights_hash()})
    loaded = Update.load(update.save(tmp_path / "update"))
    model = MODEL.copy()
    with loaded.applied(model):
        assert same_weights(weights_of(model), BASE) and model.updates == [update.identity]


def test_update_and_model_from_the_disk_fit(tmp_path):
    MODEL.save(tmp_path / "model")
    update = toy_update(MODEL)
    update.save(tmp_path / "update")
    model = load(tmp_path / "model", check=False)
    Update.load(tmp_path / "update").apply(model)
    assert same_weights(weights_of(model), weights_of(update.apply(MODEL.copy())))


def test_a_saved_model_remembers_the_update_in_it(tmp_path):
    update = toy_update(MODEL)
    update.apply(MODEL.copy("changed")).save(tmp_path / "changed")
    update.save(tmp_path / "update")
    model, again = load(tmp_path / "changed", check=False), Update.load(tmp_path / "update")
    assert model.updates == [update.identity]
    with pytest.raises(UpdateError, match="already in 'changed'"):
        again.apply(model)
    again.undo(model)
    close(weights_of(model), BASE)
    assert model.updates == []


def test_saving_replaces_an_update_and_nothing_else(tmp_path):
    toy_update(MODEL, 1).save(tmp_path / "update")
    toy_update(MODEL, 2).save(tmp_path / "update")
    assert Update.load(tmp_path / "update").identity == toy_update(MODEL, 2).identity
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(StorageError, match="thesis: holds other files, which would be lost"):
        toy_update(MODEL).save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert Update.load(toy_update(MODEL).save(tmp_path / "empty")).delta.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "thesis", "update"]


def cut(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


def edit(path, change):
    note = json.loads(path.read_text())
    path.write_text(json.dumps(change(note)))


BREAKS = {
    "no delta": lambda folder: (folder / "delta.safetensors").unlink(),
    "no note": lambda folder: (folder / "update.json").unlink(),
    "delta cut short": lambda folder: cut(folder / "delta.safetensors"),
    "header cut short": lambda folder: os.truncate(folder / "delta.safetensors", 5),
    "delta empty": lambda folder: os.truncate(folder / "delta.safetensors", 0),
    "header too long": lambda folder: (folder / "delta.safetensors").write_bytes(struct.pack("<Q", 2**50) + b"{}"),
    "note cut short": lambda folder: cut(folder / "update.json"),
    "note empty": lambda folder: os.truncate(folder / "update.json", 0),
    "note not text": lambda folder: (folder / "update.json").write_bytes(b"\xff\xfe{}"),
    "note a list": lambda folder: (folder / "update.json").write_text("[]"),
    "note a number": lambda folder: (folder / "update.json").write_text("3"),
    "no provenance": lambda folder: edit(folder / "update.json", lambda note: {"factor": 1.0}),
    "provenance a list": lambda folder: edit(folder / "update.json", lambda note: note | {"provenance": [1]}),
    "no factor": lambda folder: edit(folder / "update.json", lambda note: {"provenance": note["provenance"]}),
    "factor a word": lambda folder: edit(folder / "update.json", lambda note: note | {"factor": "half"}),
    "factor null": lambda folder: edit(folder / "update.json", lambda note: note | {"factor": None}),
    "base unknown": lambda folder: edit(folder / "update.json", lambda note: note | {"provenance": {}}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_folder_is_one_line(broken, tmp_path):
    folder = toy_update(MODEL).save(tmp_path / "update")
    BREAKS[broken](folder)
    with pytest.raises(UpdateError) as error:
        Update.load(folder)
    assert str(error.value).startswith(f"{folder}: not a whole update") and "\n" not in str(error.value)


def test_no_folder_a_file_and_a_model_folder_are_no_updates(tmp_path):
    (tmp_path / "file").write_text("")
    MODEL.save(tmp_path / "model")
    for name in ("nowhere", "file", "model"):
        with pytest.raises(UpdateError, match="not a whole update") as error:
            Update.load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_delta_of_another_model_is_refused_when_it_is_applied(tmp_path):
    folder = toy_update(MODEL).save(tmp_path / "update")
    save_file({"model.norm.weight": torch.ones(2)}, folder / "delta.safetensors")
    with pytest.raises(UpdateError, match=r"changes model\.norm\.weight"):
        Update.load(folder).apply(MODEL.copy())


def test_an_update_keeps_no_model_alive():
    update, model = toy_update(MODEL), MODEL.copy()
    update.apply(model)
    assert len(update._originals) == 1
    del model
    assert len(update._originals) == 0
