"""Certified truncated SVD against LAPACK's, ARPACK's and torch.svd_lowrank: time and residual, side by side.

    python benchmarks/svd.py [--rank 32] [--rounds 5] [--only 8b] [--json FILE]

The matrices have power-law spectra, σ_i = i^-exponent, like trained weights, in the shapes of Llama-3.1-8B and of
SmolLM2-135M; their exact singular values are therefore known. Each round times every method on the same matrix, in
an order that rotates, so that drift of the machine hits all alike; the full SVD of a large one is timed once.
`svd_lowrank` runs with the paper's two power iterations, and with as many as it takes to reach 1e-4 too.
Ours includes the certificate and the fingerprint. CPU seconds are those of all threads together: look at them, with
`--threads 1`, where the machine has other work. The residual is
`max_i max(‖Wv_i − σ_i u_i‖, ‖Wᵀu_i − σ_i v_i‖) / σ_1`, the error of σ is `max_i |σ_i − exact| / σ_1`, both measured
here in float64 for all methods alike.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from scipy.sparse.linalg import svds
from side_by_side import options, timed, turns, write

from hiplora.spectral import truncated_svd

SHAPES = {
    "8b": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096)},
    "smollm2": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
}
EXPONENTS = (0.5, 1.0)
FULL = "torch.linalg.svd"
TOLERANCE = 1e-4
OURS = "hiplora"


def power_law(rows: int, columns: int, exponent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a matrix with σ_i = i^-exponent and random singular vectors; return it and σ."""
    size = min(rows, columns)
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator)).Q
    sigma = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    return (left * sigma.float()) @ right.T, sigma


def methods(k: int, weight: torch.Tensor) -> dict[str, Callable]:
    """Every contender as a function from a weight to (U, σ, V); `weight` is what they are timed on."""

    def ours(weight):
        factors = truncated_svd(weight, k, tol=TOLERANCE)
        return factors.U, factors.sigma, factors.V

    def full(weight):
        U, sigma, Vt = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :k], sigma[:k], Vt[:k].T

    def lowrank(iterations: int) -> Callable:  # with the paper's eight oversamples
        def factor(weight):
            U, sigma, V = torch.svd_lowrank(weight, q=k + 8, niter=iterations)
            return U[:, :k], sigma[:k], V[:, :k]

        return factor

    def arpack(weight):
        U, sigma, Vt = (torch.from_numpy(part.copy()) for part in svds(weight.numpy(), k=k, tol=TOLERANCE))
        order = sigma.argsort(descending=True)
        return U[:, order], sigma[order], Vt[order].T

    enough = next((n for n in (4, 8, 16, 32, 64) if residual(weight, lowrank(n)(weight)) <= TOLERANCE), 64)
    return {
        OURS: ours,
        FULL: full,
        "scipy svds": arpack,
        "svd_lowrank, 2 iterations": lowrank(2),
        f"svd_lowrank, {enough} iterations": lowrank(enough),
    }


def residual(weight: torch.Tensor, triplets: tuple[torch.Tensor, ...]) -> float:
    """The certificate's definition, in float64."""
    W = weight.double()
    U, sigma, V = (tensor.double() for tensor in triplets)
    forward = torch.linalg.norm(W @ V - sigma * U, dim=0)
    backward = torch.linalg.norm(W.T @ U - sigma * V, dim=0)
    return (torch.maximum(forward, backward).max() / sigma[0]).item()


def measure(name: str, shape: tuple[int, int], exponent: float, args: argparse.Namespace) -> dict:
    """Time all methods on one matrix."""
    weight, sigma = power_law(*shape, exponent)
    contenders = methods(args.rank, weight)
    spent: dict[str, list[dict[str, float]]] = {method: [] for method in contenders}
    rows = {}
    for turn, method in turns([*contenders], args.rounds + 1):  # the first is warm-up, except for what takes long
        once = method == FULL and min(shape) >= 1024
        if once and spent[method]:
            continue
        triplets, took = timed(functools.partial(contenders[method], weight))
        if turn or once:
            spent[method].append(took)
        error = (triplets[1].double() - sigma[: args.rank]).abs().max().item() / sigma[0].item()
        rows[method] = {"residual": residual(weight, triplets), "sigma_error": error}
    for method, row in rows.items():
        row |= {key: statistics.median(took[key] for took in spent[method]) for key in spent[method][0]}
    for method, row in rows.items():
        row |= {"times_ours": row["seconds"] / rows[OURS]["seconds"], "runs": len(spent[method])}
    return {"matrix": name, "shape": list(shape), "exponent": exponent, "methods": rows}


def show(result: dict) -> None:
    m, n = result["shape"]
    print(f"\n{result['matrix']}: {m} × {n}, σ_i = i^-{result['exponent']}", flush=True)
    print(f"  {'':28}{'seconds':>10}{'CPU':>10}{'× ours':>9}{'residual':>11}{'σ error':>10}")
    for method, row in result["methods"].items():
        times = f"{row['seconds']:10.4f}{row['cpu_seconds']:10.4f}{row['times_ours']:9.2f}"
        print(f"  {method:28}{times}{row['residual']:11.1e}{row['sigma_error']:10.1e}", flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--threads", type=int, help="else torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for model in [args.only] if args.only else SHAPES:
        for name, shape in SHAPES[model].items():
            for exponent in EXPONENTS:
                results.append(measure(f"{name} of {model}", shape, exponent, args))
                show(results[-1])
    chosen = {"rank": args.rank, "rounds": args.rounds, "threads": torch.get_num_threads()}
    write(args.json, {"results": results, "options": chosen})


if __name__ == "__main__":
    main()
