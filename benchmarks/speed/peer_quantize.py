"""`python peer_quantize.py TOOL MODEL TOKENS OUT`: quantize a model with somebody else's tool, in its own environment.

4 bits, symmetric, groups of 128, damping 0.01, act order as the tool does it by default. `whole_run` runs it
with the peers' interpreter; TOKENS is a safetensors file with `input_ids` [samples, tokens].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

DAMPING, BITS, GROUP, BATCH = 0.01, 4, 128, 16
# GPTQModel takes one sequence at a time by default; batches of 16 made it several times slower.
SINGLE = 1


def llmcompressor(model: str, ids: torch.Tensor, out: Path) -> None:
    """llm-compressor's `GPTQModifier`, one decoder layer at a time."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], dampening_frac=DAMPING)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(
        model=loaded,
        tokenizer=model,
        dataset=DataLoader(rows, batch_size=BATCH),  # type: ignore[arg-type]
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        pipeline="sequential",
        output_dir=str(out),
    )


def gptqmodel(model: str, ids: torch.Tensor, out: Path) -> None:
    """GPTQModel's `quantize`."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP, damp_percent=DAMPING, device="cpu")
    loaded = GPTQModel.load(model, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    loaded.quantize(rows, batch_size=SINGLE)
    loaded.save(str(out))


if __name__ == "__main__":
    tool, path, tokens, target = sys.argv[1:]
    {"llm-compressor": llmcompressor, "GPTQModel": gptqmodel}[tool](path, load_file(tokens)["input_ids"], Path(target))
