"""What becomes of families, and the table of it."""

import json

from benchmarks import RESULTS
from benchmarks.families import METHODS, attempt, try_family
from benchmarks.tables.families import families_table
from epmq.errors import InputError


def test_what_is_refused_and_what_goes_wrong_is_said_in_one_line():
    def refuse():
        raise InputError("too large")

    assert attempt(dict) == "right" and attempt(refuse) == "refused: too large"
    assert attempt(lambda: 1 / 0) == "wrong: ZeroDivisionError: division by zero"


def test_a_part_goes_through_all_of_it(tmp_path):
    row = try_family("clip_vision of clip", tmp_path)
    assert row["model"] == "CLIPVisionModel" and row["opens"] is True
    assert {row[name] for name in ("merge", *METHODS)} == {"right"}


def test_the_table_puts_families_of_one_fate_together():
    results = json.loads((RESULTS / "families.json").read_text())
    lines = families_table(results).splitlines()
    (line,) = [line for line in lines if "`LlavaForConditionalGeneration`" in line]
    assert "`Qwen2VLForConditionalGeneration`" in line and line.endswith("| yes | yes | yes | yes | opens |")
    assert any(line.startswith("* ") and "`ResNetModel`" in line for line in lines)
