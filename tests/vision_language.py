"""Tiny joint processors of vision-language models, and a model for one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from conftest import word_tokenizer
from PIL import Image
from transformers import CLIPImageProcessorPil, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

SIDE = 28  # pixels of what every processor here makes of a picture
# As the templates of such models are written: through the parts of every message.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def llava_processor(template: str | None = TEMPLATE.replace("IMAGE", "<image>")) -> Any:
    """A token for each of four patches."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(pictures, tokenizer, 14, "default", template, num_additional_image_tokens=1)


def gemma3_processor() -> Any:
    """Four tokens, between one that begins and one that ends a picture."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        word_tokenizer(extra_special_tokens=names),
        chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
        image_seq_length=4,
    )


def idefics3_processor() -> Any:
    """One token, among three that surround it; a batch is padded with pictures."""
    tokenizer, size = word_tokenizer(), {"longest_edge": SIDE}
    tokenizer.add_tokens(["<global-img>"], special_tokens=True)
    pictures = transformers.Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    template = TEMPLATE.replace("IMAGE", "<image>")
    return transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=1, chat_template=template)


def qwen2vl_processor() -> Any:
    """As many tokens as there are squares of 8 pixels; what it does with videos needs a library, and is left out."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    pictures = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    with patch.object(transformers.Qwen2VLProcessor, "check_argument_for_proper_class"):
        return transformers.Qwen2VLProcessor(
            pictures, tokenizer, SimpleNamespace(), chat_template=TEMPLATE.replace("IMAGE", shown)
        )


# Name → what makes the processor, and how many tokens stand for the pixels of one picture.
PROCESSORS: dict[str, tuple[Callable[[], Any], int]] = {
    "llava": (llava_processor, 4),
    "gemma3": (gemma3_processor, 4),
    "idefics3": (idefics3_processor, 1),
    "qwen2vl": (qwen2vl_processor, 2),
}


def llava_model(processor: Any) -> Any:
    """A LLaVA for `llava_processor`."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    number = processor.tokenizer.convert_tokens_to_ids("<image>")
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 14}
    text = LlamaConfig(num_hidden_layers=2, vocab_size=32, num_key_value_heads=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    tokens = {"image_token_id": number, "image_token_index": number}
    config = LlavaConfig(vision_config={**vision, **sizes}, text_config=text, **tokens)
    return LlavaForConditionalGeneration(config).eval()


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    """Rows as a file, with the pictures `0.png` and `1.png` beside it."""
    for seed in (0, 1):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"
