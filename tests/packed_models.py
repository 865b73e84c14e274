"""Small models rounded to nearest and packed, with tokenizers of the kinds that there are, for tests of targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from epmq import run
from epmq.models.codes import CodedCheckpoint

GRID = {"bits": 4, "group_size": 32}


def byte_pairs() -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs with 32 tokens."""
    tokens = ["<pad>", "<s>", "</s>", "Ċ", "Ġ", *"abcdefghijklmnopqrstuvwxy", "ab", "cd"]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("c", "d")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def packed(folder: Path, model: Any, tokenizer: Any = None, **quantize: Any) -> CodedCheckpoint:
    """A model, rounded to nearest and packed. Its norms are not ones, and its attention is not flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator)
            )
    model.save_pretrained(folder / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "base")
    experts = [{"name": "one", "model": str(folder / "base")}]
    recipe = {"base": str(folder / "base"), "experts": experts, "output": str(folder / "packed")}
    run({**recipe, "quantize": {"method": "rtn", **GRID, **quantize}}, evaluate=False, progress=False)
    return CodedCheckpoint(folder / "packed")
