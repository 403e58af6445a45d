"""A model that is loaded to be scored."""

import peft

from hiplora.evaluation.evaluate import EvalSettings, load_model
from hiplora.evaluation.mounting import mounted
from hiplora.evaluation.suite import suite_of
from hiplora.study.pico_data import write_pico_data


def test_it_scores_the_same_bits_before_an_adapter_and_after_one(tmp_path):
    write_pico_data(tmp_path)
    engine = EvalSettings("pico", tmp_path).engine(suite_of("pico", {"mmlu": None}, tmp_path))
    model, tokenizer = load_model("pico")
    other, _ = load_model("pico")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(other, config).save_pretrained(tmp_path / "adapter")
    before = engine.score(model, tokenizer)
    with mounted(model, tmp_path / "adapter"):
        pass
    assert engine.score(model, tokenizer) == before
