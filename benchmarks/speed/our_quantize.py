"""`python our_quantize.py RECIPE TOKENS`: run a recipe on ready tokens, as the command `epmq` runs one.

`whole_run` runs it. RECIPE is JSON; TOKENS a safetensors file with `input_ids` [samples, tokens], which are
shared out among the recipe's experts.
"""

from __future__ import annotations

import sys

import epmq
from epmq.runtime import spare_gc

BATCH = 16  # as in peer_quantize.py


def quantize(file: str, tokens: str) -> None:
    """Merge and quantize in this process."""
    recipe = epmq.load_recipe(file)  # before torch is imported: epmq does that in less time
    import torch
    from safetensors.torch import load_file

    shares = load_file(tokens)["input_ids"].tensor_split(len(recipe.experts))
    calibration = {
        expert.name: [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in share.split(BATCH)]
        for expert, share in zip(recipe.experts, shares)
    }
    epmq.run(recipe, calibration=calibration, evaluate=False, progress=False)


if __name__ == "__main__":
    spare_gc()
    quantize(*sys.argv[1:])
