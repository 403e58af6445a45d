"""One file a method: its settings, how its adapter is made, and what it does while it trains.

`METHODS` are those that a recipe can name: every class with a `name` in these files.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hiplora.training.method import Method


def _found() -> dict[str, type[Method]]:
    methods: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in value.model_fields:
                methods[value.model_fields["name"].default] = value
    return dict(sorted(methods.items()))


METHODS = _found()

if TYPE_CHECKING:
    AnyMethod = Any
else:
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
