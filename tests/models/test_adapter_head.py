"""Task heads that LoRA adapters bring."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import adapt, edit, open_adapters, rewrite
from conftest import TEXTS, padded_batches, recipe_for, tiny_bert
from families import FAMILIES, text_model
from peft import PeftModel, TaskType
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

import epmq
from epmq.data.processors import load_processor
from epmq.models.heads import HEAD_FILE
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.run import merge, run


def classifier(pool: Path, folder: Path, **fields: Any) -> Any:
    """A sequence classifier with three labels, adapted."""
    model = BertForSequenceClassification.from_pretrained(pool / "base", num_labels=3)
    return adapt(model, folder, target_modules=["query", "value"], **fields)


@pytest.mark.parametrize("fields", [{"task_type": TaskType.SEQ_CLS}, {"modules_to_save": ["classifier"]}])
@torch.no_grad()
def test_an_adapter_brings_its_own_head(pool, tmp_path, fields):
    """Whether PEFT wrote down the task or only the class that was trained."""
    model = classifier(pool, tmp_path / "lora", **fields)
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge={"method": "average"})
    recipe["experts"] = [{**recipe["experts"][0], "model": str(tmp_path / "lora")}]
    rows = [json.loads(line) for line in (pool / "data" / "one.jsonl").read_text().splitlines()]
    batch = load_processor(pool / "base")([row["text"] for row in rows], padding=True, return_tensors="pt")
    logits = model(**batch).logits
    right = (logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).float().mean().item()
    assert evaluate_experts(recipe, progress=False)["scores"]["one"] == pytest.approx(right)

    report = merge(recipe, progress=False, evaluate=True)
    loaded = epmq.load(tmp_path / "out")
    torch.testing.assert_close(loaded("one", **batch), logits, rtol=0, atol=1e-5)
    assert loaded.answer("one", [row["text"] for row in rows]) == [f"LABEL_{i}" for i in logits.argmax(-1)]
    assert report["scores"]["one"] == pytest.approx(right) and report["notes"] == []


def test_adapters_and_whole_checkpoints_in_one_recipe(pool, tmp_path):
    classifier(pool, tmp_path / "lora", task_type="SEQ_CLS", bias="all")
    recipe = recipe_for(pool, output=str(tmp_path / "out"), merge={"method": "task_arithmetic"})
    recipe["experts"][1]["model"] = str(tmp_path / "lora")
    report = run(recipe, progress=False)
    model = epmq.load(tmp_path / "out")
    assert model.tasks == ["one", "two"] and set(report["scores"]) == {"one", "two"}
    assert model.answer("one", TEXTS)[0] in "xyz" and model.answer("two", TEXTS)[0].startswith("LABEL_")
    # By hand: the merge of what peft and transformers make of the two.
    merge({**recipe, "output": str(tmp_path / "merged")}, progress=False)
    lora = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(pool / "base", num_labels=3), tmp_path / "lora"
    )
    two, base = lora.merge_and_unload().bert.state_dict(), load_file(pool / "base" / "model.safetensors")
    one = load_file(pool / "experts" / "one" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        expected = base[name] + 0.3 * (one[name] - base[name]) + 0.3 * (two[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-6, msg=name)


@torch.no_grad()
def test_a_decoder_with_an_adapted_classifier(tmp_path):
    base = tmp_path / "llama"
    FAMILIES["llama"].build().save_pretrained(base)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=5)
    model = adapt(model, tmp_path / "lora", target_modules=["q_proj"], task_type="SEQ_CLS")
    recipe = {"base": str(base), "experts": [{"name": "t", "model": str(tmp_path / "lora")}]}
    merge({**recipe, "merge": {"method": "average"}, "output": str(tmp_path / "out")}, progress=False)
    batch = padded_batches(1)[0]
    torch.testing.assert_close(epmq.load(tmp_path / "out")("t", **batch), model(**batch).logits, rtol=0, atol=1e-5)


def test_a_head_that_was_not_saved_is_named(tmp_path):
    FAMILIES["distilbert"].build().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapt(model, tmp_path / "lora", target_modules=["q_lin"], task_type="SEQ_CLS")
    rewrite(tmp_path / "lora", lambda tensors: {k: v for k, v in tensors.items() if "pre_classifier" not in k})
    with pytest.raises(ValueError, match=r"pre_classifier\.bias, pre_classifier\.weight is neither in the base nor"):
        open_adapters(tmp_path / "base", tmp_path / "lora")


@pytest.mark.parametrize("saved", [True, False])
def test_a_pooler_that_the_base_lacks_must_come_with_the_adapter(tmp_path, saved):
    config = tiny_bert().config
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    modules = ["classifier", "pooler"] if saved else ["classifier"]
    model = adapt(model, tmp_path / "lora", target_modules=["query"], task_type="SEQ_CLS", modules_to_save=modules)
    recipe = {"base": str(tmp_path / "base"), "experts": [{"name": "t", "model": str(tmp_path / "lora")}]}
    recipe |= {"merge": {"method": "average"}, "output": str(tmp_path / "out")}
    if not saved:
        with pytest.raises(ValueError, match=r"pooler\.dense\.weight is neither in the base nor in the adapter"):
            merge(recipe, progress=False)
        return
    merge(recipe, progress=False)
    with torch.no_grad():
        batch = padded_batches(1)[0]
        torch.testing.assert_close(epmq.load(tmp_path / "out")("t", **batch), model(**batch).logits, rtol=0, atol=1e-5)


def modernbert(kind: Any, **fields: Any) -> Any:
    windows = {"local_attention": 8, "global_attn_every_n_layers": 2, "max_position_embeddings": 40}
    return text_model(transformers.ModernBertConfig, kind, **windows, **fields)


def distilbert(kind: Any, **fields: Any) -> Any:
    sizes = {"vocab_size": 32, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    return kind(transformers.DistilBertConfig(**sizes, **fields)).eval()


SEQ_CLS = {"task_type": "SEQ_CLS"}
# The base, the class that is adapted, how, and what of the head is the base's.
COMPLETED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "modernbert": (
        lambda: modernbert(transformers.ModernBertForMaskedLM),
        transformers.ModernBertForSequenceClassification,
        {**SEQ_CLS, "target_modules": ["Wqkv"]},
    ),
    "modernbert_all_linear": (
        lambda: modernbert(transformers.ModernBertForMaskedLM),
        transformers.ModernBertForSequenceClassification,
        {**SEQ_CLS, "target_modules": "all-linear"},
    ),
    "distilbert": (
        lambda: distilbert(transformers.DistilBertForSequenceClassification, num_labels=3),
        transformers.DistilBertForSequenceClassification,
        {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]},
    ),
    "distilbert_changed": (
        lambda: distilbert(transformers.DistilBertForSequenceClassification, num_labels=3),
        transformers.DistilBertForSequenceClassification,
        {"target_modules": ["q_lin", "pre_classifier", "classifier"]},
    ),
    "xlm_roberta": (
        lambda: text_model(
            transformers.XLMRobertaConfig, transformers.XLMRobertaForSequenceClassification, num_labels=2
        ),
        transformers.XLMRobertaForSequenceClassification,
        {"target_modules": ["query", "classifier.dense"], "modules_to_save": ["out_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", COMPLETED)
@torch.no_grad()
def test_the_base_completes_a_head_as_peft_does(tmp_path, case):
    base, head_class, fields = COMPLETED[case]
    base().save_pretrained(tmp_path / "base")

    def classifier() -> Any:
        return head_class.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)

    adapt(classifier(), tmp_path / "lora", size=0.03, **fields)
    recipe = {"base": str(tmp_path / "base"), "experts": [{"name": "t", "model": str(tmp_path / "lora")}]}
    report = merge({**recipe, "merge": {"method": "average"}, "output": str(tmp_path / "out")}, progress=False)
    assert not any("head" in note for note in report["notes"])
    batch = padded_batches(1)[0]
    expected = PeftModel.from_pretrained(classifier(), tmp_path / "lora").merge_and_unload().eval()(**batch).logits
    torch.testing.assert_close(epmq.load(tmp_path / "out")("t", **batch), expected, rtol=0, atol=1e-5)


def test_a_part_that_training_changed_is_not_the_bases(tmp_path):
    """It is named in `modules_to_save`, by its end, and not in the file: PEFT cannot read such an adapter either."""
    base = distilbert(transformers.DistilBertForSequenceClassification, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    adapt(base, tmp_path / "lora", target_modules=["q_lin"], task_type="SEQ_CLS")
    rewrite(tmp_path / "lora", lambda tensors: {k: v for k, v in tensors.items() if "pre_classifier" not in k})
    with pytest.raises(
        ValueError, match=r"pre_classifier\.weight is neither in the base nor in the adapter, as training"
    ):
        open_adapters(tmp_path / "base", tmp_path / "lora")


@pytest.mark.parametrize(
    ("labels", "note", "has_head"),
    [
        (None, "names SEQ_CLS but brings no head: it has none; name it in modules_to_save when training", False),
        (3, "brings no head: the base's takes its place (classifier.weight, classifier.bias)", True),
    ],
)
def test_an_adapter_that_names_a_task_without_a_head_is_a_departure(tmp_path, labels, note, has_head):
    model = text_model(
        transformers.BertConfig,
        BertForSequenceClassification if labels else BertModel,
        **({"num_labels": labels} if labels else {}),
    )
    model.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "lora", target_modules=["query"])
    edit(tmp_path / "lora", task_type="SEQ_CLS", auto_mapping=None)
    opened = open_adapters(tmp_path / "base", tmp_path / "lora")
    assert len(opened.notes.departures) == 1 and note in opened.notes.departures[0]
    assert opened.experts["t0"].has_head == has_head


def test_a_head_file_is_a_head(pool, tmp_path):
    adapt(BertModel.from_pretrained(pool / "base"), tmp_path / "lora", target_modules=["query"])
    edit(tmp_path / "lora", task_type="SEQ_CLS", auto_mapping=None)
    shutil.copyfile(pool / "experts" / "one" / HEAD_FILE, tmp_path / "lora" / HEAD_FILE)
    assert open_adapters(pool / "base", tmp_path / "lora").notes == []


@pytest.mark.parametrize(("targets", "left_out"), [(["query"], 0), (["query", "transform.dense"], 1)])
def test_a_masked_language_models_head_is_no_tasks(tmp_path, targets, left_out):
    model = text_model(transformers.BertConfig, BertForMaskedLM)
    model.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "lora", target_modules=targets)
    opened = open_adapters(tmp_path / "base", tmp_path / "lora")
    notes = ["expert t0: cls.predictions.transform.dense.weight is in another head of the base: left out"]
    found = [note for note in opened.notes.departures if note.startswith("expert")]
    assert found == notes[:left_out] and not opened.experts["t0"].has_head


def test_names_of_a_state_dict_that_peft_did_not_write(pool, tmp_path):
    classifier(pool, tmp_path / "lora", task_type="SEQ_CLS")
    found = open_adapters(pool / "base", tmp_path / "lora").experts["t0"]
    name = "encoder.layer.0.attention.self.query.weight"
    expected, head = found.tensor(name), found.head_tensors()

    def raw(key: str) -> str:
        key = re.sub(r"lora_([AB])\.", r"lora_\1.default.", key)
        return key.replace("classifier.", "classifier.modules_to_save.default.")

    rewrite(tmp_path / "lora", lambda tensors: {raw(key): tensor for key, tensor in tensors.items()})
    found = open_adapters(pool / "base", tmp_path / "lora").experts["t0"]
    assert torch.equal(found.tensor(name), expected)
    assert all(torch.equal(tensor, head[key]) for key, tensor in found.head_tensors().items()) and len(head) == 2


def test_the_names_of_as_many_labels_are_the_bases(tmp_path):
    """As `from_pretrained` with that many labels has them."""
    names = {0: "bad", 1: "good"}
    model = text_model(transformers.BertConfig, BertForSequenceClassification, id2label=names)
    model.save_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "lora", target_modules=["query"], task_type="SEQ_CLS")
    config = open_adapters(tmp_path / "base", tmp_path / "lora").experts["t0"].head_config
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["label2id"] == {"bad": 0, "good": 1}


def test_a_change_to_what_the_base_lacks_is_refused(tmp_path):
    BertForMaskedLM(tiny_bert().config).save_pretrained(tmp_path / "base")
    adapt(tiny_bert(), tmp_path / "lora", target_modules=["pooler.dense"])
    with pytest.raises(ValueError, match=r"changes 'pooler\.dense\.weight', which the base lacks"):
        open_adapters(tmp_path / "base", tmp_path / "lora")


def test_a_head_of_no_known_class_is_refused(pool, tmp_path):
    class Mine(BertModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.answer = nn.Linear(64, 3)

    adapt(Mine.from_pretrained(pool / "base"), tmp_path, target_modules=["query"], modules_to_save=["answer"])
    with pytest.raises(ValueError, match=r"answer\.weight.* is not in the base, and no task class is named for it"):
        open_adapters(pool / "base", tmp_path)


def test_the_written_checkpoint_needs_no_adapter(pool, tmp_path):
    classifier(pool, tmp_path / "lora", task_type="SEQ_CLS")
    recipe = recipe_for(pool, output=str(tmp_path / "out"), quantize={"method": "rtn"})
    recipe["experts"][1]["model"] = str(tmp_path / "lora")
    run(recipe, progress=False, evaluate=False)
    shutil.rmtree(tmp_path / "lora")
    assert not list((tmp_path / "out").glob("adapter*"))
    assert epmq.load(tmp_path / "out").answer("two", TEXTS)


def test_a_head_on_parts_of_a_writer_holds_nothing_of_them(tmp_path):
    """T5's task classes have the writer's parts by the same names: the shared model's, not the base's, are read."""
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, num_labels=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = transformers.T5ForQuestionAnswering.from_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "lora", target_modules=["q"], modules_to_save=["qa_outputs"], task_type="QUESTION_ANS")
    found = open_adapters(tmp_path / "base", tmp_path / "lora").experts["t0"].head_tensors()
    assert sorted(name.rpartition(".")[0] for name in found) == ["qa_outputs", "qa_outputs"]
