"""What a format knows of a weight."""

import torch

from epmq.export.form import Form
from epmq.quantization.grid import Grid


def test_scales_go_by_the_name_that_files_have_for_their_dtype():
    assert Form(Grid()).scale_name == "F32" and Form(Grid(), scale=torch.float16).scale_name == "F16"
    assert Form(Grid(), torch.float16, torch.bfloat16).scale_name == "BF16"
