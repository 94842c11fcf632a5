"""A picture is read once and asked many times; token ids are those of whole passes."""

from threading import Thread

import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from transformers import DynamicCache, MistralConfig, StaticCache, TextIteratorStreamer

from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import (
    LlavaSTFConfig,
    LlavaSTFForConditionalGeneration,
    LlavaSTFProcessor,
    PictureCache,
    ask_many,
    generate_many,
)
from modeling_llava_stf.__main__ import DEFAULT_MODEL

GREEDY = {"do_sample": False, "max_new_tokens": 16}
COUNT, PLACE, ANSWER = "How many guitars are there?", "Where is the fox?", "There are two guitars."
QUESTIONS = (COUNT, " Why?\n", "a" * 40 + " ist das Größe 2 😀?", "")
SYSTEM = "Be brief."


@pytest.fixture(params=["original", "lora", "small"])
def parts(request, load_model, processor):
    """Model, processor and two pictures: of golden checkpoints, and the small model that has learned something."""
    if request.param != "small":
        pictures = [Image.open(GOLDENS / "images" / name).convert("RGB") for name in ("wide.png", "shapes.png")]
        return load_model(request.param), processor, pictures
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    paths = [DEFAULT_MODEL.parent / "demo.png", DEFAULT_MODEL.parent / "demo_stranger.png"]
    return model, LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL), [Image.open(path).convert("RGB") for path in paths]


def whole(model, processor, images, question, turns=(), system=None):
    """Token ids of the conversation, and of the answer of a whole pass."""
    chat = [{"role": "system", "content": system}] if system else []
    media = [{"type": "image", "image": image} for image in images]
    for asked, answer in turns:
        chat.append({"role": "user", "content": [*media, {"type": "text", "text": asked}]})
        chat.append({"role": "assistant", "content": answer})
        media = []
    chat.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    return inputs["input_ids"][0].tolist(), model.generate(**inputs, **GREEDY)[0, length:].tolist()


def answers(tokens, model, processor):
    """Rows without what comes after their end."""
    end = model.generation_config.eos_token_id
    rows = tokens.tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.mark.parametrize("static", [False, True])
def test_rows_of_any_kind_in_a_batch_give_the_ids_of_whole_passes(parts, static):
    model, processor, (one, other) = parts
    turns = ((COUNT, ANSWER), (PLACE, "  Twice  "))
    first = PictureCache(model, processor, one)
    both = PictureCache(model, processor, [one, other], system=SYSTEM)
    later = first.after(*turns[0]).after(*turns[1])
    rows = [(first, ([one], question)) for question in QUESTIONS] + [
        (both, ([one, other], COUNT, (), SYSTEM)),
        (later, ([one], PLACE, turns)),
        (PictureCache(model, processor, other), ([other], COUNT)),
    ]
    pictures, questions = [row[0] for row in rows], [row[1][1] for row in rows]
    expected = [whole(model, processor, *row[1]) for row in rows]
    assert [picture.prompt(question) for picture, question in zip(pictures, questions, strict=True)] == [
        ids for ids, _ in expected
    ]
    cache = StaticCache(config=model.config.text_config, max_cache_len=256) if static else None
    for _ in range(2):  # the cache of a first call does not spoil the second
        tokens = generate_many(pictures, questions, cache=cache, **GREEDY)
        assert answers(tokens, model, processor) == [answer for _, answer in expected]
    for picture, question, (_, answer) in zip(pictures, questions, expected, strict=True):
        alone = StaticCache(config=model.config.text_config, max_cache_len=256) if static else None
        assert generate_many([picture], [question], cache=alone, **GREEDY).tolist() == [answer]


def test_another_picture_gives_another_answer(parts):
    """The comparison above can fail."""
    model, processor, (one, other) = parts
    tokens = generate_many([PictureCache(model, processor, other)], [COUNT], **GREEDY)
    assert tokens.tolist() != [whole(model, processor, [one], COUNT)[1]]


@pytest.mark.parametrize("folder", ["original", "tokenizer_legacy_false"])
def test_the_seam_between_picture_and_question_is_that_of_the_template(model, processor, picture, folder):
    processor.tokenizer = load_tokenizer(GOLDENS / folder, 4096)
    pictures = PictureCache(model, processor, picture("wide.png"))
    later = pictures.after("Why?", "So.")
    for question in QUESTIONS:
        ids, answer = whole(model, processor, [picture("wide.png")], question)
        assert pictures.prompt(question) == ids
        assert generate_many([pictures], [question], **GREEDY).tolist() == [answer]
        ids, answer = whole(model, processor, [picture("wide.png")], question, [("Why?", "So.")])
        assert later.prompt(question) == ids
        assert generate_many([later], [question], **GREEDY).tolist() == [answer]


def test_answers_in_words_beams_and_stream():
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)
    picture, other = DEFAULT_MODEL.parent / "demo.png", DEFAULT_MODEL.parent / "demo_stranger.png"
    pictures = PictureCache(model, processor, str(picture))
    assert pictures.ask(COUNT, **GREEDY) == ANSWER
    assert pictures.ask([PLACE, COUNT], **GREEDY) == ["The fox is at the top left.", ANSWER]
    assert pictures.ask([]) == []
    assert 0 < pictures.num_tokens < len(pictures.prompt(COUNT)) < pictures.after(COUNT, ANSWER).num_tokens
    assert pictures.after(COUNT, ANSWER).ask(PLACE, **GREEDY) == "The fox is at the top left."
    assert ask_many([PictureCache(model, processor, str(other)), pictures], [COUNT, COUNT], **GREEDY)[1] == ANSWER

    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": PLACE}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(generate_many([pictures], [PLACE], **beams), expected)
    texts = [text.strip() for text in processor.batch_decode(expected, skip_special_tokens=True)]
    assert pictures.ask(PLACE, **beams) == pictures.ask([PLACE], **beams) == texts
    assert pictures.ask(PLACE, **GREEDY, num_beams=3) == texts[0]

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=pictures.ask, args=(COUNT,), kwargs={**GREEDY, "streamer": streamer})
    thread.start()
    chunks = [chunk for chunk in streamer if chunk]
    thread.join()
    assert len(chunks) > 1 and "".join(chunks) == ANSWER


def test_mistakes(model, load_model, processor, picture):
    image = picture("wide.png")
    pictures = PictureCache(model, processor, image)
    for nothing in (None, [], ()):
        with pytest.raises(ValueError, match="There is no picture"):
            PictureCache(model, processor, nothing)
    for text in ("Why <image>?", "<image>", "<video>"):  # the model would see tokens of a picture that is not there
        for ask in (
            pictures.ask,
            pictures.after("Why?", "So.").ask,
            lambda text: pictures.after("Why?", text),
            lambda text: PictureCache(model, processor, image, system=text),
        ):
            with pytest.raises(ValueError, match="has the placeholder <"):
                ask(text)
    with pytest.raises(ValueError, match="2 questions about 1 pictures"):
        generate_many([pictures], ["Why?", "What?"])
    with pytest.raises(ValueError, match="A question is a string, got Image"):
        pictures.ask([image])
    with pytest.raises(ValueError, match="several models"):
        ask_many([pictures, PictureCache(load_model(), processor, image)], ["Why?", "Why?"])
    with pytest.raises(ValueError, match="holds 20 tokens, but conversation and answer take up to"):
        pictures.ask("Why?", cache=StaticCache(config=model.config.text_config, max_cache_len=20), **GREEDY)
    with pytest.raises(ValueError, match="is a DynamicCache, expected a StaticCache"):
        pictures.ask("Why?", cache=DynamicCache(config=model.config.text_config))
    cache = StaticCache(config=model.config.text_config, max_cache_len=256)
    pictures.ask("Why?", cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="has 1 rows, but 2 are asked for"):
        pictures.ask(["Why?", "What?"], cache=cache, **GREEDY)
    with pytest.raises(ValueError, match="but the context holds"):
        pictures.ask("a " * 5000)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="was read in torch.float32 on cpu"):
        pictures.ask("Why?")


def test_a_sliding_window_is_refused(model, processor, picture):
    """It would count the padding between what was read and what is new."""
    config = LlavaSTFConfig.from_dict(model.config.to_dict())
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"num_hidden_layers": 2, "vocab_size": config.text_config.vocab_size, "max_position_embeddings": 4096}
    for window, refused in ((24, True), (4096, False), (None, False)):
        config.text_config = MistralConfig(**text, sliding_window=window)
        sliding = LlavaSTFForConditionalGeneration(config).eval()
        if refused:
            with pytest.raises(ValueError, match=f"a sliding window of {window} tokens"):
                PictureCache(sliding, processor, picture("wide.png"))
        else:
            PictureCache(sliding, processor, picture("wide.png"))


def test_a_template_that_asks_first_is_refused(model, processor, picture):
    pictures = PictureCache(model, processor, picture("wide.png"))
    processor.chat_template = "{{ bos_token }}{{ messages[0]['content'][-1]['text'] }}<image>{{ messages | length }}"
    with pytest.raises(ValueError, match="begins the conversation in another way"):
        pictures.ask("Why?")
