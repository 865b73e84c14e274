from pathlib import Path

import pytest
import torch
import transformers

from epmq.data.processors import load_processor
from epmq.models.heads import load_head, save_head
from epmq.models.multitask import MultiTaskModel
from epmq.reproduce import zeroshot
from epmq.reproduce.tables import load_table
from epmq.reproduce.zeroshot import check_template, text_heads
from tests.kit.mirror import build

NAMES, TEMPLATES = ["cat", "dog", "big tree"], ["a photo of a {}.", "the {} itself"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel as the Hub has it: a pickle, old files beside it."""
    table, hub = load_table("clip-vit-b32-8"), tmp_path_factory.mktemp("hub")
    build(table.model_copy(update={"tasks": {"mnist": table.tasks["mnist"]}}), hub, rows=1)
    return hub / table.base


@torch.no_grad()
def test_a_head_scores_as_the_whole_model_does(clip, tmp_path):
    whole, processor = transformers.CLIPModel.from_pretrained(clip).eval(), load_processor(clip)
    files = text_heads(clip / "pytorch_model.bin", {"pets": (NAMES, TEMPLATES[:1])}, tmp_path)
    head = load_head(files["pets"])
    assert head.labels == NAMES and head.bias.count_nonzero() == 0
    pixels = torch.randn(4, 3, 28, 28)
    texts = processor.tokenizer([TEMPLATES[0].format(name) for name in NAMES], padding=True, return_tensors="pt")
    expected = whole(pixel_values=pixels, **texts).logits_per_image
    model = MultiTaskModel(whole.vision_model, {"pets": head})
    torch.testing.assert_close(model("pets", pixel_values=pixels), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_templates_are_averaged_where_they_are_normalised(clip, tmp_path):
    alone = [
        load_head(text_heads(clip / "pytorch_model.bin", {"a": (NAMES, [one])}, tmp_path)["a"]) for one in TEMPLATES
    ]
    both = load_head(text_heads(clip / "pytorch_model.bin", {"a": (NAMES, TEMPLATES)}, tmp_path)["a"])
    scale = alone[0].weight.norm(dim=1, keepdim=True)
    mean = alone[0].weight + alone[1].weight
    torch.testing.assert_close(both.weight, scale * mean / mean.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert torch.equal(both.projection, alone[0].projection)


def test_heads_are_made_once(clip, tmp_path, monkeypatch):
    tasks = {"one": (NAMES, TEMPLATES), "two": (NAMES, TEMPLATES[:1])}
    made: list[int] = []
    original = zeroshot.text_head
    monkeypatch.setattr(zeroshot, "text_head", lambda *args: made.append(1) or original(*args))
    first = text_heads(clip / "pytorch_model.bin", tasks, tmp_path)
    assert text_heads(clip / "pytorch_model.bin", tasks, tmp_path) == first and len(made) == 2
    other = text_heads(clip / "pytorch_model.bin", {**tasks, "one": (NAMES[::-1], TEMPLATES)}, tmp_path)
    assert other["two"] == first["two"] and other["one"] != first["one"] and len(made) == 3


def test_a_model_without_a_text_tower_is_named(clip, tmp_path):
    folder = clip.parent.parent / "tanganke" / "clip-vit-base-patch32_mnist"
    with pytest.raises(ValueError, match=r"clip-vit-base-patch32_mnist: no CLIP model with a text tower"):
        text_heads(folder, {"one": (NAMES, TEMPLATES)}, tmp_path)


def test_a_projection_is_kept_with_its_head(clip, tmp_path):
    head = load_head(text_heads(clip / "pytorch_model.bin", {"a": (NAMES, TEMPLATES)}, tmp_path)["a"])
    save_head(head, tmp_path / "b.safetensors")
    assert torch.equal(load_head(tmp_path / "b.safetensors").projection, head.projection)


@pytest.mark.parametrize("template", ["a cat", "{name}", "{} and {}", "{", "{1}"])
def test_a_template_has_one_place(template):
    with pytest.raises(ValueError, match="the place of the class's name"):
        check_template(template)
    assert check_template("a {}, fine") == "a {}, fine"
