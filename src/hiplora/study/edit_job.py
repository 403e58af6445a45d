"""What an editing job is made of: its edits and questions, its method and settings, and the run of it on a model."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hiplora.editing.counterfact import BUILT_IN, load_edits
from hiplora.editing.edits import EditSet, Question, load_questions
from hiplora.errors import ConfigError
from hiplora.provenance import file_sha256, json_sha256
from hiplora.training.method import Method
from hiplora.training.methods import METHODS

if TYPE_CHECKING:
    from hiplora.editing import AlphaEdit, EditRun, EditSettings

ALPHAEDIT = "alphaedit"
# Steps and learning rate, where none are given: the paper's for a batch, fewer and larger steps for one edit alone.
DEFAULT_STEPS = {"single": (20, 2e-3), "batch": (500, 2e-4), "sequential": (500, 2e-4)}


@dataclass(frozen=True)
class EditJob:
    """What to edit and how. None is the default, which for steps and learning rate depends on the mode.

    `edits` is "builtin" or a file, `category` takes those of one category alone; `method` a recipe's method or
    "alphaedit", `method_settings` its settings; `rows` are the edits of a training step; `sample` is how many edits
    the mode "single" draws; `questions` is how many unrelated questions measure the locality, 0 is none;
    `neighbours` asks the questions near each edit, where the file has some.
    """

    model: str
    edits: str
    method: str = "hiplora"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "batch"
    limit: int | None = None
    category: str | None = None
    edits_per_batch: int | None = None
    sample: int | None = None
    steps: int | None = None
    lr: float | None = None
    rows: int | None = None
    questions: int = 500
    neighbours: bool = True
    seed: int = 42
    device: str = "cpu"


@dataclass(frozen=True)
class PreparedEdits:
    """What a job comes to, before a model is loaded: method, settings, edits, unrelated questions."""

    job: EditJob
    method: "Method | AlphaEdit"
    settings: "EditSettings"
    edits: EditSet
    questions: list[Question]

    @classmethod
    def of(cls, job: EditJob) -> "PreparedEdits":
        """Read the edits and check the settings.

        Raises:
            ConfigError: a setting does not fit the method or the mode.
            DataError: the edits cannot be used.
        """
        method, settings = _method(job), _settings(job)
        near = None if job.neighbours else 0
        edits = load_edits(job.edits, job.limit, neighbours=near, category=job.category)
        return cls(job, method, settings, edits, _questions(edits, job.questions))

    @property
    def stages(self) -> int:
        """How many stages the run has."""
        from hiplora.editing.run import edit_groups

        return len(edit_groups(len(self.edits), self.job.mode, self.settings))

    @property
    def training(self) -> dict[str, Any] | None:
        """How adapters are trained; None for AlphaEdit, which trains none."""
        return None if self.job.method == ALPHAEDIT else asdict(self.settings.training)

    def run(self, model: Any, tokenizer: Any, aside: Path, **more: Any) -> "EditRun":
        """Freeze what the bare base says, edit, measure, and leave the base as it was.

        PiSSA keeps its start in the folder `aside`; `more` are further arguments of `run_edits`.

        Raises:
            ConfigError, DataError, AdapterError: as `run_edits`.
        """
        from hiplora.editing import Reference, run_edits

        edits, method = self.edits.edits, self.method
        reference = Reference.freeze(model, tokenizer, self.questions, edits) if self.questions else None
        put_on = _adapt(method, tokenizer, self.job.seed, aside) if isinstance(method, Method) else method
        mode = cast(Any, self.job.mode)
        name = self.job.method
        return run_edits(model, tokenizer, put_on, edits, mode, self.settings, reference, name=name, **more)

    def described(self) -> dict[str, Any]:
        """Return the edits' name, hashes and number, for the record."""
        source = self.job.edits
        built_in = source == BUILT_IN and not Path(source).exists()
        return {
            "name": self.edits.name if built_in else Path(source).name,
            "file_sha256": None if built_in else file_sha256(source),
            "edits_sha256": json_sha256([asdict(item) for item in self.edits.edits]),
            "count": len(self.edits),
        }


def _method(job: EditJob) -> "Method | AlphaEdit":
    if job.method == ALPHAEDIT:
        given = [name for name in ("steps", "lr", "rows") if getattr(job, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]} has no use with alphaedit, which does not train; set value_steps and the like"
            )
        return alphaedit_settings({"seed": job.seed, **job.method_settings})
    if job.method not in METHODS:
        raise ConfigError(f"method is {job.method!r}; expected one of {', '.join([*METHODS, ALPHAEDIT])}")
    return _built(METHODS[job.method], job.method_settings)


def alphaedit_settings(settings: Mapping[str, Any]) -> "AlphaEdit":
    """Return AlphaEdit's settings from those of a recipe, or of a command line.

    Raises:
        ConfigError: there is no such setting, or a value makes no sense.
    """
    from hiplora.editing.alphaedit import AlphaEdit

    known = AlphaEdit.__dataclass_fields__
    unknown = next((name for name in settings if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"alphaedit has no setting {unknown!r}; expected one of {', '.join(known)}")
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    return AlphaEdit(**given)


def _built(kind: type[Method], settings: Mapping[str, Any]) -> Method:
    """Make a method of its settings; what is wrong with them is said in one line."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        raise ConfigError(
            f"--set {name}: {first['msg']}, found {first.get('input')!r}; docs/training.md lists the settings"
        ) from error


def _settings(job: EditJob) -> "EditSettings":
    from hiplora.editing import EditSettings, EditTraining

    if job.mode not in DEFAULT_STEPS:
        raise ConfigError(f"mode is {job.mode!r}; expected one of {', '.join(DEFAULT_STEPS)}")
    steps, lr = DEFAULT_STEPS[job.mode]
    training = EditTraining(
        steps=steps if job.steps is None else job.steps,
        lr=lr if job.lr is None else job.lr,
        batch_size=EditTraining.batch_size if job.rows is None else job.rows,
        seed=job.seed,
    )
    return EditSettings(training, job.edits_per_batch, job.sample)


def _questions(edits: EditSet, count: int) -> list[Question]:
    """The first built-in questions whose subjects are not edited."""
    edited = {item.subject.casefold() for item in edits.edits}
    return [item for item in load_questions() if item.subject.casefold() not in edited][:count]


def _adapt(method: Method, tokenizer: Any, seed: int, aside: Path) -> Callable[[Any], Any]:
    """A function that puts the adapter of a recipe's method on a bare model."""

    def adapt(model: Any) -> Any:
        from hiplora.training.adapt import put_on

        return put_on(method, model, tokenizer, seed=seed, start=aside / "start")

    return adapt
