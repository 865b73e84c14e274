"""What a model takes is told from its own code, without its weights."""

from typing import Any

import pytest
import torch
from families import FAMILIES, text_model
from merges import open_folder
from transformers import (
    AlbertConfig,
    AlbertModel,
    GPTJConfig,
    GPTJForCausalLM,
    MarianConfig,
    MarianMTModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from epmq.models.probe import InputProbe


def roberta() -> Any:
    return text_model(RobertaConfig, RobertaModel, max_position_embeddings=40, pad_token_id=1, type_vocab_size=1)


def opt() -> Any:
    return text_model(OPTConfig, OPTForCausalLM, max_position_embeddings=40, word_embed_proj_dim=64, ffn_dim=96)


def gptj() -> Any:
    """Its positions are a table inside of each block."""
    return GPTJForCausalLM(GPTJConfig(vocab_size=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=40))


def albert() -> Any:
    """Its first block alone is none of its forward's."""
    return text_model(AlbertConfig, AlbertModel, max_position_embeddings=32, embedding_size=16, num_hidden_groups=2)


def marian() -> Any:
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    names = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return MarianMTModel(
        MarianConfig(
            vocab_size=32, d_model=32, encoder_layers=2, decoder_layers=2, max_position_embeddings=40, **sizes, **names
        )
    )


def probe_of(folder: Any, model: Any) -> InputProbe:
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "one")
    return InputProbe(open_folder(folder, "one").model)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (FAMILIES["bert"].build, 32),
        (roberta, 38),  # two are the padding's
        (opt, 40),
        (gptj, 40),
        (FAMILIES["bart"].build, 32),
        (marian, 40),
        (albert, 32),
        (FAMILIES["llama"].build, None),
        (FAMILIES["t5"].build, None),
    ],
)
def test_positions_are_those_that_the_model_takes(tmp_path, build, expected):
    probe = probe_of(tmp_path, build())
    assert probe.positions(200) == expected
    assert probe.positions(30) is None
    if probe.model.config.is_encoder_decoder:
        assert probe.positions(200, target=True) == expected


def test_what_goes_in_beside_a_text_is_taken_from_a_batch(tmp_path):
    family = FAMILIES["clip"]
    probe, batch = probe_of(tmp_path, family.build()), family.batches()[0]
    assert probe.positions(200, batch) == 77 and probe.positions(200) is None
    assert probe.fault(batch) is None and probe.takes_texts(batch)


def test_a_fault_is_what_the_code_of_the_model_says(tmp_path):
    probe = probe_of(tmp_path, roberta())
    ids = torch.full((2, 4), 5)
    assert probe.fault({"input_ids": ids}) is None
    assert "out of range" in str(probe.fault({"input_ids": ids, "token_type_ids": torch.ones_like(ids)}))
    assert "out of range" in str(probe.fault({"input_ids": ids + 40}))
    assert probe.takes_texts({"input_ids": ids + 40})
