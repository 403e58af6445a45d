"""The protocols that a study can run, each with its settings."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hiplora.data.examples import Block

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rules = Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
ALPHAEDIT = "alphaedit"  # the method of editing that is none of training
SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]  # becomes part of the names of files
PROJECT_TAUS = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]

NAMING = {
    "texts": ("text",),
    "methods": (
        *("methods", "method", "reference", "plain", "attention", "early"),
        *("hiplora", "lora", "proj_lora", "pissa", "split_lora", "adalora"),
    ),
    "domains": ("domains", "domain", "early_domains", "order"),
}


class Protocol(Block):
    """What all protocols have."""

    seeds: list[Seed] | None = Field(default=None, min_length=1, description="Its seeds, if not the study's.")

    @model_validator(mode="after")
    def _none_twice(self) -> "Protocol":
        for name in ("seeds", "methods", "values", "rates", "domains", "sizes", "modes"):
            values = getattr(self, name, None)
            if isinstance(values, list) and len(set(values)) < len(values):
                raise ValueError(f"`{name}` has one twice: {values}; name each once")
        return self

    def named(self, kind: str) -> Iterator[tuple[str, list[str]]]:
        """Yield its fields that name `methods`, `domains` or drift `texts` of the study, with the names."""
        for field in NAMING[kind]:
            value = getattr(self, field, None)
            if value is not None:
                yield field, [value] if isinstance(value, str) else list(value)


class OfMethods(Protocol):
    """A protocol that compares methods."""

    methods: list[str] = Field(min_length=1, description="Methods to compare, in the order of the table.")


class SingleTask(OfMethods):
    """Each method trained on each domain alone, scored on all: the paper's single-task table with Retain."""


class AdaLora(OfMethods):
    """The same table for the comparison with AdaLoRA."""


class Merging(OfMethods):
    """The adapters of all domains merged: scores before, after, and their difference."""

    rules: Rules = Field(
        default={"addition": {}}, description="Merge rule → its options, as of `hiplora merge`."
    )
    passing: dict[str, Positive | None] = Field(
        default={}, description="Further tasks, scored for the adapter of the domain that has such a task."
    )


class MergeFail(OfMethods):
    """Merges of several adapters drawn from all seeds: how many fail, over the threshold τ."""

    rules: Rules = Field(default={"addition": {}}, description="Merge rule → its options.")
    sizes: list[Annotated[int, Field(ge=2)]] = Field(
        default=[2, 3, 4], min_length=1, description="How many adapters are merged."
    )
    instances: Positive = Field(
        default=20, description="Merges of each size drawn for each seed; all, where there are fewer."
    )
    taus: list[Share] = Field(default=PROJECT_TAUS, min_length=1, description="Thresholds.")
    tau: Share = Field(default=0.9, description="The one that is reported first.")
    seed: int = Field(default=0, ge=0, description="Draws the merges, the same for all methods.")
    drift: bool = Field(default=False, description="Measure the drift of every merged model too.")


class LambdaCurve(Protocol):
    """Scores against Retain over the price λ of the gains."""

    method: str = Field(description="A HiP-LoRA with gains.")
    values: list[Annotated[float, Field(ge=0)]] = Field(min_length=2, description="λ.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")


class Allocation(OfMethods):
    """Where the updates lie on the spectrum of the base weights."""

    rank: Positive = Field(default=32, description="Leading directions that count as principal.")
    domains: list[str] | None = Field(default=None, description="Domains of the adapters; all, if empty.")


class Ablations(Protocol):
    """The method without its budget, without the projection, with zero init, without gains."""

    method: str = Field(description="A HiP-LoRA with gains: the full method.")
    domains: list[str] | None = Field(default=None, description="Domains to train on; all, if empty.")
    merge: bool = Field(default=True, description="Merge the adapters of the domains too, for MergeFail.")
    tau: Share = Field(default=0.9, description="Threshold of MergeFail.")


class Continual(OfMethods):
    """One adapter trained on one domain after the other."""

    order: list[str] | None = Field(
        default=None, min_length=2, description="Domains in order; as they stand."
    )


class EditedFacts(Block):
    """A set of edits."""

    edits: str = Field(default="builtin", description="`builtin`, or a file of the data folder.")
    title: str = Field(default="", description="As tables show it.")
    category: Literal["Entity/Attribute", "Relation/Fact", "Temporal/Numeric"] | None = Field(
        default=None,
        description="The edits of one category alone, so that their locality is that category's.",
    )
    limit: Positive | None = Field(default=None, description="The first so many edits.")
    neighbours: bool = Field(default=False, description="Ask the file's neighbourhood prompts too.")


class Editing(OfMethods):
    """Facts edited by each method: success, paraphrases, locality."""

    sets: dict[SetName, EditedFacts] = Field(
        default={"edit-set": EditedFacts()}, min_length=1, description="Sets of edits by name."
    )
    modes: list[Literal["single", "batch", "sequential"]] = Field(
        default=["batch"], min_length=1, description="How edits are made."
    )
    alphaedit: dict[str, Any] | None = Field(
        default=None, description="Settings of AlphaEdit as one more row; none: leave it out."
    )
    steps: Positive = Field(default=500, description="Training steps of a batch.")
    single_steps: Positive = Field(default=20, description="Training steps of a single edit.")
    lr: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Method → learning rate on edits, where it is not `train.lr`; a method's own or chosen rate is "
        "for tasks, and has no say here.",
    )
    edits_per_batch: Positive | None = Field(
        default=None, description="Edits of a batch (sequential: a stage)."
    )
    sample: Positive | None = Field(default=None, description="How many edits are made one by one.")
    rows: Positive | None = Field(default=None, description="Edits in one training step.")
    questions: int = Field(default=500, ge=0, description="Unrelated questions for the locality.")


class RankOne(Protocol):
    """Single directions of single weights removed, flipped or shaken."""

    modules: list[str] | str | None = Field(default=None, description="Modules; the attention projections.")
    layers: list[int] | None = Field(default=None, description="Layers; first, middle and last.")
    directions: Positive = Field(default=8, description="Directions of each module.")
    choice: Literal["log", "even", "energy", "random"] = Field(default="log", description="How chosen.")
    bases: list[Literal["weight", "activation"]] = Field(
        default=["weight"], min_length=1, description="Whose directions."
    )
    kinds: list[str] = Field(
        default=["zero", "flip", "noise_0.1"], min_length=1, description="Interventions."
    )
    draws: Positive = Field(default=1, description="Draws of the noise.")
    tokens: Annotated[int, Field(ge=2)] = Field(default=512, description="Tokens of each text.")


class Selection(Protocol):
    """Coarse to fine on held-out rows: λ at the given γ and k, then γ, then r if some are named, then k."""

    method: str = Field(description="A HiP-LoRA with gains.")
    domain: str = Field(description="Domain whose held-out rows decide.")
    lambdas: list[Annotated[float, Field(ge=0)]] = Field(min_length=1, description="λ to try.")
    gammas: list[Annotated[float, Field(ge=0)]] = Field(min_length=1, description="γ to try.")
    residual_ranks: list[Positive] = Field(
        default=[], description="r to try, at the same `lora_alpha`; none: r is as the method has it."
    )
    ranks: list[Positive] = Field(min_length=1, description="k to try.")


class CostTable(OfMethods):
    """Throughput, memory, the one-time cost of the factors."""

    domain: str = Field(description="Domain whose rows are trained on.")
    warmup: int = Field(default=20, ge=0, description="Steps before the measured ones.")
    steps: Positive = Field(default=200, description="Measured steps.")
    repeats: Positive = Field(
        default=1,
        description="Times that each method is timed, in turn with the others; of one there is no interval.",
    )


class Frontier(Protocol):
    """Learning against drift: every method of a domain at every learning rate and seed."""

    domains: dict[str, list[str]] = Field(
        min_length=1, description="Domain to train on → methods that are compared there."
    )
    rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=2, description="Learning rates, for all methods."
    )
    early: dict[str, list[Positive]] = Field(
        default={}, description="Method → further, smaller numbers of steps: early stops."
    )
    early_domains: list[str] | None = Field(
        default=None, description="Domains of the early stops; all, if empty."
    )
    tasks: dict[str, Positive | None] = Field(
        default={},
        description="Tasks whose likelihoods are a drift too, with their items; none: all of the domains'.",
    )
    plain: list[str] = Field(
        min_length=1,
        description="The plain LoRAs among the methods: the best tuned of them is what is to be beaten.",
    )
    attention: str | None = Field(
        default=None, description="The one among them that adapts the attention only."
    )
    reference: str = Field(description="The method that is compared with all others.")

    def named(self, kind: str) -> Iterator[tuple[str, list[str]]]:
        """Yield the methods of each domain too."""
        yield from super().named(kind)
        if kind == "methods":
            for domain, methods in self.domains.items():
                yield f"domains.{domain}", methods

    @model_validator(mode="after")
    def _roles_are_compared(self) -> "Frontier":
        for domain, methods in self.domains.items():
            if self.reference not in methods:
                raise ValueError(
                    f"`domains.{domain}` lacks the `reference` {self.reference!r}, which all are compared with; add it"
                )
        compared = {method for methods in self.domains.values() for method in methods}
        attention = [self.attention] if self.attention is not None else []
        for field, names in (("plain", self.plain), ("attention", attention), ("early", list(self.early))):
            for name in names:
                if name not in compared:
                    raise ValueError(f"`{field}` names {name!r}, which no domain compares; add it to one")
        return self


class Aims(Protocol):
    """What the reference is to reach against the plain LoRAs, checked on what the other protocols found."""

    reference: str = Field(description="The method with the aims.")
    plain: list[str] = Field(min_length=1, description="The plain LoRAs, of which the best counts.")
    attention: str | None = Field(
        default=None, description="The one among them that adapts the attention only."
    )


class Claims(Protocol):
    """What the paper claims, checked on what the other protocols found."""

    hiplora: str = Field(description="The paper's method.")
    lora: str = Field(description="LoRA.")
    proj_lora: str | None = Field(default=None, description="Proj-LoRA.")
    pissa: str | None = Field(default=None, description="PiSSA.")
    split_lora: str | None = Field(default=None, description="Split-LoRA.")
    adalora: str | None = Field(default=None, description="AdaLoRA.")


class BenchmarkPoint(Block):
    """A method's result as a benchmark of others reports it."""

    title: str = Field(min_length=1, description="The method, as tables show it.")
    accuracy: Annotated[float, Field(ge=0, le=1)] = Field(description="Share of right answers.")
    forgetting: float = Field(description="How much the loss on its texts grew, in nats a token.")
    source: str = Field(min_length=1, description="Where it is reported.")


class MetaMath(OfMethods):
    """PEFT's own comparison of methods: accuracy against forgetting, with its results' files in its format."""

    domain: str = Field(description="Domain that is trained on; its first task gives the accuracy.")
    text: str = Field(description="Text of `evaluation.drift` whose loss tells the forgetting.")
    points: list[BenchmarkPoint] = Field(
        default=[], description="What the benchmark reports itself, to set beside what is measured here."
    )


class Protocols(Block):
    """Which protocols a study runs."""

    single_task: SingleTask | None = Field(default=None, description="Single-task table with Retain.")
    merging: Merging | None = Field(default=None, description="Merging: before, after, difference.")
    merge_fail: MergeFail | None = Field(default=None, description="MergeFail over sizes and thresholds.")
    adalora: AdaLora | None = Field(default=None, description="Comparison with AdaLoRA.")
    lambda_curve: LambdaCurve | None = Field(default=None, description="Trade-off over λ.")
    allocation: Allocation | None = Field(default=None, description="Spectral allocation.")
    ablations: Ablations | None = Field(default=None, description="Ablations and their dynamics.")
    continual: Continual | None = Field(default=None, description="Continual tuning.")
    editing: Editing | None = Field(default=None, description="Knowledge editing.")
    rank_one: RankOne | None = Field(default=None, description="Rank-1 interventions.")
    selection: Selection | None = Field(default=None, description="Coarse-to-fine selection.")
    cost: CostTable | None = Field(default=None, description="Cost table.")
    frontier: Frontier | None = Field(default=None, description="Frontiers of learning against drift.")
    metamath: MetaMath | None = Field(default=None, description="PEFT's own comparison of methods.")
    aims: Aims | None = Field(default=None, description="Aims of the function-aware basis.")
    claims: Claims | None = Field(default=None, description="The paper's claims, one by one.")
