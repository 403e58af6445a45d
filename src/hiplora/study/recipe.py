"""The recipe of a study: a model, domains, methods, seeds, and the protocols to run; and how it is read from YAML."""

import importlib.resources
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hiplora.data.examples import Block, DataSettings
from hiplora.data.rows import is_hub_name
from hiplora.editing.job import EDITORS
from hiplora.errors import ConfigError, first_problem
from hiplora.study.protocols import Protocols
from hiplora.study.protocols.settings import AboveZero, Positive, Seed
from hiplora.training.baselines import AnyMethod
from hiplora.training.reading import described, put_over, read_yaml, refusal
from hiplora.training.recipe import TrainSettings, expand_short_forms

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # becomes part of the names of jobs and files


class Domain(Block):
    """What an adapter is trained for: rows to train on, and the tasks that test it."""

    title: str = Field(min_length=1, description="Name in tables.")
    train: DataSettings = Field(description="Rows to train on, some held out; files are those of the data folder.")
    hub: DataSettings | None = Field(default=None, description="Rows to train on if the data folder has no such file.")
    tasks: dict[str, Positive | None] = Field(
        min_length=1, description="Task → number of items (null: all). The first one's score is the domain's."
    )

    @model_validator(mode="after")
    def _rows_are_held_out(self) -> "Domain":
        for name, data in (("train", self.train), ("hub", self.hub)):
            if data is not None and not data.has_held_out:
                raise ValueError(f"`{name}` holds out no rows; add `held_out_fraction: 0.05`")
        return self

    @property
    def task(self) -> str:
        """The task whose score is the domain's."""
        return next(iter(self.tasks))


class StudyMethod(Block):
    """A row of the study's tables: a method with its settings."""

    title: str = Field(min_length=1, description="Name in tables.")
    method: AnyMethod = Field(description="As in a training recipe.")
    train: dict[str, Any] = Field(default={}, description="Training settings of this method alone.")
    lr: AboveZero | Literal["chosen"] = Field(default="chosen", description="`chosen`: the best of `rates.grid`.")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_short_forms(value) if isinstance(value, dict) else value


class Rates(Block):
    """The learning rates to try, the same for all methods; the lowest loss on held-out rows decides."""

    grid: list[AboveZero] = Field(min_length=1, description="Learning rates to try.")
    domains: list[str] | None = Field(default=None, description="Domains to try them in; all, if empty.")
    seed: Seed = Field(default=7, description="Seed of these runs, not one of the study's.")


class DriftTexts(Block):
    """Texts on which adapted models are compared with the base, token by token."""

    texts: dict[str, str] = Field(
        min_length=1,
        description="Name → a text file of the data folder, FILE:FIELD+FIELD for fields of its rows, or a data set on "
        "the hub (OWNER/NAME), of which `documents` rows of the train split are fetched.",
    )
    tokens: int = Field(default=512, ge=2, description="Tokens of each text.")
    window: int = Field(default=512, ge=2, description="Tokens in one forward pass.")
    documents: int | None = Field(
        default=None,
        ge=1,
        description="Take the first rows of each source as texts of their own, the first `window` tokens of each, "
        "instead of all rows as one text of `tokens`.",
    )

    @model_validator(mode="after")
    def _fetched_by_rows(self) -> "DriftTexts":
        for name, source in self.texts.items():
            if self.documents is None and is_hub_name(source.partition(":")[0]):
                raise ValueError(
                    f"`texts.{name}` is a data set on the hub; set how many of its rows are read: `documents: 100`"
                )
        return self

    @property
    def files(self) -> list[str]:
        """The names of the files, or data sets, that the texts are read from."""
        return [source.partition(":")[0] for source in self.texts.values()]

    def settings(self) -> dict[str, Any]:
        """Return them as a job's settings, without unused fields, so that those change no key."""
        return self.model_dump(mode="json", exclude_none=True)


class Evaluation(Block):
    """How models are scored."""

    seed: int = Field(default=0, ge=0, description="Chooses the items of the tasks.")
    drift: DriftTexts | None = Field(default=None, description="Texts to measure the drift on.")


class StudyRecipe(Block):
    """A whole study; every job follows from it."""

    study: Name = Field(description="Name of the study.")
    title: str = Field(default="", description="Title of its report.")
    model: str = Field(min_length=1, description="Base model: `smollm2-135m`, `pico`, a folder, or a name on the hub.")
    seeds: list[Seed] = Field(default=[42, 100, 2024], min_length=1, description="Seeds of training.")
    train: TrainSettings = Field(default=TrainSettings(), description="How all methods train.")
    rates: Rates | None = Field(default=None, description="Search for learning rates; none: all take `train.lr`.")
    evaluation: Evaluation = Field(default=Evaluation(), description="How models are scored.")
    domains: dict[Name, Domain] = Field(min_length=1, description="Name → what is trained and tested.")
    methods: dict[Name, StudyMethod] = Field(min_length=1, description="Name → a method and its settings.")
    protocols: Protocols = Field(description="Protocols to run.")

    @model_validator(mode="after")
    def _names_exist_once(self) -> "StudyRecipe":
        """Check the names of methods and domains, and that titles, tasks and seeds tell results apart."""
        protocols = {name: settings for name, settings in self.protocols if settings is not None}
        _check_names(self.rates.domains if self.rates else None, self.domains, "rates.domains")
        for protocol, settings in protocols.items():
            for field, names, block in settings.named():
                _check_names(names, getattr(self, block), f"protocols.{protocol}.{field}")
        for block, field in (("methods", "title"), ("domains", "title"), ("domains", "task")):
            values = [getattr(entry, field) for entry in getattr(self, block).values()]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(
                    f"`{block}`: two have the {field} {twice[0]!r}, by which results are told apart; give each its own"
                )
        # The selection takes the seed of the rates on purpose.
        own = {f"`protocols.{name}`'s": one.seeds or [] for name, one in protocols.items() if name != "selection"}
        for owner, seeds in {"the study's": self.seeds, **own}.items():
            if self.rates is not None and self.rates.seed in seeds:
                raise ValueError(
                    f"`rates.seed` {self.rates.seed} is one of {owner} seeds; rates must be chosen on runs that are "
                    "not reported: change it"
                )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` lists a seed twice; name each once")
        return self

    @model_validator(mode="after")
    def _protocols_fit(self) -> "StudyRecipe":
        protocols = self.protocols
        for name in ("lambda_curve", "ablations", "selection"):
            settings = getattr(protocols, name)
            if settings and not getattr(self.methods[settings.method].method, "principal_channel", False):
                raise ValueError(
                    f"`protocols.{name}.method` is {settings.method!r}, which has no gains; name a HiP-LoRA with "
                    "`principal_channel: true`"
                )
        if protocols.frontier and self.evaluation.drift is None:
            raise ValueError("`protocols.frontier` compares drifts; set `evaluation.drift`")
        if protocols.merge_fail and (most := max(protocols.merge_fail.sizes)) > len(self.domains):
            raise ValueError(
                f"`protocols.merge_fail.sizes` has {most}, and there are {len(self.domains)} domains; lower it or add "
                "domains"
            )
        if protocols.continual:
            first, *others = protocols.continual.orders or [list(self.domains)]
            if len(first) < 2 or any(sorted(order) != sorted(set(first)) for order in (first, *others)):
                raise ValueError("`protocols.continual` needs two or more domains in order, each once in each order")
        if protocols.editing:
            if reserved := sorted(EDITORS.keys() & protocols.editing.methods):
                raise ValueError(
                    f"`protocols.editing.methods`: {reserved[0]!r} is an editor of weights; rename the method"
                )
            trained = [*protocols.editing.methods, *(["crispedit"] if protocols.editing.crispedit is not None else [])]
            _check_names(protocols.editing.lr, trained, "protocols.editing.lr")
        return self

    @model_validator(mode="after")
    def _trainings_fit(self) -> "StudyRecipe":
        for name, method in self.methods.items():
            try:
                self.training(method)
            except ValidationError as error:
                raise ValueError(f"`methods.{name}.train`: {first_problem(error)}") from None
        return self

    def training(self, method: StudyMethod, **changes: Any) -> TrainSettings:
        """Return how a method trains: the study's settings, its own over them, and `changes` over both."""
        settings = {**self.train.model_dump(exclude_unset=True), **method.train, **changes}
        if "epochs" in settings:
            settings.pop("epochs" if "steps" in changes else "steps", None)
        return TrainSettings.model_validate(settings)

    def given_rate(self, method: StudyMethod) -> float:
        """Return a method's learning rate if none is searched for: its own, else that of its training."""
        return self.training(method).lr if method.lr == "chosen" else method.lr


def _check_names(names: Iterable[str] | None, defined: Iterable[str], where: str) -> None:
    for name in names or ():
        if name not in defined:
            raise ValueError(f"`{where}` names {name!r}; expected one of {', '.join(defined) or 'none'}")


def own_studies() -> dict[str, Path]:
    """Return the recipes that come with hiplora by name."""
    folder = Path(str(importlib.resources.files("hiplora.study") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> StudyRecipe:
    """Read a study's recipe, put `overrides` (`train.steps=20`) over it, and check all of it.

    It is a YAML file or a name of `own_studies`; with `extends:`, the name of another or a file beside it, its own
    values go over that one's. ConfigError lists everything that is wrong, with the way out.
    """
    path = _find(recipe)
    value = _extended(path)
    for override in overrides:
        put_over(value, override)
    try:
        # The model's path in a file is absolute already.
        return StudyRecipe.model_validate(_with_absolute_model(value, Path.cwd()))
    except ValidationError as error:
        raise refusal(path, described(error, StudyRecipe)) from None


def _find(recipe: str | os.PathLike) -> Path:
    path = own_studies().get(str(recipe), Path(recipe))
    if not path.is_file():
        raise ConfigError(
            f"{recipe}: no such file, and no study of that name; expected a YAML file or one of "
            f"{', '.join(own_studies())}"
        )
    return path


def _with_absolute_model(value: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make a recipe's model absolute if it is a path."""
    model = value.get("model")
    if isinstance(model, str) and model.startswith((".", "/", "~")):
        value["model"] = os.path.abspath(folder / Path(model).expanduser())
    return value


def _extended(path: Path, below: Sequence[Path] = ()) -> dict[str, Any]:
    """Return a recipe's values over those of the recipe it extends; `below` are those that extend this one."""
    value = _with_absolute_model(read_yaml(path), path.parent)
    parent = value.pop("extends", None)
    if parent is None:
        return value
    beside = path.parent / str(parent)
    parent_path = beside if beside.is_file() else _find(str(parent))
    below = (path.resolve(), *below)
    if parent_path.resolve() in below:
        raise ConfigError(f"{path}: extends {parent}, which extends this recipe; break the circle")
    merged = _extended(parent_path, below)
    for key, new in value.items():
        old = merged.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            new = {name: entry for name, entry in {**old, **new}.items() if entry is not None}
        merged[key] = new
    return merged
