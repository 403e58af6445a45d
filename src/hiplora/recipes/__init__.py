"""Recipes: a YAML file that says what to train, on what and how, checked in full before anything is loaded."""

from hiplora.recipes.load import load_recipe, model_problems
from hiplora.recipes.methods import (
    CordaMethod,
    HipLoraMethod,
    LoraMethod,
    LoraNullMethod,
    MiloraMethod,
    PissaMethod,
    ProjLoraMethod,
    SplitLoraMethod,
)
from hiplora.recipes.schema import DataSettings, TrainRecipe, TrainSettings

__all__ = [
    "CordaMethod",
    "DataSettings",
    "HipLoraMethod",
    "LoraMethod",
    "LoraNullMethod",
    "MiloraMethod",
    "PissaMethod",
    "ProjLoraMethod",
    "SplitLoraMethod",
    "TrainRecipe",
    "TrainSettings",
    "load_recipe",
    "model_problems",
]
