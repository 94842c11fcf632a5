"""A checkpoint whose language model is quantised to compressed-tensors, vLLM's own format."""

import os
import subprocess

import pytest

from .conftest import MODEL, ROOT

pytestmark = pytest.mark.serving

PYTHON = ROOT / ".venv-quantise" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-quantise (make quantise-vllm)")
def test_fp8(serve, tmp_path, conversations, answers, figures):
    """8-bit floats on the CPU, weights and activations: nearly all answers are those of float32."""
    command = [PYTHON, "examples/quantise_vllm.py", MODEL, tmp_path / "fp8", "--scheme", "FP8_DYNAMIC"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with serve("FP8", tmp_path / "fp8", "--enforce-eager") as server:
        assert "quantization=compressed-tensors" in server.printed()
        served = server.ask_all(conversations)
    equal = sum(answer["token_ids"] == own["token_ids"] for answer, own in zip(served, answers, strict=True))
    figures["FP8: of 24 answers those of float32"] = equal
    assert equal >= 20
