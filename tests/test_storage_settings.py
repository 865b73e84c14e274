"""Settings of what is stored how, and what they refuse."""

import pytest

from epmq.export.gguf_blocks import block_type
from epmq.quantization.grid import Grid
from epmq.recipe_file import load_recipe
from epmq.storage_settings import (
    ALWAYS_SHOWN,
    PRESETS,
    Override,
    PartGrid,
    StorageSettings,
    describe,
    parse_size,
    without_defaults,
)


def test_a_part_has_a_row_a_scale_at_8_bits_and_small_groups_below():
    settings = StorageSettings(method="rtn", symmetric=False)
    assert settings.part_grid(None) == Grid(8, -1, False) and StorageSettings(method="gptq", bits=16).block_grid is None
    assert StorageSettings(method="gptq", bits=16).part_grid(None) is None
    for value, grid in (
        (8, Grid(8, -1, False)),
        (4, Grid(4, 32, False)),
        (16, None),
        ({"bits": 3, "group_size": -1, "symmetric": True}, Grid(3, -1, True)),
    ):
        part = StorageSettings(method="rtn", embeddings=value).embeddings
        assert isinstance(part, PartGrid) and settings.part_grid(part) == grid


def test_an_override_changes_what_it_says():
    assert Override(layers="*.mlp.*", bits=8).grid(Grid(4, 32, False)) == Grid(8, 32, False)
    assert Override(layers="a", group_size=64).grid(None) == Grid(4, 64)
    assert Override(layers="a", bits=16).grid(Grid()) is Override(layers="a", skip=True).grid(Grid()) is None
    assert Override(layers="*.mlp.*", bits=8).matches("h.0.mlp.up")
    assert not Override(layers="re:mlp", bits=8).matches("h.0.mlp.up")
    assert Override(layers=r"re:h\.\d\.mlp\..*", bits=8).matches("h.0.mlp.up")


@pytest.mark.parametrize("text, size", [("40MB", 40_000_000), ("1.5 GiB", 3 << 29), ("12k", 12_000), ("7", 7), (9, 9)])
def test_sizes_are_bytes(text, size):
    assert parse_size(text) == size


BAD = [
    ({"embeddings": 5}, "quantize.embeddings.bits: 5 is not one of 2, 3, 4, 8, 16"),
    ({"embeddings": True}, "quantize.embeddings: "),
    ({"output_layer": {"bits": 4, "group_size": 7}}, "quantize.output_layer.group_size: 7 is not one of"),
    ({"output_layer": {"group_size": 32}}, "field 'quantize.output_layer.bits' is missing"),
    ({"rest": "int8"}, "quantize.rest: "),
    ({"scale_dtype": "half"}, "quantize.scale_dtype: "),
    ({"overrides": [{"layers": "re:(", "bits": 8}]}, "is not a regular expression"),
    ({"overrides": [{"layers": "a"}]}, "says neither bits, group_size, symmetric nor skip"),
    ({"overrides": [{"layers": "a", "skip": True, "bits": 4}]}, "a layer that is skipped has no bits"),
    ({"overrides": [{"layers": "a", "bits": 16, "group_size": 32}]}, "16 has no groups"),
    ({"overrides": [{"bits": 4}]}, "field 'quantize.overrides.0.layers' is missing"),
    ({"overrides": "mlp"}, "quantize.overrides: "),
    ({"size": "forty"}, "'forty' is not a size such as 40MB"),
    ({"size": 0}, "quantize.size: "),
    ({"budget": -1}, "quantize.budget: "),
    ({"budget": 4.0, "size": "40MB"}, "budget, size: only one of them"),
    ({"grid": "gguf-q4_0", "bits": 3}, "quantize: bits: another one than that of grid: gguf-q4_0: leave it out"),
    ({"grid": "gguf-q4_0", "scale_dtype": "auto"}, "quantize: scale_dtype: another one than that of"),
    ({"grid": "gguf-q4_0", "embeddings": 4}, "quantize: embeddings: another one than that of"),
    ({"grid": "gguf-q4_0", "budget": 4.0}, "quantize: grid: a budget chooses the bits"),
    ({"grid": "gguf-q4_1"}, "quantize.grid: "),
    ({"bits": 16, "budget": 4.0}, "a budget chooses the bits"),
    ({"method": "rtn", "bits": 16}, "16 rounds nothing: use method: none"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_one_line_that_names_the_field(settings, message):
    experts = [{"name": "one", "model": "model"}]
    with pytest.raises(ValueError) as error:
        load_recipe({"base": "base", "experts": experts, "quantize": settings})
    found = str(error.value)
    assert message in found and "quantize" in found and "\n" not in found, found


def test_a_grid_in_words():
    assert describe({"bits": 4, "group_size": 32, "symmetric": False}) == "4 bits, g32, asymmetric"
    assert describe({"bits": 8, "group_size": -1}) == "8 bits, a row" and describe(None) == "not quantized"


def test_a_grid_stands_for_settings_that_gguf_holds():
    for name, preset in PRESETS.items():
        settings = StorageSettings(method="rtn", grid=name)
        assert {field: getattr(settings, field) for field in preset} == preset
        kind = block_type(settings.block_grid, 256)
        assert kind is not None and kind.name.lower() == name.removeprefix("gguf-")
        assert block_type(settings.part_grid(settings.embeddings), 32).name == "Q8_0"
        again = StorageSettings.model_validate(settings.model_dump(mode="json"))
        assert again == settings
    assert StorageSettings(method="rtn", grid="gguf-q4_0", bits=4, embeddings=8).bits == 4
    assert without_defaults(StorageSettings(method="rtn").model_dump()).keys() == set(ALWAYS_SHOWN)
