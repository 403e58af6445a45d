"""Studies: several methods on one job, run stage by stage, measured and reported."""

from hiplora.extras import require

require("train")
