"""Every operation on every architecture, on tiny random models; docs/models.md is made of what this finds."""

import copy
import re

import peft
import pytest
import torch
import transformers

import hiplora
from hiplora import HipLoraConfig
from hiplora.adapters import save_dense
from hiplora.errors import ConfigError
from hiplora.tuner import find_targets, hip_layers, sampled_rows
from tests.models.zoo import CASES, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore")


def config(case, preset="paper", **changes):
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "principal_rank": 4, "task_type": case.task}
    return HipLoraConfig(preset=preset, **{**settings, **changes})


def calibrated(case, model, **changes):
    made = config(case, "function-aware", **changes)
    hiplora.calibrate(model, made, lambda: model(**case.batch(model)))
    return made


@torch.no_grad()
def logits(model, case, **options):
    return model(**case.batch(model), **options).logits.float()


def trained(model, case, steps=2):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**case.batch(model)).loss.backward()
        optimizer.step()
    return model.eval()


def assert_same(found, expected, tolerance=1e-4):
    off = (found - expected).abs().max() / expected.abs().max()
    assert off < tolerance, f"off by {off:.1e} of the largest logit"


# Of the same kinds of blocks as another case.
ALIKE = {"Qwen2", "OLMo 2", "StableLM", "StarCoder2", "GPT-BigCode", "Gemma 2", "Qwen3-MoE", "RoBERTa", "LLaVA"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.slow] if case.name in ALIKE else []) for case in CASES],
    ids=[re.sub(r"\W+", "-", case.name) for case in CASES],
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def base(case):
    """The logits of the base model."""
    return logits(case.make(), case)


@pytest.fixture(scope="module")
def adapted(case, base):
    """A model with an adapter in the weight basis, on attention or experts, after two steps; a test leaves it so."""
    made = config(case, "function-aware" if case.has_experts else "paper", basis="weight", principal_channel=True)
    return trained(peft.get_peft_model(case.make(), made), case)


def test_attach(case, base):
    """The preset's layers are found, and a new adapter changes nothing."""
    for preset in ("function-aware", "paper"):
        model = case.make()
        made = config(case, preset, basis="weight")
        names = [target.name for target in find_targets(model, made)]
        assert names
        assert not any(re.search(r"lm_head|embed|router|vision|\.gate$", name) for name in names if case.name != "ViT")
        attached = peft.get_peft_model(model, made)
        assert [name for name, _ in hip_layers(attached)] == names
        assert_same(logits(attached, case), base, 1e-6)


def test_train(case, base, adapted):
    assert not torch.allclose(logits(adapted, case), base, atol=1e-5)
    assert hiplora.max_leak(adapted) < 1e-5


def test_activation_basis(case, base, tmp_path):
    """Calibrated on data of the user's, trained, saved and loaded again."""
    model = case.make()
    attached = peft.get_peft_model(model, calibrated(case, model))
    assert_same(logits(attached, case), base, 1e-6)
    expected = logits(trained(attached, case), case)
    assert hiplora.max_leak(attached) < 1e-5
    attached.save_pretrained(tmp_path)
    assert_same(logits(peft.PeftModel.from_pretrained(case.make(), tmp_path), case), expected)


def test_self_calibration(case):
    """Text is sampled from the model, or one error says what to pass."""
    model = case.make()
    if case.writes:
        rows = torch.stack(sampled_rows(model, 40))
        assert rows.shape[1] >= 40
        assert 0 <= rows.min() <= rows.max() < VOCABULARY
    else:
        with pytest.raises(ConfigError, match="run_model="):
            sampled_rows(model, 40)


def test_save_and_load(case, base, adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    for saving_memory in (False, True):
        model = peft.PeftModel.from_pretrained(case.make(), tmp_path, low_cpu_mem_usage=saving_memory)
        assert_same(logits(model, case), logits(adapted, case))
    if case.task != "SEQ_CLS":  # PEFT leaves a trained head in the model
        assert_same(logits(model.unload(), case), base, 1e-6)


def test_disable(case, base, adapted):
    with adapted.disable_adapter():
        assert_same(logits(adapted, case), base, 1e-6)


def test_merge_and_unmerge(case, adapted):
    before = logits(adapted, case)
    adapted.merge_adapter()
    try:
        assert_same(logits(adapted, case), before)
    finally:
        adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, case), before)


def test_merge_and_unload(case, adapted):
    expected = logits(adapted, case)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert_same(logits(merged, case), expected)
    names = [{name for name, _ in one.named_parameters(remove_duplicate=False)} for one in (merged, case.make())]
    assert names[0] == names[1]


def test_mixed_batch(case, base, adapted):
    names = ["default", "__base__"]
    if case.has_experts:
        with pytest.raises(ValueError, match="expert"):
            logits(adapted, case, adapter_names=names)
        return
    mixed, alone = logits(adapted, case, adapter_names=names), logits(adapted, case)
    assert_same(mixed[0], alone[0])
    assert_same(mixed[1], base[1])


def test_copy(case, adapted):
    """A copy computes the same, and is trained inside the complement."""
    twin = copy.deepcopy(adapted)
    assert torch.equal(logits(twin, case), logits(adapted, case))
    trained(twin, case)
    assert not torch.equal(logits(twin, case), logits(adapted, case))
    assert hiplora.max_leak(twin) < 1e-5


def test_half_precision(case, tmp_path):
    """A new adapter over a bf16 base is saved and merged, and a trained one too."""
    attached = peft.get_peft_model(case.make(torch.bfloat16), config(case))
    attached.save_pretrained(tmp_path / "new")
    trained(attached, case, 1).save_pretrained(tmp_path / "trained")
    attached.merge_adapter()


def test_export(case, adapted, tmp_path):
    """Of the model and of its folder: as plain LoRA and dense, others compute the same."""
    case.make().save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    folder = {"model_or_dir": tmp_path / "adapter", "base": str(tmp_path / "base")}
    for number, source in enumerate(({"model_or_dir": adapted}, folder)):
        out = tmp_path / f"lora{number}"
        hiplora.export.save_as_lora(**source, path=out)
        lora = peft.PeftModel.from_pretrained(case.make(), out)
        assert_same(logits(lora, case), logits(adapted, case), 1e-3)
    save_dense(**folder, path=tmp_path / "dense")
    dense = getattr(transformers, case.auto).from_pretrained(tmp_path / "dense").eval()
    assert_same(logits(dense, case), logits(adapted, case), 1e-3)
