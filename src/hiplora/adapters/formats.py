"""Read what PEFT saves of HiP-LoRA, LoRA, AdaLoRA and OSF as plain updates; refuse adapters that do more."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from hiplora.adapters.base import BaseWeights, in_precision
from hiplora.adapters.update import AdapterUpdate, Channels, Pair
from hiplora.errors import AdapterError
from hiplora.spectral import FactorStore, full_precision, protected, retract, soften
from hiplora.tuner import for_module, leak_limit
from hiplora.tuner.experts import stacks

# Settings under which a LoRA-like adapter does more than add `B'A'` to linear layers.
_NOT_PLAIN = (
    *("lora_bias", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication"),
)
# These initialisations subtract B₀A₀ from the base weights: the saved factors alone are no update of them.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Saved whole by PEFT where the vocabulary was resized.
_EMBEDDINGS = r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|shared)\.weight$"
_ADALORA_SMALL = 1e-5  # what PEFT adds to the rank that it divides by

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT saves it: configuration as in JSON, tensors by name without PEFT's prefix, name in messages.

    Of a live model, `tensors` also has what a layer holds but does not save: U, σ and V, or OSF's initial triplets.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    source: str
    base: str

    @cached_property
    def weights(self) -> BaseWeights:
        """The base model's weights."""
        return BaseWeights(self.base, self.config.get("task_type"), self.fingerprints)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the base weights, by module, where the adapter recorded them."""
        return dict(self.config.get("fingerprints") or {})

    def sort(self, prefix: str, part: str) -> tuple[dict[str, Parts], Parts]:
        """Sort the tensors into those of adapted modules, by module and part, and those of `modules_to_save`."""
        modules: dict[str, Parts] = {}
        extras: Parts = {}
        saved_whole = self.config.get("modules_to_save") or []
        for saved, tensor in self.tensors.items():
            # Where embeddings are trained whole, PEFT saves its wrappers' copies too, by their inner names.
            name = saved.replace(".modules_to_save.", ".")
            if ".original_module." in saved or (name != saved and name in self.tensors):
                continue
            owners = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
            if match := re.fullmatch(rf"(.+)\.{re.escape(prefix)}({part})(\.weight)?", name):
                modules.setdefault(match[1], {})[match[2]] = tensor
            elif ".base_layer." in name:
                pass  # PEFT saves a copy of an adapted output head's frozen weight beside its factors
            elif re.search(_EMBEDDINGS, name) or any(
                owner.endswith(module) for owner in owners for module in saved_whole
            ):
                extras[name] = tensor  # matched as PEFT does
            else:
                raise self.error(
                    f"tensor {name} is neither a LoRA factor of a linear layer nor in modules_to_save "
                    f"({', '.join(saved_whole) or 'none'}); adapters of embeddings or biases are not plain updates: "
                    "merge it with PEFT instead"
                )
        if not modules:
            raise self.error(f"no {self.config['peft_type']} tensors in it; nothing was adapted or saved")
        return modules, extras

    def value(self, name: str) -> Any:
        """Return a setting of the configuration, or PEFT's default for it."""
        return self.config.get(
            name, PEFT_TYPE_TO_CONFIG_MAPPING[self.config["peft_type"]].__dataclass_fields__[name].default
        )

    def setting(self, pattern: str, module: str, default: Any) -> Any:
        """Return what a PEFT pattern (`rank_pattern`, `alpha_pattern`, …) says for a module."""
        return for_module(self.config.get(pattern) or {}, module, default)

    def check_rank(self, module: str, rank: int, expected: int) -> None:
        """Check a factor's rank against the configuration: with another rank its scaling would be wrong."""
        if rank != expected:
            raise self.error(
                f"layer {module}: rank {rank}, but the configuration says {expected}; the configuration and the "
                "weights are of different adapters"
            )

    def check_shapes(self, fit: bool, module: str, parts: Parts) -> None:
        """Check that a module's tensors fit together."""
        if not fit:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
            raise self.error(f"layer {module}: {shapes} are not factors of a linear layer")

    def error(self, message: str) -> AdapterError:
        """Return an error that names the adapter."""
        return AdapterError(f"{self.source}: {message}")


def is_low_rank(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter's tensors are the factors of its update; of other methods PEFT's merge gives it."""
    return config["peft_type"] in FORMATS and not config.get("use_dora")


def update_of(saved: Saved) -> AdapterUpdate:
    """Return an adapter as an update, its scaling baked into `B'`; AdapterError if it is not a plain one or damaged."""
    config, kind = saved.config, saved.config["peft_type"]
    prefix, part, required, read = FORMATS[kind]
    if kind == "HIPLORA":
        has_gains, has_factors = config.get("principal_channel", True), config.get("save_factors", True)
        required = (*required, *(["delta"] if has_gains else []), *(["U", "sigma", "V"] if has_factors else []))
    else:
        _check_plain(saved)
    modules, extras = saved.sort(prefix, part)
    factors, channels = _of_parameters(saved, modules) if kind == "LORA" else {}, {}
    for module in sorted({*modules, *saved.fingerprints}):
        parts = modules.get(module, {})
        if missing := [name for name in required if name not in parts]:
            raise saved.error(f"tensor {module}.{prefix}{missing[0]} is missing; the adapter was not saved whole")
        update = read(saved, module, parts)
        if isinstance(update, Channels):
            channels[module] = update
        factors[module] = update.factors() if isinstance(update, Channels) else update
    return AdapterUpdate(
        saved.base, kind.lower(), dict(config), factors, saved.fingerprints, extras, channels, saved.source
    )


def _check_plain(saved: Saved) -> None:
    reasons = [key for key in _NOT_PLAIN if saved.config.get(key)]
    if saved.config.get("bias", "none") != "none":
        reasons.append("bias")
    if reasons:
        raise saved.error(
            f"not a plain low-rank update: {', '.join(reasons)} is set. Merge it into the base model with PEFT "
            "(merge_and_unload), or train it as plain LoRA"
        )
    initialisation = saved.config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(_REBASING):
        raise saved.error(
            f"init_lora_weights={initialisation!r} moves the base weights, so its saved factors are no update of them; "
            "save it with model.save_pretrained(path, path_initial_model_for_weight_conversion=…), which writes "
            "the difference as plain LoRA"
        )


def _lora(saved: Saved, module: str, parts: Parts) -> Pair:
    A, B = parts["A"].float(), parts["B"].float()
    saved.check_shapes(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1], module, parts)
    r = A.shape[0]
    saved.check_rank(module, r, saved.setting("rank_pattern", module, saved.value("r")))
    alpha = saved.setting("alpha_pattern", module, saved.value("lora_alpha"))
    return A, (alpha / math.sqrt(r) if saved.config.get("use_rslora") else alpha / r) * B


def _of_parameters(saved: Saved, modules: dict[str, Parts]) -> dict[str, Pair]:
    """Take LoRA's factors of `target_parameters` out of `modules`: of a module's weight, of each expert by its name.

    PEFT names them after the module that has the parameters, and wraps the one that comes last around the other. The
    factors of all E experts are one pair: A (E·r, n), expert by expert, and B (m, r·E), with the experts innermost.
    PEFT's patterns match the parameter's name, not the module's.
    """
    targets = saved.config.get("target_parameters") or ()
    factors: dict[str, Pair] = {}

    def take(prefix: str, name: str) -> tuple[Parts, int]:
        parts = modules.pop(prefix)
        saved.check_shapes(all(part in parts and parts[part].dim() == 2 for part in "AB"), name, parts)
        return parts, saved.setting("rank_pattern", name, saved.value("r"))

    for module in sorted({name.partition(".base_layer")[0] for name in modules} if targets else ()):
        candidates = (f"{module}.{target.rpartition('.')[2]}" for target in targets)
        names = {name for name in candidates if any(f".{name}".endswith(f".{target}") for target in targets)}
        if _is_layer(saved.config.get("target_modules") or (), module):
            continue
        if (weight := f"{module}.weight") in names:
            parts, r = take(module, weight)
            if len(parts["A"]) != r and len(parts["A"]) % r == 0:
                raise saved.error(
                    f"layer {module}: has experts of a kind that is not read; merge it with PEFT instead"
                )
            factors[module] = _lora(saved, weight, parts)
            continue
        parameters = {name: prefix for name, (prefix, _) in stacks(f"{name}.0" for name in names).items()}
        prefixes = {name for name in modules if name.partition(".base_layer")[0] == module}
        if not names or {*parameters.values()} != prefixes:
            raise saved.error(
                f"layer {module}: its tensors are not those of experts that target_parameters names; the configuration "
                "and the weights are of different adapters, or of experts of another kind: merge it with PEFT instead"
            )
        for name, prefix in parameters.items():
            parts, r = take(prefix, name)
            saved.check_shapes(r > 0 and len(parts["A"]) % r == 0, name, parts)
            A, experts = parts["A"].split(r), len(parts["A"]) // r
            saved.check_shapes(parts["B"].shape[1] == experts * r, name, parts)
            B = parts["B"].unflatten(1, (r, experts)).unbind(2)
            pairs = ({"A": A[expert], "B": B[expert]} for expert in range(experts))
            factors |= {f"{name}.{expert}": _lora(saved, name, pair) for expert, pair in enumerate(pairs)}
    return factors


def _is_layer(targets: str | Sequence[str], module: str) -> bool:
    """Return whether `target_modules` select a module."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return f".{module}".endswith(tuple(f".{target}" for target in targets))


def _adalora(saved: Saved, module: str, parts: Parts) -> Pair:
    """Return `s · B diag(E) A` without the ranks that were pruned; a zero update where none is left.

    PEFT scales by `lora_alpha / (init_r + 1e-5)`, whatever is left of the rank.
    """
    A, B, E = parts["A"].float(), parts["B"].float(), parts["E"].float().reshape(-1, 1)
    saved.check_shapes(A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == len(E), module, parts)
    r, init_r = A.shape[0], saved.value("init_r")
    masks = saved.config.get("rank_pattern") or {}
    ranks = {name.partition(".lora_E")[0]: sum(mask) for name, mask in masks.items()}
    saved.check_rank(module, r, ranks.get(module, init_r))
    if r == 0:
        return torch.zeros(1, A.shape[1]), torch.zeros(B.shape[0], 1)
    alpha = saved.value("lora_alpha") or 0
    return A * E, (alpha if alpha > 0 else r) / (init_r + _ADALORA_SMALL) * B


def _osf(saved: Saved, module: str, parts: Parts) -> Pair:
    """Return the change of the q smallest singular triplets of a weight, of rank 2q.

    The initial triplets are in a live model's layers, or computed from the base weights on disk as PEFT computes them.
    """
    U, S, V = (parts[f"{name}_low"].float() for name in "USV")
    fit = U.dim() == V.dim() == 2 and U.shape[1] == len(V) == len(S) <= min(len(U), V.shape[1])
    saved.check_shapes(fit, module, parts)
    if "U_low_init" in parts:
        U0, S0, V0 = (parts[f"{name}_low_init"].float() for name in "USV")
    else:
        U0, S0, V0 = torch.linalg.svd(saved.weights.weight(module).float(), full_matrices=False)
        frozen = len(S0) - len(S)
        U0, S0, V0 = U0[:, frozen:], S0[frozen:], V0[frozen:]
    if U0.shape != U.shape or V0.shape != V.shape:
        raise saved.error(
            f"layer {module}: the adapter is for a weight ({len(U)}, {V.shape[1]}), and the base model's is "
            f"({len(U0)}, {V0.shape[1]}); pass the right one as base=… (--base)"
        )
    with full_precision(U.device):
        return torch.cat([V, V0]), torch.cat([U * S, -(U0 * S0)], dim=1)


def _hiplora(saved: Saved, module: str, tensors: Parts) -> Channels:
    config, parts = saved.config, {part: tensor.float() for part, tensor in tensors.items()}
    k = saved.setting("principal_rank_pattern", module, config.get("principal_rank"))
    if not isinstance(k, int):
        k = (config.get("principal_ranks") or {}).get(module)
    if recomputed := "U" not in parts:
        parts |= _factors(saved, module, k)
    A, B = parts["A"], parts["B"]
    (r, n), m = A.shape if A.dim() == 2 else (0, 0), B.shape[0] if B.dim() == 2 else 0
    expected = {"A": (r, n), "B": (m, r), "delta": (k,), "U": (m, k), "sigma": (k,), "V": (n, k)}
    for part, tensor in parts.items():
        if tensor.shape != (shape := expected.get(part, (k, k))):  # shrink_U and shrink_V
            raise saved.error(
                f"tensor {module}.hiplora_{part} is {tuple(tensor.shape)}, expected {shape}; the configuration and "
                "the weights are of different adapters"
            )
    saved.check_rank(module, r, saved.setting("rank_pattern", module, saved.value("r")))
    U, V, sides = parts["U"], parts["V"], config.get("basis_sides", "both")
    projected = config.get("residual_projection", True)
    if recomputed and projected:  # as the layer does: recomputed factors may differ by rounding
        A, B = retract(A, B, *protected(U, V, sides))
    if config.get("projection", "hard") == "soft":
        projected = False
        A, B = soften(A, B, U, V, parts.get("shrink_U"), parts.get("shrink_V"))
    alpha = saved.setting("alpha_pattern", module, saved.value("lora_alpha"))
    limit = leak_limit(tensors["A"].dtype) if projected else None
    delta = parts["delta"] if config.get("principal_channel", True) else None
    return Channels(A, B, U, parts["sigma"], V, delta, alpha / r, limit, sides)


def _factors(saved: Saved, module: str, k: int) -> Parts:
    """Return U, σ and V of the base weight as the adapter had it, through the cache."""
    config: Any = saved.config
    weight = in_precision(saved.weights.weight(module), saved.fingerprints.get(module, ""))
    if weight is None:
        raise saved.error(
            f"layer {module}: the weight in {saved.base} is not the one this adapter was made for; saved "
            "without its factors, the adapter needs the very same values: pass the right one as base=… (--base)"
        )
    factors = FactorStore().get_or_compute(weight, k, float(config.get("svd_tolerance", 1e-4)), name=module)
    return {"U": factors.U, "sigma": factors.sigma, "V": factors.V}


# PEFT's type → prefix of a part in a tensor's name, pattern of the parts, parts that every module has, reader.
FORMATS: dict[str, tuple[str, str, tuple[str, ...], Callable[..., Pair | Channels]]] = {
    "LORA": ("lora_", "[AB]", ("A", "B"), _lora),
    "ADALORA": ("lora_", "[ABE]", ("A", "B", "E"), _adalora),
    "OSF": ("osf_svd_params.", "[USV]_low(?:_init)?", ("U_low", "S_low", "V_low"), _osf),
    "HIPLORA": ("hiplora_", "A|B|delta|U|sigma|V|shrink_U|shrink_V", ("A", "B"), _hiplora),
}
