"""From a study's recipe to its jobs: the same call twice is one job, whichever protocol makes it."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hiplora.data.examples import DataSettings
from hiplora.data.rows import is_hub_name
from hiplora.evaluation.suite import task_settings
from hiplora.evaluation.tasks.rows import data_file
from hiplora.provenance import file_sha256, folder_identity
from hiplora.recipes.study import CHOSEN, StudyMethod, StudyRecipe
from hiplora.study.engine.bench import located
from hiplora.study.engine.jobs import Job, result
from hiplora.study.steps.registry import step
from hiplora.training.baselines.hiplora import PAPER, Spectral
from hiplora.training.recipe import TrainRecipe

# What of a method's settings its factors depend on; the rest may differ between jobs that share them.
OF_THE_FACTORS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("principal_rank", "principal_rank_pattern", "basis", "basis_sides", "projection"),
    *("calibration_text", "calibration_tokens", "svd_tolerance"),
)


class Study:
    """A study's recipe at a data folder, and the jobs that follow from both.

    `missing` lists the files that the recipe names and the folder lacks, as far as jobs were made that read them.
    """

    def __init__(self, recipe: StudyRecipe, data: Path | None):
        """Take a recipe, its file names relative to the data folder; nothing is read yet."""
        self.recipe, self.data = recipe, data
        self.missing: dict[str, None] = {}
        # What was asked for → the job: protocols ask again and again.
        self._made: dict[tuple[Any, ...], Job] = {}

    @functools.cached_property
    def identity(self) -> str:
        """What the base model is, in every job's key: its name, or the hash of a folder's files."""
        name = self.recipe.model
        return folder_identity(name) or name

    def seeds(self, settings: Any = None) -> list[int]:
        """Return the seeds of a protocol: its own, else the study's."""
        return list((settings.seeds if settings is not None else None) or self.recipe.seeds)

    def row(self, method: str) -> StudyMethod:
        """Return a method of the study by its name."""
        return self.recipe.methods[method]

    def variant(self, method: str, title: str | None = None, **settings: Any) -> StudyMethod:
        """Return a method with some of its settings changed, by fields of its `method` block, under its title or
        another.
        """
        row = self.row(method)
        changed = {**as_written(row.method), **settings}
        given = {**row.model_dump(exclude_unset=True), "title": title or row.title, "method": changed}
        return StudyMethod.model_validate(given)

    # Jobs.

    def rate(self, row: StudyMethod, steps: int | None = None) -> Job | None:
        """Return the job that chooses a method's learning rate on held-out rows; None where it is given."""
        search = self.recipe.rates
        if row.lr != CHOSEN or search is None:
            return None
        key = ("rate", row.model_dump_json(), steps)
        if key not in self._made:
            candidates = {
                rate: {
                    f"{domain}-{rate:g}": self.adapter(row, domain, search.seed, lr=rate, steps=steps)
                    for domain in search.domains or self.recipe.domains
                }
                for rate in search.grid
            }
            self._made[key] = self.choice(f"rate of {row.title}", candidates)
        return self._made[key]

    def choice(self, name: str, candidates: Mapping[float, Mapping[str, Job]]) -> Job:
        """Return the job that chooses the value whose trainings have the lowest mean loss on held-out rows.

        `candidates`: value → its trainings by names, none of which two values share.
        """
        listed = [{"value": value, "needs": list(runs)} for value, runs in candidates.items()]
        settings = {"field": "held_out_after", "prefer": "low", "candidates": listed}
        needs = {need: job for runs in candidates.values() for need, job in runs.items()}
        return self.job("collect", name, settings, **needs)

    def adapter(
        self,
        row: StudyMethod,
        domain: str,
        seed: int,
        *,
        lr: float | None = None,
        steps: int | None = None,
        start: Job | None = None,
        like: StudyMethod | None = None,
        chosen: Mapping[str, Job] | None = None,
    ) -> Job:
        """Return the job that trains a method on a domain.

        Its learning rate is `lr`, else the method's own, else the chosen one; that of `like`, if given (a variant
        takes its parent's). `steps` cuts the training short, `start` is a training to carry on from. `chosen` has
        the jobs that choose settings of the method, by their fields; none that its factors depend on.
        """
        by = like or row
        others = (start and start.key, *((field, job.key) for field, job in (chosen or {}).items()))
        key = ("adapter", row.model_dump_json(), by.model_dump_json(), domain, seed, lr, steps, *others)
        if key not in self._made:
            self._made[key] = self._adapter(row, by, domain, seed, lr, steps, start, chosen or {})
        return self._made[key]

    def _adapter(
        self,
        row: StudyMethod,
        like: StudyMethod,
        domain: str,
        seed: int,
        lr: float | None,
        steps: int | None,
        start: Job | None,
        chosen: Mapping[str, Job],
    ) -> Job:
        needs: dict[str, Job] = {}
        rate: Any = lr
        if rate is None:
            choice = self.rate(like)
            if choice is not None:
                needs["rate"] = choice
                rate = result("rate", "value")
            else:
                rate = self.recipe.given_rate(like)
        if (factors := self.factors(row)) is not None:
            needs["factors"] = factors
        if start is not None:
            needs["start"] = start
        needs |= chosen
        changes = {} if steps is None else {"steps": steps}
        recipe = TrainRecipe.model_validate(
            {
                "model": self.identity,
                "data": as_written(self.source(domain)),
                "method": as_written(row.method),
                "train": self.recipe.training(row, **changes).model_dump(exclude_defaults=True),
                "seed": seed,
            }
        )
        written = _recipe_settings(recipe)
        written["train"] = {**written.get("train", {}), "lr": rate}
        written["method"] |= {field: result(field, "value") for field in chosen}
        files = self.hashes([recipe.data.path, recipe.data.held_out, *_texts(recipe)])
        rate_told = f", rate {lr:g}" if lr is not None else ""
        steps_told = f", {steps} steps" if steps is not None else ""
        after = f" after {start.name.partition(' ')[2]}" if start is not None else ""
        name = f"train {row.title} on {domain}, seed {seed}{rate_told}{steps_told}{after}"
        return self.job("train", name, {"recipe": written, "files": files}, **needs)

    def factors(self, row: StudyMethod) -> Job | None:
        """Return the job that computes a method's protected factors; None for methods without."""
        if not isinstance(row.method, Spectral):
            return None
        written = row.method.model_dump(exclude_defaults=True, mode="json")
        method = {
            "name": "proj_lora",
            **{key: written[key] for key in OF_THE_FACTORS if key in written},
        }
        files = self.hashes([getattr(row.method, "calibration_text", None)])
        settings = {"method": method, "files": files}
        return self.job("factorize", f"factors of {row.title}", settings)

    def score(
        self, adapter: Job | None = None, tasks: Mapping[str, int | None] | None = None, drift: bool = True
    ) -> Job:
        """Return the job that scores an adapter, or the base, on tasks (all of the domains', if None)."""
        name = f"score {adapter.name.partition(' ')[2] if adapter else 'the base'}"
        needs = {"adapter": adapter} if adapter else {}
        return self.job("evaluate", name, self.scoring(tasks, drift and adapter is not None), **needs)

    def merge(
        self,
        adapters: Mapping[str, Job],
        rule: str,
        options: Mapping[str, Any] | None = None,
        tasks: Mapping[str, int | None] | None = None,
        drift: bool = False,
        name: str = "",
    ) -> Job:
        """Return the job that merges adapters by a rule and scores the merged model."""
        settings = {**self.scoring(tasks, drift), "rule": rule, "options": dict(options or {})}
        return self.job("merge", f"merge by {rule}: {name or ' + '.join(adapters)}", settings, **adapters)

    def inspect(self, adapter: Job, rank: int) -> Job:
        """Return the job that tells where an adapter's update lies on the spectrum of the base weights."""
        return self.job(
            "inspect", f"inspect {adapter.name.partition(' ')[2]}", {"rank": rank}, adapter=adapter
        )

    # What jobs are made of.

    @property
    def tasks(self) -> dict[str, int | None]:
        """The tasks of all domains with their numbers of items."""
        return {
            task: items for domain in self.recipe.domains.values() for task, items in domain.tasks.items()
        }

    def tasks_of(self, domains: Sequence[str]) -> dict[str, int | None]:
        """Return the tasks whose scores are those of some domains."""
        found = {}
        for name in domains:
            domain = self.recipe.domains[name]
            found[domain.task] = domain.tasks[domain.task]
        return found

    def scoring(self, tasks: Mapping[str, int | None] | None, drift: bool) -> dict[str, Any]:
        """Return the settings of jobs that score a model."""
        evaluation = self.recipe.evaluation
        asked = dict(self.tasks if tasks is None else tasks)
        texts = evaluation.drift if drift else None
        files = self._task_files(asked)
        if texts is not None:
            files |= self.hashes([source.partition(":")[0] for source in texts.texts.values()])
        return {
            "tasks": asked,
            "seed": evaluation.seed,
            "drift": None if texts is None else texts.settings(),
            "files": files,
        }

    def source(self, domain: str) -> DataSettings:
        """Return a domain's rows: the file, or the hub's where the data folder has no such file."""
        found = self.recipe.domains[domain]
        here = self.data is not None and found.train.path and (self.data / found.train.path).is_file()
        return found.hub if found.hub is not None and not here else found.train

    def hashes(self, names: Sequence[str | None]) -> dict[str, str | None]:
        """Return name → hash of files of the data folder; None for data sets of the hub, and for what is missing."""
        found: dict[str, str | None] = {}
        for name in names:
            if name is None:
                continue
            path = Path(located(name, self.data))
            found[name] = _hash(path)
            if found[name] is None and not is_hub_name(name):
                self.missing[name] = None
        return found

    def _task_files(self, tasks: Mapping[str, int | None]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for task in tasks:
            try:
                stem = task_settings(task)["file"]
            except FileNotFoundError:
                continue  # one of lm-eval's own
            path = data_file(self.data, stem) if self.data is not None else None
            found[stem] = None if path is None else _hash(path)
        return found

    def job(self, kind: str, name: str, settings: Mapping[str, Any], **needs: Job) -> Job:
        """Return a job of any kind, with the base model in its settings."""
        return Job(kind, step(kind).version, name, {"model": self.identity, **settings}, needs)


def as_written(block: Any) -> dict[str, Any]:
    """Return a block as a recipe writes it: what differs from the defaults, and a method's name.

    Keys of jobs are made of this, so that a setting that is added to the program changes no key. A preset has defaults
    of its own: what it would change is written too.
    """
    written = block.model_dump(mode="json", exclude_defaults=True)
    if not hasattr(block, "name"):
        return written
    if getattr(block, "preset", None) == "paper":
        changed = {name for name in (*PAPER, "principal_channel") if hasattr(block, name)} - set(written)
        written |= block.model_dump(mode="json", include=changed)
    return {"name": block.name, **written}


def _recipe_settings(recipe: TrainRecipe) -> dict[str, Any]:
    written = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"out", "model"})
    return {**written, "method": as_written(recipe.method), "seed": recipe.seed}


def _texts(recipe: TrainRecipe) -> list[str | None]:
    return [getattr(recipe.method, "calibration_text", None), getattr(recipe.train, "kl_text", None)]


def _hash(path: Path) -> str | None:
    """The hash of a file's bytes, read again only where it has changed; None where there is no such file."""
    return _read_hash(path, path.stat().st_mtime_ns) if path.is_file() else None


@functools.lru_cache(maxsize=256)
def _read_hash(path: Path, changed: int) -> str:
    return file_sha256(path)
