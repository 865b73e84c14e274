"""Write a tiny random base, two experts, texts and a recipe: enough to see that an installed epmq runs.

python tools/tiny_pool.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ("good", "bad", "film", "food", "was", "the", "very", "not")
RECIPE = """\
base: base
experts:
  - {name: one, model: one, calibration: {path: texts.jsonl}, evaluation: {path: texts.jsonl}}
  - {name: two, model: two, calibration: {path: texts.jsonl}, evaluation: {path: texts.jsonl}}
output: merged-4bit
"""


def write_pool(folder: Path) -> None:
    """Write `base`, `one`, `two` (BERT; the experts with heads), `texts.jsonl` and `recipe.yaml`."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = BertConfig(
        vocab_size=len(WORDS) + 5,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    model = BertModel(config)
    model.save_pretrained(folder / "base")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task in ("one", "two"):
        model.load_state_dict({name: w + 0.02 * torch.randn(w.shape) for name, w in base.items()})
        model.save_pretrained(folder / task)
        head = {"weight": torch.randn(2, 64), "bias": torch.zeros(2)}
        save_file(head, folder / task / "head.safetensors", metadata={"pooling": "mean", "labels": '["no", "yes"]'})
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(32):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (6,))]
            file.write(json.dumps({"text": " ".join(words), "label": number % 2}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)


if __name__ == "__main__":
    write_pool(Path(sys.argv[1]))
