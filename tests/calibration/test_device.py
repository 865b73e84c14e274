"""The same run on an accelerator; skipped without one."""

import pytest
import torch
from conftest import recipe_for

import epmq
from epmq.pipeline.prepare import prepare
from epmq.pipeline.run import run
from epmq.recipe_file import load_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("method", ["gptq", "e_pmq", "expert_guided"])
def test_a_run_on_a_gpu_gives_what_a_run_on_the_cpu_gives(pool, tmp_path, method):
    losses, outputs = {}, {}
    for device in ("cpu", "cuda"):
        recipe = recipe_for(pool, quantize={"method": method}, device=device, output=str(tmp_path / device))
        losses[device] = run(recipe, progress=False, evaluate=False)["loss"]
        prepared = prepare(load_recipe({**recipe, "output": str(tmp_path / "none")}))
        batch = prepared.calibration["one"][0]
        with torch.no_grad():
            outputs[device] = epmq.load(tmp_path / device).backbone(**batch).last_hidden_state
    # Codes that lie half way between two levels may fall to either side.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
    assert (outputs["cuda"] - outputs["cpu"]).norm() < 0.2 * outputs["cpu"].norm()
