"""How long calibrating a model takes from an empty cache, stage by stage, with the defaults of `hiplora.calibrate`.

    python benchmarks/calibrate.py [--model smollm2-135m] [--device cpu] [--json FILE]

`sampling`, `inputs` and `outputs` are the stages; `products` and `eigenvectors` are the parts of the last two that are
not the model's own forward and backward passes.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import options, write

import hiplora
from hiplora import HipLoraConfig
from hiplora.models import load
from hiplora.spectral import SecondMoment
from hiplora.tuner import CalibrationStore, calibration

STAGES = {
    "sampling": (calibration, "sampled_rows"),
    "inputs": (calibration, "measure_inputs"),
    "outputs": (calibration, "measure_outputs"),
    "products": (SecondMoment, "add"),
    "eigenvectors": (SecondMoment, "_eigen"),
}


def timed(seconds: dict[str, float], stage: str, place: Any, name: str) -> None:
    """Have a function add up the time it takes."""
    function = getattr(place, name)

    def replaced(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[stage] += time.perf_counter() - began

    setattr(place, name, replaced)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    seconds = dict.fromkeys(STAGES, 0.0)
    for stage, (place, name) in STAGES.items():
        timed(seconds, stage, place, name)
    with tempfile.TemporaryDirectory() as empty:
        config = HipLoraConfig(task_type="CAUSAL_LM")
        store = CalibrationStore(Path(empty))
        found = hiplora.calibrate(model.to(args.device), config, store=store, tokenizer=tokenizer)
    record = {
        "benchmark": "calibrate",
        "model": args.model,
        "device": args.device,
        "tokens": found.tokens,
        "layers": len(found.layers),
        "seconds": {"all": found.seconds, **seconds},
    }
    for stage, duration in record["seconds"].items():
        print(f"{stage:14}{duration:8.1f} s")
    write(args.json, record)


if __name__ == "__main__":
    main()
