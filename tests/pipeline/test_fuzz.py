"""A short version of `python -m benchmarks.faults.fuzz`: damaged files end in one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: inputs are opened in forks, and threads that other tests have started do not survive one.
FUZZ = """
import json, torch
from tests.kit.fuzz import failed, fuzz
torch.set_num_threads(1)
log = []
counts = fuzz(90, seed=1, log=log)
print(json.dumps({**counts, "failed": [str(result) for result in log if failed(result)]}))
"""


@pytest.mark.slow
def test_damaged_files_end_in_one_error():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FUZZ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["mutated_inputs"] == 90 and counts["refused"] > 30
    assert counts["failed"] == [] and counts["crashes"] == counts["hangs"] == counts["escapes"] == 0
