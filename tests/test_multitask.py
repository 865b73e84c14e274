import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import padded_batches, perturbed, recipe_for
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import epmq
from epmq.batches import load_processor
from epmq.checkpoint import Checkpoint
from epmq.evaluate import accuracy, gap_recovered
from epmq.heads import HEAD_FILE, load_head
from epmq.multitask import HEADS, MultiTaskModel
from epmq.pipeline import evaluate_checkpoint, evaluate_experts, merge, run

TEXTS = ["the cat sat on the mat", "a dog ran", "blue tree"]
LABELS = {"one": ["no", "yes"], "two": ["red", "green", "blue", "none"]}


@pytest.fixture(scope="module")
def merged(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's experts, merged and quantized to 4 bits."""
    folder = tmp_path_factory.mktemp("merged")
    run(recipe_for(pool, output=str(folder / "out")), progress=False, evaluate=False)
    return folder / "out"


@pytest.fixture(scope="module")
def native(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose experts are `BertForSequenceClassification` checkpoints with two and four labels."""
    folder = tmp_path_factory.mktemp("native")
    recipe = recipe_for(pool)
    for seed, expert in enumerate(recipe["experts"], start=7):
        names = dict(enumerate(LABELS[expert["name"]]))
        config = BertConfig.from_pretrained(pool / "base", id2label=names, label2id={v: k for k, v in names.items()})
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict(BertModel.from_pretrained(pool / "base").state_dict())
        expert["model"] = str(folder / expert["name"])
        perturbed(model, seed).save_pretrained(expert["model"])
        del expert["evaluation"]
    return recipe


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_processor(folder)(TEXTS, padding=True, return_tensors="pt"))


def test_every_task_is_answered(pool, merged):
    model = epmq.load(merged)
    assert model.tasks == ["one", "two"] and model.device.type == "cpu"
    assert not model.backbone.training
    for task in model.tasks:
        head = load_head(pool / "experts" / task / HEAD_FILE)
        with torch.no_grad():
            hidden = model.backbone(**inputs(merged)).last_hidden_state
            scores = model(task, **inputs(merged))
        assert torch.equal(scores, head.logits(hidden, inputs(merged)["attention_mask"]))
        assert model.labels(task) == ["x", "y", "z"]
        assert model.answer(task, TEXTS) == ["xyz"[i] for i in scores.argmax(-1)]
        assert model.answer(task, iter(TEXTS), max_length=3) == model.answer(task, [t.split()[0] for t in TEXTS])
    assert model.answer("one", []) == []


def test_an_unknown_task_is_refused_by_name(merged):
    model = epmq.load(merged)
    for ask in (lambda: model("three"), lambda: model.answer("three", TEXTS), lambda: model.labels("three")):
        with pytest.raises(KeyError, match="no task 'three'; there are: one, two"):
            ask()
    with pytest.raises(KeyError, match="there are: none"):
        MultiTaskModel(model.backbone, {}).head("one")


def test_answers_are_indices_where_no_names_are_known(merged):
    model = epmq.load(merged)
    names = model.answer("one", TEXTS)
    model.head("one").labels.clear()
    assert ["xyz"[index] for index in model.answer("one", TEXTS)] == names


def test_nothing_to_load(tmp_path, pool):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        epmq.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        epmq.load(tmp_path)
    assert epmq.load(pool / "base").tasks == []


def test_a_head_that_cannot_be_read_is_named(merged, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / HEADS / "two.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"two\.safetensors: not a readable safetensors file"):
        epmq.load(tmp_path / "out")


@pytest.mark.parametrize("form", ["pack-quantized", "dequantized", "merged"])
@torch.no_grad()
def test_native_heads_are_the_experts_own_around_the_shared_backbone(native, tmp_path, form):
    recipe = {**native, "output": str(tmp_path / "out")}
    if form == "merged":
        merge(recipe, progress=False)
    else:
        run({**recipe, "format": form}, progress=False, evaluate=False)
    model = epmq.load(tmp_path / "out")
    batch = inputs(tmp_path / "out")
    assert model.tasks == ["one", "two"]
    for expert in native["experts"]:
        task = expert["name"]
        # By hand: transformers' class, the expert's classifier, and the checkpoint's backbone put in.
        reference = BertForSequenceClassification.from_pretrained(expert["model"]).eval()
        classifier = {name: value.clone() for name, value in reference.classifier.state_dict().items()}
        reference.bert.load_state_dict(epmq.load(tmp_path / "out").backbone.state_dict())
        scores = model(task, **batch)
        assert scores.shape == (3, len(LABELS[task])) and torch.equal(scores, reference(**batch).logits)
        assert model.labels(task) == LABELS[task]
        assert model.answer(task, TEXTS) == [LABELS[task][i] for i in scores.argmax(-1)]
        # Heads are kept as they were: in full precision, and out of the merge.
        kept = load_file(tmp_path / "out" / HEADS / f"{task}.safetensors")
        assert {name.removeprefix("classifier."): value for name, value in kept.items()}.keys() == classifier.keys()
        assert all(torch.equal(kept[f"classifier.{name}"], value) for name, value in classifier.items())
    assert not any("classifier" in name for name in Checkpoint(tmp_path / "out").names)
    one, two = (model.head(task).model.bert for task in model.tasks)
    assert one is two is model.backbone


def test_native_heads_can_be_evaluated(pool, native, tmp_path):
    recipe = json.loads(json.dumps(native))
    for expert in recipe["experts"]:
        rows = [{"text": text, "label": i % len(LABELS[expert["name"]])} for i, text in enumerate(TEXTS * 3)]
        path = tmp_path / f"{expert['name']}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        expert["evaluation"] = {"path": str(path)}
    report = run({**recipe, "output": str(tmp_path / "out")}, progress=False)
    assert report["scores"] == evaluate_checkpoint(tmp_path / "out", recipe, progress=False)["scores"]
    model = epmq.load(tmp_path / "out")
    for expert in recipe["experts"]:
        task = expert["name"]
        wanted = [LABELS[task][i % len(LABELS[task])] for i in range(9)]
        right = sum(a == b for a, b in zip(model.answer(task, TEXTS * 3), wanted, strict=True))
        assert report["scores"][task] == right / 9
    # Each expert on its own task, with its own head: what one model for all tasks is measured against.
    scores = evaluate_experts(recipe, progress=False)["scores"]
    for expert in recipe["experts"]:
        reference = BertForSequenceClassification.from_pretrained(expert["model"]).eval()
        with torch.no_grad():
            found = reference(**inputs(pool / "base")).logits.argmax(-1).tolist()
        wanted = [i % len(LABELS[expert["name"]]) for i in range(9)]
        assert scores[expert["name"]] == sum(a == b for a, b in zip(found * 3, wanted)) / 9


def test_leftovers_of_an_old_layout_are_no_head(pool, tmp_path):
    """Older transformers stored a `position_ids` buffer; an expert that has one has no task head because of it."""
    recipe = recipe_for(pool, output=str(tmp_path / "out"))
    for expert in recipe["experts"]:
        folder = tmp_path / expert["name"]
        shutil.copytree(expert["model"], folder)
        (folder / HEAD_FILE).unlink()
        tensors = load_file(folder / "model.safetensors")
        tensors["embeddings.position_ids"] = torch.arange(32)[None]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        expert["model"] = str(folder)
    with pytest.raises(ValueError, match=r"experts\.one: evaluation needs a head"):
        run(recipe, progress=False)
    run(recipe, progress=False, evaluate=False)
    assert epmq.load(tmp_path / "out").tasks == []


def test_accuracy_is_the_share_of_right_answers(pool, merged):
    from epmq.data import Examples

    model = epmq.load(merged)
    texts = [f"{a} {b}" for a in ("the", "a big", "small blue tree and") for b in ("cat", "dog", "mat sat on")]
    answers = np.asarray(["xyz".index(name) for name in model.answer("one", texts)])
    assert accuracy(model, "one", Examples("text", texts, answers), batch_size=4) == 1
    assert accuracy(model, "one", Examples("text", texts, (answers + 1) % 3), batch_size=4) == 0
    half = np.where(np.arange(9) < 3, answers, (answers + 1) % 3)
    done = []
    assert accuracy(model, "one", Examples("text", texts, half), batch_size=2, advance=done.append) == 3 / 9
    assert done == [2, 2, 2, 2, 1]


def test_labels_that_do_not_fit_the_head_are_refused(merged):
    from epmq.data import Examples

    model = epmq.load(merged)
    with pytest.raises(ValueError, match="task one: the evaluation data has no labels"):
        accuracy(model, "one", Examples("text", TEXTS, None))
    for labels, wrong in (([0, 1, 3], 3), ([0, -1, 1], -1)):
        with pytest.raises(ValueError, match=f"task one: label {wrong} but the head has 3 classes"):
            accuracy(model, "one", Examples("text", TEXTS, np.asarray(labels)))


def test_gap_recovered_by_hand():
    assert gap_recovered(73.6, 65.0, 90.3) == pytest.approx(0.34, abs=0.001)
    assert gap_recovered(1.0, 1.0, 2.0) == 0 and gap_recovered(0.5, 1.0, 1.0) is None


@torch.no_grad()
def test_a_native_head_sits_on_the_inner_model_of_a_decoder(tmp_path):
    """Base: a causal language model. Experts: sequence classifiers, whose head takes what the inner model returns."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=2, pad_token_id=0, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    experts = []
    for seed, task in enumerate(("one", "two"), start=1):
        settings = LlamaConfig.from_pretrained(tmp_path / "base", num_labels=seed + 2)
        expert = LlamaForSequenceClassification(settings)
        expert.model.load_state_dict(LlamaForCausalLM.from_pretrained(tmp_path / "base").model.state_dict())
        perturbed(expert, seed).save_pretrained(tmp_path / task)
        experts.append({"name": task, "model": str(tmp_path / task)})
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "quantize": {"method": "none"}}
    run({**recipe, "output": str(tmp_path / "out")}, progress=False)
    model, batch = epmq.load(tmp_path / "out"), padded_batches(1)[0]
    for expert in experts:
        reference = LlamaForSequenceClassification.from_pretrained(expert["model"]).eval()
        reference.model.load_state_dict(model.backbone.model.state_dict())
        assert torch.equal(model(expert["name"], **batch), reference(**batch).logits)
