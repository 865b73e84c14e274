"""How far apart fine-tunes and strangers lie among a suite's real experts."""

from __future__ import annotations

import importlib
from statistics import median

from benchmarks.suites.build import suite_dir
from benchmarks.suites.pool import pool_recipe
from epmq.merging.compatibility import open_experts
from epmq.merging.relation import SAMPLE, correlation
from epmq.models.blocks import find_stacks, linears


def related(suite: str) -> dict[str, float]:
    """How the line between fine-tunes and strangers lies in a suite's real experts.

    A stranger is an expert whose every block is taken for the next one: real weights of the right shapes and sizes that
    were not fine-tuned from those they are held against.

    Returns:
        experts; the least correlation (the median over layers) of an expert with its base; the greatest of a stranger;
        and the greatest norm of a task vector over that of the base.
    """
    module = importlib.import_module(f"benchmarks.suites.{suite}")
    root, tasks = suite_dir(suite), list(module.TASKS)
    recipe = pool_recipe(root, tasks, max_length=module.MAX_LENGTH, data=getattr(module, "DATA", None))
    experts = open_experts(recipe.base, recipe.experts)
    own: dict[str, list[float]] = {task: [] for task in tasks}
    other: dict[str, list[float]] = {task: [] for task in tasks}
    sizes: dict[str, list[float]] = {task: [] for task in tasks}
    rows = slice(0, SAMPLE)
    for stack in find_stacks(experts.model):
        for index, block in enumerate(stack.blocks):
            after = (index + 1) % len(stack.blocks)
            for layer, _ in linears(block):
                name = f"{stack.block_name(index)}.{layer}.weight"
                base = experts.base.tensor(name, rows).double()
                for task in tasks:
                    reader = experts.experts[task]
                    expert = reader.tensor(name, rows).double()
                    stranger = reader.tensor(f"{stack.block_name(after)}.{layer}.weight", rows).double()
                    own[task].append(correlation(base, expert))
                    other[task].append(correlation(base, stranger))
                    sizes[task].append(float((expert - base).norm() / base.norm()))
    return {
        "experts": len(tasks),
        "least_of_experts": min(map(median, own.values())),
        "greatest_of_strangers": max(map(median, other.values())),
        "greatest_task_vector": max(map(median, sizes.values())),
    }
