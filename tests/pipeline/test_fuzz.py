"""A short version of `python -m benchmarks.fuzz`: damaged files end in one clear error."""

import json
import subprocess
import sys
from pathlib import Path

# A process of its own: inputs are opened in forks, and threads that other tests have started do not survive one.
FUZZ = """
import json, torch
from benchmarks.fuzz import fuzz
torch.set_num_threads(1)
log = []
found = fuzz(150, seed=1, log=log)
found["failed"] = [str(r) for r in log if r.outcome in ("crashes", "hangs") or r.escapes]
print(json.dumps(found))
"""


def test_damaged_files_end_in_one_error():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FUZZ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mutated_inputs"] == 150 and found["refused"] > 50
    assert found["failed"] == [] and found["crashes"] == found["hangs"] == found["escapes"] == 0
