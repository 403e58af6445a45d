"""What PEFT saves of LoRA, AdaLoRA and OSF, as plain updates; an error for an adapter that does something else."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hiplora.adapters.base import BaseWeights
from hiplora.adapters.update import AdapterUpdate, Pair
from hiplora.errors import AdapterError
from hiplora.spectral import full_precision
from hiplora.tuner import for_module

# Settings under which a LoRA-like adapter does more than add `B'A'` to linear layers.
_NOT_PLAIN = (
    *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
)
# These initialisations subtract B₀A₀ from the base weights: the saved factors alone are no update of them.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Saved whole by PEFT where the vocabulary was resized.
_EMBEDDINGS = r"(^|\.)(embed_tokens|lm_head)\.weight$"
_ADALORA_RANK = 12  # init_r of peft.AdaLoraConfig
_ADALORA_SMALL = 1e-5  # what PEFT adds to the rank that it divides by

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT saves it: configuration as in JSON, tensors by name without PEFT's prefix.

    `source` is what messages call it; `model` carries it under the name `adapter`, if it is live.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str
    base: str
    model: nn.Module | None = None
    adapter: str = "default"

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the base weights, by module, where the adapter recorded them."""
        return dict(self.config.get("fingerprints") or {})

    def sort(self, pattern: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Sort the tensors into those of adapted modules, by module and part, and those of `modules_to_save`.

        `pattern` matches what follows the module's name and has the group `part`.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        extras: dict[str, Tensor] = {}
        whole = self.config.get("modules_to_save") or []
        for saved, tensor in self.tensors.items():
            # Where embeddings are trained whole, PEFT saves its wrappers' copies too, by their inner names.
            name = saved.replace(".modules_to_save.", ".")
            if ".original_module." in saved or (name != saved and name in self.tensors):
                continue
            owners = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
            if match := re.fullmatch(rf"(?P<module>.+)\.{pattern}", name):
                modules.setdefault(match["module"], {})[match["part"]] = tensor
            elif ".base_layer." in name:
                pass  # PEFT saves a copy of an adapted output head's frozen weight beside its factors
            elif re.search(_EMBEDDINGS, name) or any(owner.endswith(part) for owner in owners for part in whole):
                extras[name] = tensor  # matched as PEFT does
            else:
                raise self.error(
                    f"tensor {name} is neither a LoRA factor of a linear layer nor in modules_to_save "
                    f"({', '.join(whole) or 'none'}); adapters of embeddings or biases are not plain updates: merge "
                    "it with PEFT instead"
                )
        if not modules:
            raise self.error(f"no {self.config['peft_type']} tensors in it; nothing was adapted or saved")
        return dict(sorted(modules.items())), extras

    def setting(self, pattern: str, module: str, default: Any) -> Any:
        """Return what a PEFT pattern (`rank_pattern`, `alpha_pattern`, …) says for a module."""
        return for_module(self.config.get(pattern) or {}, module, default)

    def check_rank(self, module: str, found: int, expected: int | None = None) -> None:
        """Check a factor's rank against the configuration: with another rank its scaling would be wrong."""
        if expected is None:
            expected = self.setting("rank_pattern", module, self.config.get("r"))
        if found != expected:
            raise self.error(
                f"layer {module}: rank {found}, but the configuration says {expected}; the configuration and the "
                "weights are of different adapters"
            )

    def check_complete(self, module: str, parts: Parts, names: Iterable[str], written: str) -> None:
        """Check that a module has the named tensors, `written` (`"{}.weight"`) as they are in the file."""
        for name in names:
            if name not in parts:
                raise self.error(f"tensor {module}.{written.format(name)} is missing; the adapter was not saved whole")

    def check_shapes(self, fit: bool, module: str, parts: Parts) -> None:
        """Check that a module's tensors fit together."""
        if not fit:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
            raise self.error(f"layer {module}: {shapes} are not factors of a linear layer")

    def error(self, message: str) -> AdapterError:
        """Return an error that names the adapter."""
        return AdapterError(f"{self.source}: {message}")


def lora_like(kind: str, saved: Saved) -> AdapterUpdate:
    """Return a LoRA, AdaLoRA or OSF adapter as an update, its scaling baked into `B'`; AdapterError if it is more."""
    config = saved.config
    reasons = [key for key in _NOT_PLAIN if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append("bias")
    if reasons:
        raise saved.error(
            f"not a plain low-rank update: {', '.join(reasons)} is set. Merge it into the base model with PEFT "
            "(merge_and_unload), or train it as plain LoRA"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REBASING):
        raise saved.error(
            f"init_lora_weights={start!r} moves the base weights, so its saved factors are no update of them; "
            "save it with model.save_pretrained(path, path_initial_model_for_weight_conversion=…), which writes "
            "the difference as plain LoRA"
        )
    pattern, written, names, read = _FORMATS[kind]
    modules, extras = saved.sort(pattern)
    weights = BaseWeights(saved.base) if kind == "osf" and saved.model is None else None
    factors = {}
    for module, parts in modules.items():
        saved.check_complete(module, parts, names, written)
        tensors = [parts[name].float() for name in names]
        factors[module] = read(saved, module, parts, *tensors, *([weights] if kind == "osf" else []))
    return AdapterUpdate(saved.base, kind, dict(config), factors, saved.fingerprints, extras, source=saved.source)


def _lora(saved: Saved, module: str, parts: Parts, A: Tensor, B: Tensor) -> Pair:
    saved.check_shapes(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1], module, parts)
    r = A.shape[0]
    saved.check_rank(module, r)
    alpha = saved.setting("alpha_pattern", module, saved.config.get("lora_alpha", r))
    return A, (alpha / math.sqrt(r) if saved.config.get("use_rslora") else alpha / r) * B


def _adalora(saved: Saved, module: str, parts: Parts, A: Tensor, B: Tensor, E: Tensor) -> Pair:
    """Return `s · B diag(E) A` without the ranks that were pruned.

    PEFT scales by `lora_alpha / (init_r + 1e-5)`, whatever is left of the rank after pruning. A module that lost all
    of its rank gets a zero update of rank 1.
    """
    E = E.reshape(-1, 1)
    saved.check_shapes(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == len(E), module, parts)
    r, started = A.shape[0], saved.config.get("init_r", _ADALORA_RANK)
    kept = {n.partition(".lora_E")[0]: sum(on) for n, on in (saved.config.get("rank_pattern") or {}).items()}
    saved.check_rank(module, r, kept.get(module, started))
    if r == 0:
        return torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1)
    alpha = saved.config.get("lora_alpha") or 0
    return A * E, (alpha if alpha > 0 else r) / (started + _ADALORA_SMALL) * B


def _osf(
    saved: Saved, module: str, parts: Parts, U: Tensor, S: Tensor, V: Tensor, weights: BaseWeights | None
) -> Pair:
    """Return the trained part of a weight less the part that it replaces, of rank 2q.

    The adapter holds what the q smallest singular triplets of each weight became. What they were is in the live
    model's layers, or computed from the base weights on disk as PEFT computes it.
    """
    fit = U.dim() == V.dim() == 2 and U.shape[1] == len(V) == len(S) <= min(len(U), V.shape[1])
    saved.check_shapes(fit, module, parts)
    if weights is None:
        layer: Any = saved.model.get_submodule(f"base_model.model.{module}")  # type: ignore[union-attr]
        U0, S0, V0 = (getattr(layer, f"_osf_{part}_low_init")[saved.adapter].float().cpu() for part in "USV")
    else:
        U0, S0, V0 = torch.linalg.svd(weights.weight(module).float(), full_matrices=False)
        kept = len(S0) - len(S)
        U0, S0, V0 = U0[:, kept:], S0[kept:], V0[kept:]
    if U0.shape != U.shape or V0.shape != V.shape:
        raise saved.error(
            f"layer {module}: the adapter is for a weight ({len(U)}, {V.shape[1]}), and the base model's is "
            f"({len(U0)}, {V0.shape[1]}); pass the right one as base=… (--base)"
        )
    with full_precision(U.device):
        return torch.cat([V, V0]), torch.cat([U * S, -(U0 * S0)], dim=1)


# Kind → the pattern of its tensors after the module's name, how a part is written, the parts, and their reader.
_FORMATS: dict[str, tuple[str, str, tuple[str, ...], Callable[..., Pair]]] = {
    "lora": (r"(?P<part>lora_[AB])\.weight", "{}.weight", ("lora_A", "lora_B"), _lora),
    "adalora": (r"(?P<part>lora_[ABE])", "{}", ("lora_A", "lora_B", "lora_E"), _adalora),
    "osf": (r"osf_svd_params\.(?P<part>[USV]_low)", "osf_svd_params.{}", ("U_low", "S_low", "V_low"), _osf),
}
