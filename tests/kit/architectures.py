"""Tiny models of some eighty architectures, with batches for each: what reads any checkpoint is tried on all of them.

`tests/families.py` has those whose every detail is tested; here the number counts. An architecture is the name of a
class of transformers and the settings of its config, so that the same sizes serve another class (a task head) and
other settings (tied or untied output layers). Weights are random and depend on the seed alone.
"""

from __future__ import annotations

import transformers

from tests.kit import architecture_batches as batches
from tests.kit.architecture_batches import PICTURE, PICTURE_END, PICTURE_START, VIDEO, VOCABULARY
from tests.kit.architecture_kinds import (
    BART,
    CLIP_TOWER,
    GROUPED,
    IMAGE,
    MIXTURE,
    NARROW,
    SPECIAL,
    T5,
    TEXT,
    WAVE,
    Architecture,
    Settings,
    decoder,
    encoder,
    grouped,
    image,
    seq2seq,
)

# The language model of Qwen2-VL and its like, and their tokens.
PATCHED_TEXT: Settings = {
    **{**GROUPED, "max_position_embeddings": 128},
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}
PATCHED: Settings = {
    **{"image_token_id": PICTURE, "video_token_id": VIDEO},
    **{"vision_start_token_id": PICTURE_START, "vision_end_token_id": PICTURE_END},
}

ENCODERS: dict[str, Architecture] = {
    "bert": encoder("Bert"),
    "roberta": encoder("Roberta"),
    "distilbert": Architecture(
        "encoder",
        "DistilBertModel",
        "DistilBertConfig",
        {
            **{"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
            "max_position_embeddings": 64,
        },
        batches.texts(),
        64,
    ),
    "modernbert": encoder(
        "ModernBert", local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "debertav2": encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        max_relative_positions=-1,
    ),
    "deberta": encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=12),
    "electra": encoder("Electra", embedding_size=32),
    "xlmr": encoder("XLMRoberta", max_position_embeddings=70),
    "mpnet": encoder("MPNet"),
    "albert": encoder("Albert", embedding_size=32, num_hidden_layers=3, num_hidden_groups=1),
    "albert_groups": encoder("Albert", embedding_size=32, num_hidden_layers=4, num_hidden_groups=2),
    "esm": encoder(
        "Esm",
        max_position_embeddings=70,
        mask_token_id=4,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
    ),
    "longformer": encoder("Longformer", max_position_embeddings=70, attention_window=4),
    "bigbird": encoder("BigBird", max_position_embeddings=70, attention_type="original_full"),
    "roformer": encoder("RoFormer", embedding_size=64, max_position_embeddings=70),
    "convbert": encoder("ConvBert", embedding_size=64, head_ratio=2, conv_kernel_size=3),
    "mobilebert": encoder("MobileBert", embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=2),
    "squeezebert": encoder("SqueezeBert", embedding_size=64, q_groups=2, k_groups=2, v_groups=2),
    "fnet": encoder("FNet", max_position_embeddings=70, mask=False),
    "xlnet": Architecture(
        "encoder",
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, **SPECIAL},
        batches.texts(),
    ),
    "funnel": Architecture(
        "encoder",
        "FunnelModel",
        "FunnelConfig",
        {
            **{"vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8},
            **{"d_inner": 64, "num_decoder_layers": 1, **SPECIAL},
        },
        batches.texts(),
    ),
    "nomic": encoder("NomicBert"),
    "eurobert": encoder("EuroBert", num_key_value_heads=2),
}

DECODERS: dict[str, Architecture] = {
    "llama": grouped("Llama"),
    "llama_scaled": grouped(
        "Llama",
        rope_parameters={
            **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 16, "rope_theta": 10000.0},
        },
    ),
    "qwen2": grouped("Qwen2"),
    "qwen3": grouped("Qwen3", head_dim=16),
    "mistral": grouped("Mistral", sliding_window=4),
    "gemma": grouped("Gemma", head_dim=16),
    "gemma2": grouped("Gemma2", head_dim=16, sliding_window=4, query_pre_attn_scalar=16),
    "gemma3": decoder("Gemma3Text", "Gemma3ForCausalLM", **NARROW, max_position_embeddings=64, sliding_window=4),
    "phi": decoder("Phi", max_position_embeddings=64),
    "phi3": grouped("Phi3"),
    "olmo2": grouped("Olmo2"),
    "stablelm": grouped("StableLm"),
    "cohere": grouped("Cohere"),
    "granite": grouped("Granite"),
    "starcoder2": grouped("Starcoder2"),
    "smollm3": grouped("SmolLM3"),
    "gpt2": Architecture(
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL},
        batches.texts(),
        64,
    ),
    "gptneo": Architecture(
        "decoder",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8},
            **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **SPECIAL},
        },
        batches.texts(),
        64,
    ),
    "gptj": Architecture(
        "decoder",
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            **{"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
            **{"n_positions": 64, **SPECIAL},
        },
        batches.texts(),
    ),
    "neox": decoder("GPTNeoX", max_position_embeddings=64),
    "opt": Architecture(
        "decoder",
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        batches.texts(),
        64,
    ),
    "falcon": decoder(
        "Falcon", new_decoder_architecture=False, multi_query=True, alibi=False, bias=False, parallel_attn=True
    ),
    "falcon_alibi": decoder(
        "Falcon", new_decoder_architecture=False, multi_query=False, alibi=True, bias=True, parallel_attn=False
    ),
    "bloom": Architecture(
        "decoder",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, **SPECIAL},
        batches.texts(),
    ),
    "mpt": Architecture(
        "decoder",
        "MptForCausalLM",
        "MptConfig",
        {
            **{"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
            "expansion_ratio": 2,
        },
        batches.texts(),
    ),
    "mamba": decoder("Mamba", mask=False, state_size=4, time_step_rank=4),
    "mamba2": decoder("Mamba2", mask=False, state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=8, expand=2),
    "jamba": grouped(
        "Jamba",
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
        **{"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "bamba": grouped(
        "Bamba",
        **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
        **{"mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "qwen3moe": grouped(
        "Qwen3Moe",
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        decoder_sparse_step=1,
    ),
    "mixtral": decoder("Mixtral", **MIXTURE),
    "gptoss": decoder("GptOss", **MIXTURE, head_dim=16, sliding_window=4),
    "granitemoe": decoder("GraniteMoe", **MIXTURE),
    "qwen2moe": grouped(
        "Qwen2Moe",
        **{"num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "olmoe": grouped("Olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=32),
    "deepseekv3": grouped(
        "DeepseekV3",
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
}

ENCODER_DECODERS: dict[str, Architecture] = {
    "t5": seq2seq("T5", **T5),
    "flan_t5": seq2seq("T5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": seq2seq("MT5", **T5),
    "switch": seq2seq("SwitchTransformers", **T5, num_decoder_layers=2, num_experts=2, expert_capacity=64),
    "bart": seq2seq("Bart", **BART),
    "marian": seq2seq("Marian", "MarianMTModel", **BART),
    "pegasus": seq2seq("Pegasus", **BART),
    "m2m100": seq2seq("M2M100", **BART),
    "led": seq2seq(
        "LED",
        **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=4,
    ),
}

IMAGES: dict[str, Architecture] = {
    "vit": image("ViT", **IMAGE),
    "dinov2": image("Dinov2", **{**IMAGE, "mlp_ratio": 2}),
    "dinov3": Architecture("image", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE, batches.pictures()),
    "clip_vision": Architecture(
        "image",
        "CLIPVisionModel",
        "CLIPVisionConfig",
        {**CLIP_TOWER, "image_size": 28, "patch_size": 14},
        batches.pictures(),
    ),
    "beit": image("Beit", **IMAGE, use_relative_position_bias=True),
    "swin": image(
        "Swin", 32, image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4
    ),
    "convnext": image("ConvNext", 32, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "segformer": image(
        "Segformer",
        32,
        **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]},
        **{"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    ),
    "resnet": image("ResNet", 32, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
}

SOUNDS: dict[str, Architecture] = {
    "wav2vec2": Architecture("audio", "Wav2Vec2Model", "Wav2Vec2Config", WAVE, batches.sound),
    "hubert": Architecture("audio", "HubertModel", "HubertConfig", WAVE, batches.sound),
    "whisper": Architecture(
        "speech",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
            **{"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 20, "bos_token_id": 1},
            **{"suppress_tokens": None, "begin_suppress_tokens": None},
        },
        batches.speech,
    ),
}

SEVERAL: dict[str, Architecture] = {
    "clip": Architecture(
        "dual",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**CLIP_TOWER, **SPECIAL, "vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1},
            "vision_config": {**CLIP_TOWER, "image_size": 28, "patch_size": 14},
        },
        batches.texts_and_pictures,
    ),
    "siglip": Architecture(
        "dual",
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": {**TEXT, "max_position_embeddings": 16},
            "vision_config": IMAGE,
        },
        batches.texts_and_pictures,
    ),
    "llava": Architecture(
        "vision_language",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", **CLIP_TOWER, "image_size": 28, "patch_size": 14},
            "text_config": {"model_type": "llama", **GROUPED, "max_position_embeddings": 64},
            **{"image_token_index": PICTURE, "image_token_id": PICTURE, "vision_feature_layer": -2},
        },
        batches.texts_with_pictures(),
    ),
    "qwen2vl": Architecture(
        "vision_language",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "vision_config": {
                **{"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
                **{"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
            },
            "text_config": PATCHED_TEXT,
            **PATCHED,
        },
        batches.texts_with_patches,
    ),
    "qwen25vl": Architecture(
        "vision_language",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "vision_config": {
                **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4},
                **{"out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
                **{"window_size": 16, "fullatt_block_indexes": [1]},
            },
            "text_config": PATCHED_TEXT,
            **PATCHED,
        },
        batches.texts_with_patches,
    ),
    **{
        name: Architecture(
            "vision_language",
            f"{prefix}ForConditionalGeneration",
            f"{prefix}Config",
            {
                "vision_config": {**CLIP_TOWER, "image_size": 28, "patch_size": 14},
                "text_config": {"model_type": "llama", **GROUPED, "max_position_embeddings": 64},
                **{"scale_factor": 1, "image_token_id": PICTURE, "pad_token_id": 0},
            },
            batches.texts_with_listed_pictures,
        )
        for name, prefix in {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}.items()
    },
    "gemma3_vision": Architecture(
        "vision_language",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": {**CLIP_TOWER, "image_size": 28, "patch_size": 14},
            "text_config": {**NARROW, "sliding_window": 8, "max_position_embeddings": 64},
            **{"mm_tokens_per_image": 4, "image_token_index": PICTURE},
            **{"boi_token_index": PICTURE_START, "eoi_token_index": PICTURE_END},
        },
        batches.texts_with_pictures(types=True),
    ),
}

# What this version of transformers has; the oldest that is supported lacks some.
ARCHITECTURES: dict[str, Architecture] = {
    name: architecture
    for name, architecture in {**ENCODERS, **DECODERS, **ENCODER_DECODERS, **IMAGES, **SOUNDS, **SEVERAL}.items()
    if hasattr(transformers, architecture.config) and hasattr(transformers, architecture.model)
}
