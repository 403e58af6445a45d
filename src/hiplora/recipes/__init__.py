"""Recipes of studies; those of trainings are `hiplora.training.recipe`."""
