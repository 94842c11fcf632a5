"""The compiled model on a GPU, with CUDA graphs."""

import pytest
import torch

from benchmarks.systems import OURS, OURS_COMPILED, compile_system, eager_systems
from modeling_llava_stf.modeling_llava_stf import CACHE

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_cuda_graphs_answer_as_eager_passes(counters):
    ours = eager_systems("tiny", "cuda")[OURS]
    compiled = compile_system(ours, OURS_COMPILED, mode="reduce-overhead")
    cache = compiled.new_cache(1, 50)
    ids = ours.prompt(1, 50)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "min_new_tokens": 16, "max_new_tokens": 16}
    graphs = []
    for turn in range(4):  # the first two warm up and record
        pixels = ours.pictures(1) * (1 + turn)
        expected = ours.model.generate(**inputs, pixel_values=pixels, do_sample=False)
        cache.reset()
        tokens = compiled.model.generate(
            **inputs, pixel_values=pixels, do_sample=False, **{CACHE: cache}, disable_compile=True
        )
        assert torch.equal(tokens, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
