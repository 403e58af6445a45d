import math

import pytest
import torch

from hiplora.errors import ConfigError, FactorError
from hiplora.spectral import krylov, minor_svd_factors, projected_factors, truncated_svd, weight_fingerprint
from hiplora.spectral.factors import Triplets
from hiplora.spectral.svd import gram_svd
from tests import reference
from tests.calls import watch
from tests.unit.spectral.matrices import gaussian, power_law, with_spectrum

LARGE = (700, 760)  # above the exact method's reach for k = 8, so that "auto" iterates


def assert_right(weight, factors, tol=1e-4):
    """The certificate is what its definition says, holds, and the triplets are the leading ones."""
    k = factors.rank
    _, sigma, _ = reference.dense_svd(weight.float(), k)
    assert factors.residual == pytest.approx(reference.residual(weight.float(), factors), rel=1e-2, abs=1e-12)
    assert factors.residual <= tol
    assert factors.orthogonality == pytest.approx(reference.orthogonality(factors), rel=1e-2, abs=1e-12)
    assert factors.orthogonality < 5e-6
    assert torch.all(factors.sigma[:-1] >= factors.sigma[1:])
    torch.testing.assert_close(factors.sigma.double(), sigma, rtol=0, atol=tol * sigma[0].item())
    assert factors.U.shape == (weight.shape[0], k)
    assert factors.V.shape == (weight.shape[1], k)
    assert {factors.U.dtype, factors.sigma.dtype, factors.V.dtype} == {torch.float32}


SPECTRA = {
    "power law": power_law(*LARGE),
    "flat random": gaussian(*LARGE),
    "gap": with_spectrum([10.0] * 5 + [1.0] * 200, *LARGE),
    "cluster around k": with_spectrum([1 + 1e-4 * i for i in range(40, 0, -1)] + [0.5] * 100, *LARGE),
    "copies of one value": with_spectrum([3.0] * 60 + [1.0] * 200, *LARGE),
    "identity": torch.eye(*LARGE),
    "rank one": with_spectrum([2.0], *LARGE),
    "rank below k": with_spectrum([2.0, 1.0, 0.5], *LARGE),
    "rank equal to k": with_spectrum([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3], *LARGE),
    "steep": with_spectrum([10.0**-i for i in range(12)], *LARGE),
    "a single entry": torch.zeros(*LARGE).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-2.0)),
    "zero padded": torch.nn.functional.pad(gaussian(40, 30), (0, 730, 0, 660)),
    "tiny values": gaussian(*LARGE) * 1e-12,
    "huge values": gaussian(*LARGE) * 1e12,
    "wide": power_law(650, 3000),
    "tall": power_law(3000, 650),
}


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_spectrum_is_factored_within_tolerance(spectrum, method):
    factors = truncated_svd(SPECTRA[spectrum], 8, method=method)
    assert_right(SPECTRA[spectrum], factors)
    assert factors.method == ("exact" if method == "exact" else "krylov")


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (8, 3000), (3000, 8), (96, 64), (60, 90)])
@pytest.mark.parametrize("method", ["auto", "krylov"])
def test_weights_too_small_for_the_iteration_are_factored_exactly(shape, method):
    weight = power_law(*shape)
    factors = truncated_svd(weight, min(8, *shape), method=method)
    assert_right(weight, factors, tol=1e-6)
    assert factors.method == "exact"


VARIANTS = {
    "bfloat16": power_law(*LARGE).bfloat16(),
    "float64": power_law(*LARGE).double(),
    "a transposed view": power_law(*LARGE).T.contiguous().T,  # GPT-2 keeps (in, out)
    "a small transposed view": power_law(64, 96).T.contiguous().T,
}


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("weight", VARIANTS.values(), ids=VARIANTS)
def test_equal_values_give_equal_bits_and_one_sign_whatever_their_dtype_layout_and_the_callers_seed(weight, method):
    one = truncated_svd(weight, 8, method=method)
    torch.manual_seed(2)
    other = truncated_svd(weight.float().contiguous(), 8, method=method)
    assert_right(weight, one)
    assert all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("U", "sigma", "V"))
    assert one.fingerprint == other.fingerprint == weight_fingerprint(weight)
    assert (one.U.gather(0, one.U.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", ["auto", "exact", "krylov"])
def test_an_all_zero_weight_has_zero_gains_and_orthonormal_vectors(method):
    factors = truncated_svd(torch.zeros(*LARGE), 8, method=method)
    assert (factors.residual, factors.orthogonality, reference.orthogonality(factors)) == (0, 0, 0)
    assert not factors.sigma.any()


def test_the_callers_random_state_default_device_and_weight_are_left_alone():
    weight = gaussian(*LARGE).requires_grad_()
    before, state = weight.detach().clone(), torch.random.get_rng_state()
    with torch.device("meta"):
        factors = truncated_svd(weight, 8)
    assert_right(before, factors)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weight, before)
    assert not factors.U.requires_grad


@pytest.mark.parametrize(
    ("weight", "k", "message"),
    [
        (gaussian(19, 57), 25, r"layer q: principal_rank 25 exceeds min\(out, in\) = 19; .*principal_rank_pattern"),
        (gaussian(6, 5), 0, "layer q: principal_rank 0 is below 1"),
        (gaussian(6, 5).index_fill(0, torch.tensor(2), math.nan), 2, "layer q: the weight has NaN or Inf"),
        (gaussian(6, 5).bfloat16().index_fill(0, torch.tensor(2), -math.inf), 2, "layer q: the weight has NaN or Inf"),
        (torch.ones(2, 3, 4), 1, r"layer q: expected a matrix \(out, in\), got shape \(2, 3, 4\)"),
        (torch.ones(4, 4, dtype=torch.uint8), 1, "layer q: dtype torch.uint8 .* dequantise"),
        (torch.ones(4, 4, device="meta"), 1, "layer q: .* meta device"),
        (torch.full((4, 4), 3e38), 1, "layer q: the .* decomposition reached a residual of nan"),
        (torch.full((4, 4), 1e39, dtype=torch.float64), 1, "layer q: the weight has NaN or Inf in float32"),
    ],
)
def test_what_cannot_be_factored_is_named_with_the_way_out(weight, k, message):
    with pytest.raises(FactorError, match=message):
        truncated_svd(weight, k, name="q")


@pytest.mark.parametrize("option", [{"tol": 0.0}, {"tol": math.nan}, {"method": "lanczos"}])
def test_an_option_that_makes_no_sense_is_refused(option):
    with pytest.raises(ConfigError, match=r"svd_tolerance|auto, exact, kr"):
        truncated_svd(gaussian(6, 5), 2, **option)


def test_where_the_iteration_misses_the_tolerance_auto_goes_on_exactly_and_the_iteration_alone_fails(monkeypatch):
    monkeypatch.setattr(krylov, "_MAX_PRODUCTS", 2)
    factors = truncated_svd(gaussian(*LARGE), 8)
    assert factors.method == "exact"
    assert_right(gaussian(*LARGE), factors)
    with pytest.raises(FactorError, match=r"layer q: the krylov decomposition reached a residual of .*svd_tol"):
        truncated_svd(gaussian(*LARGE), 8, method="krylov", name="q")
    with pytest.raises(FactorError, match="exact decomposition reached a residual"):  # more than float32 holds
        truncated_svd(gaussian(60, 50), 8, tol=1e-12)


def test_the_gram_shortcut_is_replaced_by_the_full_svd_where_its_certificate_fails(monkeypatch):
    def spoilt(weight, k):
        U, sigma, V = gram_svd(weight, k)
        return Triplets(U, sigma, V.roll(1, dims=0))

    monkeypatch.setattr("hiplora.spectral.svd.gram_svd", spoilt)
    assert_right(gaussian(60, 50), truncated_svd(gaussian(60, 50), 8), tol=1e-6)


def test_autocast_and_low_precision_products_do_not_reach_the_decomposition():
    expected = truncated_svd(power_law(*LARGE), 8)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            factors = truncated_svd(power_law(*LARGE), 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(factors.U, expected.U)


def test_memory_stays_bounded_and_restarts_converge(monkeypatch):
    calls = watch(monkeypatch, krylov, "_grow")
    weight = gaussian(*LARGE)
    assert_right(weight, truncated_svd(weight, 8, tol=1e-5, method="krylov"), tol=1e-5)
    assert len(calls) > krylov.MAX_BLOCKS
    assert max(space.core.shape[0] for space, *_ in calls) <= krylov.MAX_BLOCKS * krylov.block_size(8)


@pytest.mark.real_model
def test_real_attention_weights_are_certified_and_agree_with_lapack(smollm2):
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        for kind in ("q_proj", "k_proj", "o_proj"):
            weight = file.get_tensor(f"model.layers.7.self_attn.{kind}.weight")
            assert_right(weight, truncated_svd(weight, 32))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_parts_that_baselines_start_from_are_those_of_the_weight_with_the_root_of_sigma_to_each(shape):
    W = gaussian(*shape)
    U, sigma, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    N = torch.linalg.qr(gaussian(shape[1], 5, seed=2)).Q
    minor = U[:, 8:] * sigma[8:] @ Vt[8:]
    for (B, A), expected in ((minor_svd_factors(W, 4), minor.float()), (projected_factors(W, N), W @ N @ N.T)):
        torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize(
    "candidates",
    [
        torch.zeros(60, 8),
        torch.eye(60, 8),  # already in the basis, to the last bit
        torch.eye(60, 20)[:, 12:20],  # half of it in the basis
        gaussian(60, 1).repeat(1, 8),
        gaussian(60, 8) * 1e-12,
        gaussian(60, 8),
    ],
    ids=["zero", "in the basis", "half in the basis", "one direction", "rounding noise", "independent"],
)
def test_a_block_of_the_iteration_is_orthonormal_and_off_the_basis_whatever_the_candidates(candidates, scale):
    vectors = krylov._extend(torch.eye(60, 16), candidates, scale, torch.Generator().manual_seed(0)).vectors
    joint = torch.cat([torch.eye(60, 16), vectors], 1).double()
    torch.testing.assert_close(joint.T @ joint, torch.eye(24).double(), rtol=0, atol=1e-5)
