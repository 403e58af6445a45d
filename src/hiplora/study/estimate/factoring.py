"""Operations of decompositions and of calibrating: what a method costs before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hiplora.errors import ConfigError, first_problem
from hiplora.models.shapes import FACTORED, ModelShape
from hiplora.spectral.krylov import MAX_BLOCKS, block_size
from hiplora.study.estimate.load import Load
from hiplora.training.methods import METHODS, AnyMethod
from hiplora.tuner import ROW_LENGTH

EIGH = (
    9.0  # n³: reduction to tridiagonal form, divide and conquer, back-transformation (Golub & Van Loan, 8.3)
)
DENSE_SVD = (14.0, 8.0)  # m n s, s³: both sides of singular vectors (Golub & Van Loan, 8.6)
PRODUCTS = 14  # blocks until a weight of a trained model meets the default tolerance
EXACT_SIZE, EXACT_SIZE_PER_RANK = (
    640,
    14,
)  # of the smaller side: up to here `truncated_svd` decomposes exactly
GRADIENT_TOKENS = 4096  # on which a calibration measures the output side
SAMPLED_AT_ONCE = 40


_METHOD: TypeAdapter[Any] = TypeAdapter(AnyMethod)  # costly to make


def full_settings(method_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's method with every default filled in.

    Raises:
        ConfigError: it is no method of a recipe.
    """
    try:
        method = _METHOD.validate_python({"name": "hiplora", **method_settings})
    except ValidationError as error:
        raise ConfigError(f"method {dict(method_settings)}: {first_problem(error)}") from error
    return method.model_dump()


def svd_load(shape: ModelShape, method_settings: Mapping[str, Any]) -> float:
    """Return the operations of a method's decompositions on every layer that it adapts.

    PiSSA, OSF, MiLoRA and CorDA decompose each weight in full, CorDA after a covariance and its inverse; LoRA-Null the
    moment of each input, and a thin product; the weight basis takes the leading directions, of small weights through
    their Gram matrix, of large ones by block iteration; the activation basis sums up the second moments of inputs and
    outputs and decomposes those. The others have none. The model's own passes are `calibration_load`'s.

    Raises:
        ConfigError: the settings are not a recipe's method, or do not fit the model.
    """
    settings = full_settings(method_settings)
    if settings["name"] == "osf":
        return sum(_full(m, n) for m, n in shape.targets(settings).values())
    if METHODS[settings["name"]].moves_base:
        return _starting(shape, settings)
    if settings["name"] not in FACTORED:
        return 0.0
    ranks = shape.principal_ranks(settings)
    if settings["basis"] == "activation":
        return _moments(shape, settings, ranks)
    return sum(truncated_flops(*shape.modules[name], k) for name, k in ranks.items())


def calibration_load(shape: ModelShape, method_settings: Mapping[str, Any]) -> Load:
    """Return all that a method does before its first step: sampling text, running the model over it, decomposing.

    Raises:
        ConfigError: as `svd_load`.
    """
    settings = full_settings(method_settings)
    svd = svd_load(shape, settings)
    if "calibration_tokens" not in settings or settings.get("basis") == "weight":
        return Load(svd_flops=svd)
    tokens = settings["calibration_tokens"]
    outputs = settings.get("basis_sides", "input") != "input"
    gradients = min(tokens, GRADIENT_TOKENS) if outputs else 0
    return Load(
        train_tokens=gradients,
        forward_tokens=tokens,
        generated_tokens=tokens if settings["calibration_text"] is None else 0,
        logit_positions=gradients,
        svd_flops=svd,
        batch_tokens=(4 if outputs else 8) * ROW_LENGTH,
        train=outputs,
        sequence_length=ROW_LENGTH,
        decode_batch=SAMPLED_AT_ONCE,
        factor_scalars=shape.factor_scalars(settings),
        adapter_elements=0,
    )


def _full(m: int, n: int) -> float:
    small = min(m, n)
    return DENSE_SVD[0] * m * n * small + DENSE_SVD[1] * small**3


def truncated_flops(m: int, n: int, k: int) -> float:
    """Operations of `truncated_svd` with its certificate, 4 m n k."""
    small, certificate = min(m, n), 4.0 * m * n * k
    if small <= max(EXACT_SIZE, EXACT_SIZE_PER_RANK * k, MAX_BLOCKS * block_size(k)):
        return 2.0 * m * n * small + EIGH * small**3 + 2.0 * m * n * k + certificate
    block = block_size(k)
    products = 4.0 * m * n * block * PRODUCTS
    orthogonalising = 8.0 * (m + n) * block * (4 * block) * PRODUCTS  # against four blocks, twice, on average
    return products + orthogonalising + certificate


def _starting(shape: ModelShape, settings: Mapping[str, Any]) -> float:
    """Operations of the starts of the methods that move the base weights."""
    targets, tokens = shape.targets(settings), settings.get("calibration_tokens", 0)
    if settings["name"] == "lora_null":
        r = settings["r"]
        thin = sum(2.0 * m * n * r + 2.0 * n * r**2 + _full(m, r) for m, n in targets.values())
        return thin + sum(tokens * n**2 + EIGH * n**3 for _, n in _inputs(targets))
    total = sum(_full(m, n) for m, n in targets.values())
    if (
        settings["name"] == "corda"
    ):  # the covariance, its inverse and the check of it, W C, Vᵀ C⁻¹; nothing is shared
        total += sum(2.0 * (tokens + 2.0 * n + m + min(m, n)) * n**2 for m, n in targets.values())
    return total


def _inputs(targets: Mapping[str, tuple[int, int]]) -> set[tuple[str, int]]:
    """Name the inputs of some layers; those of one block and one width mostly share theirs: q, k, v; gate, up."""
    return {(name.rpartition(".")[0], n) for name, (_, n) in targets.items()}


def _moments(shape: ModelShape, settings: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    total = 0.0  # moments are symmetric: n² operations a token
    for name, k in ranks.items():
        m, n = shape.modules[name]
        total += 2.0 * k * m * n + 4.0 * m * n * k
        if settings["basis_sides"] != "input":
            total += min(settings["calibration_tokens"], GRADIENT_TOKENS) * m**2 + EIGH / 2 * m**3
    return total + sum(
        settings["calibration_tokens"] * n**2 + EIGH * n**3 for _, n in _inputs(shape.targets(settings))
    )
