"""`hiplora merge`: several adapters of one base model as one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import (
    JSON_OPTION,
    OVERWRITE_OPTION,
    counted,
    emit_json,
    print_table,
    progress,
)
from hiplora.cli.eval import CODE_HELP, DATA_HELP, LIMIT_HELP, SUITE_HELP
from hiplora.cli.export import print_report
from hiplora.cli.protect import (
    PROJECTION_HELP,
    RANK_HELP,
    STRENGTH_HELP,
    TEXT_HELP,
    TOKENS_HELP,
    Projection,
    print_protection,
)
from hiplora.cli.verdicts import print_verdicts
from hiplora.errors import ConfigError
from hiplora.merging.options import parse_option
from hiplora.merging.registry import RULES, Rule
from hiplora.merging.registry import rule as find_rule

if TYPE_CHECKING:
    from hiplora.adapters import AdapterUpdate

_WITH_PROTECT = " Only with --protect; "
_WITH_EVALUATE = " Only with --evaluate."
_FACTOR_RULES = ", ".join(name for name, rule in RULES.items() if rule.kind == "factors")
_DENSE_RULES = ", ".join(name for name, rule in RULES.items() if rule.kind == "dense")
_LISTED_LOSSES = 10


def _shown_options(rule: Rule) -> str:
    values = {
        name: json.dumps(value) if value is not None else "none" for name, value in rule.defaults.items()
    }
    return f"{rule.name}: " + ", ".join(f"{name}={value}" for name, value in values.items())


METHOD_HELP = "Merge rule. " + "; ".join(f"{name}: {rule.summary}" for name, rule in RULES.items()) + "."
WEIGHTS_HELP = "One number for each adapter, with commas between, as 1,0.5; else 1 for each."
SET_HELP = (
    "Option of the rule, as density=0.3; may be repeated. With their defaults, "
    + "; ".join(_shown_options(rule) for rule in RULES.values() if rule.defaults)
    + "."
)


class Format(str, Enum):
    """What to write."""

    lora = "lora"
    dense = "dense"
    hiplora = "hiplora"


def command(
    adapters: list[str] = typer.Argument(
        ...,
        help="Adapter folders, of any methods and ranks, over one base; for --evaluate as TASK=FOLDER, the task that "
        "each was trained for.",
    ),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    method: str = typer.Option("addition", "--method", help=METHOD_HELP),
    weights: str | None = typer.Option(None, "--weights", help=WEIGHTS_HELP),
    set_: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help=SET_HELP),
    rank: int | None = typer.Option(
        None,
        "--rank",
        help="Cut every module down to this rank, and report what is lost; for --format hiplora, the residual channel.",
    ),
    format: Format | None = typer.Option(
        None,
        "--format",
        help="lora: a plain LoRA adapter; dense: a standalone model; hiplora: a HiP-LoRA adapter, where all share a "
        f"basis. If not given: dense for {_DENSE_RULES} without --rank, else lora.",
    ),
    base: str | None = typer.Option(
        None, "--base", help="Base model, if not the one that the adapters name."
    ),
    protect: bool = typer.Option(
        False, "--protect", help="Project the merge off its layers' inputs, as hiplora protect does."
    ),
    principal_rank: str | None = typer.Option(
        None, "--principal-rank", help=f"{RANK_HELP}{_WITH_PROTECT}else 32."
    ),
    projection: Projection | None = typer.Option(
        None, "--projection", help=f"{PROJECTION_HELP}{_WITH_PROTECT}else hard."
    ),
    strength: float | None = typer.Option(
        None, "--strength", min=0.0, max=1.0, help=f"{STRENGTH_HELP}{_WITH_PROTECT}else 1."
    ),
    text: str | None = typer.Option(None, "--text", help=f"{TEXT_HELP} Only with --protect."),
    tokens: int | None = typer.Option(
        None, "--tokens", min=2, help=f"{TOKENS_HELP}{_WITH_PROTECT}else 10000."
    ),
    html: Path | None = typer.Option(None, "--html", help="Also write the report as a page to this file."),
    evaluate: str | None = typer.Option(
        None,
        "--evaluate",
        help=f"Score the adapters alone and the merge, as hiplora merge-check does. {SUITE_HELP}",
    ),
    data: Path | None = typer.Option(None, "--data", help=f"{DATA_HELP}{_WITH_EVALUATE}"),
    limit: int | None = typer.Option(None, "--limit", min=1, help=f"{LIMIT_HELP}{_WITH_EVALUATE}"),
    seed: int = typer.Option(0, "--seed", min=0, help=f"Seed of the choice of items.{_WITH_EVALUATE}"),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help=f"Rows of a batch.{_WITH_EVALUATE}"),
    allow_code: bool = typer.Option(False, "--allow-code-execution", help=f"{CODE_HELP}{_WITH_EVALUATE}"),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Merge adapters of one base model into one, and check what is written.

    Adapters of different base weights are refused. With --protect, the merge is projected off the strongest
    directions of what its layers are fed, and its drift from the base model before and after is reported.

    Each merge comes with a report of where the adapters conflict (merge-report.json in the folder; --html makes a
    page of it). With --evaluate it also says what the merge broke: each task before and after, and MergeFail.

    Example:

        hiplora merge runs/medicine runs/law --weights 1,0.5 --out runs/both
    """
    from hiplora.adapters import check_out, read_update
    from hiplora.evaluation.evaluate import EvalSettings
    from hiplora.evaluation.mounting import name_adapters
    from hiplora.files import check_output_file
    from hiplora.merging import merge

    how = {"strength": strength, "text": text, "tokens": tokens}
    how |= {"principal_rank": principal_rank, "projection": projection.value if projection else None}
    how = {name: value for name, value in how.items() if value is not None}
    rule, options = find_rule(method), parse_options(method, set_)
    form = _chosen_format(format, rule, rank)
    _check_protect(protect, how, form, rule, rank)
    named = name_adapters(adapters)
    for folder in named.values():
        check_out(out, overwrite, str(folder))
    if html is not None:
        check_output_file(html, overwrite, "--html")
    numbers = parse_weights(weights)
    updates = {name: read_update(folder, base) for name, folder in named.items()}
    update: Any = merge(
        list(updates.values()),
        method,
        numbers,
        base=base,
        rank=rank,
        keep_channels=form is Format.hiplora,
        options=options,
        wrap=lambda names: progress(list(names), "merging modules"),
    )
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "merge",
        "adapters": list(map(str, named.values())),
        "method": method,
        "weights": numbers or [1.0] * len(adapters),
        "options": options,
    }
    if rank is not None:
        record["truncation"] = update.to_json()
    if protect:
        update, record["protection"] = _protected(update, how)
    report = _report(updates, record)
    if evaluate is not None:
        settings = EvalSettings(evaluate, data, limit, seed, batch_size, allow_code)
        checked = _evaluated(adapters, settings, update, record, base, out)
        record["evaluation"], report["evaluation"] = checked
    record["export"] = _write(update, out, form, overwrite, record)
    record["report"] = str(_write_report(report, out, html))
    if as_json:
        emit_json(record | {"conflicts": report})
        return
    _print(record)
    print_table(*_conflict_table(report))
    if evaluate is not None:
        print_verdicts(record["evaluation"])


def _report(updates: "dict[str, AdapterUpdate]", record: dict[str, Any]) -> dict[str, Any]:
    """Measure where the adapters conflict, under the names that they were given."""
    from hiplora.merging.report import merge_report

    return merge_report(
        [replace(update, source=name) for name, update in updates.items()],
        record["weights"],
        record,
        wrap=lambda modules: progress(list(modules), "how the adapters conflict"),
    )


def _evaluated(
    adapters: list[str], settings: Any, update: Any, record: dict[str, Any], base: str | None, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score the adapters alone and the merge as it is going to be written; for the record, and for the page."""
    from hiplora.study.merge_check import MergeSettings, merge_check
    from hiplora.study.merge_verdict import page_evaluation

    method = record["method"]
    how = MergeSettings((method,), record["weights"], record["options"], base=base)
    with counted() as bars:
        checked = merge_check(adapters, settings, how, merged=update, partial=out, progress=bars)
    return checked, page_evaluation(checked, method)


def _write_report(report: dict[str, Any], out: Path, html: Path | None) -> Path:
    from hiplora.files import write_atomic
    from hiplora.reporting.merge_page import save_merge_html

    if html is not None:
        save_merge_html(report, html)
    return write_atomic(out / "merge-report.json", json.dumps(report, indent=1))


def _conflict_table(report: dict[str, Any]) -> tuple[str, Sequence[str], list[tuple[str, ...]]]:
    from hiplora.reporting.merge_summary import conflict_table

    return conflict_table(report)


def _chosen_format(format: Format | None, rule: Rule, rank: int | None) -> Format:
    """Return the format to write, or say why the one that was asked for cannot be.

    Raises:
        ConfigError: naming both ways out.
    """
    full = rule.kind == "dense" and rank is None
    if format is Format.hiplora and rule.name != "addition":
        raise ConfigError(
            f"--format hiplora: {rule.name} keeps no gains apart, only addition does; pass --format lora or dense"
        )
    if format is Format.lora and full:
        raise ConfigError(
            f"--format lora: {rule.name} gives updates of full rank, which no LoRA adapter holds; pass --rank, as "
            "--rank 64, to keep the strongest directions of each module, or --format dense"
        )
    return format or (Format.dense if full else Format.lora)


def _check_protect(protect: bool, how: dict[str, Any], form: Format, rule: Rule, rank: int | None) -> None:
    if how and not protect:
        option = next(iter(how)).replace("_", "-")
        raise ConfigError(f"--{option}: only with --protect; leave it out or pass --protect")
    if protect and form is Format.hiplora:
        raise ConfigError(
            "--protect: its result is no HiP-LoRA adapter; write it with --format lora or dense"
        )
    if protect and rule.kind == "dense" and rank is None:
        raise ConfigError(
            f"--protect: it projects low-rank updates, and {rule.name} gives updates of full rank; pass --rank, or a "
            f"rule that keeps to low rank: {_FACTOR_RULES}"
        )


def parse_options(method: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return all options of a rule, those set by `name=value` among them.

    Raises:
        ConfigError: there is no such rule or option, or a value makes no sense.
    """
    return asdict(find_rule(method).make_options(dict(map(parse_option, settings))))


def parse_weights(text: str | None) -> list[float] | None:
    """Read numbers with commas between; None stays None.

    Raises:
        ConfigError: one of them is no number.
    """
    if text is None:
        return None
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise ConfigError(
                f"--weights: {part.strip()!r} is not a number; pass numbers with commas between, as 1,0.5"
            ) from None
    return numbers


def _protected(update: "AdapterUpdate", given: dict[str, Any]) -> "tuple[AdapterUpdate, dict[str, Any]]":
    from hiplora.protect import ProtectSettings, protect_update
    from hiplora.spectral import parse_rank

    if "principal_rank" in given:
        given = given | {"principal_rank": parse_rank(given["principal_rank"])}
    return protect_update(update, ProtectSettings(**given), wrap=progress)


def _write(update: Any, out: Path, form: Format, overwrite: bool, record: dict[str, Any]) -> dict[str, Any]:
    from hiplora.adapters import save_as_hiplora, save_dense
    from hiplora.merging import save_merged

    details = {
        "merge": {key: value for key, value in record.items() if key not in ("schema", "kind", "protection")}
    }
    details |= {key: record[key] for key in ("protection",) if key in record}
    if form is Format.hiplora:
        return save_as_hiplora(update, out, overwrite=overwrite, details=details).to_json()
    if form is Format.lora:
        return save_merged(update, out, overwrite=overwrite, details=details).to_json()
    return save_dense(
        update,
        out,
        overwrite=overwrite,
        details=details,
        wrap=lambda names: progress(list(names), "writing tensors"),
    ).to_json()


def _print(record: dict[str, Any]) -> None:
    if "truncation" in record:
        _print_truncation(record["truncation"])
    if "protection" in record:
        print_protection(record["protection"])
    print_report(record["export"], f"{record['method']} of {len(record['adapters'])} adapters")


def _print_truncation(truncation: dict[str, Any]) -> None:
    modules = truncation["modules"]
    rest = len(modules) - _LISTED_LOSSES
    rows = [(entry["module"], f"{entry['relative_error']:.2e}") for entry in modules[:_LISTED_LOSSES]]
    if rest > 0:
        rows.append((f"{rest} more, each of them less (--json lists all)", ""))
    print_table(f"Cut down to rank {truncation['rank']}", ("Module", "Lost of ‖ΔW‖"), rows)
