"""Examples are cut to what the model has positions for, and what it cannot take is refused before any compute."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, perturbed, tiny_bert, word_tokenizer
from families import FAMILIES, text_model
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    RobertaConfig,
    RobertaModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)
from vision_language import TEMPLATE, llava_model, llava_processor, write_rows

import epmq
from epmq.pipeline.prepare import PreparedRun, prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe


def place(folder: Path, model: Any, processor: Any) -> Path:
    """`base` with its processor, and `one`, in a folder."""
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    perturbed(model, 1).save_pretrained(folder / "one")
    return folder


def rows(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def recipe(folder: Path, data: Path | None, **fields: Any) -> dict[str, Any]:
    expert: dict[str, Any] = {"name": "one", "model": str(folder / "one")}
    if data is not None:
        expert["calibration"] = {"path": str(data), "pack": fields.pop("pack", True)}
        if fields.pop("scored", False):
            expert["evaluation"] = expert["calibration"]
    quantize = fields.pop("quantize", {"method": "gptq", "bits": 8, "group_size": 32})
    return {
        "base": str(folder / "base"),
        "experts": [expert],
        "quantize": quantize,
        "output": str(folder / "out"),
        "format": "dequantized",
        **fields,
    }


def prepared(content: dict[str, Any], *batches: dict[str, Any]) -> PreparedRun:
    return prepare(load_recipe(content), calibration={"one": batches} if batches else None)


def gpt2() -> Any:
    """A GPT-2 of 32 positions."""
    model = FAMILIES["gpt2"].build()
    model.config.n_positions = 32
    return type(model)(model.config).eval()


LONG = " ".join(WORDS * 4)  # 56 tokens
ENDLESS = {"model_max_length": int(1e30)}


def test_long_texts_are_cut_to_the_positions_and_noted(tmp_path):
    place(tmp_path, tiny_bert(), word_tokenizer(**ENDLESS))
    job = prepared(recipe(tmp_path, rows(tmp_path, {"text": LONG}, {"text": "the cat"})))
    (batch,) = job.calibration["one"]
    assert batch["attention_mask"].sum(1).tolist() == [32, 2]
    cut = "experts.one.calibration: 1 of 2 texts are cut to the 32 tokens that BertModel has positions for"
    assert job.experts.notes == [cut] and job.experts.notes.departures == []
    with pytest.raises(ValueError, match=r"calibration: max_length is 40, but BertModel has positions for 32 tokens"):
        prepared(recipe(tmp_path, rows(tmp_path, {"text": LONG}), max_length=40))
    short = prepared(recipe(tmp_path, rows(tmp_path, {"text": "the cat"}), max_length=40))
    assert short.experts.notes == []


@pytest.mark.parametrize("pack", [True, False])
def test_language_models_are_calibrated_and_scored_within_their_positions(tmp_path, pack):
    place(tmp_path, gpt2(), word_tokenizer(**ENDLESS))
    report = run(recipe(tmp_path, rows(tmp_path, *3 * [{"text": LONG}]), scored=True, pack=pack), progress=False)
    assert len(report["notes"]) == 2 and all("GPT2LMHeadModel has positions" in note for note in report["notes"])
    assert np.isfinite(report["scores"]["one"])
    if pack:
        with pytest.raises(ValueError, match="max_length is 40, but GPT2LMHeadModel has positions for 32"):
            prepared(recipe(tmp_path, tmp_path / "rows.jsonl", output=None, max_length=40))


def test_targets_are_cut_and_generated_within_the_positions(tmp_path):
    place(tmp_path, FAMILIES["bart"].build(), word_tokenizer(ends=True, **ENDLESS))
    data = rows(tmp_path, {"text": "the cat", "target": LONG}, {"text": "a dog", "target": "the"})
    report = run(recipe(tmp_path, data, scored=True), progress=False)
    assert [note.split(": ")[1] for note in report["notes"]] == 2 * [
        "1 of 2 targets are cut to the 32 tokens that BartForConditionalGeneration has positions for"
    ]


def clip_config(positions: int) -> CLIPConfig:
    text: dict[str, Any] = {"vocab_size": 32, "max_position_embeddings": positions, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPConfig(text_config={**text, **sizes}, vision_config={**sizes, "image_size": 28, "patch_size": 14})


def test_texts_that_go_with_pictures_are_cut(tmp_path):
    place(tmp_path, CLIPModel(clip_config(12)).eval(), CLIPProcessor(pictures(), word_tokenizer(**ENDLESS)))
    job = prepared(recipe(tmp_path, image_rows(tmp_path, LONG)))
    assert job.calibration["one"][0]["input_ids"].shape == (2, 12) and "cut to the 12 tokens" in job.experts.notes[0]


def test_what_is_too_long_in_ready_batches_is_refused(tmp_path):
    place(tmp_path, tiny_bert(), word_tokenizer())
    with pytest.raises(ValueError, match=r"calibration: inputs of 40 tokens, but BertModel has positions for 32"):
        prepared(recipe(tmp_path, None), {"input_ids": torch.full((2, 40), 5)})


def test_texts_without_tokens_are_left_out_of_calibration_alone(tmp_path):
    place(tmp_path, tiny_bert(), word_tokenizer())
    data = rows(tmp_path, {"text": ""}, {"text": "the cat"}, {"text": "a"})
    job = prepared(recipe(tmp_path, data))
    assert job.calibration["one"][0]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert job.experts.notes == ["experts.one.calibration: 1 of 3 texts have no tokens and are left out"]


def test_inputs_that_no_part_of_a_model_has_a_name_for_are_left_out(tmp_path):
    place(tmp_path, tiny_bert(), word_tokenizer())
    batch = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.ones(2, 4).long(), "index": torch.ones(2)}
    job = prepared(recipe(tmp_path, None), batch)
    assert job.calibration["one"][0].keys() == {"input_ids", "attention_mask"}
    assert job.experts.notes == ["experts.one.calibration: BertModel takes no index; left out"]
    slip = {"input_ids": batch["input_ids"], "attention_maks": batch["attention_mask"]}
    with pytest.raises(ValueError, match="BertModel takes no attention_maks; is attention_mask meant"):
        prepared(recipe(tmp_path, None), slip)


def test_types_of_tokens_that_a_model_lacks_are_refused(tmp_path):
    model = text_model(RobertaConfig, RobertaModel, max_position_embeddings=40, type_vocab_size=1)
    place(tmp_path, model, word_tokenizer())
    ids = torch.full((2, 4), 5)
    with pytest.raises(ValueError, match=r"calibration: RobertaModel cannot take these inputs \(index out of range"):
        prepared(recipe(tmp_path, None), {"input_ids": ids, "token_type_ids": torch.ones_like(ids)})


def test_pictures_of_another_size_are_refused(tmp_path):
    place(tmp_path, FAMILIES["vit"].build(), pictures())
    assert prepared(recipe(tmp_path, None), {"pixel_values": torch.zeros(3, 3, 28, 28)}).calibration
    with pytest.raises(ValueError, match=r"calibration: ViTModel cannot take these inputs \(.*32"):
        prepared(recipe(tmp_path, None), {"pixel_values": torch.zeros(3, 3, 32, 32)})


# --- pictures with texts, and sounds -----------------------------------------------------------------------------


def pictures() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def image_rows(folder: Path, text: str | None) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    return rows(folder, *2 * [{"image": "a.png"} if text is None else {"image": "a.png", "text": text}])


def llava(folder: Path, template: str | None = None) -> None:
    """A vision-language model, and its processor, which puts a token for each patch of a picture into the text."""
    processor = llava_processor(template)
    place(folder, llava_model(processor), processor)


def test_pictures_go_into_texts_by_the_joint_processor(tmp_path):
    llava(tmp_path)
    data, tower = image_rows(tmp_path, "user <image> the cat sat"), {"layers": "*vision_tower*", "bits": 8}
    quantize = {"method": "gptq", "bits": 8, "group_size": 32, "overrides": [tower]}
    report = run(recipe(tmp_path, data, quantize=quantize), progress=False)
    tokens = {layer["name"].partition(".layers")[0]: layer["tokens"] for layer in report["layers"]}
    assert set(tokens.values()) - {0} == {2 * 5, 2 * 8}  # four patches and the class; four patches and four words
    with pytest.raises(ValueError, match=r"LlavaProcessor cannot take them .* 0 <image> tokens"):
        prepared(recipe(tmp_path, image_rows(tmp_path, "the cat"), output=None))


def test_a_vision_language_model_is_calibrated_on_conversations_with_and_without_pictures(tmp_path):
    """Every token, those of pictures among them, and no padding; the tower stays as it is merged, but for its dtype."""
    llava(tmp_path, TEMPLATE.replace("IMAGE", "<image>"))
    said = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "a dog"}]
    two, one = {"messages": said, "image": ["0.png", "1.png"]}, {"messages": said[:1], "image": "0.png"}
    data = write_rows(tmp_path, {"messages": said}, two, one)
    settings = {"scored": True, "quantize": {"method": "expert_guided"}, "format": "pack-quantized"}
    settings["merge"] = {"method": "task_arithmetic", "scaling": 0.3}
    report = run(recipe(tmp_path, data, **settings), progress=False)
    solved = [layer for layer in report["layers"] if layer["tokens"]]
    assert {layer["tokens"] for layer in solved} == {7 + (7 + 8) + (4 + 4)} and len(solved) == 2 * 7 + 1
    assert report["metric"] == "log_perplexity" and math.isfinite(report["scores"]["one"])
    base, expert, out = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "one", "out"))
    name = next(name for name in base if name.endswith("encoder.layers.0.mlp.fc1.weight"))
    wanted = base[name] + 0.3 * (expert[name] - base[name])
    assert out[name].dtype == torch.float16 and (out[name] - wanted).abs().max() < 1e-3
    assert type(epmq.load(tmp_path / "out").processor).__name__ == "LlavaProcessor"


def test_pictures_alone_are_no_input_of_a_model_of_texts(tmp_path):
    place(tmp_path, CLIPModel(clip_config(77)).eval(), CLIPProcessor(pictures(), word_tokenizer()))
    with pytest.raises(ValueError, match="CLIPModel takes input_ids, which these examples do not give"):
        prepared(recipe(tmp_path, image_rows(tmp_path, None)))


def test_sounds_are_calibrated_on_ready_batches(tmp_path):
    conv: dict[str, Any] = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
    config = Wav2Vec2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **conv,
    )
    place(tmp_path, Wav2Vec2Model(config).eval(), Wav2Vec2FeatureExtractor())
    run(recipe(tmp_path, None, quantize={"method": "none"}), progress=False)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    job = prepared(recipe(tmp_path, None, output=None), {"input_values": torch.randn(2, 400)})
    assert job.calibration["one"][0]["input_values"].shape == (2, 400)
    with pytest.raises(ValueError, match="Wav2Vec2Model takes input_values, which files do not give: pass ready"):
        prepared(recipe(tmp_path, rows(tmp_path, {"audio": "a.wav"}), output=None))
