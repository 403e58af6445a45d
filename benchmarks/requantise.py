"""How large the rounding is against the update when an adapter is merged into a quantised base.

    PYTHONPATH=build/quantised python benchmarks/requantise.py MODEL ADAPTER [--json FILE]

`make quantised` installs the quantisers. Each adapted weight W of MODEL is quantised to Q(W); the adapter's update ΔW
is added, and the sum quantised again. The ratio is `‖Q(Q(W) + ΔW) − (Q(W) + ΔW)‖ / ‖ΔW‖`, a median over the modules.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from side_by_side import options, write
from torch import Tensor, nn

from hiplora.adapters import read_update
from hiplora.models import load


def bits_4(linear: nn.Linear) -> Any:
    """Quantise as QLoRA does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def bits_8(linear: nn.Linear) -> Any:
    """Quantise as bitsandbytes' LLM.int8() does."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    layer = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    return layer


def hqq_4(linear: nn.Linear) -> Any:
    """Quantise as HQQ does, in groups of 64."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)


KINDS: dict[str, Callable[[nn.Linear], Any]] = {"4 bits, NF4": bits_4, "4 bits, HQQ": hqq_4, "8 bits": bits_8}


def read(layer: Any) -> Tensor:
    """Return a quantised layer's weight in fp32."""
    return resolve_quantization_backend(layer).get_base_weight(layer).float()


@torch.no_grad()
def main() -> None:
    parser = options(__doc__)
    parser.add_argument("model")
    parser.add_argument("adapter")
    arguments = parser.parse_args()
    update, (model, _) = read_update(arguments.adapter), load(arguments.model)
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for name in update.modules:
        weight, delta = model.get_submodule(name).weight, update.delta(name)
        for kind, quantise in KINDS.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            linear.weight.data = merged = read(quantise(linear)) + delta
            rounding = read(quantise(linear)) - merged
            ratios[kind].append((rounding.norm() / delta.norm()).item())
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    for kind, median in medians.items():
        print(f"{kind}: the rounding is {median:.2g} times as large as the update")
    write(arguments.json, {"benchmark": "requantise", "modules": len(update.modules), "ratios": medians})


if __name__ == "__main__":
    main()
