import pytest
import torch

from hiplora.spectral import full_precision


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_the_callers_precision_comes_back_even_after_an_error(chosen):
    def work():
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    torch.set_float32_matmul_precision(chosen)
    try:
        with pytest.raises(ZeroDivisionError):
            work()
        assert torch.get_float32_matmul_precision() == chosen
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_inside_autocast_stay_in_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        with full_precision(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
