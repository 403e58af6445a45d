"""The factors of a model's weights in the weight basis: from the store, or computed and kept there."""

import functools
from collections.abc import Iterator

from torch import nn
from tqdm import tqdm

from hiplora.spectral import FactorStore, SpectralFactors, resolve_rank, squared_singular_values
from hiplora.tuner.config import HipLoraConfig
from hiplora.tuner.experts import unrolled
from hiplora.tuner.targets import Target, find_targets, frozen_weight


def weight_factors(
    model: nn.Module, config: HipLoraConfig, store: FactorStore | None = None
) -> Iterator[tuple[Target, SpectralFactors]]:
    """Yield each layer that an adapter of this configuration would sit on, with its certified factors.

    They are stored one by one (by default in the user's cache), so an interrupted run goes on where it stopped.

    Raises:
        ConfigError: as `find_targets`.
        FactorError, StoreError: as `FactorStore.get_or_compute`.
    """
    store = store or FactorStore()
    targets = find_targets(model, config)
    with unrolled(model):
        for target in tqdm(targets, "factoring weights", unit=" modules", delay=2, leave=False, disable=None):
            weight = frozen_weight(model.get_submodule(target.name))
            energies = functools.partial(squared_singular_values, weight)
            k = resolve_rank(config.principal_ranks.get(target.name, target.k), target.shape, energies)
            yield target, store.get_or_compute(weight, k, config.svd_tolerance, name=target.name)
