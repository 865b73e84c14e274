"""Tokenizer, chat templates and ends of texts of the output."""

import json

import pytest
import torch
from merges import recipe_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification
from vocabularies import END, FIRST, START, WHOLE, chat_tokenizer, merged, write_base, write_expert

from epmq.models.multitask import load
from epmq.pipeline.evaluation import evaluate_experts
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe

CHAT = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "a dog ran"}]


def template(start):
    return "{% for m in messages %}" + start + " {{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"


def chats(folder, *experts, **fields):
    """A recipe whose experts have chats."""
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(8)))
    recipe = recipe_of(folder, *experts, batch_size=4, samples=8, max_length=32, **fields)
    for expert in recipe["experts"]:
        expert |= {field: {"path": str(folder / "chats.jsonl")} for field in ("calibration", "evaluation")}
    return recipe


def ids(tokenizer, name=None):
    found = tokenizer.apply_chat_template(CHAT, chat_template=name, tokenize=True, return_dict=True)["input_ids"]
    return tokenizer.convert_ids_to_tokens(found)


def test_an_expert_s_chats_are_read_as_the_expert_does(tmp_path):
    """The base has no template, and ends its texts with another token."""
    write_base(tmp_path)
    write_expert(tmp_path, "one", chat_tokenizer(START, END, eos_token=END, chat_template=template(START)))
    gptq = {"quantize": {"method": "gptq", "bits": 8, "group_size": 32}}
    report = run(chats(tmp_path, "one", **gptq, merge=WHOLE["merge"]), progress=False)
    assert "the base has no chat template: the output has that of one" in report["notes"]
    assert "generated texts end at token 20, too, as those of expert one do" in report["notes"]
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "one"))
    assert ids(ours) == ids(theirs) and isinstance(ours.chat_template, str)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 20]
    expected = evaluate_experts(chats(tmp_path, "one"), progress=False)
    assert report["scores"]["one"] == pytest.approx(expected["scores"]["one"], abs=0.02)


@pytest.mark.parametrize("base", [None, "<s>"])
def test_other_templates_are_saved_by_the_names_of_tasks(tmp_path, base):
    write_base(tmp_path, chat_tokenizer(**({"chat_template": template(base)} if base else {})))
    write_expert(tmp_path, "one", chat_tokenizer(START, END, eos_token=END, chat_template=template(START)))
    write_expert(tmp_path, "two", chat_tokenizer(chat_template=template("<unk>")))
    prepared = prepare(load_recipe(chats(tmp_path, quantize={"method": "gptq", "bits": 8, "group_size": 32})))
    ours = AutoTokenizer.from_pretrained(tmp_path / "base")
    merged(tmp_path, **FIRST)
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    for task in ("one", "two"):
        expected = ids(AutoTokenizer.from_pretrained(tmp_path / task))
        found = prepared.calibration[task][0]["input_ids"][0].tolist()
        assert prepared.plan.processor.convert_ids_to_tokens(found) == expected == ids(written, task)
    assert ids(written) == (ids(ours) if base else ids(written, "one"))


def test_the_same_templates_and_tokens_change_no_file(tmp_path):
    tokenizer = chat_tokenizer(START, chat_template=template(START))
    write_base(tmp_path, tokenizer)
    write_expert(tmp_path, "one", tokenizer)
    notes = merged(tmp_path, "one", **WHOLE)["notes"]
    assert notes == []
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_classifiers_read_their_own_tokens(tmp_path):
    """They number them otherwise, and one pads with a token of its own."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, tokenizer in (
        ("base", chat_tokenizer()),
        ("one", chat_tokenizer("<x>", "<y>")),
        ("two", chat_tokenizer("[PAD]", "<y>", pad_token="[PAD]")),
    ):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(vocab_size=21, **sizes)).eval()
        if name == "base":
            model = model.bert
        else:
            model.resize_token_embeddings(22, mean_resizing=False)
            model.get_input_embeddings().weight.data[20:].normal_()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    merged(tmp_path, "two", **WHOLE)
    ours, text = load(tmp_path / "out"), ["the <y> cat", "a dog"]
    theirs, tokenizer = (
        kind.from_pretrained(tmp_path / "two") for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    with torch.no_grad():
        found = ours("two", **ours.processor(text, padding=True, return_tensors="pt"))
        expected = theirs(**tokenizer(text, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, expected)
    (tmp_path / "out").rename(tmp_path / "alone")
    merged(tmp_path, **FIRST)
    both = load(tmp_path / "out")
    assert both.head("two").model.config.pad_token_id == both.processor.pad_token_id == 0
    assert both.processor.convert_ids_to_tokens([20, 21, 22]) == ["<x>", "<y>", "[PAD]"]
