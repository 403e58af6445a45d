"""The methods that a recipe can name: every class with a `name` in the files of `baselines/`."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hiplora.training import baselines
from hiplora.training.method import ATTENTION_PROJECTIONS, LowRank, Method

__all__ = ["ATTENTION_PROJECTIONS", "METHODS", "AnyMethod", "LowRank", "Method"]


def _found() -> dict[str, type[Method]]:
    methods: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(baselines.__path__, f"{baselines.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in value.model_fields:
                methods[value.model_fields["name"].default] = value
    return dict(sorted(methods.items()))


METHODS = _found()

if TYPE_CHECKING:
    AnyMethod = Any
else:
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
