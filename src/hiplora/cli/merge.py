"""`hiplora merge`: several adapters of one base model as one."""

import json
from pathlib import Path
from typing import Any, Literal

from typer import Argument, Option

from hiplora.cli.common import BASE, DEVICE, OUT, OVERWRITE, PUSH, Group, Shown, numbers, scaling, try_step
from hiplora.cli.export import report_table
from hiplora.errors import ConfigError
from hiplora.merging.rules import RULES, Rule, find_rule

_DENSE_RULES = ", ".join(name for name, rule in RULES.items() if rule.kind == "dense")
_DEFAULTS = {name: rule.defaults for name, rule in RULES.items() if rule.defaults}
METHOD_HELP = "Merge rule. " + "; ".join(f"{name}: {rule.summary}" for name, rule in RULES.items()) + "."
WEIGHTS = Option(None, help="One number per adapter, separated by commas, for example 1,0.5. Default: 1 each.")
SET = Option(
    [],
    metavar="KEY=VALUE",
    help="Option of the rule, for example density=0.3; may be repeated. Defaults: "
    + "; ".join(f"{n}: " + ", ".join(f"{k}={json.dumps(v)}" for k, v in own.items()) for n, own in _DEFAULTS.items()),
)
FORMAT_HELP = (
    "lora: a plain LoRA adapter; dense: a standalone model; hiplora: a HiP-LoRA adapter, where all share a basis. "
    f"Default: dense for {_DENSE_RULES} without --rank, else lora."
)
Format = Literal["lora", "dense", "hiplora"]


def command(
    adapters: list[Path] = Argument(..., help="Adapter folders, of any methods and ranks, over one base."),
    out: Path = OUT,
    method: str = Option("addition", help=METHOD_HELP),
    weights: str | None = WEIGHTS,
    set: list[str] = SET,
    rank: int | None = Option(
        None,
        help="Cut every module down to this rank, and report what is lost; for --format hiplora, the residual channel.",
    ),
    format: Format | None = Option(None, help=FORMAT_HELP),
    base: str | None = BASE,
    scaling: Any = Group(scaling),
    drift: bool = Option(
        True, help="Measure how far the merge drifts from the base, if that is a local folder (or --base names one)."
    ),
    device: str = Option("auto", help=f"{DEVICE.help} With --format dense, only drift and --tolerance run there."),
    html: Path | None = Option(None, help="Also write the report as a page to this file."),
    overwrite: bool = OVERWRITE,
    push: str | None = PUSH,
) -> Shown:
    """Merge adapters of one base model into one, and check what is written.

    Adapters of different base weights are refused. Each merge comes with its drift from the base beside the adapters'
    own, a verdict, and a report of where the adapters conflict (merge-report.json in the folder; --html makes a page
    of it). hiplora merge-check measures what a merge breaks; hiplora protect removes from it the directions that change
    the base model most.

    Example:

        hiplora merge runs/medicine runs/law --weights 1,0.5 --out runs/both
    """
    from hiplora.adapters import push_to_hub, read_update, save_as_hiplora, save_as_lora, save_dense
    from hiplora.evaluation.updates import choose_scale
    from hiplora.files import check_output_dir, check_output_file
    from hiplora.merge_check import drift_of_merge, drift_problem, save_merge_page
    from hiplora.merging.conflict import merge_report
    from hiplora.merging.merger import check_weights, merge

    rule = find_rule(method)
    options = rule.options(rule_options(set))
    form = _chosen_format(format, rule, rank)
    check_output_dir(out, overwrite)
    if html is not None:
        check_output_file(html, overwrite, "--html")
    shares = check_weights(numbers("--weights", weights, float) or None, len(adapters))
    updates = [read_update(folder, base) for folder in adapters]
    update = merge(updates, method, shares, base=base, rank=rank, keep_channels=form == "hiplora", options=options)
    scale, search = choose_scale(update, **scaling, device=device)
    update, named = update.scaled(scale), _named(adapters, updates)
    record: dict[str, Any] = {
        "schema": 1,
        "kind": "merge",
        "adapters": list(map(str, adapters)),
        "method": method,
        "weights": shares,
        "options": options,
        "scale": scale,
        "scale_search": search,
        "drift": drift_of_merge(named, [scale * share for share in shares], update, device) if drift else None,
    }
    losses = sorted(update.errors.items(), key=lambda item: -item[1])
    if rank is not None:
        modules = [{"module": module, "relative_error": error} for module, error in losses]
        record["truncation"] = {"rank": rank, "modules": modules}
    report = merge_report(named, shares, record)
    save: Any = {"hiplora": save_as_hiplora, "lora": save_as_lora, "dense": save_dense}[form]
    details = {"merge": dict(record), "merge-report.json": report}
    placed = {} if form == "dense" else {"device": device}
    record["export"] = save(update, out, overwrite=overwrite, details=details, **placed)
    if html is not None:
        save_merge_page(html, report)
    if push is not None:
        push_to_hub(out, push)
    yield record | {"conflicts": report}
    yield from _shown(record, report)
    if drift and not record["drift"]:
        yield f"The drift was not measured: {drift_problem(update, device)}"
    yield try_step(out, update, form == "dense")


def _shown(record: dict[str, Any], report: dict[str, Any]) -> Shown:
    """Yield the tables and the verdict of a merge."""
    from hiplora.merge_check import conflict_table

    if cut := record.get("truncation"):
        rows = [(module["module"], f"{module['relative_error']:.1%}") for module in cut["modules"][:10]]
        yield (
            f"Cut down to rank {cut['rank']} (the ten modules that lost most)",
            ("Module", "Lost of ‖ΔW‖"),
            rows,
        )
    yield report_table(record["export"], f"{record['method']} of {len(record['adapters'])} adapters")
    if report["most_conflicting"]:
        yield "Modules that conflict most", conflict_table(report)
    if record["drift"]:
        yield record["drift"]["verdict"]


def _named(folders: list[Path], updates: list[Any]) -> dict[str, Any]:
    """Return each update by its folder's own name, or by its whole path where names repeat, or one is "merge"."""
    names = [folder.resolve().name for folder in folders]
    if len({*names, "merge"}) <= len(names):
        names = [f"{folder} ({number})" for number, folder in enumerate(folders, 1)]
    return dict(zip(names, updates, strict=True))


def rule_options(texts: list[str]) -> dict[str, Any]:
    """Read options `name=value`, the value as YAML or `none`; ConfigError if one is not of this form."""
    from hiplora.training.reading import put_over

    options: dict[str, Any] = {}
    for text in texts:
        put_over(options, text, "density=0.2")
    return {name: None if value == "none" else value for name, value in options.items()}


def _chosen_format(format: Format | None, rule: Rule, rank: int | None) -> Format:
    full = rule.kind == "dense" and rank is None
    if format == "hiplora" and rule.name != "addition":
        raise ConfigError(
            f"--format hiplora: {rule.name} keeps no gains apart, only addition does; pass --format lora or dense"
        )
    if format == "lora" and full:
        raise ConfigError(
            f"--format lora: {rule.name} gives updates of full rank, which no LoRA adapter holds; pass --rank, for "
            "example --rank 64, to keep the strongest directions of each module, or --format dense"
        )
    return format or ("dense" if full else "lora")
