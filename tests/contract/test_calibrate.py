"""What calibration promises: the same basis however it is computed, a model left as it was, resumption."""

import json

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hiplora
from hiplora import HipLoraConfig
from hiplora.adapters import save_dense
from hiplora.errors import ConfigError, FactorError
from hiplora.models import load, load_tokenizer
from hiplora.tuner import CalibrationStore, input_bases, model_fingerprint, moments, sampled_rows, sampling
from hiplora.tuner.moments import measure_inputs, measure_outputs, score
from hiplora.tuner.sampling import conversation_scripts, sample_rows
from tests.calls import watch
from tests.commands import succeed
from tests.contract.conftest import logits
from tests.models.zoo import CASE
from tests.tiny import left_as_it_was, tiny_llama, tiny_tokenizer

Q = "model.layers.0.self_attn.q_proj"


def config(**changes):
    return HipLoraConfig(**{"preset": "paper", "basis": "activation", "r": 4, "principal_rank": 8, **changes})


def rows(count=12, length=40, seed=0):
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model, tmp_path, **changes):
    options = {"rows": rows(), "store": CalibrationStore(tmp_path), **changes}
    return hiplora.calibrate(model, config(), **options)


def assert_equal_factors(one, other, tolerance=1e-4):
    assert one.factors.keys() == other.factors.keys()
    for name, a in one.factors.items():
        b = other.factors[name]
        torch.testing.assert_close(a.V @ a.V.T, b.V @ b.V.T, rtol=0, atol=tolerance, msg=name)
        torch.testing.assert_close(a.U @ a.U.T, b.U @ b.U.T, rtol=0, atol=tolerance, msg=name)
        torch.testing.assert_close(a.sigma, b.sigma, rtol=tolerance, atol=tolerance, msg=name)


def test_v_spans_what_the_layer_is_fed(tiny, tmp_path):
    model, seen = tiny.make(), []
    handle = model.get_submodule(Q).register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    model(input_ids=rows())
    handle.remove()
    factors = calibrated(model, tmp_path).factors[Q]
    x = seen[0].reshape(-1, 64).double()
    top = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)[:, :8]
    torch.testing.assert_close(factors.V.double() @ factors.V.double().T, top @ top.T, rtol=0, atol=1e-5)


def test_u_spans_the_outputs_that_the_predictions_depend_on(tiny, tmp_path, monkeypatch):
    """Against gradients taken one row at a time, of the same draws of next tokens."""
    drawn = []
    monkeypatch.setattr(moments, "score", lambda *a: drawn.append(score(*a)) or drawn[-1])
    factors = calibrated(tiny.make(), tmp_path).factors[Q]
    model, total = tiny.make(), torch.zeros(64, 64, dtype=torch.float64)
    outputs = []
    model.get_submodule(Q).register_forward_hook(lambda _, __, y: outputs.append(y))
    for row, scores in zip(rows(), drawn, strict=True):
        logits = model(input_ids=row[None]).logits
        (g,) = torch.autograd.grad((logits[0] * scores).sum(), outputs[-1])
        total += g[0].double().T @ g[0].double()
    top = torch.linalg.eigh(total).eigenvectors.flip(1)[:, :8]
    torch.testing.assert_close(factors.U.double() @ factors.U.double().T, top @ top.T, rtol=0, atol=1e-4)


def test_the_draws_follow_the_models_own_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]]).expand(20_000, 4)
    p = logits[0].softmax(-1)
    scores = score(logits, 3)
    torch.testing.assert_close(scores.mean(0), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(scores.T @ scores / len(scores), p.diag() - p.outer(p), rtol=0, atol=0.02)
    assert torch.equal(scores, score(logits, 3))
    assert not torch.equal(scores, score(logits, 4))


@pytest.mark.parametrize("limit", [100, 130])
def test_gradients_are_taken_of_whole_rows_up_to_their_limit(tiny, tmp_path, limit):
    few = calibrated(tiny.make(), tmp_path / "a", gradient_tokens=limit)
    assert_equal_factors(few, calibrated(tiny.make(), tmp_path / "b", gradient_tokens=limit, batch_size=1))
    enough = -(-limit // 40)
    same = calibrated(tiny.make(), tmp_path / "c", rows=rows(enough), batch_size=5)
    for name, factors in few.factors.items():
        other = same.factors[name]
        torch.testing.assert_close(factors.U @ factors.U.T, other.U @ other.U.T, rtol=0, atol=1e-4)


def test_a_loop_without_gradients_of_its_own_is_differentiated_all_the_same(tiny, tmp_path):
    model = tiny.make()

    @torch.no_grad()
    def loop():
        for row in rows():
            model(input_ids=row[None])

    own = hiplora.calibrate(model, config(), loop)
    assert own.source == "run_model"
    assert_equal_factors(own, calibrated(tiny.make(), tmp_path, batch_size=12), 1e-4)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("length", [8, 7])
def test_the_padding_of_an_encoders_text_is_not_the_decoders(length):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids, labels, padding = rows(4, 8) % 50, rows(4, length) % 50, torch.ones(4, 8, dtype=torch.long)
    padding[:, 3:] = 0
    encoder, decoder = "encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wi"

    def run():
        model(input_ids=ids, attention_mask=padding, labels=labels)

    inputs = measure_inputs(model, [encoder, decoder], run)
    assert (inputs[encoder].tokens, inputs[decoder].tokens) == (12, 4 * length)
    assert measure_outputs(model, {decoder: 4}, run, 1000)[decoder].tokens == 4 * length


def test_what_cannot_be_differentiated_is_told_the_way_out(tiny):
    model, backbone = tiny.make(), tiny.make().model
    with pytest.raises(ConfigError, match=r"inference_mode.*basis_sides='input'"), torch.inference_mode():
        hiplora.calibrate(model, config(), lambda: model(input_ids=rows()))
    with pytest.raises(ConfigError, match=r"LlamaModel gives no logits.*basis_sides='input'"):
        hiplora.calibrate(backbone, config(), lambda: backbone(input_ids=rows()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *backbone.modules()))
    calibration = hiplora.calibrate(backbone, config(basis_sides="input"), lambda: backbone(input_ids=rows()))
    assert len(calibration.factors) == 8


def test_a_model_of_another_library_that_writes_no_text_is_told_the_way_out():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model.config = {"model_type": "custom"}
    settings = HipLoraConfig(r=2, principal_rank=2, target_modules=["0"], basis_sides="input")
    with pytest.raises(ConfigError, match=r"not a causal language model.*run_model"):
        peft.get_peft_model(model, settings)
    hiplora.calibrate(model, settings, lambda: model(torch.randn(20, 8)))
    assert peft.get_peft_model(model, settings)(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize("ragged", [False, True])
def test_batches_padding_and_groups_of_layers_change_nothing_but_rounding(tiny, tmp_path, ragged):
    data = [row[: 20 + index] for index, row in enumerate(rows())] if ragged else rows()
    alone = calibrated(tiny.make(), tmp_path / "1", rows=data, batch_size=1)
    assert alone.tokens == sum(map(len, data))
    together = calibrated(tiny.make(), tmp_path / "12", rows=data, batch_size=12)
    assert together.tokens == alone.tokens
    assert_equal_factors(together, alone)
    grouped = calibrated(tiny.make(), tmp_path / "b", rows=data, batch_size=12, max_bytes=8 * 64 * 64 * 3)
    assert_equal_factors(together, grouped, 1e-6)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("memory", [4 << 30, 1])
def test_a_mixture_is_calibrated_on_the_tokens_of_the_text_however_few_an_expert_gets(tmp_path, targets, memory):
    model = CASE["Mixtral"].make()
    settings = HipLoraConfig(target_modules=targets, principal_rank=4, basis_sides="input")
    options = {"store": CalibrationStore(tmp_path), "max_bytes": memory}
    with pytest.warns(UserWarning, match="calibrated on 30 tokens, few"):
        found = hiplora.calibrate(model, settings, rows=rows(3, 10) % 64, **options)
    assert found.tokens == settings.calibration["tokens"] == 30


def test_the_output_head_is_measured_on_all_tokens(tiny, tmp_path):
    rows = [torch.arange(5, 5 + length) for length in (40, 60)]
    store = CalibrationStore(tmp_path)
    bases = input_bases(tiny.make(), ["lm_head", "model.layers.0.mlp.down_proj"], rows=rows, store=store)
    assert [basis.tokens for basis in bases.values()] == [100, 100]


def test_a_template_that_writes_the_date_begins_alike_every_day(tiny):
    tokenizer = tiny_tokenizer()
    today = "{{ date_string if date_string is defined else strftime_now('%S.%f') }}"
    tokenizer.chat_template = today + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    openings = [conversation_scripts(tiny.make(), tokenizer, 128)[0].opening for _ in range(2)]
    assert openings[0] == openings[1]


def test_the_model_is_left_as_it_was(tiny, tmp_path):
    model = tiny.make().train()
    model.get_submodule(Q).requires_grad_(False)
    state = torch.random.get_rng_state()
    with left_as_it_was(model):
        hiplora.calibrate(model, config(), store=CalibrationStore(tmp_path), tokens=300)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_adapters_are_off_while_the_base_is_measured(tiny, ids, tmp_path):
    adapted = tiny.trained(ids, init_weights=False)
    before = logits(adapted, ids)
    calibration = hiplora.calibrate(adapted.base_model.model, config(), rows=rows(), store=CalibrationStore(tmp_path))
    assert torch.equal(logits(adapted, ids), before)
    assert list(adapted.peft_config) == ["default"]
    assert adapted.peft_config["default"].basis == "weight"
    assert_equal_factors(calibration, calibrated(tiny.make(), tmp_path / "bare"), 1e-6)


def test_get_peft_model_calibrates_by_itself_once(tiny, ids, monkeypatch):
    sampled = watch(monkeypatch, sampling, "sample_rows")
    make = lambda: peft.get_peft_model(tiny_llama(seed=77), config(lora_dropout=0.0))  # noqa: E731
    one = make()
    times = len(sampled)
    two = make()
    assert len(sampled) == times >= 1
    recorded = one.peft_config["default"].calibration
    assert recorded["source"] == "self"
    assert recorded["tokens"] >= 10_000
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b)


def test_a_model_whose_pass_takes_token_ids_alone_is_found_to_be_causal(tiny):
    class Bare(LlamaForCausalLM):
        def forward(self, input_ids):
            return super().forward(input_ids)

    sampling.check_causal(Bare(tiny.make().config))


def test_sampled_rows_do_not_depend_on_what_is_sampled_with_them(tiny):
    model = tiny.make()
    whole = sample_rows(model, range(6), 30)
    assert torch.equal(torch.cat([sample_rows(model, range(i, i + 2), 30) for i in (0, 2, 4)]), whole)
    assert whole.shape == (6, 30)
    assert (whole[:, 0] == 256).all()
    assert (whole[:, 1:] < 256).all()
    assert not torch.equal(sample_rows(model, range(6), 30, seed=1), whole)


def test_sampling_follows_the_models_own_distribution(tiny):
    model = tiny.make()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    many = sample_rows(model, range(4000), 3)
    with torch.no_grad():
        expected = torch.zeros(256)
        for token in many[:, 1].unique():
            logit = model(input_ids=torch.tensor([[256, token]])).logits[0, -1, :256]
            expected += logit.softmax(-1) * (many[:, 1] == token).sum() / len(many)
    frequencies = torch.bincount(many[:, 2], minlength=256)[:256] / len(many)
    assert (frequencies - expected).abs().sum() < 0.25


@pytest.mark.parametrize(("template", "opening", "reply"), [(True, "[user]\n", "[assistant]\n"), (False, "Q", "\nA")])
def test_every_other_row_is_a_conversation_that_the_model_has_with_itself(tiny, tmp_path, template, opening, reply):
    model, tokenizer = tiny.make(), tiny_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[257] = 0.1 * model.lm_head.weight.sum(0)  # the end of a turn is drawn now and then
    if not template:
        tokenizer.chat_template = None
    store = CalibrationStore(tmp_path)
    rows = sampled_rows(model, 256 * 8, store=store, tokenizer=tokenizer)
    plain = sampled_rows(model, 256 * 8, store=store)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows[1::2]]
    assert all(text.startswith((opening, "### Instruction")) for text in texts)
    assert sum(reply in text or "### Response" in text for text in texts) >= 3
    assert all(torch.equal(a, b) for a, b in zip(rows[::2], plain[::2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows[1::2], plain[1::2], strict=True))
    scripts = sampling.conversation_scripts(model, tokenizer, 256)
    assert torch.equal(sample_rows(model, range(3, 5), 256, 0, scripts), torch.stack(rows[3:5]))


def test_a_layer_that_is_called_by_keyword_is_calibrated_and_adapted():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.lin(input=x)

    model, x = Block(), torch.randn(8, 16)
    chosen = config(basis_sides="input", target_modules=["lin"], init_weights=False)
    hiplora.calibrate(model, chosen, lambda: model(x))
    before = model(x)
    assert not torch.allclose(peft.get_peft_model(model, chosen)(x), before)


def test_a_model_in_a_folder_brings_its_own_tokenizer_and_sampling_is_announced_once(tiny_model_dir, tmp_path, caplog):
    caplog.set_level("INFO", logger="hiplora")
    model, tokenizer = load(str(tiny_model_dir))
    for _ in range(2):
        rows = sampled_rows(model, 512, store=CalibrationStore(tmp_path))
    assert sum("first run with this model" in message for message in caplog.messages) == 1
    assert tokenizer.decode(rows[1]).startswith("[user]\n")


def test_the_same_weights_under_other_settings_are_another_model_but_not_where_they_are_loaded_otherwise(
    tiny, tmp_path
):
    tiny.make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    model.config.use_cache = False
    assert model_fingerprint(model) == model_fingerprint(tiny.make())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    stretched = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope)
    store, names = CalibrationStore(tmp_path / "store"), ["model.layers.1.mlp.down_proj"]
    one, other = (input_bases(m, names, rows=rows(), store=store)[names[0]] for m in (tiny.make(), stretched))
    assert not torch.allclose(one.values, other.values, rtol=1e-3)


def test_an_interrupted_calibration_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    """Sampling stops in its second part; what the first one wrote is not sampled again."""
    calls = watch(monkeypatch, sampling, "sample_rows", fail_at=2)
    monkeypatch.setattr(sampling, "_SAMPLED_AT_ONCE", 2)

    def calibrate(folder):
        return hiplora.calibrate(tiny.make(), config(), store=CalibrationStore(folder), tokens=256 * 3)

    with pytest.raises(KeyboardInterrupt):
        calibrate(tmp_path)
    resumed = calibrate(tmp_path)
    assert [part.start for _, part, *_ in calls] == [0, 2, 2]
    assert_equal_factors(resumed, calibrate(tmp_path / "b"), 1e-6)


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({"basis": "weight"}, {}, "basis is 'weight', which needs no calibration"),
        ({}, {"rows": []}, "rows is empty"),
        ({}, {"rows": [[]]}, r"rows\[0\]"),
        ({}, {"rows": rows(), "run_model": print}, "both run_model and rows"),
        ({}, {"tokens": 1}, "tokens is 1"),
        ({}, {"rows": rows(), "batch_size": 0}, "batch_size is 0"),
        ({"target_modules": ["nothing"]}, {"rows": rows()}, "nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, changes, options, why):
    with pytest.raises(ConfigError, match=why):
        hiplora.calibrate(tiny.make(), config(**changes), **options)


def test_rows_longer_than_a_models_table_of_positions_are_refused():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(ConfigError, match=r"rows\[0\] has 40 tokens, and the model reads 16 at most"):
        hiplora.calibrate(model, config(target_modules=["c_attn"]), rows=rows())


def test_a_calibration_of_nothing_of_other_settings_or_of_another_model_is_refused(tiny, tmp_path):
    with pytest.warns(UserWarning, match="calibrated on 80 tokens, few for inputs 64 wide.*at least 128"):
        calibrated(tiny.make(), tmp_path, rows=rows(2))
    with pytest.raises(FactorError, match="no token reached it"):
        hiplora.calibrate(tiny.make(), config(), run_model=lambda: None)
    model, changed, store = tiny.make(), config(), CalibrationStore(tmp_path)
    hiplora.calibrate(model, changed, rows=rows(), store=store)
    changed.principal_rank = 5
    with pytest.raises(ConfigError, match="changed after hiplora"):
        peft.get_peft_model(model, changed)
    other = config()
    hiplora.calibrate(tiny_llama(seed=5), other, rows=rows(), store=store)
    with pytest.raises(ConfigError, match="not the one that was calibrated"):
        peft.get_peft_model(model, other)


def test_the_command_calibrates_what_recipes_adapt_and_one_side_without_gradients(tiny_model_dir, capsys, monkeypatch):
    options = ["--rank", "energy:0.5", "--tokens", "600", "--json"]
    record = json.loads(succeed(capsys, "calibrate", tiny_model_dir, *options))
    names = {layer["name"].rpartition(".")[2] for layer in record["layers"]}
    assert names == {"gate_proj", "up_proj", "down_proj"}
    assert all(layer["energy"] >= 0.5 or layer["k"] == 32 for layer in record["layers"])
    assert (record["source"], record["tokens"]) == ("self", 768)
    monkeypatch.setattr(moments.GradientCollector, "watching", lambda self: pytest.fail("measured gradients"))
    shown = succeed(capsys, "calibrate", tiny_model_dir, "--sides", "input", "--tokens", 300)
    assert "effective rank" in shown
    assert [shown.count(name) for name in ("q_proj", "gate_proj", "up_proj", "down_proj")] == [0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_folder_without_a_tokenizer_for_which_transformers_makes_one_up_has_none(tmp_path, kind):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / "base")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "base")) < 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    names = {"target_modules": ["c_fc"]} if kind == "gpt2" else {}
    adapted = peft.get_peft_model(model, HipLoraConfig(r=2, principal_rank=4, init_weights=False, **names))
    store = CalibrationStore(tmp_path / "cache")
    assert torch.stack(sampled_rows(adapted, 256, store=store)).max() < 64
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path / "base"))
    save_dense(adapted, tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*token*"))
