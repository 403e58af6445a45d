"""`--models-json FILE` writes what the suite found, for docs/models.md."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

_FOUND: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_addoption(parser):
    parser.addoption("--models-json", help="write the outcome of each architecture and operation to this file")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if case is None or (report.when != "call" and not report.failed and not report.skipped):
        return
    operation = item.originalname.removeprefix("test_")
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    if _FOUND[case.name].get(operation) in (None, "passed"):
        _FOUND[case.name][operation] = outcome


def pytest_sessionfinish(session):
    path = session.config.getoption("--models-json")
    if path:
        from tests.models.zoo import CASES, described

        rows = [{**described(case), "found": _FOUND[case.name]} for case in CASES if case.name in _FOUND]
        Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
