from dataclasses import replace

import pytest
import torch

from hiplora.editing import AlphaEdit, AlphaEditor, evaluate_edits
from hiplora.editing.alphaedit import locate, null_space, null_space_update, search_value, subject_states
from hiplora.editing.editors import default_layers
from hiplora.errors import ConfigError, DataError, FactorError
from hiplora.spectral import SecondMoment
from hiplora.tuner import input_bases
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.unit.editing.samples import EDITS, lively

SETTINGS = AlphaEdit(threshold=0.02, ridge=1e-3, calibration_tokens=400, value_steps=12, prefixes=2, prefix_tokens=3)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def preserved():
    """Keys (24, 500) that lie in 9 dimensions, but for a little noise, and their eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    span = torch.linalg.qr(torch.randn(24, 9, generator=generator))[0]
    keys = torch.randn(500, 9, generator=generator) @ span.T
    moment = SecondMoment(24)
    moment.add(keys + 1e-4 * torch.randn(500, 24, generator=generator))
    return keys.double().T, moment.eigen()


def test_the_projector_is_of_the_directions_below_the_threshold_and_an_update_moves_no_other(preserved):
    keys, basis = preserved
    P = null_space(basis, 0.02)
    assert torch.allclose(P @ P, P, atol=1e-6)
    assert torch.equal(P, P.T)
    assert P.trace().item() == pytest.approx(24 - 9, abs=1e-4)
    with pytest.raises(FactorError, match=r"layer down: 24 of 24 directions .* raise threshold \(the mean"):
        null_space(basis, 1e-12, "down")
    new, residual = torch.randn(24, 3), torch.randn(10, 3)
    A, B = null_space_update(new, residual, P, ridge=1e-6)
    assert (B @ A @ keys).abs().max() < 1e-3 * (B @ A @ torch.randn(24, 500).double()).abs().max()
    assert torch.allclose(B @ A @ new.double(), residual.double(), atol=1e-3)
    A, B = null_space_update(new, residual, torch.eye(24).double(), ridge=1e-6)
    assert (B @ A @ keys).abs().max() > 0.1
    K1, R, Kp = torch.randn(24, 4).double(), torch.randn(10, 4).double(), torch.randn(24, 6).double()
    by_hand = R @ K1.T @ P @ torch.linalg.inv(Kp @ Kp.T @ P + K1 @ K1.T @ P + torch.eye(24))
    A, B = null_space_update(K1, R, P, Kp @ Kp.T)
    assert torch.allclose(B @ A, by_hand)


def test_layers_end_at_a_quarter_of_the_depth_and_those_that_the_model_lacks_are_errors():
    assert default_layers(32) == default_layers(30) == (4, 5, 6, 7, 8)
    assert AlphaEdit().modules(tiny_llama()) == [DOWN]
    for layers in ((1,), (), (0, 0)):
        with pytest.raises(ConfigError, match=r"layers is .* the model has 2 blocks"):
            AlphaEdit(layers=layers).modules(tiny_llama())


def test_the_subject_is_found_where_it_ends_last_and_in_any_case():
    tokenizer = tiny_tokenizer()
    located = locate(tokenizer, "the Fox", "Once. The fox saw the fox run", "away")
    assert tokenizer.decode(located.encoded.ids) == "Once. The fox saw the fox run away"
    assert tokenizer.decode(located.ids) == "Once. The fox saw the fox"
    for subject in ("thing 0", ""):
        with pytest.raises(DataError, match=rf"edit 'It is': its subject '{subject}' is not in the prompt"):
            locate(tokenizer, subject, "It is", "b")


def test_the_states_are_those_at_the_last_token_of_each_row_whatever_the_padding():
    model = tiny_llama()
    rows = [[1, 2, 3], [4, 5, 6, 7, 8]]
    keys, values = subject_states(model, [DOWN], "model.layers.0", rows)
    for column, row in enumerate(rows):
        inputs, output = subject_states(model, [DOWN], "model.layers.0", [row])
        assert torch.allclose(keys[DOWN][:, column], inputs[DOWN][:, 0], atol=1e-5)
        hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0, -1]
        assert torch.allclose(values[:, column], hidden, atol=1e-5)
        assert torch.allclose(output[:, 0], hidden, atol=1e-5)


def test_a_searched_value_makes_the_answer_likelier_within_its_clamp():
    model, tokenizer, edit = lively(), tiny_tokenizer(), EDITS[0]
    prompts = [locate(tokenizer, edit.subject, text + edit.prompt, edit.new) for text in ("", "Once. ")]
    essence = locate(tokenizer, edit.subject, f"{edit.subject} is", "a").ids
    still = AlphaEdit(value_steps=2, value_lr=1e-9)
    first, before = search_value(model, "model.layers.0", prompts[:1], essence, still)
    fresh = evaluate_edits(model, tokenizer, [edit])["log_prob_new"].item()
    assert before == pytest.approx(-fresh / len(f" {edit.new}"), rel=1e-4)  # the mean over the answer's tokens
    hidden = model(torch.tensor([prompts[0].ids]), output_hidden_states=True).hidden_states[1][0, -1]
    assert torch.allclose(first, hidden, atol=1e-5)
    _, before = search_value(model, "model.layers.0", prompts, essence, still)
    value, after = search_value(model, "model.layers.0", prompts, essence, AlphaEdit(value_steps=20))
    assert after < before - 0.1
    assert 0.05 < (value - first).norm() / first.norm() <= 0.75 + 1e-4


def test_editing_brings_the_values_to_their_targets_and_the_new_answers_up():
    model, tokenizer = lively(), tiny_tokenizer()
    middle = input_bases(model, [DOWN], tokens=400)[DOWN].values.median().item()
    before = evaluate_edits(model, tokenizer, EDITS)
    editor = AlphaEditor(model, tokenizer, replace(SETTINGS, threshold=middle))
    took = editor.teach(EDITS)
    after = evaluate_edits(model, tokenizer, EDITS)
    assert (after["log_prob_new"] - before["log_prob_new"]).mean() > 0.5
    assert len(took["search_loss"]) == len(took["value_error"]) == 6
    assert max(took["value_error"]) < 0.75
    assert took["null_space_rank"] == {DOWN: 47}  # of 96, the median itself is not below it
    update = editor.state()[f"{DOWN}.B"] @ editor.state()[f"{DOWN}.A"]
    (P,) = editor._projectors.values()
    assert torch.allclose(update @ P, update, atol=1e-3 * update.abs().max())
    editor.close()
