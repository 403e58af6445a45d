"""A study's recipe: what it may say, what it extends, and what is wrong with one."""

import re

import pytest

from hiplora.errors import ConfigError
from hiplora.recipes.load_study import load_study, own_studies

SMALL = """\
study: small
model: pico
domains:
  sums: {title: Sums, train: {path: gsm8k_train.jsonl, held_out_fraction: 0.1}, tasks: {gsm8k: 4}}
methods:
  lora: {title: LoRA, method: lora}
protocols:
  single_task: {methods: [lora]}
"""


def write(folder, text=SMALL, name="small.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def refusal(folder, old, new):
    """What is said of the small recipe after a change."""
    assert old in SMALL
    with pytest.raises(ConfigError) as error:
        load_study(write(folder, SMALL.replace(old, new)))
    return str(error.value)


def test_a_recipe_is_read_with_the_papers_defaults(tmp_path):
    recipe = load_study(write(tmp_path))
    assert recipe.seeds == [42, 100, 2024]
    assert recipe.domains["sums"].task == "gsm8k"
    assert recipe.methods["lora"].method.r == 16
    assert recipe.train.steps == 2000
    assert recipe.protocols.merging is None


def test_fields_are_overridden(tmp_path):
    recipe = load_study(write(tmp_path), ["train.steps=3", "seeds=[1]", "domains.sums.tasks.gsm8k=2"])
    assert (recipe.train.steps, recipe.seeds, recipe.domains["sums"].tasks) == (3, [1], {"gsm8k": 2})


def test_a_method_may_train_in_its_own_way(tmp_path):
    recipe = load_study(write(tmp_path), ["methods.lora.train={batch_size: 2, epochs: 1.5}"])
    settings = recipe.training(recipe.methods["lora"])
    assert (settings.batch_size, settings.epochs, settings.steps) == (2, 1.5, None)
    assert recipe.training(recipe.methods["lora"], lr=0.5).lr == 0.5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("{methods: [lora], seeds: [1, 1]}", "`seeds` has one twice"),
        ("{methods: [lora, lora]}", "`methods` has one twice"),
        ("{methods: [lora], seeds: [-1]}", "protocols.single_task.seeds"),
    ],
)
def test_what_counts_once_is_named_once(tmp_path, settings, told):
    assert told in refusal(tmp_path, "{methods: [lora]}", settings)


def test_a_rate_is_above_none(tmp_path):
    assert "methods.lora.lr" in refusal(tmp_path, "method: lora}", "method: lora, lr: -0.1}")


def test_a_circle_of_recipes_is_told(tmp_path):
    write(tmp_path, "extends: b.yaml\nstudy: a\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\nstudy: b\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"extends a\.yaml, which extends this recipe itself"):
        load_study(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="expected one recipe"):
        load_study(write(tmp_path, "extends: [a.yaml]\nstudy: c\n", "c.yaml"))


def test_a_recipe_extends_another(tmp_path):
    write(tmp_path)
    child = write(
        tmp_path,
        "extends: small.yaml\nstudy: child\nseeds: [7]\n"
        "methods:\n  pissa: {title: PiSSA, method: pissa}\n"
        "protocols:\n  single_task: null\n  adalora: {methods: [pissa, lora]}\n",
        "child.yaml",
    )
    recipe = load_study(child, ["domains.sums.title=Totals"])
    assert (recipe.domains["sums"].title, recipe.domains["sums"].task) == ("Totals", "gsm8k")
    assert (recipe.study, recipe.model, recipe.seeds) == ("child", "pico", [7])
    assert list(recipe.methods) == ["lora", "pissa"]
    assert recipe.protocols.single_task is None
    assert recipe.protocols.adalora.methods == ["pissa", "lora"]


def test_steps_that_are_asked_for_replace_the_epochs(tmp_path):
    recipe = load_study(write(tmp_path, SMALL + "train: {epochs: 2}\n"))
    row = recipe.methods["lora"]
    assert recipe.training(row).epochs == 2
    stopped = recipe.training(row, steps=3)
    assert (stopped.steps, stopped.epochs) == (3, None)


SINGLE = "single_task: {methods: [lora]}"


def frontier(methods, reference="lora", plain="lora", rates="[0.1, 0.2]"):
    settings = f"domains: {{sums: {methods}}}, rates: {rates}, plain: [{plain}], reference: {reference}"
    return f"frontier: {{{settings}}}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model: pico", "model: pico\nwarmth: 3", "line 3: warmth: unknown field; expected one of study, title, model"),
        ("model: pico", "model: pico\nseed: [1]", "line 3: seed: unknown field; did you mean `seeds`?"),
        (SINGLE, "mergefail: {}", "protocols.mergefail: unknown field; did you mean `merge_fail`?"),
        ("{gsm8k: 4}", "{gsm8k: 4}, task: {}", "domains.sums.task: unknown field; did you mean `tasks`?"),
        ("method: lora", "method: {name: lora, lora_alfa: 3}", "methods.lora.method.lora_alfa: unknown field; did you"),
        ("model: pico\n", "", "model: is missing; add `model:` (Base model: `smollm2-135m`,"),
        ("model: pico", "model: pico\nseeds: [x]", "seeds.0: should be a valid integer, found 'x' (Seeds of training)"),
        ("methods: [lora]", "methods: [lara]", "`protocols.single_task.methods` names 'lara'; expected one of lora"),
        (", held_out_fraction: 0.1", "", "`train` holds no rows back; add `held_out_fraction: 0.05`"),
        ("method: lora", "method: {name: lora, rank: 3}", "line 6: methods.lora.method.rank: unknown field"),
        ("{gsm8k: 4}", "{gsm8k: 0}", "line 4: domains.sums.tasks.gsm8k: should be greater than or equal to 1"),
        (
            "method: lora",
            "method: lora, train: {step: 2}",
            "`methods.lora.train`: step: Extra inputs are not permitted",
        ),
        (
            "model: pico",
            "model: pico\nrates: {grid: [0.1], seed: 42}",
            "`rates.seed` 42 is one of the study's seeds",
        ),
        ("model: pico", "model: pico\nrates: {grid: [0.1], domains: [code]}", "`rates.domains` names 'code'"),
        ("model: pico", "model: pico\nseeds: [1, 1]", "`seeds` has one twice"),
        (SINGLE, frontier("[lora, hip]"), "`protocols.frontier.domains.sums` names 'hip'; expected one of lora"),
        (SINGLE, frontier("[lora]", reference="hip"), "`domains.sums` lacks the `reference` 'hip'"),
        (SINGLE, frontier("[lora]", plain="pissa"), "`plain` names 'pissa', which no domain compares"),
        (SINGLE, frontier("[lora]", rates="[0.1, 0.1]"), "`rates` has one twice"),
        (SINGLE, frontier("[lora]"), "`protocols.frontier` compares drifts; set `evaluation.drift`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path, old, new, said):
    assert said in refusal(tmp_path, old, new)


def test_a_recipe_that_is_not_there_names_the_own_ones():
    with pytest.raises(ConfigError, match=re.escape(", ".join(own_studies()))):
        load_study("nothing")


@pytest.mark.parametrize("name", ["pico", "smol", "paper", "paper-1b", "paper-3b"])
def test_own_studies_are_sound(name):
    assert load_study(name).study == name


def test_texts_of_the_hub_need_a_number_of_rows(tmp_path):
    drift = "evaluation.drift={texts: {wiki: owner/name:text}, window: 32%s}"
    with pytest.raises(ConfigError, match=r"texts\.wiki.*documents: 100"):
        load_study(write(tmp_path), [drift % ""])
    settings = load_study(write(tmp_path), [drift % ", documents: 3"]).evaluation.drift.settings()
    assert settings == {"texts": {"wiki": "owner/name:text"}, "tokens": 512, "window": 32, "documents": 3}


def test_a_setting_of_the_drift_that_is_not_used_is_not_among_a_jobs(tmp_path):
    recipe = load_study(write(tmp_path), ["evaluation.drift={texts: {prose: a.txt}}"])
    assert recipe.evaluation.drift.settings() == {"texts": {"prose": "a.txt"}, "tokens": 512, "window": 512}


def test_a_protocols_text_is_one_of_the_drifts(tmp_path):
    told = "protocols.metamath={methods: [lora], domain: sums, text: wiki}"
    with pytest.raises(ConfigError, match=r"protocols\.metamath\.text` names 'wiki'; expected one of none"):
        load_study(write(tmp_path), [told])
    with pytest.raises(ConfigError, match="expected one of prose"):
        load_study(write(tmp_path), [told, "evaluation.drift={texts: {prose: a.txt}}"])


@pytest.mark.parametrize(
    ("protocol", "told"),
    [
        ("ablations: {method: lora}", "`protocols.ablations.method` is 'lora', which has no gains"),
        ("lambda_curve: {method: lora, values: [0.0, 1.0]}", "`protocols.lambda_curve.method` is 'lora'"),
        (
            "merge_fail: {methods: [lora], sizes: [2]}",
            "`protocols.merge_fail.sizes` has 2, and there are 1 domains",
        ),
        (
            "continual: {methods: [lora]}",
            "`protocols.continual` trains on one domain after the other; add a domain",
        ),
        (
            "continual: {methods: [lora], order: [sums, sums]}",
            "`protocols.continual.order` has a domain twice",
        ),
        (
            "editing: {methods: [lora], lr: {hip: 0.1}}",
            "`protocols.editing.lr` names 'hip'; expected one of lora",
        ),
        ("editing: {methods: [lora], sets: {Edit Set: {}}}", "Edit Set"),
    ],
    ids=["ablations", "lambda curve", "sizes", "one stage", "order", "edits' rates", "name of a set"],
)
def test_a_protocol_that_does_not_fit_is_refused(tmp_path, protocol, told):
    assert told in refusal(tmp_path, "single_task: {methods: [lora]}", protocol)


def test_a_method_may_not_have_the_name_of_an_editor(tmp_path):
    method, edited = "methods.alphaedit={title: A, method: lora}", "protocols.editing={methods: [alphaedit]}"
    with pytest.raises(
        ConfigError, match=r"`protocols\.editing\.methods` has 'alphaedit'.*rename the method"
    ):
        load_study(write(tmp_path), [method, edited])
