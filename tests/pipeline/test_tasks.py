"""Heads of every kind: asked, scored against transformers by hand, or refused by name before any compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import perturbed
from families import FAMILIES
from task_experts import KINDS, TAGS, build, fine_tuned, recipe_of, rows, tokenizer

import epmq
from epmq.errors import InputError
from epmq.models.heads import HEAD_FILE, Head, save_head
from epmq.models.tasks import task_of_class
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.pipeline.scoring import entity_f1, rank_correlation, span_f1
from epmq.pipeline.tasks import check_ends
from epmq.recipe_file import load_recipe

SCORED = ["choice", "class", "labels", "number", "span", "tags"]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of every kind, and their rows as `KIND.jsonl`."""
    path = tmp_path_factory.mktemp("tasks")
    build(path)
    for kind in KINDS:
        write(path / f"{kind}.jsonl", rows(kind))
    return path


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def scored(folder: Path, *kinds: str, **data: Any) -> dict[str, Any]:
    """A recipe whose experts are scored on their rows, which are their calibration data too."""
    recipe = recipe_of(folder, *kinds)
    for expert in recipe["experts"]:
        own = {"path": str(folder / f"{expert['name']}.jsonl")}
        expert |= {"calibration": own, "evaluation": own | data}
    return recipe


@torch.no_grad()
def by_hand(folder: Path, kind: str) -> float:
    """An expert's score with transformers alone, example by example."""
    model = getattr(transformers, f"BertFor{KINDS[kind][0]}").from_pretrained(folder / kind).eval()
    encode, found, wanted = tokenizer(), [], []
    for row in rows(kind):
        if kind == "choice":
            inputs = encode([row["text"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
            scores = model(**{name: value[None] for name, value in inputs.items()}).logits
            found.append(float(scores.argmax() == row["label"]))
        elif kind == "span":
            inputs = encode(row["question"], row["context"], return_tensors="pt")
            output, words = model(**inputs), row["context"].split()
            first = 2 + len(row["question"].split())
            start, end = (one[0, first : first + len(words)] for one in (output.start_logits, output.end_logits))
            pairs = {(i, j): float(start[i] + end[j]) for i in range(len(words)) for j in range(i, len(words))}
            i, j = max(pairs, key=pairs.__getitem__)
            found.append(span_f1(" ".join(words[i : j + 1]), row["answers"]["text"]))
        elif kind == "tags":
            inputs = encode(row["tokens"], is_split_into_words=True, return_tensors="pt")
            found.append([TAGS[i] for i in model(**inputs).logits[0, 1:-1].argmax(-1)])
            wanted.append([TAGS[i] for i in row["tags"]])
        else:
            scores = model(**encode(row["text"], return_tensors="pt")).logits[0]
            found.append({"number": scores[0].item(), "labels": (scores > 0).tolist()}.get(kind, int(scores.argmax())))
            wanted.append(row["label"])
    if kind == "tags":
        return entity_f1(found, wanted)
    if kind == "number":
        return rank_correlation(found, wanted)
    if kind == "labels":
        right = sum(one and other for pair in zip(found, wanted) for one, other in zip(*pair))
        return 2 * right / sum(map(sum, found + wanted))
    if kind == "class":
        return sum(one == other for one, other in zip(found, wanted)) / len(found)
    return sum(found) / len(found)


def test_every_kind_is_scored_as_transformers_says_it(folder):
    scores = evaluate_experts(scored(folder, *SCORED), **QUIET)
    assert scores["metric"] == {
        **{"choice": "accuracy", "class": "accuracy", "labels": "f1"},
        **{"number": "spearman", "span": "f1", "tags": "f1"},
    }
    for kind in SCORED:
        assert scores["scores"][kind] == pytest.approx(by_hand(folder, kind), abs=1e-6), kind
    assert scores["mean_score"] == pytest.approx(sum(scores["scores"].values()) / len(SCORED))
    other = {"number": "mse", "span": "exact_match", "tags": "accuracy"}
    for kind, metric in other.items():
        found = evaluate_experts(scored(folder, kind, metric=metric), **QUIET)
        assert found["metric"] == metric and found["scores"][kind] >= 0
    assert evaluate_experts(scored(folder, "number", metric="pearson"), **QUIET)["metric"] == "pearson"


@torch.no_grad()
def test_one_model_answers_them_all(folder, tmp_path):
    """A head that only can be called is among them."""
    quantize = {"method": "rtn", "bits": 8}
    recipe = {**scored(folder, *SCORED, "masked"), "quantize": quantize, "output": str(tmp_path / "out")}
    del recipe["experts"][-1]["evaluation"]
    report = run(recipe, **QUIET)
    assert set(report["scores"]) == set(SCORED) and report["mean_score"] is not None
    model = epmq.load(tmp_path / "out")
    assert model.labels("class") == ["NEG", "MID", "POS"] and model.labels("span") == model.labels("number") == []
    assert set(model.answer("class", ["the cat", "a dog"])) <= {"NEG", "MID", "POS"}
    (number,) = model.answer("number", ["the cat"])
    assert isinstance(number, float)
    for names in model.answer("labels", ["the cat", "a dog"]):
        assert set(names) <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    (words,) = model.answer("tags", ["the cat, sat"])
    assert [word for word, _ in words] == ["the", "cat", ",", "sat"] and {tag for _, tag in words} <= set(TAGS)
    (answer,) = model.answer("span", [("the cat", "a dog sat on the mat")])
    assert answer and answer in "a dog sat on the mat"
    assert model.answer("choice", [("the cat", ["sat", "ran", "sat on"])])[0] in ("sat", "ran", "sat on")
    with pytest.raises(ValueError, match="BertForMaskedLM has no answers: call model"):
        model.answer("masked", ["the cat"])
    batch = dict(tokenizer()(["the cat", "a dog"], return_tensors="pt"))
    shapes = {"span": (2, 4, 2), "tags": (2, 4, 5), "choice": (2, 1), "number": (2, 1), "masked": (2, 4, 32)}
    assert {kind: tuple(model(kind, **batch).shape) for kind in shapes} == shapes


@pytest.mark.parametrize(
    ("kind", "content", "data", "message"),
    [
        (
            "tags",
            rows("class"),
            {},
            "BertForTokenClassification is scored on rows with a list of words.* text examples",
        ),
        ("span", rows("class"), {}, "BertForQuestionAnswering is scored on rows with columns 'question', 'context'"),
        ("choice", rows("class"), {}, "BertForMultipleChoice is scored on rows with a text, 'choices'"),
        ("class", rows("number"), {}, "line 1: field 'label' must be a class index"),
        (
            "class",
            rows("labels"),
            {},
            "field 'label' must be a class index .* not a list: .*multi_label_classification",
        ),
        ("class", [{"text": "a", "label": "good"}], {}, "'good', but the head's classes are NEG, MID, POS"),
        ("class", [{"text": "a", "label": 3}], {}, "label 3 but the head has 3 classes"),
        ("class", [{"text": "a"}], {}, "has no labels: BertForSequenceClassification is scored on texts"),
        ("class", rows("class"), {"metric": "f1"}, "metric: text examples are scored by accuracy, not by f1"),
        ("number", [{"text": "a", "label": "good"}], {}, "line 1: field 'label' must be a number, found 'good'"),
        ("number", rows("number"), {"metric": "accuracy"}, "numbers are scored by spearman, pearson, mse"),
        ("labels", [{"text": "a", "label": 5}], {}, "has class 5, but the head has 3 classes"),
        ("tags", [{"tokens": ["a"], "tags": ["B-X"]}], {}, "'B-X', but the head's classes are O, B-PER"),
        ("tags", [{"tokens": ["a"]}], {}, "has no labels"),
        ("tags", rows("tags"), {"metric": "spearman"}, "classes of words are scored by f1, accuracy"),
        ("span", [{"question": "a", "context": "b"}], {}, "has no labels"),
        ("choice", [{"text": "a", "choices": ["b"], "label": 1}], {}, "example 0: label 1 but there are 1 choices"),
        ("masked", rows("masked"), {}, "BertForMaskedLM cannot be scored: only heads for classes"),
    ],
)
def test_data_that_does_not_fit_the_head_is_refused_before_compute(folder, tmp_path, kind, content, data, message):
    recipe = scored(folder, kind)
    recipe["experts"][0]["evaluation"] = {"path": write(tmp_path / "data.jsonl", content), **data}
    with pytest.raises(ValueError, match=rf"experts\.{kind}\.evaluation: .*{message}") as error:
        prepare(load_recipe(recipe))
    assert "\n" not in str(error.value)


def test_class_names_are_labels(folder, tmp_path):
    recipe = scored(folder, "class")
    names = [{**row, "label": ["NEG", "mid", "POS"][row["label"]]} for row in rows("class")]
    recipe["experts"][0]["evaluation"] = {"path": write(tmp_path / "names.jsonl", names)}
    assert evaluate_experts(recipe, **QUIET) == evaluate_experts(scored(folder, "class"), **QUIET)


@pytest.mark.parametrize("kind", SCORED)
def test_calibration_needs_no_labels(folder, tmp_path, kind):
    """Texts alone, and labels that are none."""
    texts = [
        {"text": row["text"], "label": label} for row, label in zip(rows("class"), [None, "x", 0.5, [1], {}, True])
    ]
    recipe = recipe_of(folder, kind, quantize={"method": "gptq"})
    recipe["experts"][0]["calibration"] = {"path": write(tmp_path / "texts.jsonl", texts)}
    prepared = prepare(load_recipe(recipe))
    assert sum(len(batch["input_ids"]) for batch in prepared.calibration[kind]) == 6


def batches(kind: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    labels = {
        "class": torch.arange(4) % 3,
        "number": torch.arange(4) / 7,
        "labels": torch.eye(4)[:, :3],
        "tags": torch.tensor([[-100, 1, 2, -100]] * 4),
        "choice": torch.tensor([0, 1, 1, 0]),
    }
    shape = (4, 2, 4) if kind == "choice" else (4, 4)
    ids = torch.randint(5, 20, shape, generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels[kind]}] * 2


@pytest.mark.parametrize("kind", ["choice", "class", "labels", "number", "tags"])
@torch.no_grad()
def test_ready_batches_are_calibrated_on_and_scored(folder, tmp_path, kind):
    recipe = recipe_of(folder, kind, quantize={"method": "rtn", "bits": 8}, output=str(tmp_path / "out"))
    given = {kind: batches(kind)}
    report = run(recipe, evaluation=given, **QUIET)
    batch = dict(batches(kind)[0])
    labels, scores = batch.pop("labels"), epmq.load(tmp_path / "out")(kind, **batch)
    if kind in ("class", "choice"):
        assert report["scores"][kind] == float((scores.argmax(-1) == labels).float().mean())
    if kind == "tags":
        found = [[TAGS[i] for i in row] for row in scores[:, 1:3].argmax(-1)]
        assert report["scores"][kind] == entity_f1(found, [["B-PER", "I-PER"]] * 4)
    recipe["quantize"] = {"method": "gptq"}
    (inputs, _) = prepare(load_recipe({**recipe, "output": None}), calibration=given).calibration[kind]
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"].ndim == 2


def test_batches_that_cannot_be_scored(folder):
    without = {"class": [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]}
    wrong = {"class": [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1, 2])}]}
    floats = {"class": [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0.5, 1])}]}
    for given, message in (
        (without, "cannot be scored; only calibrated on"),
        (wrong, "'labels' must have a row for each"),
        (floats, "'labels' must be a class index"),
    ):
        with pytest.raises(ValueError, match=rf"experts\.class\.evaluation: batches examples.* {message}"):
            prepare(load_recipe(recipe_of(folder, "class")), evaluation=given)


# --- models of other forms ----------------------------------------------------------------------------------------


def built(folder: Path, family: str, task_class: Any, **settings: Any) -> Any:
    """A base of a family, and an expert `task` of a task class of it."""
    base = FAMILIES[family].build()
    base.config.eos_token_id = 2
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    config = type(base.config).from_pretrained(folder / "base", **settings)
    model = fine_tuned(task_class.from_pretrained(folder / "base", config=config).eval(), 1)
    model.save_pretrained(folder / "task")
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("t5", "T5ForSequenceClassification"),
        ("t5", "T5ForQuestionAnswering"),
        ("bart", "BartForSequenceClassification"),
        ("bart", "BartForQuestionAnswering"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForTokenClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
    ],
)
@torch.no_grad()
def test_task_classes_of_writers_sit_on_the_shared_model(tmp_path, family, name):
    kind = {"S": "class", "T": "tags", "Q": "span"}[name.split("For")[1][0]]
    settings = {"num_labels": {"tags": len(TAGS), "span": 2, "class": 3}[kind]}
    expert = built(tmp_path, family, getattr(transformers, name), **settings)
    data = {"path": write(tmp_path / "data.jsonl", rows(kind))}
    task = {"name": "task", "model": str(tmp_path / "task"), "calibration": data, "evaluation": data}
    recipe = {"base": str(tmp_path / "base"), "experts": [task], "merge": {"scaling": 1.0}, "batch_size": 5}
    report = run({**recipe, "quantize": {"method": "none"}, "output": str(tmp_path / "out")}, **QUIET)
    assert 0 <= report["scores"]["task"] <= 1
    model = epmq.load(tmp_path / "out")
    texts = [row.get("text") or row.get("context") or " ".join(row["tokens"]) for row in rows(kind)]
    inputs = dict(tokenizer()(texts, padding=True, return_tensors="pt"))
    scores = model("task", **inputs)
    # One by one there is no padding, which decoders without a token for it cannot take.
    for number, text in enumerate(texts):
        output = expert(**tokenizer()(text, return_tensors="pt"))
        wanted = torch.stack([output.start_logits, output.end_logits], -1) if kind == "span" else output.logits
        found = scores[number] if kind == "class" else scores[number, : wanted.shape[1]]
        torch.testing.assert_close(found, wanted[0], atol=1e-5, rtol=1e-4)
    if name in ("T5ForSequenceClassification", "LlamaForSequenceClassification"):
        guided = {**recipe, "quantize": {"bits": 8}, "format": "dequantized", "output": str(tmp_path / "guided")}
        assert 0 <= run(guided, **QUIET)["scores"]["task"] <= 1


def test_texts_with_an_end_of_their_own_are_refused_by_classes_that_look_for_it(tmp_path):
    built(tmp_path, "bart", transformers.BartForSequenceClassification, num_labels=3)
    data = {"path": write(tmp_path / "data.jsonl", [{"text": "a cat", "label": 0}, {"text": "a </s> cat", "label": 1}])}
    task = {"name": "task", "model": str(tmp_path / "task"), "evaluation": data}
    recipe = {"base": str(tmp_path / "base"), "experts": [task], "quantize": {"method": "none"}}
    with pytest.raises(ValueError, match=r"experts\.task\.evaluation: BartForSequenceClassification scores a text at"):
        prepare(load_recipe(recipe))


@pytest.mark.parametrize("kind", ["span", "tags", "choice", "masked"])
def test_the_experts_guide_with_heads_of_every_kind(folder, tmp_path, kind):
    recipe = {**scored(folder, kind), "quantize": {"bits": 8}, "output": str(tmp_path / "out")}
    if kind == "masked":
        del recipe["experts"][0]["evaluation"]
    run(recipe, **QUIET)
    assert epmq.load(tmp_path / "out").tasks == [kind]


def test_a_question_answerer_with_more_scores_than_two_is_refused(tmp_path):
    built(tmp_path, "bert", transformers.BertForQuestionAnswering, num_labels=3)
    data = {"path": write(tmp_path / "data.jsonl", rows("span"))}
    task = {"name": "task", "model": str(tmp_path / "task"), "evaluation": data}
    recipe = {"base": str(tmp_path / "base"), "experts": [task], "quantize": {"method": "none"}}
    with pytest.raises(ValueError, match="BertForQuestionAnswering: a token has 3 scores, not one to begin"):
        prepare(load_recipe(recipe))


def test_a_head_of_its_own_needs_the_last_hidden_state(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    perturbed(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), 1).save_pretrained(tmp_path / "task")
    save_head(Head(torch.randn(3, 64), torch.zeros(3)), tmp_path / "task" / HEAD_FILE)
    data = {"path": write(tmp_path / "data.jsonl", rows("class"))}
    task = {"name": "task", "model": str(tmp_path / "task"), "evaluation": data}
    recipe = {"base": str(tmp_path / "base"), "experts": [task], "quantize": {"method": "none"}}
    with pytest.raises(ValueError, match="is a head on last_hidden_state, which LlamaForCausalLM does not give"):
        prepare(load_recipe(recipe))


def test_a_head_that_epmq_wrote_is_an_experts_head_again(folder, tmp_path):
    run({**recipe_of(folder, "class"), "output": str(tmp_path / "out")}, **QUIET)
    recipe = scored(folder, "class")
    recipe["experts"][0]["head"] = str(tmp_path / "out" / "heads" / "class.safetensors")
    assert evaluate_experts(recipe, **QUIET) == evaluate_experts(scored(folder, "class"), **QUIET)


def test_a_class_that_reads_the_last_token_must_not_find_padding_there():
    config = transformers.XLNetConfig(vocab_size=32, d_model=32, n_layer=1, n_head=2, d_inner=32, num_labels=2)
    model, task = transformers.XLNetModel(config), task_of_class("XLNetForSequenceClassification", config)
    ids = torch.ones(2, 3, dtype=torch.long)
    check_ends({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, task, model)
    with pytest.raises(InputError, match="batch_size: 1"):
        check_ends({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, task, model)
