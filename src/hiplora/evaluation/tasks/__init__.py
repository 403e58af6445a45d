"""The project's lm-eval tasks: one YAML file each, which lm-eval's own command line takes too, and what they call."""
