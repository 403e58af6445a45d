"""How long calibrating a model takes from an empty cache, stage by stage, with the defaults of `hiplora.calibrate`.

    python benchmarks/calibrate.py [--model smollm2-135m] [--device cpu] [--json FILE]

`sampling`, `inputs` and `outputs` are the stages; `products` and `eigenvectors` are the parts of the last two that are
not the model's own forward and backward passes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import hiplora
from hiplora import HipLoraConfig
from hiplora.files import write_atomic
from hiplora.models import load
from hiplora.provenance import provenance
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    seconds = dict.fromkeys(STAGES, 0.0)
    for stage, (place, name) in STAGES.items():
        timed(seconds, stage, place, name)
    with tempfile.TemporaryDirectory() as empty:
        config = HipLoraConfig(task_type="CAUSAL_LM")
        found = hiplora.calibrate(
            model.to(args.device), config, store=CalibrationStore(Path(empty)), tokenizer=tokenizer
        )
    record = {
        "benchmark": "calibrate",
        "model": args.model,
        "device": args.device,
        "tokens": found.tokens,
        "layers": len(found.layers),
        "seconds": {"all": found.seconds, **seconds},
        "provenance": provenance(),
    }
    for stage, duration in record["seconds"].items():
        print(f"{stage:14}{duration:8.1f} s")
    if args.json:
        write_atomic(args.json, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
