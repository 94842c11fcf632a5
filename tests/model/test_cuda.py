"""On a GPU: the original's numbers, and in float32 the same tokens as on a CPU by every door. Run with `-m gpu`."""

import json

import pytest
import torch
from test_parity import (
    ACTIVATIONS,
    FORWARD_CASES,
    case_named,
    forward_inputs,
    logits_error,
    loss_inputs,
    media_of,
    wrong_gelu,
    wrong_tap_order,
    wrong_window_order,
)
from test_reduce import SCORES
from transformers import BatchFeature, StaticCache, pipeline

from modeling_llava_stf import (
    LlavaSTFForConditionalGeneration,
    LlavaSTFProcessor,
    PictureCache,
    generate_many,
    reduce_image_tokens,
    suggest_budgets,
)
from modeling_llava_stf.__main__ import DEFAULT_MODEL, DEMO, main
from modeling_llava_stf.modeling_llava_stf import CACHE

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EIGHT = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
ONE = "USER: <image>\nWhere is the fox? ASSISTANT:"
TWO = "USER: <image> and <image>\nWhat differs? ASSISTANT:"
TEXT = "USER: Name an animal. ASSISTANT:"
VIDEO = "USER: <video>\nWhat happens? ASSISTANT:"


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """By default PyTorch computes convolutions on a GPU in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(inputs, device=DEVICE):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def error_of(model, case, inputs, goldens, golden_tensors):
    """The largest difference from the original's logits, compared on the CPU."""
    with torch.no_grad():
        logits = model(**on_device(inputs)).logits.cpu()
    return logits_error(lambda **_: BatchFeature({"logits": logits}), case, inputs, goldens, golden_tensors)


# The original's numbers


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_logits(name, goldens, golden_tensors, processor, load_model):
    case = case_named(goldens["forward"], name)
    inputs = forward_inputs(case, goldens, golden_tensors, processor)
    model = load_model(case["checkpoint"], device_map=DEVICE)
    assert model.device.type == DEVICE
    assert error_of(model, case, inputs, goldens, golden_tensors) < ACTIVATIONS


@pytest.mark.parametrize("mistake", [wrong_window_order, wrong_tap_order, wrong_gelu])
def test_logits_tell_a_wrong_port(mistake, goldens, golden_tensors, processor, load_model):
    case = case_named(goldens["forward"], "single_image")
    inputs = forward_inputs(case, goldens, golden_tensors, processor)
    model = load_model(device_map=DEVICE)
    mistake(model)
    assert error_of(model, case, inputs, goldens, golden_tensors) > ACTIVATIONS


def test_greedy_tokens(goldens, processor, load_model, picture):
    for case in goldens["generate"]:
        prompts, images, videos = media_of(case, picture)
        inputs = processor(images=images, text=prompts, videos=videos, return_tensors="pt").to(DEVICE)
        output = load_model(case["checkpoint"], device_map=DEVICE).generate(
            **inputs, do_sample=False, max_new_tokens=case["max_new_tokens"], **case["extra_generate_arguments"]
        )
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == case["new_tokens"], case["name"]


@pytest.mark.parametrize("name", ["sft_v1", "plain"])
def test_loss_and_gradients(name, goldens, golden_tensors, processor, load_model):
    batch = case_named(goldens["loss"], name)
    inputs = loss_inputs(batch, goldens, golden_tensors, processor)
    gradients = []
    for device in ("cpu", DEVICE):
        model = load_model(batch["checkpoint"], device_map=device)
        loss = model(**on_device(inputs, device)).loss
        assert loss.item() == pytest.approx(batch["loss"], abs=1e-5)
        loss.backward()
        gradients.append(
            {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_near(dtype, goldens, golden_tensors, processor, load_model):
    case = case_named(goldens["forward"], "single_image")
    inputs = on_device(forward_inputs(case, goldens, golden_tensors, processor))
    model = load_model(dtype=dtype, device_map=DEVICE)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        logits = model(**inputs).logits[0].float().cpu()
    expected = golden_tensors["forward.single_image.logits"][0]
    cosines = torch.cosine_similarity(logits[:, : expected.shape[-1]], expected, dim=-1)
    assert cosines.min() > 0.999


# The same tokens as on a CPU


@pytest.fixture(scope="module")
def models():
    """The small model in float32 on the CPU and on the GPU."""
    return [
        LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32, device_map=device).eval()
        for device in ("cpu", DEVICE)
    ]


@pytest.fixture(scope="module")
def small_processor():
    return LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)


@pytest.fixture
def inputs(small_processor, picture):
    images = [picture(name) for name in ("shapes.png", "text.png", "wide.png")]
    frames = [[picture(f"frame_{number}.png") for number in range(3)]]
    return small_processor(
        images=images, videos=frames, text=[TWO, TEXT, ONE, VIDEO], padding=True, return_tensors="pt"
    )


def budgets(small_processor, picture):
    images = [picture(name) for name in ("shapes.png", "text.png", "wide.png")]
    return small_processor(
        images=images, text=[TWO, TEXT, ONE], max_soft_tokens=[1, 16, 4], padding=True, return_tensors="pt"
    )


def generate(model, inputs, **kwargs):
    tokens = model.generate(**on_device(inputs, model.device), **EIGHT | kwargs)
    assert tokens.device.type == model.device.type
    return tokens.cpu()


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fewer", [False, True], ids=["all tokens", "budgets"])
def test_every_search_gives_the_tokens_of_a_cpu(way, fewer, models, inputs, small_processor, picture):
    batch = budgets(small_processor, picture) if fewer else inputs
    expected, found = (generate(model, batch, **WAYS[way]) for model in models)
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize("kwargs", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}])
def test_guesses_give_the_tokens_of_a_cpu(kwargs, models, small_processor, picture):
    one = small_processor(images=picture("wide.png"), text=ONE, return_tensors="pt")
    expected, found = (
        generate(model, one, **{name: model if value is True else value for name, value in kwargs.items()})
        for model in models
    )
    assert torch.equal(found, expected)


def test_a_cache_in_the_memory_of_the_machine(models, inputs):
    expected, found = generate(models[0], inputs), generate(models[1], inputs, cache_implementation="offloaded")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fewer", [False, True], ids=["all tokens", "budgets"])
def test_a_gpu_as_the_default_device(fewer, models, small_processor, picture):
    """As scripts set it, by `torch.set_default_device` or in a `with`: pictures and ids are made there, too."""
    asked = {"max_soft_tokens": [4, 16]} if fewer else {}

    def prepare():
        images = [picture(name) for name in ("shapes.png", "text.png")]
        return small_processor(images=images, text=TWO, return_tensors="pt", **asked)

    expected = prepare()
    with torch.device(DEVICE):
        found = prepare()
        model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval().to(DEVICE)
        tokens = generate(model, found)
        reduced = generate(model, reduce_image_tokens(model, on_device(found), keep=4)) if not fewer else None
        cache = PictureCache(model, small_processor, picture("wide.png"))
        answers = generate_many([cache], ["Where is the fox?"], **EIGHT)
    assert found["input_ids"].tolist() == expected["input_ids"].tolist()
    assert torch.equal(found["pixel_values"].cpu(), expected["pixel_values"])
    assert torch.equal(tokens, generate(models[0], expected))
    if reduced is not None:
        assert torch.equal(reduced, generate(models[0], reduce_image_tokens(models[0], expected, keep=4)))
    cache = PictureCache(models[0], small_processor, picture("wide.png"))
    assert torch.equal(answers.cpu(), generate_many([cache], ["Where is the fox?"], **EIGHT))


def test_a_cache_of_fixed_length(models, small_processor, picture):
    one = small_processor(images=picture("wide.png"), text=ONE, return_tensors="pt")
    caches = [StaticCache(config=model.config.text_config, max_cache_len=128) for model in models]
    expected, found = (generate(model, one, **{CACHE: cache}) for model, cache in zip(models, caches, strict=True))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("score", SCORES)
def test_reduced_prompts(score, models, inputs):
    expected, found = (
        generate(model, reduce_image_tokens(model, on_device(inputs, model.device), keep=4, score=score))
        for model in models
    )
    assert torch.equal(found, expected)


def test_suggested_budgets(models, small_processor, picture):
    pixels = small_processor(images=[picture("shapes.png"), picture("wide.png")], return_tensors="pt").pixel_values
    suggested = [suggest_budgets(model, {"pixel_values": pixels.to(model.device)}) for model in models]
    assert suggested[0] == suggested[1]


def test_a_picture_that_is_read_once(models, small_processor, picture):
    questions = ["Where is the fox?", "How many guitars are there?", "Why?"]
    answers = []
    for model in models:
        caches = [PictureCache(model, small_processor, picture(name)) for name in ("shapes.png", "wide.png")]
        rows = [(cache, question) for cache in caches for question in questions]
        answers.append(generate_many(*zip(*rows, strict=True), **EIGHT).cpu())
    assert torch.equal(*answers)


def test_pipeline_on_the_first_gpu(small_processor, picture):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture("wide.png")}, {"type": "text", "text": "Where is the fox?"}],
        }
    ]
    answers = [
        pipeline("image-text-to-text", model=str(DEFAULT_MODEL), device=device, dtype=torch.float32)(
            text=chat, return_full_text=False, generate_kwargs=EIGHT
        )[0]["generated_text"]
        for device in ("cpu", DEVICE)
    ]
    assert answers[0] == answers[1]


def test_the_command_answers_on_the_gpu(monkeypatch, capsys):
    """In float16, as the model is stored."""
    torch.cuda.reset_peak_memory_stats()
    for scene in json.loads(DEMO.read_text(encoding="utf-8")):
        for asked in scene["questions"]:
            monkeypatch.setattr("sys.argv", ["ask", "ask", str(DEMO.parent / scene["picture"]), asked["question"]])
            assert main() == 0
            assert asked["answer"] in capsys.readouterr().out
    assert torch.cuda.max_memory_allocated() > 4_000_000  # the weights were there


def test_compiled_with_cuda_graphs(models, small_processor, picture):
    """The whole forward pass for pictures and text, by the compiler's own backend."""
    model = models[1]
    one = on_device(small_processor(images=picture("wide.png"), text=ONE, return_tensors="pt"))
    with torch.no_grad():
        expected = model(**one).logits
        compiled = torch.compile(model, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(**one).logits, expected, rtol=1e-3, atol=1e-3)
