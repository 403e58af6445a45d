"""Supervised fine-tuning: from a recipe to an adapter, in runs that can be stopped and carried on."""

from hiplora.extras import require

require("train")


from hiplora.training.reading import load_recipe
from hiplora.training.recipe import TrainRecipe
from hiplora.training.result import TrainResult
from hiplora.training.train import train

__all__ = ["TrainRecipe", "TrainResult", "load_recipe", "train"]
