"""The jobs of a study's recipe: the same call twice gives the same job, whichever protocol makes it."""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiplora.data.examples import DataSettings
from hiplora.data.rows import is_hub_name
from hiplora.evaluation.suite import own_tasks
from hiplora.evaluation.tasks.rows import data_file
from hiplora.provenance import file_sha256, folder_identity
from hiplora.study.jobs import KINDS, Graph, Job, result
from hiplora.study.store import Place, Store
from hiplora.training import TrainRecipe
from hiplora.training.baselines.hiplora import PAPER, Spectral

if TYPE_CHECKING:  # recipes are made of protocols, which are made of this
    from hiplora.study.recipe import StudyMethod, StudyRecipe

# The settings of a method that its factors depend on; the others may differ between jobs that share them.
OF_THE_FACTORS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("principal_rank", "principal_rank_pattern", "basis", "basis_sides", "projection"),
    *("calibration_text", "calibration_tokens", "svd_tolerance"),
)


class Study:
    """A study at its place: the recipe, the jobs that follow from it and the data, and the store of their results.

    `missing` collects the files that jobs read and the data folder lacks.
    """

    def __init__(self, recipe: "StudyRecipe", place: Place):
        self.recipe, self.place, self.store = recipe, place, Store(place.folder)
        self.tasks = {domain.task: name for name, domain in recipe.domains.items()}  # of each domain, the first
        self.missing: dict[str, None] = {}
        self._hashes: dict[Path, str | None] = {}
        self._made: dict[tuple[Any, ...], Job] = {}  # protocols ask for the same jobs again and again

    @functools.cached_property
    def identity(self) -> str:
        """The base model in every job's key: its name, or the hash of a folder's files."""
        return folder_identity(self.recipe.model) or self.recipe.model

    @functools.cached_property
    def graph(self) -> Graph:
        """The jobs that the study's protocols want, and what those need."""
        protocols = filter(None, dict(self.recipe.protocols).values())
        return Graph(job for settings in protocols for job, _ in settings.runs(self))

    def seeds(self, settings: Any) -> list[int]:
        """Return the seeds of a protocol: its own, else the study's."""
        return settings.seeds or self.recipe.seeds

    def row(self, method: str) -> "StudyMethod":
        """Return a method of the study by its name."""
        return self.recipe.methods[method]

    def variant(self, method: str, title: str | None = None, **settings: Any) -> "StudyMethod":
        """Return a method with some fields of its `method` block changed, under its title or another."""
        row = self.row(method)
        changed = as_read({**as_written(row.method), **settings})
        return type(row).model_validate(
            {**row.model_dump(exclude_unset=True), "title": title or row.title, "method": changed}
        )

    # Jobs.

    def rate(self, row: "StudyMethod") -> Job | None:
        """Return the job that chooses a method's learning rate on held-out rows; None if it is given."""
        search = self.recipe.rates
        if row.lr != "chosen" or search is None:
            return None
        domains = search.domains or self.recipe.domains
        candidates = {
            rate: {f"{domain}-{rate:g}": self.adapter(row, domain, search.seed, lr=rate) for domain in domains}
            for rate in search.grid
        }
        return self.choice(f"rate of {row.title}", candidates)

    def choice(self, name: str, candidates: Mapping[float, Mapping[str, Job]]) -> Job:
        """Return the job that chooses the value whose trainings have the lowest mean loss on held-out rows.

        `candidates`: value → its trainings by name; no two values share a name.
        """
        choices = [{"value": value, "needs": list(runs)} for value, runs in candidates.items()]
        settings = {"field": "held_out_after", "prefer": "low", "candidates": choices}
        needs = {need: job for runs in candidates.values() for need, job in runs.items()}
        return self.job("collect", name, settings, **needs)

    def adapter(
        self,
        row: "StudyMethod",
        domain: str,
        seed: int,
        *,
        lr: float | None = None,
        steps: int | None = None,
        start: Job | None = None,
        widen: bool = False,
        like: "StudyMethod | None" = None,
        chosen: Mapping[str, Job] | None = None,
    ) -> Job:
        """Return the job that trains a method on a domain.

        Its learning rate is `lr`, else that of `like` (a variant's parent) or of the method itself. `steps` cuts the
        training short; `start` is a training to carry on from, which may `widen` a function-aware basis. `chosen` maps
        fields of the method, which its factors do not depend on, to the jobs that choose them.
        """
        rated, chosen = like or row, chosen or {}  # whose learning rate it is
        widen = widen and start is not None and getattr(row.method, "widens", False)
        key = (row.model_dump_json(), rated.model_dump_json(), domain, seed, lr, steps, start, widen, *chosen.items())
        if key in self._made:
            return self._made[key]
        optional = {"rate": self.rate(rated) if lr is None else None, "factors": self.factors(row), "start": start}
        needs = {name: job for name, job in {**optional, **chosen}.items() if job is not None}
        details = ("" if lr is None else f", rate {lr:g}") + ("" if steps is None else f", {steps} steps")
        details += "" if start is None else f" after {start.name.partition(' ')[2]}"
        recipe = TrainRecipe(
            model=self.identity,
            data=self.source(domain),
            method=row.method,
            train=self.recipe.training(row, **({} if steps is None else {"steps": steps})),
            seed=seed,
        )
        rate = result("rate", "value") if "rate" in needs else lr or self.recipe.given_rate(rated)
        written = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"out", "model"})
        written["train"] = {**written.get("train", {}), "lr": rate, **({"widen": True} if widen else {})}
        written["method"] = as_written(row.method) | {field: result(field, "value") for field in chosen}
        calibration = getattr(recipe.method, "calibration_text", None)
        files = self.hashes([recipe.data.path, recipe.data.held_out, calibration, recipe.train.kl_text])
        self._made[key] = self.job(
            "train", f"train {row.title} on {domain}, seed {seed}{details}",
            {"recipe": {**written, "seed": seed}, "files": files}, **needs,
        )  # fmt: skip
        return self._made[key]

    def factors(self, row: "StudyMethod") -> Job | None:
        """Return the job that computes a method's protected factors; None for methods without."""
        if not isinstance(row.method, Spectral):
            return None
        shared = row.method.model_dump(exclude_defaults=True, mode="json", include=set(OF_THE_FACTORS))
        files = self.hashes([row.method.calibration_text])
        return self.job(
            "factorize", f"factors of {row.title}", {"method": {"name": "proj_lora", **shared}, "files": files}
        )

    def score(self, adapter: Job | None = None, tasks: Mapping[str, int | None] | None = None) -> Job:
        """Return the job that scores an adapter, or the base, on tasks (None: all of the domains')."""
        listed = f" ({', '.join(tasks)})" if tasks else ""
        if adapter is None:
            return self.job("evaluate", f"score the base{listed}", self.scoring(tasks, drift=False))
        name = f"score {adapter.name.partition(' ')[2]}{listed}"
        return self.job("evaluate", name, self.scoring(tasks, drift=True), adapter=adapter)

    def inspect(self, adapter: Job, rank: int) -> Job:
        """Return the job that locates an adapter's update on the spectrum of the base weights."""
        return self.job("inspect", f"inspect {adapter.name.partition(' ')[2]}", {"rank": rank}, adapter=adapter)

    def job(self, kind: str, name: str, settings: Mapping[str, Any], **needs: Job) -> Job:
        """Return a job of any kind, with the base model in its settings."""
        return Job(kind, KINDS[kind].version, name, {"model": self.identity, **settings}, needs)

    # What jobs are made of.

    def scoring(self, tasks: Mapping[str, int | None] | None, drift: bool) -> dict[str, Any]:
        """Return the settings of jobs that score a model."""
        if tasks is None:
            domains = self.recipe.domains.values()
            tasks = {task: items for domain in domains for task, items in domain.tasks.items()}
        evaluation, files = self.recipe.evaluation, {}
        for task in tasks:
            if task in own_tasks():  # else one of lm-eval's own
                name = own_tasks()[task]["metadata"]["file"]
                path = data_file(self.place.data, name) if self.place.data is not None else None
                files[name] = None if path is None else self._hash(path)
        texts = evaluation.drift if drift else None
        files |= self.hashes(texts.files if texts else ())
        return {"tasks": dict(tasks), "seed": evaluation.seed, "drift": texts and texts.settings(), "files": files}

    def source(self, domain: str) -> DataSettings:
        """Return a domain's rows: the file, or the hub's if the data folder has no such file."""
        rows, hub = self.recipe.domains[domain].train, self.recipe.domains[domain].hub
        has_file = self.place.data is not None and rows.path and (self.place.data / rows.path).is_file()
        return hub if hub is not None and not has_file else rows

    def hashes(self, names: Iterable[str | None]) -> dict[str, str | None]:
        """Return name → hash for files of the data folder; None for hub data sets and missing files."""
        hashes = {name: self._hash(Path(self.place.located(name))) for name in names if name is not None}
        self.missing |= {name: None for name, digest in hashes.items() if digest is None and not is_hub_name(name)}
        return hashes

    @property
    def files(self) -> list[Path]:
        """The files that jobs read."""
        return [path for path, digest in self._hashes.items() if digest is not None]

    def _hash(self, path: Path) -> str | None:
        if path not in self._hashes:
            self._hashes[path] = file_sha256(path) if path.is_file() else None
        return self._hashes[path]


def as_written(method: Any) -> dict[str, Any]:
    """Return a method as it stands in the keys of jobs: its name and what differs from the defaults.

    So a new field changes no key. Fields for which the preset "paper" has a default of its own are written too, and
    `gradient_projection` where it is on: records without it are of trainings whose gradients were not projected.
    """
    written = method.model_dump(mode="json", exclude_defaults=True, exclude={"gradient_projection"})
    if getattr(method, "is_closed", False) and method.gradient_projection:
        written["gradient_projection"] = True
    if getattr(method, "preset", None) == "paper":
        changed = {name for name in (*PAPER, "principal_channel") if hasattr(method, name)} - set(written)
        written |= method.model_dump(mode="json", include=changed)
    return {"name": method.name, **written}


def as_read(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method that `as_written` wrote, for a recipe."""
    spectral = written["name"] in ("hiplora", "proj_lora")
    closed = spectral and written.get("projection") != "soft" and written.get("residual_projection", True)
    return {"gradient_projection": False, **written} if closed else dict(written)
