import torch

from hiplora.editing import CrispEdit, CrispEditor, EditTraining, evaluate_edits
from hiplora.editing.crispedit import protected_pairs
from hiplora.spectral import MomentBasis
from tests.tiny import tiny_tokenizer
from tests.unit.editing.samples import EDITS, lively

DOWN = "model.layers.0.mlp.down_proj"
SETTINGS = CrispEdit(energy=0.8, calibration_tokens=400)
TRAINING = EditTraining(steps=6, lr=5e-2)


def test_the_fewest_pairs_that_hold_a_share_of_the_energy_are_protected():
    inputs, outputs = (MomentBasis(torch.tensor(v), torch.eye(len(v)), 9) for v in ([6.0, 3.0, 1.0], [5.0, 0.0]))
    assert protected_pairs(inputs, outputs, 0.5).tolist() == [[True, False, False], [False, False, False]]
    assert protected_pairs(inputs, outputs, 0.9).tolist() == [[True, True, False], [False, False, False]]
    wide = MomentBasis(inputs.values, inputs.vectors[:, :2], 9)  # of a wide layer only the leading vectors are kept
    assert protected_pairs(wide, outputs, 0.95).tolist() == [[True, True], [False, False]]


def test_editing_brings_the_new_answers_up_off_the_protected_pairs_and_is_taken_back():
    model, tokenizer = lively(), tiny_tokenizer()
    base = {name: values.clone() for name, values in model.state_dict().items()}
    before = evaluate_edits(model, tokenizer, EDITS)
    editor = CrispEditor(model, tokenizer, SETTINGS, TRAINING)
    took = editor.teach(EDITS)
    assert took["loss"][-1] < took["loss"][0]
    assert 0 < took["protected_pairs"][DOWN] < 1
    after = evaluate_edits(model, tokenizer, EDITS)
    assert (after["log_prob_new"] - before["log_prob_new"]).mean() > 0.5
    change = (editor.weight(DOWN) - base[f"{DOWN}.weight"]).detach()
    masked = editor._masked[DOWN]
    inside = masked._pairs * (masked._F.T @ change @ masked._E)
    assert inside.norm() < 1e-5 * change.norm()
    with editor.off():
        assert all(torch.equal(values, base[name]) for name, values in model.state_dict().items())
    saved, edited = {name: values.clone() for name, values in editor.state().items()}, editor.weight(DOWN).data
    editor.restore({})
    assert torch.equal(editor.weight(DOWN), base[f"{DOWN}.weight"])
    editor.restore(saved)
    assert torch.equal(editor.weight(DOWN), edited)
    editor.close()
    assert all(torch.equal(values, base[name]) for name, values in model.state_dict().items())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in lively().named_parameters()]
