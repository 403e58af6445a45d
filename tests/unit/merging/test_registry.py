import inspect
import subprocess
import sys

import pytest

from hiplora.errors import ConfigError
from hiplora.merging import RULES
from hiplora.merging.options import parse_option
from hiplora.merging.registry import rule
from tools.docs_reference import described_fields

FACTORS = {"addition", "knots", "tsv", "iso-c"}
DENSE = {"ties", "dare", "magnitude"}


def test_these_are_the_rules():
    assert {name for name, rule in RULES.items() if rule.kind == "factors"} == FACTORS
    assert {name for name, rule in RULES.items() if rule.kind == "dense"} == DENSE
    assert next(iter(RULES)) == "addition"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_does_and_where_it_is_from(name):
    found = RULES[name]
    assert found.name == name
    assert found.summary
    assert found.source
    assert inspect.getdoc(found.combine)
    assert inspect.getdoc(found.options)


@pytest.mark.parametrize("name", RULES)
def test_every_option_is_described_and_has_a_default(name):
    found = RULES[name]
    assert set(described_fields(found.options)) == set(found.defaults)
    assert found.make_options() == found.options(**found.defaults)


def test_an_option_is_set_by_name():
    assert RULES["ties"].make_options({"density": 0.4}).density == 0.4
    assert RULES["ties"].make_options({"density": 0.4}).scale == 1.0


def test_an_option_that_the_rule_does_not_have_is_refused_and_its_own_are_named():
    with pytest.raises(ConfigError, match=r"'ties' has no option 'seed'; its options: density, scale"):
        RULES["ties"].make_options({"seed": 1})
    with pytest.raises(ConfigError, match="'addition' has no option 'density'; its options: none"):
        RULES["addition"].make_options({"density": 1})


def test_an_unknown_rule_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ConfigError, match="'average' is not known; expected one of addition, ties, dare"):
        rule("average")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("density=0.3", ("density", 0.3)),
        (" seed = 7 ", ("seed", 7)),
        ("scale=1e-1", ("scale", 0.1)),
        ("rescale=false", ("rescale", False)),
        ("rescale=true", ("rescale", True)),
        ("sv_reduction=none", ("sv_reduction", None)),
        ("density=much", ("density", "much")),
    ],
)
def test_an_option_is_read_from_text(text, value):
    name, found = parse_option(text)
    assert (name, found) == value
    assert type(found) is type(value[1])


@pytest.mark.parametrize("text", ["density", "=0.3", ""])
def test_text_that_is_no_option_is_refused(text):
    with pytest.raises(ConfigError, match="expected name=value"):
        parse_option(text)


def test_the_rules_and_their_options_are_listed_without_torch():
    code = (
        "import sys; from hiplora.merging import RULES\n"
        "assert [rule.make_options() for rule in RULES.values()]\n"
        "assert [rule.combine for rule in RULES.values()]\n"
        "assert not {'torch', 'peft', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
