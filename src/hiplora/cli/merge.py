"""`hiplora merge`: several adapters of one base model as one."""

import json
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from hiplora.cli.common import (
    JSON_OPTION,
    OUT_OPTION,
    OVERWRITE_OPTION,
    emit_json,
    print_frame,
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
from hiplora.errors import ConfigError
from hiplora.merging.rules import RULES, Rule, find_rule

_FACTOR_RULES = ", ".join(name for name, rule in RULES.items() if rule.kind == "factors")
_DENSE_RULES = ", ".join(name for name, rule in RULES.items() if rule.kind == "dense")
METHOD_HELP = "Merge rule. " + "; ".join(f"{name}: {rule.summary}" for name, rule in RULES.items()) + "."
WEIGHTS_HELP = "One number per adapter, separated by commas, for example 1,0.5. Default: 1 each."
SET_HELP = "Option of the rule, for example density=0.3; may be repeated. Defaults: " + "; ".join(
    f"{name}: " + ", ".join(f"{key}={json.dumps(value)}" for key, value in rule.defaults.items())
    for name, rule in RULES.items()
    if rule.defaults
)
BASE_OPTION = typer.Option(None, "--base", help="Base model, if not the one that the adapters name.")


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
    out: Path = OUT_OPTION,
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
        f"basis. Default: dense for {_DENSE_RULES} without --rank, else lora.",
    ),
    base: str | None = BASE_OPTION,
    protect: bool = typer.Option(
        False, "--protect", help="Project the merge off its layers' inputs, as hiplora protect does."
    ),
    principal_rank: str | None = typer.Option(None, "--principal-rank", help=f"{RANK_HELP} With --protect."),
    projection: Projection | None = typer.Option(
        None, "--projection", help=f"{PROJECTION_HELP} With --protect."
    ),
    strength: float | None = typer.Option(
        None, "--strength", min=0.0, max=1.0, help=f"{STRENGTH_HELP} With --protect."
    ),
    text: str | None = typer.Option(None, "--text", help=f"{TEXT_HELP} With --protect."),
    tokens: int | None = typer.Option(None, "--tokens", min=2, help=f"{TOKENS_HELP} With --protect."),
    html: Path | None = typer.Option(None, "--html", help="Also write the report as a page to this file."),
    evaluate: str | None = typer.Option(
        None,
        "--evaluate",
        help=f"Score the adapters alone and the merge, as hiplora merge-check does. {SUITE_HELP}",
    ),
    data: Path | None = typer.Option(None, "--data", help=f"{DATA_HELP} With --evaluate."),
    limit: int | None = typer.Option(None, "--limit", min=1, help=f"{LIMIT_HELP} With --evaluate."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the choice of items. With --evaluate."),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Rows per batch. With --evaluate."),
    allow_code: bool = typer.Option(False, "--allow-code-execution", help=f"{CODE_HELP} With --evaluate."),
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Merge adapters of one base model into one, and check what is written.

    Adapters of different base weights are refused. With --protect, the merge is projected off the strongest
    directions of its layers' inputs, and its drift from the base model before and after is reported.

    Each merge comes with a report of where the adapters conflict (merge-report.json in the folder; --html makes a
    page of it). With --evaluate it also reports what the merge broke: each task before and after, and MergeFail.

    Example:

        hiplora merge runs/medicine runs/law --weights 1,0.5 --out runs/both
    """
    from hiplora.adapters import check_out, read_update
    from hiplora.evaluation.evaluate import EvalSettings
    from hiplora.evaluation.mounting import name_adapters
    from hiplora.files import check_output_file, write_atomic
    from hiplora.merge_check import (
        MergeSettings,
        conflict_table,
        merge_check,
        save_merge_page,
    )
    from hiplora.merging.conflict import merge_report
    from hiplora.merging.merger import merge

    how = {"strength": strength, "text": text, "tokens": tokens, "principal_rank": principal_rank}
    how |= {"projection": projection.value if projection else None}
    how = {name: value for name, value in how.items() if value is not None}
    rule = find_rule(method)
    options = rule.options(dict(map(parse_option, set_)))
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
    report = merge_report(
        [replace(one, source=name) for name, one in updates.items()],
        record["weights"],
        record,
        wrap=lambda modules: progress(list(modules), "how the adapters conflict"),
    )
    if evaluate is not None:
        settings = EvalSettings(evaluate, data, limit, seed, batch_size, allow_code)
        judged = MergeSettings((method,), record["weights"], options, base=base)
        record["evaluation"] = merge_check(
            adapters, settings, judged, merged=update, partial=out, progress=True
        )
    record["export"] = _write(update, out, form, overwrite, record)
    record["report"] = str(write_atomic(out / "merge-report.json", json.dumps(report, indent=1)))
    if html is not None:
        save_merge_page(html, report, record.get("evaluation"))
    if as_json:
        emit_json(record | {"conflicts": report})
        return
    _print(record)
    print_frame("Modules that conflict most", conflict_table(report))
    if evaluate is not None:
        from hiplora.cli.merge_check import print_verdicts  # which imports this module

        print_verdicts(record["evaluation"])


def parse_option(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as JSON where it is JSON; else as text, which the rule refuses.

    Raises:
        ConfigError: there is no name or no equals sign.
    """
    name, equals, raw = (part.strip() for part in text.partition("="))
    if not name or not equals:
        raise ConfigError(f"--set {text}: expected name=value, for example --set density=0.2")
    try:
        return name, json.loads("null" if raw == "none" else raw)
    except json.JSONDecodeError:
        return name, raw


def parse_weights(text: str | None) -> list[float] | None:
    """Read numbers separated by commas; None stays None.

    Raises:
        ConfigError: one of them is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text}: expected numbers separated by commas, for example 1,0.5"
        ) from None


def _chosen_format(format: Format | None, rule: Rule, rank: int | None) -> Format:
    full = rule.kind == "dense" and rank is None
    if format is Format.hiplora and rule.name != "addition":
        raise ConfigError(
            f"--format hiplora: {rule.name} keeps no gains apart, only addition does; pass --format lora or dense"
        )
    if format is Format.lora and full:
        raise ConfigError(
            f"--format lora: {rule.name} gives updates of full rank, which no LoRA adapter holds; pass --rank, for "
            "example --rank 64, to keep the strongest directions of each module, or --format dense"
        )
    return format or (Format.dense if full else Format.lora)


def _check_protect(protect: bool, how: dict[str, Any], form: Format, rule: Rule, rank: int | None) -> None:
    if how and not protect:
        option = next(iter(how)).replace("_", "-")
        raise ConfigError(f"--{option}: only with --protect; leave it out or pass --protect")
    if protect and form is Format.hiplora:
        raise ConfigError(
            "--protect: its result is not a HiP-LoRA adapter; write it with --format lora or dense"
        )
    if protect and rule.kind == "dense" and rank is None:
        raise ConfigError(
            f"--protect: it projects low-rank updates, and {rule.name} gives updates of full rank; pass --rank, or a "
            f"rule that keeps to low rank: {_FACTOR_RULES}"
        )


def _protected(update: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from hiplora.protect import ProtectSettings, protect_update
    from hiplora.spectral import parse_rank

    if "principal_rank" in given:
        given = given | {"principal_rank": parse_rank(given["principal_rank"])}
    return protect_update(update, ProtectSettings(**given), wrap=progress)


def _write(update: Any, out: Path, form: Format, overwrite: bool, record: dict[str, Any]) -> dict[str, Any]:
    from hiplora.adapters import save_as_hiplora, save_dense
    from hiplora.merging.merger import save_merged

    apart = ("schema", "kind", "protection")
    details = {"merge": {key: value for key, value in record.items() if key not in apart}}
    details |= {key: record[key] for key in ("protection",) if key in record}
    save = {Format.hiplora: save_as_hiplora, Format.lora: save_merged, Format.dense: save_dense}[form]
    return save(update, out, overwrite=overwrite, details=details).to_json()


def _print(record: dict[str, Any]) -> None:
    if "truncation" in record:
        modules: Sequence[dict[str, Any]] = record["truncation"]["modules"]
        rows = [(one["module"], f"{one['relative_error']:.2e}") for one in modules[:10]]
        title = f"Cut down to rank {record['truncation']['rank']} (the ten modules that lost most)"
        print_table(title, ("Module", "Lost of ‖ΔW‖"), rows)
    if "protection" in record:
        print_protection(record["protection"])
    print_report(record["export"], f"{record['method']} of {len(record['adapters'])} adapters")
