import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, padded_batches, perturbed, recipe_for, word_tokenizer
from families import FAMILIES, clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import epmq
from epmq.data.encoding import encode
from epmq.data.processors import load_processor
from epmq.data.readers import read_examples
from epmq.models.checkpoint import Checkpoint
from epmq.models.heads import HEAD_FILE, Head, load_head, save_head
from epmq.models.multitask import HEADS, MultiTaskModel
from epmq.pipeline.evaluation import evaluate_checkpoint, evaluate_experts
from epmq.pipeline.run import merge, run

LABELS = {"one": ["no", "yes"], "two": ["red", "green", "blue", "none"]}


@pytest.fixture(scope="module")
def merged(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's experts, merged and quantized to 4 bits."""
    folder = tmp_path_factory.mktemp("merged")
    recipe = recipe_for(pool, quantize={"adapt_heads": False}, output=str(folder / "out"))
    run(recipe, progress=False, evaluate=False)
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
    with pytest.raises(FileNotFoundError, match=r"config\.json: missing"):
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
    recipe = {**native, "quantize": {"adapt_heads": False}, "output": str(tmp_path / "out")}
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
@torch.no_grad()
def test_heads_follow_the_dtype_that_is_asked_for(native, merged, tmp_path, dtype):
    run({**native, "output": str(tmp_path / "out")}, progress=False, evaluate=False)
    kind = torch.float32 if dtype == "auto" else dtype
    for folder in (tmp_path / "out", merged):
        model = epmq.load(folder, dtype=dtype)
        assert model.backbone.dtype == kind
        for task in model.tasks:
            scores, exact = model(task, **inputs(folder)), epmq.load(folder)(task, **inputs(folder))
            torch.testing.assert_close(scores.float(), exact, rtol=0, atol=0.1 if kind != torch.float32 else 0)


@torch.no_grad()
def test_a_head_in_half_precision_sits_on_a_backbone_in_float32(native, tmp_path):
    recipe = json.loads(json.dumps(native))
    for expert in recipe["experts"]:
        model = BertForSequenceClassification.from_pretrained(expert["model"])
        expert["model"] = str(tmp_path / expert["name"])
        model.bfloat16().save_pretrained(expert["model"])
    merge({**recipe, "output": str(tmp_path / "out")}, progress=False)
    scores = epmq.load(tmp_path / "out")("one", **inputs(tmp_path / "out"))
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all()
    kept = load_file(tmp_path / "out" / HEADS / "one.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_a_vision_model_with_a_tokenizer_beside_it_answers_images(tmp_path):
    """What CLIP's vision experts become: the base's processor has both."""
    clip().save_pretrained(tmp_path / "base")
    CLIPProcessor(CLIPImageProcessorPil(size=28, crop_size=28), word_tokenizer()).save_pretrained(tmp_path / "base")
    CLIPVisionModel.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "one")
    save_head(Head(torch.randn(3, 32), torch.randn(3), "cls", labels=["x", "y", "z"]), tmp_path / "one" / HEAD_FILE)
    experts = [{"name": "one", "model": str(tmp_path / "one")}]
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "output": str(tmp_path / "out")}
    images = torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8).numpy()
    rows = [{"image": Image.fromarray(image), "label": 0} for image in images]
    report = run(recipe, calibration={"one": rows}, evaluation={"one": rows}, progress=False)
    model = epmq.load(tmp_path / "out")
    answers = model.answer("one", images)
    assert answers == model.answer("one", [Image.fromarray(image) for image in images])
    assert report["scores"]["one"] == answers.count("x") / 4


# --- text that is written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_generated_text_is_the_models_own(family):
    model, tokenizer = FAMILIES[family].build(), word_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    written = MultiTaskModel(model, {}, tokenizer).generate(TEXTS, max_new_tokens=5)
    for text, found in zip(TEXTS, written, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        # Greedily by hand: the likeliest token, again and again.
        own = torch.tensor([[0]]) if family == "t5" else ids
        for _ in range(5):
            logits = model(ids, decoder_input_ids=own).logits if family == "t5" else model(own).logits
            own = torch.cat([own, logits[:, -1:].argmax(-1)], dim=1)
            if own[0, -1] == 2:
                break
        start = 0 if family == "t5" else ids.shape[1]
        assert found == tokenizer.decode(own[0, start:], skip_special_tokens=True)


def test_what_does_not_write_says_so(merged):
    with pytest.raises(ValueError, match="BertModel does not generate text"):
        epmq.load(merged).generate(TEXTS)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not generate text"):
        MultiTaskModel(FAMILIES["llama"].build(), {}).generate(TEXTS)


def test_settings_of_generate_are_handed_on():
    model = MultiTaskModel(FAMILIES["llama"].build(), {}, word_tokenizer())
    allowed = [6, 7]
    words = word_tokenizer().convert_ids_to_tokens(allowed)
    (text,) = model.generate(
        TEXTS[:1], 4, suppress_tokens=[i for i in range(32) if i not in allowed], repetition_penalty=1.1
    )
    assert len(text.split()) == 4 and set(text.split()) <= set(words)
    assert model.generate([]) == []


@torch.no_grad()
def test_ready_batches_and_objects_stand_in_for_the_recipes_data(pool, tmp_path):
    """The same rows from files, as objects and as batches give the same checkpoint and the same scores."""
    recipe = recipe_for(pool)
    rows = {
        task: [json.loads(line) for line in (pool / "data" / f"{task}.jsonl").read_text().splitlines()]
        for task in ("one", "two")
    }
    batches = {
        task: list(encode(read_examples(pool / "data" / f"{task}.jsonl"), load_processor(pool / "base"), 8, 16))
        for task in rows
    }
    reports = [
        run({**recipe, "output": str(tmp_path / "files")}, progress=False),
        run({**recipe, "output": str(tmp_path / "rows")}, progress=False, calibration=rows, evaluation=rows),
        run({**recipe, "output": str(tmp_path / "batches")}, progress=False, calibration=batches),
    ]
    first, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "rows", "batches"))
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    assert reports[0]["scores"] == reports[1]["scores"] == reports[2]["scores"]
    with pytest.raises(ValueError, match="data for 'three', but the recipe has no expert of that name"):
        run({**recipe, "output": str(tmp_path / "x")}, progress=False, calibration={"three": rows["one"]})
    with pytest.raises(ValueError, match=r"experts\.one\.evaluation: batches examples cannot be scored"):
        run({**recipe, "output": str(tmp_path / "x")}, progress=False, evaluation=batches)
