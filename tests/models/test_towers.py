"""What lies beside a language model."""

import pytest

from epmq.models.towers import beside_language
from tests.kit.architectures import ARCHITECTURES


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llava", {"model.vision_tower", "model.multi_modal_projector"}),
        ("qwen2vl", {"model.visual"}),
        ("gemma3_vision", {"model.vision_tower"}),  # the projector is no linear layer
        ("clip", set()),
        ("whisper", set()),
        ("llama", set()),
    ],
)
def test_towers_and_projectors_are_found_by_what_transformers_calls_the_decoder(name, parts):
    found = beside_language(ARCHITECTURES[name].build())
    assert set(found.values()) == parts
    assert all(layer.startswith(f"{part}.") for layer, part in found.items())
    assert not any("language_model" in layer or layer == "lm_head" for layer in found)
