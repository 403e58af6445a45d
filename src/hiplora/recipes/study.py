"""The recipe of a study: a model, domains, methods, seeds, and the protocols that are asked for."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hiplora.data.examples import Block, DataSettings
from hiplora.data.rows import is_hub_name
from hiplora.errors import first_problem
from hiplora.recipes.protocols import ALPHAEDIT, Protocols, Seed
from hiplora.training.methods import AnyMethod
from hiplora.training.recipe import TrainSettings, expand_short_forms

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]  # becomes part of the names of jobs and files
Items = Annotated[int, Field(ge=1)] | None
CHOSEN: Literal["chosen"] = "chosen"


class Domain(Block):
    """What an adapter is trained for: rows to learn from, and tasks that tell how well it did."""

    title: str = Field(min_length=1, description="As tables show it.")
    train: DataSettings = Field(
        description="Rows to train on; file names are relative to the data folder. Some are to be held back."
    )
    hub: DataSettings | None = Field(
        default=None, description="What to train on instead where the data folder has no such file."
    )
    tasks: dict[str, Items] = Field(
        min_length=1,
        description="Tasks of `hiplora eval`, each with its number of items (null: all). The first one's score is the "
        "domain's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        files = {name: {"path": value[name]} for name in ("train", "hub") if isinstance(value.get(name), str)}
        return {**value, **files}

    @model_validator(mode="after")
    def _rows_are_held_back(self) -> "Domain":
        for name, data in (("train", self.train), ("hub", self.hub)):
            if data is not None and not data.has_held_out:
                raise ValueError(f"`{name}` holds no rows back; add `held_out_fraction: 0.05`")
        return self

    @property
    def task(self) -> str:
        """The task whose score is the domain's."""
        return next(iter(self.tasks))


class StudyMethod(Block):
    """A row of the study's tables: a method with its settings."""

    title: str = Field(min_length=1, description="As tables show it.")
    method: AnyMethod = Field(description="As in a training recipe.")
    train: dict[str, Any] = Field(default={}, description="Training settings of this method alone.")
    lr: Annotated[float, Field(gt=0)] | Literal["chosen"] = Field(
        default=CHOSEN,
        description="Its learning rate; `chosen`: the best of the study's grid on held-out rows.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_short_forms(value) if isinstance(value, dict) else value


class Rates(Block):
    """The grid of learning rates, the same for all methods, and what a rate is chosen by: the loss on held-out rows."""

    grid: list[Annotated[float, Field(gt=0)]] = Field(min_length=1, description="Learning rates to try.")
    domains: list[str] | None = Field(default=None, description="Domains to try them in; all, if empty.")
    seed: Seed = Field(default=7, description="Seed of these runs: none of the study's own.")


class DriftTexts(Block):
    """Texts on which adapted models are compared with the base, token by token."""

    texts: dict[str, str] = Field(
        min_length=1,
        description="Name → a text file of the data folder, or FILE:FIELD+FIELD for fields of its rows; or, instead of "
        "a file, a data set of the hub (OWNER/NAME), of which `documents` rows of the train split are fetched.",
    )
    tokens: int = Field(default=512, ge=2, description="Tokens of each text.")
    window: int = Field(default=512, ge=2, description="Tokens that are read at once.")
    documents: int | None = Field(
        default=None,
        ge=1,
        description="Take the first so many rows of each source as texts of their own, the first `window` tokens of "
        "each (`tokens` has no say then), instead of all rows as one text.",
    )

    @model_validator(mode="after")
    def _fetched_by_rows(self) -> "DriftTexts":
        for name, source in self.texts.items():
            if self.documents is None and is_hub_name(source.partition(":")[0]):
                raise ValueError(
                    f"`texts.{name}` is a data set of the hub; say how many of its rows are read: `documents: 100`"
                )
        return self

    def settings(self) -> dict[str, Any]:
        """Return them as a job's settings; what is not used is not among them, so that it changes no key."""
        return self.model_dump(mode="json", exclude={"documents"} if self.documents is None else None)


class Evaluation(Block):
    """How models are scored."""

    seed: int = Field(default=0, ge=0, description="Chooses the items of the tasks.")
    drift: DriftTexts | None = Field(default=None, description="Texts to measure the drift on.")


class StudyRecipe(Block):
    """A whole study: every job follows from it."""

    study: Name = Field(description="Name of the study.")
    title: str = Field(default="", description="Title of its report.")
    model: str = Field(
        min_length=1,
        description="Base model: `smollm2-135m`, `pico`, a folder, or a name on the Hugging Face hub.",
    )
    seeds: list[Seed] = Field(default=[42, 100, 2024], min_length=1, description="Seeds of training.")
    train: TrainSettings = Field(default=TrainSettings(), description="How all methods train.")
    rates: Rates | None = Field(
        default=None, description="Search for each method's learning rate; without it all take `train.lr`."
    )
    evaluation: Evaluation = Field(default=Evaluation(), description="How models are scored.")
    domains: dict[Name, Domain] = Field(min_length=1, description="Name → what is trained and tested.")
    methods: dict[Name, StudyMethod] = Field(min_length=1, description="Name → a method and its settings.")
    protocols: Protocols = Field(description="What is done with them.")

    @model_validator(mode="after")
    def _names_are_known(self) -> "StudyRecipe":
        self._check(self.rates.domains if self.rates else None, self.domains, "rates.domains")
        if self.rates is not None and self.rates.seed in self.seeds:
            raise ValueError(
                f"`rates.seed` {self.rates.seed} is one of the study's seeds: rates must be chosen on other runs than "
                "those that are reported; change it"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` has one twice; a run counts once")
        for protocol, settings in self.protocols:
            if settings is None:
                continue
            for field, value in settings.named("methods"):
                self._check(value, self.methods, f"protocols.{protocol}.{field}")
            for field, value in settings.named("domains"):
                self._check(value, self.domains, f"protocols.{protocol}.{field}")
            for field, value in settings.named("texts"):
                known = self.evaluation.drift.texts if self.evaluation.drift else {}
                self._check(value, known, f"protocols.{protocol}.{field}")
        return self

    @model_validator(mode="after")
    def _protocols_fit(self) -> "StudyRecipe":
        for name in ("lambda_curve", "ablations", "selection"):
            settings = getattr(self.protocols, name)
            if settings is not None and not getattr(
                self.methods[settings.method].method, "principal_channel", False
            ):
                raise ValueError(
                    f"`protocols.{name}.method` is {settings.method!r}, which has no gains; name a HiP-LoRA with "
                    "`principal_channel: true`"
                )
        if self.protocols.frontier is not None and self.evaluation.drift is None:
            raise ValueError("`protocols.frontier` compares drifts; set `evaluation.drift`")
        merges = self.protocols.merge_fail
        if merges is not None and max(merges.sizes) > len(self.domains):
            raise ValueError(
                f"`protocols.merge_fail.sizes` has {max(merges.sizes)}, and there are {len(self.domains)} domains; "
                "lower it or add domains"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "StudyRecipe":
        if self.protocols.continual is None:
            return self
        order = self.protocols.continual.order or list(self.domains)
        if len(order) < 2:
            raise ValueError("`protocols.continual` trains on one domain after the other; add a domain")
        if len(set(order)) < len(order):
            raise ValueError("`protocols.continual.order` has a domain twice; name each once")
        return self

    @model_validator(mode="after")
    def _edits_fit(self) -> "StudyRecipe":
        editing = self.protocols.editing
        if editing is None:
            return self
        if ALPHAEDIT in editing.methods:
            raise ValueError(
                f"`protocols.editing.methods` has {ALPHAEDIT!r}, the name of an editor; rename the method"
            )
        self._check(list(editing.lr), dict.fromkeys(editing.methods), "protocols.editing.lr")
        return self

    @model_validator(mode="after")
    def _methods_train(self) -> "StudyRecipe":
        for name, method in self.methods.items():
            try:
                self.training(method)
            except ValidationError as error:
                raise ValueError(f"`methods.{name}.train`: {first_problem(error)}") from None
        return self

    def training(self, method: StudyMethod, **changes: Any) -> TrainSettings:
        """Return how a method trains: the study's settings, its own, and `changes` over them."""
        own = {**self.train.model_dump(exclude_unset=True), **method.train, **changes}
        if "steps" in changes:
            own.pop("epochs", None)
        elif "epochs" in own:
            own.pop("steps", None)
        return TrainSettings.model_validate(own)

    def given_rate(self, method: StudyMethod) -> float:
        """Return a method's learning rate where none is searched for: its own, else that of its training."""
        return self.training(method).lr if method.lr == CHOSEN else method.lr

    @staticmethod
    def _check(names: list[str] | None, known: dict[str, Any], where: str) -> None:
        for name in names or ():
            if name not in known:
                raise ValueError(f"`{where}` names {name!r}; expected one of {', '.join(known) or 'none'}")
