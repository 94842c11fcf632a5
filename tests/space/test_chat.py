"""The page's answers, without the page: streamed, stopped, remembered and forgotten; the picture with its grid."""

import re
from pathlib import Path
from threading import enumerate as threads

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from examples.space.chat import Chat, draw_grid, stream
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor, PictureCache
from modeling_llava_stf.__main__ import DEFAULT_MODEL

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
PICTURE, OTHER = SPACE / "pictures" / "four.png", SPACE / "pictures" / "word.png"
FIRST, SECOND = "Describe the picture.", "Where is the frog?"
SHORT = "Is there an animal?"


@pytest.fixture(scope="module")
def parts():
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    return LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL), model.eval()


@pytest.fixture
def chat(parts):
    return Chat(*parts)


def whole(parts, picture, turns, question):
    """The answer of `generate` to the whole conversation."""
    processor, model = parts
    messages, media = [], [{"type": "image", "image": str(picture)}]
    for asked, said in (*turns, (question, None)):
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": asked}]})
        messages += [{"role": "assistant", "content": said}] if said else []
        media = []
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=512 - length)
    return processor.decode(output[0, length:], skip_special_tokens=True).strip()


def answering():
    return [thread for thread in threads() if thread.name.startswith("answer")]


def test_answers_grow_and_end_as_those_of_generate(chat, parts):
    turns = []
    for question in (FIRST, SECOND, FIRST):
        answers = [*chat.answer(PICTURE, turns, question)]
        texts = [answer.text for answer in answers]
        assert len(set(texts)) > 5 and all(
            later.startswith(text) for text, later in zip(texts, texts[1:], strict=False)
        )
        assert texts[-1] == whole(parts, PICTURE, turns, question)
        assert 0 < answers[0].first_word == answers[-1].first_word <= answers[-1].seconds
        turns.append((question, texts[-1]))
    assert not answering()


def test_a_picture_is_read_once(chat, monkeypatch):
    read = []
    monkeypatch.setattr(PictureCache, "__init__", counted(read, PictureCache.__init__))
    first = [*chat.answer(PICTURE, [], SHORT)][-1]
    assert first.new_tokens == first.prompt_tokens
    again = [*chat.answer(str(PICTURE), [], SECOND)][-1]
    later = [*chat.answer(PICTURE, [(SHORT, first.text)], SECOND)][-1]
    later_again = [*chat.answer(PICTURE, [(SHORT, first.text)], SHORT)][-1]
    assert len(read) == 1
    assert later_again.new_tokens < again.new_tokens + 5 < later.new_tokens < later.prompt_tokens
    [*chat.answer(OTHER, [], FIRST)]
    assert len(read) == 2


def counted(calls, function):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


def test_memory_is_bounded_and_what_was_forgotten_is_read_again(parts):
    chat = Chat(*parts, max_new_tokens=4, kept_tokens=150)
    turns = []
    for number in range(6):
        for picture in (PICTURE, OTHER):
            text = [*chat.answer(picture, turns, FIRST)][-1].text
            kept = [conversation.num_tokens for conversation in chat._kept.values()]
            assert sum(kept) <= 150 or len(kept) == 1
        turns.append((f"{FIRST} {number}", "So."))
    assert text == [*Chat(*parts, max_new_tokens=4).answer(OTHER, turns[:-1], FIRST)][-1].text


def test_a_stopped_answer_ends_its_thread(chat, parts):
    steps = []
    hook = parts[1].register_forward_pre_hook(lambda *_: steps.append(1))
    answers = chat.answer(PICTURE, [], FIRST)
    next(answers)
    assert answering()
    answers.close()
    assert not answering()
    stopped = len(steps)
    hook.remove()
    assert stopped < len([*chat.answer(PICTURE, [], FIRST)])


def test_a_failing_generation_ends_the_stream(parts):
    conversation = PictureCache(parts[1], parts[0], str(PICTURE))

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = parts[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            [*stream(conversation, FIRST, 8)]
    finally:
        hook.remove()
    assert not answering()


def test_mistakes_are_said_in_words(chat, tmp_path):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_text("no picture")
    cut.write_bytes(PICTURE.read_bytes()[:1000])
    for picture in (broken, cut):
        for use in (chat.overlay, lambda picture: [*chat.answer(picture, [], FIRST)]):
            with pytest.raises(ValueError, match=f"Cannot read the picture '{picture.name}'"):
                use(picture)
    for question, words in ((" \n", "is empty"), ("word " * 600, "holds 512"), ("What is <image>?", "placeholder")):
        for turns in ([], [(FIRST, "So.")]):
            with pytest.raises(ValueError, match=words):
                [*chat.answer(PICTURE, turns, question)]
    with pytest.raises(ValueError, match="holds 512"):
        [*chat.answer(PICTURE, [(FIRST, "So.")] * 60, FIRST)]
    assert [*chat.answer(PICTURE, [], FIRST)]


def test_an_answer_ends_with_the_context(chat, monkeypatch):
    limits = []
    monkeypatch.setattr("examples.space.chat.stream", lambda *args: limits.append(args[2]) or iter(["So."]))
    turns, lengths = [], []
    while True:
        try:
            lengths.append([*chat.answer(PICTURE, turns, FIRST)][-1].prompt_tokens)
        except ValueError as error:
            assert "holds 512" in str(error)
            break
        turns.append((FIRST, "So."))
    assert limits == [min(512, 512 - length) for length in lengths] and 0 < limits[-1] < 20


@pytest.mark.parametrize("name", ["lying.png", "glass.png", "wide.png"])
def test_the_overlay_shows_what_the_model_sees(chat, parts, tmp_path, name):
    drawing = Image.open(PICTURE).convert("RGB")
    exif = Image.Exif()
    if name == "lying.png":
        exif[0x0112] = 6
    glass = drawing.convert("RGBA")
    glass.putalpha(7)
    {"glass.png": glass, "wide.png": drawing.resize((96, 40))}.get(name, drawing).save(tmp_path / name, exif=exif)
    pixels = parts[0](images=str(tmp_path / name), return_tensors="pt")["pixel_values"][0]
    processor = parts[0].image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    square = (pixels * std + mean).mul(255).round().byte().permute(1, 2, 0).numpy()
    expected = draw_grid(Image.fromarray(square), 8, 2)
    assert np.array_equal(np.asarray(chat.overlay(tmp_path / name)), np.asarray(expected))


def test_the_grid_is_that_of_the_processor_s_default_number_of_tokens(parts):
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL, max_soft_tokens=4)
    full, chat = Chat(*parts), Chat(processor, parts[1])
    assert (full.grids, chat.grids) == ((8, 4), (8, 2))
    lengths = [[*one.answer(PICTURE, [], FIRST)][-1].prompt_tokens for one in (full, chat)]
    assert lengths[0] - lengths[1] == 16 - 4
    assert not np.array_equal(np.asarray(full.overlay(PICTURE)), np.asarray(chat.overlay(PICTURE)))


@pytest.mark.parametrize(("grid", "window"), [(24, 2), (24, 3), (8, 2), (7, 7), (5, 1)])
def test_the_grid_has_a_cell_for_each_token(grid, window):
    shown = np.asarray(draw_grid(Image.new("RGB", (336, 336)), grid, window).convert("RGB")).astype(int)
    patch = len(shown) // grid
    assert shown.shape == (grid * patch, grid * patch, 3) and len(shown) >= 576
    middle = shown[patch // 2]  # a row that crosses every vertical line
    thick = (middle[:, 0] > 200).sum()
    lines = (np.diff((middle.sum(1) > 0).astype(int)) == 1).sum()
    assert lines == grid  # the first one is at the edge
    assert 3 * (grid // window) - 2 <= thick <= 3 * (grid // window + 1)


def test_the_space_has_the_versions_that_are_tested():
    def pins(path):
        return dict(re.findall(r"^([\w-]+)==([\w.]+)", path.read_text("utf-8"), re.MULTILINE))

    space, tested = pins(SPACE / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert {name: space[name] for name in space.keys() & tested.keys() - {"pillow"}} == {
        name: tested[name] for name in ("torch", "transformers", "accelerate", "huggingface-hub")
    }
    assert int(space["pillow"].split(".")[0]) == 12, "Gradio 6.31 wants <13: take the tested one when it no longer does"
    head = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---\n")[1])
    assert (head["sdk"], head["sdk_version"]) == ("gradio", space["gradio"])
    assert (SPACE / head["app_file"]).exists() and len(head["short_description"]) <= 60
