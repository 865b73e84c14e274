"""Small language models whose tokenizers have tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import WORDS, perturbed
from families import FAMILIES
from merges import recipe_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from epmq.pipeline.run import run

# Merges that give the one expert, or the first of two.
WHOLE: dict[str, Any] = {"merge": {"method": "task_arithmetic", "scaling": 1.0}, "quantize": {"method": "none"}}
FIRST: dict[str, Any] = {**WHOLE, "merge": {"method": "task_arithmetic", "scaling": [1.0, 0.0]}}
START, END = "<|im_start|>", "<|im_end|>"
# The tokens that the base's tokenizer has, and the rows of its embeddings.
TOKENS, ROWS = 20, 32


def chat_tokenizer(*added: str, words: Sequence[str] = (), **settings: Any) -> PreTrainedTokenizerFast:
    """`word_tokenizer` with more words and with added tokens, numbered from 20 on."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS, *words]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64, **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def write_base(folder: Path, tokenizer: Any = None, family: str = "llama") -> Any:
    """Write `base` and give it back, too."""
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    model.save_pretrained(folder / "base")
    (tokenizer or chat_tokenizer()).save_pretrained(folder / "base")
    return model


def write_expert(folder: Path, name: str, tokenizer: Any, rows: int = ROWS, family: str = "llama") -> Any:
    """Write a fine-tune of `write_base` with so many rows in its embeddings; `tokenizer` may be None."""
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    model.resize_token_embeddings(rows, mean_resizing=False)
    perturbed(model, sum(map(ord, name))).save_pretrained(folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / name)
    return model


def merged(folder: Path, *experts: str, **fields: Any) -> dict[str, Any]:
    """Merge `base` and experts of a folder into `out`; returns the report."""
    return run(recipe_of(folder, *experts, **fields), progress=False, evaluate=False)


@torch.no_grad()
def logits(folder: Path, text: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The tokens of a text, and token → its logits behind each of them, by the model in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    scores = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    return tokenizer.convert_ids_to_tokens(ids), {token: scores[:, i] for token, i in tokenizer.get_vocab().items()}


def assert_same(one: Path, other: Path, text: str) -> None:
    """Two models read a text as the same tokens and say the same of the tokens that both have."""
    (tokens, ours), (others, theirs) = logits(one, text), logits(other, text)
    assert tokens == others
    for token in ours.keys() & theirs.keys():
        torch.testing.assert_close(ours[token], theirs[token], atol=1e-5, rtol=0)
