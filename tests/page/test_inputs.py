"""What a page is told of tokenizers and processors, and that its own code makes the same of texts and pictures."""

import shutil

import pytest
from conftest import word_tokenizer
from transformers import AutoTokenizer, BitImageProcessorPil, CLIPImageProcessorPil

from epmq.errors import EnvironmentFault
from epmq.page import inputs


def needs_node() -> None:
    """Skips where there is no node, or npm cannot fetch the tokenizers."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    try:
        inputs.TOKENIZERS.fetch()
    except EnvironmentFault as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture
def tokenizer(pool):
    return AutoTokenizer.from_pretrained(pool / "base")


def test_a_text_is_cut_to_what_tokenizer_and_model_allow(tokenizer):
    tokenizer.model_max_length = 10**30
    assert inputs.text_settings(tokenizer, {"max_position_embeddings": 32})["limit"] == 32
    assert inputs.text_settings(tokenizer, {})["limit"] is None
    tokenizer.model_max_length = 16
    tokenizer.truncation_side = "left"
    found = inputs.text_settings(tokenizer, {"max_position_embeddings": 32})
    assert (found["limit"], found["cut"]) == (16, "left") and found["config"]["unk_token"] == "[UNK]"
    assert found["tokenizer"]["model"]["type"] == "WordPiece" and found["tokenizer"]["truncation"] is None


def test_a_tokenizer_without_a_fast_form_is_refused():
    with pytest.raises(ValueError, match=r"object has no tokenizer\.json, which is all that a browser reads"):
        inputs.text_settings(object(), {})


def test_settings_of_a_processor_are_those_that_it_uses():
    small = {"height": 28, "width": 28}
    found = inputs.picture_settings(BitImageProcessorPil(size=small, do_center_crop=False, do_normalize=False))
    assert found["size"] == small and found["crop"] is None and found["mean"] == [0, 0, 0] and found["filter"] == 3
    found = inputs.picture_settings(CLIPImageProcessorPil())
    assert found["size"] == {"shortest_edge": 224} and found["crop"] == {"height": 224, "width": 224}
    assert found["factor"] == pytest.approx(1 / 255) and found["std"][0] == pytest.approx(0.26862954)
    with pytest.raises(ValueError, match="a page knows width and height, or shortest_edge"):
        inputs.picture_settings(BitImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 40}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_python(tokenizer, side, monkeypatch):
    needs_node()
    monkeypatch.setattr(inputs, "TEXTS", ("the cat sat", "Big, RED tree!", "on a mat " * 20))
    tokenizer.model_max_length, tokenizer.truncation_side = 12, side
    settings = inputs.text_settings(tokenizer, {})
    inputs.try_texts(tokenizer, settings)
    with pytest.raises(ValueError, match="BertTokenizer: in a browser it makes other tokens of 'on a mat"):
        inputs.try_texts(tokenizer, {**settings, "cut": "left" if side == "right" else "right"})


def test_tokens_that_would_be_others_are_refused():
    needs_node()
    tokenizer = word_tokenizer(ends=True)
    settings = inputs.text_settings(tokenizer, {})
    settings["tokenizer"]["post_processor"] = None
    with pytest.raises(ValueError, match="in a browser it makes other tokens of 'two words'"):
        inputs.try_texts(tokenizer, settings)


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [{"height": 28, "width": 40}, {"shortest_edge": 33}])
def test_pixels_are_those_of_python(size, resample):
    needs_node()
    processor = BitImageProcessorPil(size=size, resample=resample, crop_size={"height": 29, "width": 31})
    settings = inputs.picture_settings(processor)
    inputs.try_pictures(processor, settings)
    with pytest.raises(ValueError, match=r"BitImageProcessorPil: a page makes other pixels, by \d+\.\d grey levels"):
        inputs.try_pictures(processor, {**settings, "filter": 2 if resample != 2 else 0})


def test_inputs_of_several_shapes_are_refused():
    needs_node()
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
    with pytest.raises(ValueError, match="become inputs of several shapes"):
        inputs.try_pictures(processor, inputs.picture_settings(processor))
