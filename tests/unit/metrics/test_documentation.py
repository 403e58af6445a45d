import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def test_the_example_of_the_page_runs_and_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})
    retained, failed, gain, p_value = capsys.readouterr().out.splitlines()
    assert (retained, failed) == ("2.0", "0.5")
    assert gain.startswith("33.3 pp (")
    assert p_value == "p = 0.5"  # two items differ, both one way: 2 of the 4 sign patterns


def test_every_public_name_is_on_the_page():
    from hiplora import metrics

    functions = [name for name in metrics.__all__ if name[0].islower()]
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in functions if f"hiplora.metrics.{name}`" not in text] == []
