"""The tuner on a CUDA device; skipped where there is none."""

import pytest
import torch

import hiplora
from hiplora import HipLoraConfig
from hiplora.tuner import CalibrationStore
from tests.contract.conftest import Base, logits, train
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def adapted(**changes):
    return Base("untied").adapted(**changes).to("cuda")


@pytest.fixture
def cuda_ids():
    return torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(3)).to("cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adapter_moves_to_the_device_trains_and_stays_in_the_complement(cuda_ids, dropout):
    model = adapted(lora_dropout=dropout)
    losses = train(model, cuda_ids, steps=5)
    assert losses[-1] < losses[0]
    assert hiplora.max_leak(model) < 1e-6


def test_retraction_does_not_follow_a_trainers_tf32(cuda_ids):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        model = adapted()
        train(model, cuda_ids, steps=3)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert hiplora.max_leak(model) < 1e-5


def test_bf16_bases_and_autocast_train(cuda_ids):
    model = Base("untied").adapted().to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = train(model, cuda_ids, steps=5)
    assert losses[-1] < losses[0]


def test_the_device_agrees_with_the_cpu(cuda_ids):
    torch.manual_seed(0)
    model = Base("untied").adapted(init_weights=False)
    expected = logits(model, cuda_ids.cpu())
    found = logits(model.to("cuda"), cuda_ids).cpu()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_calibration_on_the_gpu_finds_what_one_on_the_cpu_finds(tmp_path):
    rows = torch.randint(0, 256, (12, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        config = HipLoraConfig(r=4, principal_rank=8, basis="activation")
        store = CalibrationStore(tmp_path / device)
        found.append(hiplora.calibrate(tiny_llama().to(device), config, rows=rows, store=store).factors)
    for name, one in found[0].items():
        other = found[1][name]
        for a, b in ((one.V, other.V.cpu()), (one.U, other.U.cpu())):
            torch.testing.assert_close(a @ a.T, b @ b.T, rtol=0, atol=1e-3, msg=name)
