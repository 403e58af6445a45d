"""Rank-1 interventions: how much a model loses by a change of one direction of one weight."""

from hiplora.extras import require

require("eval")

from hiplora.probing.correlation import contrasts, correlate, findings
from hiplora.probing.interventions import (
    Direction,
    choose_directions,
    directions_of,
    find_modules,
    intervened,
    intervention_factor,
    probe,
)
