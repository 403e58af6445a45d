"""One file a method: its settings, how its adapter is made, and what it does while it trains.

`METHODS` are the methods that a recipe can name: every class with a `name` in these files.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hiplora.training.method import Method


def _discover() -> dict[str, type[Method]]:
    modules = [importlib.import_module(file.name) for file in pkgutil.iter_modules(__path__, f"{__name__}.")]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    methods = [value for value in classes if issubclass(value, Method) and "name" in value.model_fields]
    return dict(sorted((method.model_fields["name"].default, method) for method in methods))


METHODS = _discover()

if TYPE_CHECKING:
    AnyMethod = Any
else:
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
