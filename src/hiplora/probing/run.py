"""Intervene on direction after direction and record what the model lost by it."""

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from hiplora.errors import ConfigError, DataError
from hiplora.probing.directions import Direction
from hiplora.probing.interventions import Intervention, intervened

Measure = Callable[[nn.Module], Mapping[str, float]]
Key = tuple[str, int, str, int]


@dataclass(frozen=True)
class ProbeRecord:
    """What one intervention on one direction cost.

    `module`, `layer`, `type`, `index`, `rank`, `sigma`, `relative` are the direction's (`Direction`); `kind` is the
    intervention's name, `factor` its c, `draw` the number of the noise's draw (0 for the others). `drop` has for each
    metric how much worse it became, in its own unit; None where the model gave no finite number any more.
    """

    module: str
    layer: int | None
    type: str
    index: int
    rank: int
    sigma: float
    relative: float
    kind: str
    draw: int
    factor: float
    drop: Mapping[str, float | None]

    @property
    def key(self) -> Key:
        """What tells it apart from the other records of a probe."""
        return self.module, self.index, self.kind, self.draw

    def as_dict(self) -> dict[str, Any]:
        """Return the record for a results file; `ProbeRecord(**it)` is the same again."""
        return {**asdict(self), "drop": dict(self.drop)}


def probe(
    model: nn.Module,
    directions: Iterable[Direction],
    interventions: Sequence[Intervention],
    measure: Measure,
    *,
    base: Mapping[str, float] | None = None,
    lower_is_better: Collection[str] = (),
    draws: int = 1,
    seed: int = 0,
    done: Iterable[ProbeRecord] = (),
    on_record: Callable[[ProbeRecord], None] | None = None,
) -> list[ProbeRecord]:
    """Apply each intervention to each direction, one at a time, and return what each cost, in that order.

    Args:
        model: a bare model; it is left as it was, bit for bit, also after an error.
        directions: of `directions_of`.
        interventions: which; none twice.
        measure: called with the model as it then is, returns named scores. Scores are in per cent, higher is better,
            and the drop is base − intervened; of the metrics in `lower_is_better` (a KL divergence) the drop is
            intervened − base: a positive drop is always a loss.
        base: the scores of the model without intervention, where they are known; else they are measured first.
        lower_is_better: names of metrics.
        draws: how often noise is drawn for each direction. A draw hangs on `seed`, module, index and its number alone:
            noises of two scales are the same but for the scale.
        seed: of the noise.
        done: records of an interrupted probe; they are taken over and not measured again.
        on_record: called with each new record as soon as it is there, to keep it.

    Raises:
        ConfigError: an intervention stands there twice, `draws` is below 1, or a direction does not fit the model.
        DataError: `measure` gives other metrics than for the base, or a base score is not finite.
    """
    names = [intervention.name for intervention in interventions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"intervention {twice}: is there twice; name each once")
    if draws < 1:
        raise ConfigError(f"draws is {draws}; expected at least 1")
    kept = {record.key: record for record in done}
    scores = _base_scores(measure(model) if base is None else base, lower_is_better)
    records = []
    for direction in directions:
        for intervention in interventions:
            for draw in range(draws if intervention.kind == "noise" else 1):
                key = direction.module, direction.index, intervention.name, draw
                if key not in kept:
                    factor = intervention.factor(_normal(seed, direction, draw))
                    with intervened(model, direction, factor):
                        found = measure(model)
                    drop = _drop(scores, found, lower_is_better, key)
                    kept[key] = _record(direction, intervention.name, draw, factor, drop)
                    if on_record is not None:
                        on_record(kept[key])
                records.append(kept[key])
    return records


def _base_scores(scores: Mapping[str, float], lower_is_better: Collection[str]) -> dict[str, float]:
    if unknown := sorted(set(lower_is_better) - set(scores)):
        raise ConfigError(
            f"lower_is_better names {unknown[0]}, which is not measured; expected some of {', '.join(scores)}"
        )
    for name, value in scores.items():
        if not math.isfinite(value):
            raise DataError(f"metric {name} of the base model is {value}; expected a finite number")
    return dict(scores)


def _drop(
    base: Mapping[str, float], found: Mapping[str, float], lower_is_better: Collection[str], key: Key
) -> dict[str, float | None]:
    if set(base) != set(found):
        raise DataError(
            f"layer {key[0]}, direction {key[1]}, {key[2]}: measured {', '.join(sorted(found))}; expected the metrics "
            f"of the base model, {', '.join(sorted(base))}"
        )
    losses = {name: (found[name] - base[name]) * (1 if name in lower_is_better else -1) for name in base}
    return {name: float(loss) if math.isfinite(loss) else None for name, loss in losses.items()}


def _normal(seed: int, direction: Direction, draw: int) -> float:
    entropy = [seed, zlib.crc32(direction.module.encode()), direction.index, draw]
    return float(np.random.default_rng(entropy).standard_normal())


def _record(
    direction: Direction, kind: str, draw: int, factor: float, drop: Mapping[str, float | None]
) -> ProbeRecord:
    return ProbeRecord(
        module=direction.module,
        layer=direction.layer,
        type=direction.type,
        index=direction.index,
        rank=direction.rank,
        sigma=direction.sigma,
        relative=direction.relative,
        kind=kind,
        draw=draw,
        factor=factor,
        drop=drop,
    )
