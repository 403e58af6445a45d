"""One file a method: its settings, how its adapter is made, and what it does while it trains.

`METHODS` are those that a recipe can name: every class with a `name` in these files.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from hiplora.training.method import Method


def _found() -> dict[str, type[Method]]:
    modules = [importlib.import_module(found.name) for found in pkgutil.iter_modules(__path__, f"{__name__}.")]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    methods = [kind for kind in kinds if issubclass(kind, Method) and "name" in kind.model_fields]
    return dict(sorted((method.model_fields["name"].default, method) for method in methods))


METHODS = _found()

if TYPE_CHECKING:
    AnyMethod = Any
else:
    AnyMethod = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007
