"""The results of `hiplora edit`, in a sentence and as a page: which edits work, and what else changed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hiplora.editing.edits import Edit
from hiplora.editing.job import EDITORS
from hiplora.evaluation.answers import changes
from hiplora.reporting.html import Section, save_page
from hiplora.training.baselines import METHODS

SHOWN = 10  # edits, with what the model writes, and questions
YES_NO = {True: "yes", False: "no"}
MEASURES = {
    "success": "success",
    "preferred": "new answer preferred",
    "exact": "new answer written",
    "paraphrase_success": "success on the paraphrase",
    "neighbours_kept": "questions near it kept",
}


def verdict(record: Mapping[str, Any]) -> str:
    """Return in one or two sentences whether the edits work, and what became of the unrelated questions."""
    summary = record["summary"]
    before, after, locality = summary["before"]["all"], summary["after"]["all"], summary.get("locality")
    text = f"{after['success']:.0f} % of {record['edits']} edits work ({before['success']:.0f} % did before)"
    if "paraphrase_success" in after:
        text += f", {after['paraphrase_success']:.0f} % when asked in other words"
    if "neighbours_kept" in after:
        kept, had = after["neighbours_kept"], before["neighbours_kept"]
        text += f"; of the questions near them {kept:.0f} % keep their answers ({had:.0f} % had them before)"
    if not locality:
        return f"{text}. What else moved was not measured (--locality 0)."
    right = f"{locality['accuracy_before']:.0f} % of them were right before, {locality['accuracy']:.0f} % are now"
    unchanged = f"{locality['unchanged']:.0f} % are answered as before"
    return f"{text}. Of {locality['questions']:.0f} unrelated questions {unchanged}; {right}."


def summary_tables(summary: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Return title → table: the results of the edits, in all and by category, and of the unrelated questions."""
    before, after = summary["before"], summary["after"]
    rows = {"edits": {group: str(shares["edits"]) for group, shares in after.items()}}
    for key, title in MEASURES.items():
        rows[title] = {
            group: f"{before[group][key]:.1f} → {shares[key]:.1f}" for group, shares in after.items() if key in shares
        }
    edits = pd.DataFrame(rows).T.dropna(how="all").fillna("")
    tables = {"per cent of the edits, before → after": edits.rename_axis("").reset_index()}
    if locality := summary.get("locality"):
        values = {
            "questions": f"{locality['questions']:.0f}",
            "accuracy (%)": f"{locality['accuracy_before']:.1f} → {locality['accuracy']:.1f}",
            "unchanged answers (%)": f"{locality['unchanged']:.1f}",
            "log-probability of the true answers (nats)": f"{locality['log_prob_change']:+.3f}",
            "log-probability of the edits' new answers (nats)": f"{locality['edited_log_prob_change']:+.3f}",
        }
        tables["unrelated questions"] = pd.DataFrame(values.items(), columns=["", "value"])
    return tables


def write_report(path: Path, record: Mapping[str, Any], edits: Sequence[Edit]) -> None:
    """Write the page of a record of `edit`, whose edits these are."""
    last = record["stages"][-1:] if record["mode"] == "sequential" else record["stages"]
    after = pd.concat([pd.DataFrame(stage["records"]) for stage in last]).set_index("index")
    before = pd.DataFrame(record["before"]).set_index("index").loc[after.index]
    measured = [edits[index] for index in after.index]
    paraphrased = after.reindex(columns=["paraphrase_success"])["paraphrase_success"].astype(float)
    table = pd.DataFrame(
        {
            "prompt": [edit.prompt for edit in measured],
            "new answer": [edit.new for edit in measured],
            "worked before": before["success"].astype(bool).map(YES_NO),
            "works": after["success"].astype(bool).map(YES_NO),
            "other wording": [None if math.isnan(works) else YES_NO[bool(works)] for works in paraphrased],
            "log p(new), change in nats": after["log_prob_new"] - before["log_prob_new"],
        }
    ).reset_index(drop=True)
    answers = [
        {
            "prompt": edit.prompt,
            "said": {"before": [(was.strip(), False)], "after": changes(was.strip(), now.strip())},
            "expected": edit.new,
        }
        for edit, was, now in zip(measured[:SHOWN], before["written"], after["written"], strict=False)
    ]
    summaries = list(summary_tables(record["summary"]).items())
    others, text = dict(summaries[1:]), "Unrelated questions, answered before and after."
    if record["questions"]:
        others[f"the {SHOWN} whose true answers became least likely"] = _moved(record["questions"])
    sections = [
        Section("Do the edits work?", tables=dict(summaries[:1])),
        Section("What the model writes", answers=answers),
        Section("What else moved?", text if others else "Not measured (--locality 0).", tables=others),
        Section("All edits", tables={"Every edit": table}),
    ]
    method: Any = {**METHODS, **EDITORS}[record["method"]]
    subtitle = f"{record['edits']} edits in {record['settings']['model']} by {method.title}, {record['mode']}"
    save_page(path, record["verdict"], sections, subtitle, record["provenance"])


def _moved(questions: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Return the unrelated questions that lost most, a row each; means over separate batches."""
    table = pd.DataFrame(questions)
    table["change"] = table["log_prob"] - table["log_prob_before"]
    names = {"prompt": "question", "answer": "true answer", "change": "log p, change in nats"}
    lost = table.nsmallest(SHOWN, "change", keep="first").reset_index(drop=True)
    same = (100 * lost["unchanged"]).map("{:.0f} %".format)
    return lost[list(names)].rename(columns=names).assign(**{"answered as before": same})
