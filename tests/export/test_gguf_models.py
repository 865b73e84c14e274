"""What GGUF files say of models, and in which order rows are."""

import pytest

from epmq.export.gguf_models import FAMILIES, complete, extra_tensors, query_factor, row_order

pytest.importorskip("gguf")


def test_llama_turns_neighbours():
    """Rows of two halves of a head, one after the other, become pairs."""
    config = complete({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1})
    assert row_order(config, "model.layers.0.self_attn.q_proj.weight").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(config, "model.layers.0.self_attn.k_proj.bias").tolist() == [0, 2, 1, 3]
    assert row_order(config, "model.layers.0.self_attn.v_proj.weight") is None
    assert row_order(complete({"model_type": "qwen2"}), "model.layers.0.self_attn.q_proj.weight") is None


def test_llama_3_slows_its_low_frequencies_down():
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = complete({"model_type": "llama", "head_dim": 64, "rope_parameters": scaling})
    factors = extra_tensors(config)["rope_freqs.weight"]
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 8 and bool((factors.diff() >= -1e-6).all())


def test_the_largest_gemmas_scale_queries_by_their_width():
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 168}
    assert query_factor(complete({"model_type": "gemma3_text", "num_hidden_layers": 62, **sizes})) == 1
    assert query_factor(complete({"model_type": "gemma3_text", "num_hidden_layers": 26, **sizes})) == (128 / 168) ** 0.5


def test_a_window_that_llama_cpp_does_not_have_limits_the_context():
    fields = {name: FAMILIES[name].fields for name in ("mistral", "qwen2")}
    windowed = {"sliding_window": 64, "max_position_embeddings": 256}
    assert fields["mistral"](complete({"model_type": "mistral", **windowed}))["context_length"] == 64
    assert fields["qwen2"](complete({"model_type": "qwen2", **windowed}))["context_length"] == 256
