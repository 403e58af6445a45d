"""Studies: several methods on one job, run stage by stage, measured and reported."""
