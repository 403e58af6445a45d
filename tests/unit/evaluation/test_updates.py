import pytest
import torch

from hiplora.adapters import AdapterUpdate
from hiplora.errors import ConfigError
from hiplora.evaluation import Encoded, heldout_loss
from hiplora.evaluation.updates import choose_scale, measure_updates, search_scale, smallest_scale
from tests.tiny import tiny_llama, tiny_tokenizer

MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("best", [0.6, 1.0, 2.0])
def test_the_smallest_scale_within_the_tolerance_is_found(best, tolerance):
    def loss(scale):
        return 1 + (scale - best) ** 2

    found = smallest_scale(loss, tolerance)
    grid = [step / 64 for step in range(1, 65)]
    assert found["scale"] == min(scale for scale in grid if loss(scale) <= loss(1) + tolerance)
    assert {row["scale"]: row["loss"] for row in found["losses"]}[1.0] == loss(1.0)


@pytest.mark.parametrize(
    ("arguments", "why"), [((0.5, 0.1, "rows"), "give one of them"), ((None, 0.1, None), "needs --data")]
)
def test_options_that_do_not_go_together_are_refused(arguments, why):
    with pytest.raises(ConfigError, match=why):
        choose_scale(AdapterUpdate("", "lora", {}, {}), *arguments)
    with pytest.raises(ConfigError, match="tolerance is -1"):
        smallest_scale(lambda scale: scale, -1)


def test_a_search_and_a_measurement_leave_the_model_as_it_was():
    model, generator = tiny_llama(), torch.Generator().manual_seed(0)
    pair = torch.randn(2, 64, generator=generator), torch.randn(96, 2, generator=generator)
    update = AdapterUpdate("tiny", "lora", {}, {MODULE: pair})
    examples = [Encoded((1, 2, 3, 4, 5), (-100, 2, 3, 4, 5))]
    before = heldout_loss(model, examples)
    found = search_scale(model, update, examples, 0.05)
    drift, losses = measure_updates(
        model, tiny_tokenizer(), {"whole": update}, {"a": "some text to read " * 20}, examples
    )
    assert heldout_loss(model, examples) == losses["base"] == before
    assert losses["whole"] == pytest.approx(found["losses"][-1]["loss"])
    assert drift["whole"]["a"]["kl"] > 0
