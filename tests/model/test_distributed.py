"""Ranks with images beside ranks with text alone: no rank waits for a gradient that never comes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"


def losses(tmp_path, checkpoint, strategy, ranks):
    out = tmp_path / f"{strategy}-{ranks}.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(WORKER),
        str(checkpoint),
        strategy,
        str(out),
    ]
    subprocess.run(command, check=True, timeout=3600, capture_output=True, text=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_mixed_ranks_finish_and_equal_one_process(strategy, tmp_path, checkpoint):
    mixed = losses(tmp_path, checkpoint, strategy, ranks=2)
    alone = losses(tmp_path, checkpoint, "none", ranks=1)
    assert mixed == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == len(alone)  # the steps changed the weights
