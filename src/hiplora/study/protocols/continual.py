"""One adapter trained on one domain after the other: the whole matrix of scores, AvgAcc and Forgetting (C.4)."""

from collections.abc import Iterator

import pandas as pd
from pydantic import Field

from hiplora.metrics import CONTINUAL
from hiplora.study.protocols.settings import Done, Findings, OfMethods, Run, Study
from hiplora.study.protocols.single_task import drift_table
from hiplora.study.records import BASE, by_form, joined, measured, scored, tidy, with_differences
from hiplora.study.statistics import averaged, differences, drift, replicates, summary

COLUMNS = {
    "average accuracy": "AvgAcc",
    "forgetting": "Forgetting",
    "backward transfer": "Backward transfer",
    "learned accuracy": "Just after training",
}


class Continual(OfMethods):
    """One adapter trained on one domain after the other."""

    orders: list[list[str]] = Field(default=[], description="Orders of the domains; none: one, as they stand.")
    widen: bool = Field(default=True, description="Let HiP-LoRA's function-aware basis protect finished tasks too.")

    def named(self) -> Iterator[tuple[str, list[str], str]]:
        """Yield the domains of each order too."""
        yield from super().named()
        yield from (("orders", order, "domains") for order in self.orders)

    def runs(self, study: Study) -> list[Run]:
        """Score the base, and every stage of every method and seed on the tasks of all domains."""
        runs: list[Run] = [(study.score(), {"method": BASE, "stage": 0})]
        for row in map(study.row, self.methods):
            for seed in study.seeds(self):
                for name, order in self._orders(study).items():
                    adapter = None
                    for stage, domain in enumerate(order, 1):
                        adapter = study.adapter(row, domain, seed, start=adapter, widen=self.widen)
                        label = {"method": row.title, "seed": seed, "order": name, "stage": stage}
                        runs.append((study.score(adapter), label))
        return runs

    def tables(self, study: Study, done: Done) -> Findings:
        """Return the paper's numbers in both forms, every task after every stage, and the drift after the last."""
        records, orders = tidy(done), self._orders(study)
        titles = {domain: study.recipe.domains[domain].title for order in orders.values() for domain in order}
        moved = drift(records[(records.stage == len(titles)) & (records.method != BASE)])
        numbers = self._measured(study, records)
        shown = numbers.assign(column=numbers.metric.map(COLUMNS)).dropna(subset="column")
        tables = by_form("Continual tuning", shown[shown.order == ""], paper="continual")
        after = {
            (name, stage): f"{', ' * bool(name)}{name}, after {titles[domain]}"
            for name, order in orders.items()
            for stage, domain in enumerate(order, 1)
        }
        scores = numbers[numbers.metric == "score"]
        suffixes = [after.get(key, "") for key in zip(scores.order, scores.stage, strict=True)]
        scores = scores.assign(row=scores.method + suffixes, column=scores.domain.map(titles))
        tables |= by_form("Every task after every stage, %", scores, "row", stem="stages")
        tables["drift"] = drift_table(moved, "Drift after all stages")
        text = (
            "AvgAcc: mean over the tasks after the last stage; Forgetting: mean fall from the best earlier stage, "
            "lower is better; backward transfer: mean change since a task's own stage."
        )
        return Findings(joined(numbers, moved), tables, text=text)

    def _orders(self, study: Study) -> dict[str, list[str]]:
        """The orders of the domains by name; a single one has no name."""
        orders = self.orders or [list(study.recipe.domains)]
        return {f"order {number}" if len(orders) > 1 else "": order for number, order in enumerate(orders, 1)}

    def _measured(self, study: Study, records: pd.DataFrame) -> pd.DataFrame:
        """Scores after each stage, and the paper's numbers: of each order, where there are several, and their means."""
        orders = self._orders(study)
        domains = next(iter(orders.values()))
        tasks = {task: domain for task, domain in study.tasks.items() if domain in domains}
        draws = replicates(scored(records, tasks, "domain"), ["form", "method", "seed", "order", "stage", "domain"])
        is_base = draws.index.get_level_values("method") == BASE
        base = averaged(draws[is_base], ["domain", "stage", "order"])
        parts = [
            measured(summary(draws), "score", "%"),
            measured(summary(base), "average accuracy", "%", order=""),
        ]
        by = ["form", "method", "seed", "order"]
        for metric, function in CONTINUAL.items():
            values = {}
            for label, rows in draws[~is_base].groupby(level=by, sort=False):
                matrix = pd.MultiIndex.from_product([range(1, len(domains) + 1), orders[label[-1]]])
                cells = rows.droplevel(by).reindex(matrix).to_numpy().reshape(len(domains), len(domains), -1)
                values[label] = function(cells)
            by_order = pd.DataFrame(values.values(), pd.MultiIndex.from_tuples(values, names=by))
            means, unit = averaged(by_order, ["order"]), "%" if "accuracy" in metric else "pp"
            parts.append(with_differences(means, metric, unit).assign(order=""))
            if len(orders) > 1:
                parts.append(with_differences(by_order, metric, unit))
            if metric == "forgetting":
                over = summary(differences(averaged(means, ["seed"]), ratio=True)).rename_axis(index={"minus": "over"})
                parts.append(measured(over, "forgetting ratio", "ratio", seeds=len(study.seeds(self)), order=""))
        return joined(*parts)
