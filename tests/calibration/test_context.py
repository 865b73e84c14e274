"""What a calibration is told."""

import torch
from conftest import recipe_for

from epmq.calibration.context import CalibrationContext
from epmq.merging.compatibility import open_experts
from epmq.merging.merged import MergedWeights
from epmq.models.storage import Layout
from epmq.quantize_settings import quantize_settings
from epmq.recipe_file import load_recipe


def test_guidance_is_that_of_the_settings_and_nothing_runs_or_is_offloaded_by_default(pool):
    recipe = load_recipe(recipe_for(pool))
    experts = open_experts(recipe.base, recipe.experts)
    merged, cpu = MergedWeights(experts, recipe.merge), torch.device("cpu")
    for method in ("gptq", "e_pmq", "expert_guided"):
        settings = quantize_settings(method=method)
        context = CalibrationContext(
            experts, merged, settings, settings.guidance(), Layout(), {"one": 0.5, "two": 0.5}, cpu
        )
        assert context.guidance == settings.guidance() and context.guidance.experts == settings.guided
        assert context.teachers == {}
        large = torch.zeros(1 << 19)
        context.offloader.put([large])
        assert large.untyped_storage().filename is None
