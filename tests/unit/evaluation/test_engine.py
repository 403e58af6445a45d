"""lm-eval's own numbers on every architecture, with the memory bounded; own rows; and no code without a flag."""

import ast
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import models, pre_tokenizers, processors

import hiplora
from hiplora.errors import ConfigError, DataError
from hiplora.evaluation import engine as module
from hiplora.evaluation.answers import continuations
from hiplora.evaluation.engine import ANSWER, GOLD, TEXT, Engine, ScoringLM
from hiplora.evaluation.evaluate import EvalSettings
from hiplora.evaluation.likelihood import encode, score_responses
from hiplora.evaluation.suite import read_suite
from tests.calls import watch
from tests.reference import answer_log_prob
from tests.tiny import VOCABULARY, tiny_llama, tiny_tokenizer, write_jsonl

CONTEXTS = ["Question: what falls from a cloud?\nAnswer:", "A short one:", "x" * 90]
PAIRS = list(itertools.product(CONTEXTS, [" rain", " a stone that nobody threw", "r", " rainbows"]))

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
GEMMA = {**SMALL, **HEADS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "mistral with a window": tf.MistralConfig(**SMALL, **HEADS, sliding_window=8),
    "gpt2": tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4),
    "bloom": tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "gemma 3 with pictures": tf.Gemma3Config(
        text_config=GEMMA, vision_config={**SMALL, "intermediate_size": 48, "image_size": 56}
    ),
    "mamba": tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
}


def requests_of(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_scores_short_and_long_rows_as_lm_eval_does_and_as_alone(name):
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]).eval().requires_grad_(False)
    tokenizer = tiny_tokenizer()
    requests = requests_of("loglikelihood", PAIRS)
    ours = ScoringLM(model, tokenizer, batch_size=3).loglikelihood(requests, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests, disable_tqdm=True)
    own = score_responses(model, [encode(tokenizer, *pair) for pair in PAIRS], batch_size=5)
    for pair, (total, greedy), (other, other_greedy), row in zip(PAIRS, ours, theirs, own, strict=True):
        alone = answer_log_prob(model, tokenizer, *pair)
        assert (total, row.sum().item()) == pytest.approx((alone, alone), abs=1e-3), pair
        assert (other, other_greedy) == (pytest.approx(total, abs=1e-3), greedy)


def test_batches_of_long_rows_are_split_and_the_order_is_kept(monkeypatch):
    ours = ScoringLM(tiny_llama(), tiny_tokenizer(), batch_size=3)
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * ours.vocab_size * 200)  # one or two rows at a time
    calls = watch(monkeypatch, ours, "_model_call")
    scores = ours.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    assert [total for total, _ in scores] == pytest.approx(
        [answer_log_prob(ours.model, tiny_tokenizer(), *pair) for pair in PAIRS], abs=1e-3
    )
    assert all(len(rows) == 1 or rows.numel() <= 200 for (rows,) in calls)
    assert max(len(rows) for (rows,) in calls) == 3
    assert ours.batch_size == 3


def test_an_answer_that_merges_into_its_context_is_scored_alone():
    tokenizer = tiny_tokenizer()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: rank for rank, letter in enumerate(letters)} | {"th": 256}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("t", "h")])
    model = tiny_llama()
    ours = ScoringLM(model, tokenizer)
    ((total, _),) = ours.loglikelihood(requests_of("loglikelihood", [("is it t", "h")]), disable_tqdm=True)
    ids = [*tokenizer("is it t")["input_ids"], *tokenizer("h")["input_ids"]]
    alone = model(input_ids=torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]].item()
    assert total == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("kind", ["adds an end", "has no special tokens"])
def test_texts_are_scored_and_continued_without_the_end_that_a_tokenizer_adds_or_lacks(kind):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    if kind == "adds an end":
        ends = {"single": "$A <|eos|>", "pair": "$A $B <|eos|>", "special_tokens": [("<|eos|>", 257)]}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**ends)
    else:
        tokenizer.bos_token = tokenizer.eos_token = None
    ours = ScoringLM(model, tokenizer, batch_size=3)
    for (total, _), pair in zip(ours.loglikelihood(requests_of("loglikelihood", PAIRS), True), PAIRS, strict=True):
        assert total == pytest.approx(answer_log_prob(model, tiny_tokenizer(), *pair), abs=1e-3), pair
    limits = {"until": ["\0"], "do_sample": False, "max_gen_toks": 5}
    written = ours.generate_until(requests_of("generate_until", [(text, limits) for text in CONTEXTS]), True)
    assert written == continuations(model, tokenizer, CONTEXTS, 5)


def test_a_model_that_reads_its_padding_continues_a_text_alike_in_any_batch():
    config = tf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    model = tf.RwkvForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    limits = {"until": ["\0"], "do_sample": False, "max_gen_toks": 5}
    requests = requests_of("generate_until", [(text, limits) for text in CONTEXTS])
    ours = ScoringLM(model, tiny_tokenizer(), batch_size=3)
    assert ours.generate_until(requests, True) == [ours.generate_until([one], True)[0] for one in requests]
    assert ours.batch_size == 3


@pytest.mark.parametrize("answer", ["", "y" * 3000])
def test_an_answer_without_tokens_or_longer_than_the_context_is_refused(answer):
    with pytest.raises(DataError, match="leave its row out"):
        ScoringLM(tiny_llama(), tiny_tokenizer()).loglikelihood(requests_of("loglikelihood", [("x", answer)]), True)


SKY = [{"prompt": "The sky is", "completion": " blue"}, {"prompt": "1 +", "completion": " 1"}]
OWN = {
    "prompt_completion": (SKY, ANSWER),
    "question_answer": ([{"question": "Which?", "answer": "That."}], ANSWER),
    "messages": (
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}],
        ANSWER,
    ),
    "multiple_choice": (
        [{"context": "Of two.", "question": "Which?", "choices": ["this", "that"], "answer": 1}],
        GOLD,
    ),
    "text": ([{"text": "It was a bright cold day in April."}], TEXT),
}


@pytest.mark.parametrize("form", list(OWN))
def test_a_file_of_ones_own_rows_is_a_suite(tmp_path, form):
    rows, likelihood = OWN[form]
    suite = read_suite(str(write_jsonl(tmp_path / "mine.jsonl", rows)))
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    engine = Engine(suite, EvalSettings(""), tokenizer)
    assert engine.describe()["mine"]["title"] == "mine.jsonl"
    scores = engine.score(model, tokenizer)["mine"]
    assert (scores.form, len(scores.likelihood)) == (likelihood, len(rows))
    # The texts that are scored: lm-eval would take the line's end after [assistant] for the answer's.
    chats = {
        "question_answer": ("[user]\nWhich?\n[assistant]\n", "That."),
        "messages": ("[user]\nHi\n[assistant]\n", "Yes?"),
    }
    pairs = [chats[form]] if form in chats else [tuple(row.values()) for row in rows if form == "prompt_completion"]
    if pairs:
        parts = [(answer_log_prob(model, tokenizer, *pair), len(pair[1])) for pair in pairs]
        assert scores.likelihood == pytest.approx([100 * math.exp(total / count) for total, count in parts], rel=1e-3)
    if form == "multiple_choice":
        one, two = (
            answer_log_prob(model, tokenizer, "Question: Of two.\n\nWhich?\nA. this\nB. that\nAnswer:", c)
            for c in (" A", " B")
        )
        assert scores.score == [100.0 * (two > one)]


EVIL = """
task: evil
custom_dataset: !function evilmod.rows
output_type: loglikelihood
test_split: test
doc_to_text: "{{ cycler.__init__.__globals__.os.system('touch rendered') }}"
doc_to_target: "x"
"""


def test_a_suites_folder_runs_nothing_without_its_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    Path("tasks/evil.yaml").write_text(EVIL)
    Path("tasks/evilmod.py").write_text("open('imported', 'w')\ndef rows(**_): raise ValueError('loaded')\n")
    Path("s.yaml").write_text("tasks: [evil]\ninclude: [tasks]\n")
    suite = read_suite("s.yaml")
    with pytest.raises(ConfigError, match="--allow-suite-code"):
        Engine(suite, EvalSettings("s.yaml"), tiny_tokenizer())
    assert not Path("imported").exists()
    assert not Path("rendered").exists()
    monkeypatch.setattr(module, "PREFIX", "")  # nothing of lm-eval's own: reading that takes half a minute
    with pytest.raises(DataError, match="loaded"):
        Engine(suite, EvalSettings("s.yaml", allow_suite_code=True), tiny_tokenizer())
    assert Path("imported").exists()


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Put metrics into the working directory whose code must not run."""
    monkeypatch.chdir(tmp_path)
    for name in ("bleu", "code_eval"):
        Path(name).mkdir()
        Path(name, f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    yield
    assert not Path("ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval_instruct", "mbpp"])
def test_lm_evals_unsafe_tasks_are_refused_before_anything_is_imported(planted, task):
    suite = module.Suite("x", (module.TaskRequest(task, task),))
    with pytest.raises(ConfigError, match="outside any sandbox; score humaneval, humaneval_10, mbpp instead"):
        Engine(suite, EvalSettings(task, allow_code=True), tiny_tokenizer())


def test_a_metric_is_not_taken_from_the_working_directory(planted):
    with module._lm_eval(), pytest.raises(ConfigError, match="has the name of a metric"):
        module.metrics.load("bleu")


def test_every_loading_by_an_auto_class_says_that_no_remote_code_runs():
    for path in Path(hiplora.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and re.search(r"Auto\w+\.from_(pretrained|config)$", ast.unparse(call.func)):
                said = {keyword.arg for keyword in call.keywords}
                assert said & {"trust_remote_code", None}, f"{path}:{call.lineno}"  # None: **source has it
