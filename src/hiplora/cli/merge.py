"""`hiplora merge`: several adapters of one base model as one."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hiplora.cli.common import JSON_OPTION, OVERWRITE_OPTION, emit_json, print_table, progress
from hiplora.cli.protect import (
    PROJECTION_HELP,
    RANK_HELP,
    STRENGTH_HELP,
    TEXT_HELP,
    TOKENS_HELP,
    Projection,
    print_protection,
)
from hiplora.merging.registry import RULES

if TYPE_CHECKING:
    from hiplora.export import AdapterUpdate

_WITH_PROTECT = " Only with --protect; "
_METHODS = "; ".join(f"{name}: {rule.summary}" for name, rule in RULES.items())


class Format(str, Enum):
    """What to write."""

    lora = "lora"
    dense = "dense"
    hiplora = "hiplora"


def command(
    adapters: list[Path] = typer.Argument(
        ..., help="Adapter folders, of any methods and ranks, over one base."
    ),
    out: Path = typer.Option(..., "--out", help="Output folder; it must not exist yet."),
    method: str = typer.Option("addition", "--method", help=f"Merge rule. {_METHODS}."),
    weights: str | None = typer.Option(
        None, "--weights", help="One number for each adapter, with commas between, as 1,0.5; else 1 for each."
    ),
    format: Format = typer.Option(
        Format.lora,
        "--format",
        help="lora: a plain LoRA adapter; dense: a standalone model; hiplora: a HiP-LoRA adapter, where all share a "
        "basis.",
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
    overwrite: bool = OVERWRITE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Merge adapters of one base model into one, and check what is written.

    Adapters of different base weights are refused. With --protect, the merge is projected off the strongest
    directions of what its layers are fed, and its drift from the base model before and after is reported.

    Example:

        hiplora merge runs/medicine runs/law --weights 1,0.5 --out runs/both
    """
    from hiplora.errors import ConfigError
    from hiplora.export.folder import check_out
    from hiplora.merging import merge

    given = {"strength": strength, "text": text, "tokens": tokens}
    given |= {"principal_rank": principal_rank, "projection": projection.value if projection else None}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not protect:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option}: only with --protect; leave it out or pass --protect")
    if protect and format is Format.hiplora:
        raise ConfigError(
            "--protect: its result is no HiP-LoRA adapter; write it with --format lora or dense"
        )
    for adapter in adapters:
        check_out(out, overwrite, str(adapter))
    update = merge(adapters, method, _weights(weights), base=base)
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "merge",
        "adapters": list(map(str, adapters)),
        "method": method,
    }
    if protect:
        update, record["protection"] = _protected(update, given)
    record["export"] = _write(update, out, format, overwrite, record)
    emit_json(record) if as_json else _print(record)


def _weights(text: str | None) -> list[float] | None:
    from hiplora.errors import ConfigError

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
    from hiplora.spectral import parse_rank
    from hiplora.study.protection import ProtectSettings, protect_update

    if "principal_rank" in given:
        given = given | {"principal_rank": parse_rank(given["principal_rank"])}
    return protect_update(update, ProtectSettings(**given), wrap=progress)


def _write(
    update: "AdapterUpdate", out: Path, format: Format, overwrite: bool, record: dict[str, Any]
) -> dict[str, Any]:
    from hiplora.export import save_as_hiplora, save_dense
    from hiplora.merging import save_merged

    if format is Format.hiplora:
        return save_as_hiplora(update, out, overwrite=overwrite).to_json()
    details = {key: record[key] for key in ("protection",) if key in record}
    save: Any = save_dense if format is Format.dense else save_merged
    return save(update, out, overwrite=overwrite, details=details).to_json()


def _print(record: dict[str, Any]) -> None:
    if "protection" in record:
        print_protection(record["protection"])
    written = record["export"]
    rows: list[tuple[str, Any]] = [
        ("Written to", written["path"]),
        ("Format", f"{written['to']}, {written['dtype']}"),
    ]
    if written["to"] == "dense":
        rows.append(("Modules merged", written["modules"]))
        rows.append(("Largest difference of a logit", f"{written['logits']:.1e}"))
    else:
        worst, logits = written["largest_difference"], written["logit_difference"]
        rows.append(("Rank", written["rank"]))
        rows.append(("Modules", len(written["modules"])))
        rows.append(
            ("Largest difference of a module's update", f"{worst['relative']:.1e}  ({worst['module']})")
        )
        rows.append(("Largest difference of a logit", written["note"] if logits is None else f"{logits:.1e}"))
    print_table(
        f"{record['method']} of {len(record['adapters'])} adapters (differences are relative)", ("", ""), rows
    )
