import pytest

from hiplora.errors import ConfigError
from hiplora.reporting.palette import plain
from hiplora.reporting.study.paper import paper_model, paper_tables, paper_value, paper_where, reported


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("single-task", "LoRA", "Retain", 12.3),
        ("single-task", "HiP-LoRA", "Retain", 4.9),
        ("merge-rules", "LoRA, addition", "Mean drop", 20.24),
        ("merge-rules", "HiP-LoRA, TIES", "MergeFail", 4.5),
        ("continual", "PiSSA", "Forgetting", 10.2),
        ("editing", "HiP-LoRA", "Edit success", 89.2),
        ("cost", "LoRA", "Tokens per second", 42000),
        ("cost", "HiP-LoRA", "Cache size", 0.13),
        ("ablations", "Without stability budget", "MergeFail", 14.2),
        ("rank-one", "Zero", "Pearson", 0.856),
        ("rank-one", "zero", "pearson P", 3.09e-9),
        ("single-task", "hiplora", "retain", 4.9),
        ("single-task", "PiSSA", "Retain", None),
        ("single-task", "LoRA", "MMLU", None),
        ("adalora", "AdaLoRA", "Retain", None),
    ],
)
def test_the_papers_values_are_found_and_lost_ones_are_none(table, row, column, value):
    assert paper_value(table, row, column) == value


def test_what_the_paper_gives_beside_a_value_is_kept():
    assert reported("ablations", "HiP-LoRA", "Downstream").sd == 0.7
    zero = reported("rank-one", "Zero", "Pearson")
    assert (zero.low, zero.high, zero.where) == (0.14, 0.95, paper_where("rank-one"))


def test_an_unknown_table_is_an_error_that_names_the_tables():
    with pytest.raises(ConfigError, match="'nope' of the paper: unknown; name one of single-task"):
        paper_value("nope", "LoRA", "Retain")


def test_every_value_stands_in_a_column_that_its_table_names_and_has_a_place():
    assert paper_model() == "Llama-3.1-8B"
    for name, (rows, columns) in paper_tables().items():
        assert paper_where(name)
        known = {plain(column) for column in columns}
        for row in rows:
            assert any(paper_value(name, row, column) is not None for column in columns) or row == "Zero init"
        assert len(known) == len(columns)


def test_no_value_is_written_under_a_column_that_the_table_lacks():
    from hiplora.reporting.study import paper

    for name, (_, values) in paper._tables().items():
        assert {column for _, column in values} <= {plain(column) for column in paper_tables()[name][1]}
