"""What PEFT saves of LoRA, AdaLoRA and OSF, as plain updates; an error for an adapter that does something else."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from hiplora.adapters.base import BaseWeights
from hiplora.adapters.update import AdapterUpdate, Pair
from hiplora.errors import AdapterError
from hiplora.spectral import full_precision

# Settings under which a LoRA-like adapter does more than add `B'A'` to linear layers.
_NOT_PLAIN = (
    *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
)
# These initialisations subtract B₀A₀ from the base weights: the saved factors alone are no update of them.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ADALORA_RANK = 12  # init_r of peft.AdaLoraConfig
_ADALORA_SMALL = 1e-5  # what PEFT adds to the rank that it divides by

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT saves it: configuration as in JSON, tensors by name without PEFT's prefix.

    `source` is what messages call it, `base` the name of its base model; `model` is the live model that carries it
    under the name `adapter`, if there is one.
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
        for name, tensor in self.tensors.items():
            owners = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
            if match := re.fullmatch(rf"(?P<module>.+)\.{pattern}", name):
                modules.setdefault(match["module"], {})[match["part"]] = tensor
            elif ".base_layer." in name:
                pass  # PEFT saves a copy of an adapted output head's frozen weight beside its factors
            elif any(owner.endswith(part) for owner in owners for part in whole):  # as PEFT matches them
                extras[name] = tensor
            else:
                raise self.error(
                    f"tensor {name} is neither a LoRA factor of a linear layer nor in modules_to_save "
                    f"({', '.join(whole) or 'none'}); adapters of embeddings, biases or a resized vocabulary are not "
                    "plain updates: merge it with PEFT instead"
                )
        if not modules:
            raise self.error(f"no {self.config['peft_type']} tensors in it; nothing was adapted or saved")
        return dict(sorted(modules.items())), extras

    def setting(self, pattern: str, module: str, default: Any) -> Any:
        """Return what a PEFT pattern (`rank_pattern`, `alpha_pattern`, …) says for a module."""
        found = self.config.get(pattern) or {}
        return found.get(get_pattern_key(list(found), module), default)

    def check_rank(self, module: str, found: int, expected: int | None = None) -> None:
        """Check a factor's rank against the configuration: with another rank its scaling would be wrong."""
        if expected is None:
            expected = self.setting("rank_pattern", module, self.config.get("r"))
        if found != expected:
            raise self.error(
                f"layer {module}: rank {found}, but the configuration says {expected}; the configuration and the "
                "weights are of different adapters"
            )

    def check_complete(self, module: str, parts: Parts, names: Iterable[str], prefix: str = "", end: str = "") -> None:
        """Check that a module has the named tensors."""
        for name in names:
            if name not in parts:
                raise self.error(
                    f"tensor {module}.{prefix}{name}{end} is missing; the adapter was not saved completely"
                )

    def check_plain(self) -> None:
        """Raise AdapterError if the configuration makes it more than a sum of low-rank updates."""
        reasons = [key for key in _NOT_PLAIN if self.config.get(key)]
        if self.config.get("bias", "none") != "none":
            reasons.append("bias")
        if reasons:
            raise self.error(
                f"not a plain low-rank update: {', '.join(reasons)} is set. Merge it into the base model with PEFT "
                "(merge_and_unload), or train it as plain LoRA"
            )
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_REBASING):
            raise self.error(
                f"init_lora_weights={start!r} moves the base weights, so its saved factors are no update of them; "
                "save it with model.save_pretrained(path, path_initial_model_for_weight_conversion=…), which writes "
                "the difference as plain LoRA"
            )

    def check_factors(self, fit: bool, module: str, parts: Parts) -> None:
        """Check that a module's tensors fit together."""
        if not fit:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
            raise self.error(f"layer {module}: {shapes} are not factors of a linear layer")

    def error(self, message: str) -> AdapterError:
        """Return an error that names the adapter."""
        return AdapterError(f"{self.source}: {message}")


def lora_update(saved: Saved) -> AdapterUpdate:
    """Return a LoRA adapter as an update, its scaling baked into `B'`."""
    saved.check_plain()
    return _update(saved, "lora", r"(?P<part>lora_[AB])\.weight", _lora_pair)


def _update(saved: Saved, kind: str, pattern: str, read: Callable[[Saved, str, Parts], Pair]) -> AdapterUpdate:
    modules, extras = saved.sort(pattern)
    factors = {module: read(saved, module, parts) for module, parts in modules.items()}
    return AdapterUpdate(
        saved.base, kind, dict(saved.config), factors, saved.fingerprints, extras, source=saved.source
    )


def _lora_pair(saved: Saved, module: str, parts: Parts) -> Pair:
    saved.check_complete(module, parts, ["lora_A", "lora_B"], end=".weight")
    A, B = parts["lora_A"].float(), parts["lora_B"].float()
    saved.check_factors(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1], module, parts)
    r = A.shape[0]
    saved.check_rank(module, r)
    alpha = saved.setting("alpha_pattern", module, saved.config.get("lora_alpha", r))
    return A, (alpha / math.sqrt(r) if saved.config.get("use_rslora") else alpha / r) * B


def adalora_update(saved: Saved) -> AdapterUpdate:
    """Return an AdaLoRA adapter as an update `s · B diag(E) A`, without the ranks that were pruned.

    PEFT scales by `lora_alpha / (init_r + 1e-5)`, whatever is left of the rank after pruning. A module that lost all
    of its rank gets a zero update of rank 1.
    """
    saved.check_plain()
    return _update(saved, "adalora", r"(?P<part>lora_[ABE])", _adalora_pair)


def _adalora_pair(saved: Saved, module: str, parts: Parts) -> Pair:
    saved.check_complete(module, parts, ["lora_A", "lora_B", "lora_E"])
    A, B, E = (parts[f"lora_{part}"].float() for part in "ABE")
    E = E.reshape(-1, 1)
    saved.check_factors(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == len(E), module, parts)
    r, started = A.shape[0], saved.config.get("init_r", _ADALORA_RANK)
    kept = {n.partition(".lora_E")[0]: sum(on) for n, on in (saved.config.get("rank_pattern") or {}).items()}
    saved.check_rank(module, r, kept.get(module, started))
    if r == 0:
        return torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1)
    alpha = saved.config.get("lora_alpha") or 0
    return A * E, (alpha if alpha > 0 else r) / (started + _ADALORA_SMALL) * B


def osf_update(saved: Saved) -> AdapterUpdate:
    """Return an OSF adapter as an update of rank 2q: the trained part of each weight less the part that it replaces.

    The adapter holds what the q smallest singular triplets of each weight became. What they were is in the live
    model's layers, or computed from the base weights on disk as PEFT computes it.
    """
    weights = BaseWeights(saved.base) if saved.model is None else None
    pattern = r"osf_svd_params\.(?P<part>[USV]_low)"
    return _update(saved, "osf", pattern, partial(_osf_pair, weights))


def _osf_pair(weights: BaseWeights | None, saved: Saved, module: str, parts: Parts) -> Pair:
    saved.check_complete(module, parts, ["U_low", "S_low", "V_low"], "osf_svd_params.")
    U, S, V = (parts[f"{part}_low"].float() for part in "USV")
    fit = U.dim() == V.dim() == 2 and U.shape[1] == len(V) == len(S) <= min(len(U), V.shape[1])
    saved.check_factors(fit, module, parts)
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
