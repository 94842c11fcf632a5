"""The same pictures and questions by several ways into processor and model: equal, or refused."""

import base64
import json
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor, PictureCache
from modeling_llava_stf.__main__ import DEFAULT_MODEL
from modeling_llava_stf._bulk import Captioner, Row, _data_url, read_input
from modeling_llava_stf.modeling_llava_stf import CACHE, TAKES_ENCODED_PICTURES

EIGHT = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def small():
    return LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()


@pytest.fixture
def processor():
    return LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def pictures(picture):
    return [picture("shapes.png"), picture("text.png")]


def asked(*pictures, question=QUESTION):
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture
def inputs_of(processor):
    def prepare(conversation, **options):
        return processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )

    return prepare


def answer(model, inputs, **kwargs):
    return model.generate(**inputs, **EIGHT | kwargs)[:, inputs["input_ids"].shape[1] :]


# The beginning of a prompt


def test_a_prompt_of_the_chat_template_has_one_bos(processor, inputs_of, pictures):
    """In one step or in two, as the documentation of the stock LLaVA shows it."""
    conversation = asked(pictures[0])
    expected = inputs_of(conversation)["input_ids"].tolist()[0]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    for prompt in (text, text.removeprefix(bos)):
        assert processor(images=pictures[0], text=prompt)["input_ids"] == [expected]
    assert processor(images=pictures, text=[text, text])["input_ids"] == [expected] * 2
    assert processor(images=pictures[0], text=text, text_kwargs={"padding": True})["input_ids"] == [expected]
    for prompts in (np.array([text]), iter([text])):
        assert processor(images=pictures[0], text=prompts)["input_ids"] == [expected]
    doubled = [processor.tokenizer.bos_token_id, *expected]
    assert processor(images=pictures[0], text=text, add_special_tokens=True)["input_ids"] == [doubled]
    assert processor(images=pictures[0], text=text, text_kwargs={"add_special_tokens": True})["input_ids"] == [doubled]
    with pytest.raises(ValueError, match="1 of 2 prompts begin with <s>"):
        processor(images=pictures, text=[text, text.removeprefix(bos)])


def test_a_dictionary_of_options_may_be_used_again(processor, inputs_of, pictures):
    for stock in (False, True):  # transformers writes into it
        options, own = {"max_soft_tokens": 4}, super(LlavaSTFProcessor, processor) if stock else processor
        own.apply_chat_template(asked(pictures[0]), tokenize=True, return_tensors="pt", processor_kwargs=options)
        assert (options != {"max_soft_tokens": 4}) is stock


def test_options_may_stand_in_their_dictionary_and_beside_it(processor, pictures):
    """transformers 5.16 drops those of the dictionary then."""
    chats = [asked(pictures[0]), asked(*pictures)]
    call = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(chats, **call, processor_kwargs={"max_soft_tokens": 4, "padding": True})
    inputs = processor.apply_chat_template(chats, **call, processor_kwargs={"max_soft_tokens": 4}, padding=True)
    assert inputs["image_tokens"] == [4, 4, 4] == expected["image_tokens"]
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    other = processor.apply_chat_template(chats, **call, processor_kwargs={"padding": True}, max_soft_tokens=1)
    assert other["image_tokens"] == [1, 1, 1]


def test_a_pipeline_answers_a_rendered_prompt_as_a_chat(small, processor, pictures):
    answers = pipeline("image-text-to-text", model=small, processor=processor)
    text = processor.apply_chat_template(asked(pictures[0]), add_generation_prompt=True)
    options = {"generate_kwargs": EIGHT, "return_tensors": True}
    of_text = answers(images=pictures[0], text=text, **options)[0]["generated_token_ids"]
    assert torch.equal(of_text, answers(text=asked(pictures[0]), **options)[0]["generated_token_ids"])


def test_a_template_without_bos_is_read_alike(small, processor, inputs_of, pictures, tmp_path):
    """The tokenizer writes it then."""
    for template in ("<image>", "{{ bos_token }}<image>"):
        processor.chat_template = template + "\nQ: {{ messages[-1]['content'][-1]['text'] }} A:"
        expected = inputs_of(asked(pictures[0]))["input_ids"].tolist()[0]
        assert expected[:2] == [processor.tokenizer.bos_token_id, processor.image_token_id]
        pictures[0].save(tmp_path / "picture.png")
        prepared = Captioner(processor, small).prepare(Row("", QUESTION, tmp_path / "picture.png"))
        assert prepared.ids == expected
        assert PictureCache(small, processor, pictures[0]).prompt(QUESTION) == expected


def test_another_image_processor_is_refused(processor, tmp_path):
    settings = {"patch_size": 16, "fusion_window": 2, "vision_feature_select_strategy": "default"}
    with pytest.raises(ValueError, match="CLIPImageProcessorPil, expected a LlavaSTFImageProcessor"):
        LlavaSTFProcessor(CLIPImageProcessorPil(), processor.tokenizer, **settings)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["image_processor"] |= {"image_processor_type": "CLIPImageProcessor"}
    file.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match="`image_processor_type` names it"):
        LlavaSTFProcessor.from_pretrained(tmp_path)


# A cache that holds the first turn


@pytest.fixture
def second_turn(small, inputs_of, pictures):
    """Returns a cache of the first turn, about the first picture, and the inputs of both turns with both pictures."""
    first = asked(pictures[0])
    cache = DynamicCache(config=small.config.text_config)
    with torch.no_grad():
        small(**inputs_of(first), use_cache=True, **{CACHE: cache})
    return cache, inputs_of([*first, {"role": "assistant", "content": "A circle."}, *asked(pictures[1])])


@pytest.mark.parametrize("chunk", [None, 9])
def test_the_pictures_of_earlier_turns_are_refused(chunk, small, second_turn):
    """Chunks of transformers 5.23 and 5.24 would give the picture of the first turn to the question of the second."""
    cache, inputs = second_turn
    with pytest.raises(ValueError, match="has 16 image tokens, the images give 32|loses new pictures"):
        answer(small, inputs, prefill_chunk_size=chunk, **{CACHE: cache})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_later_turn_takes_a_new_picture_by_either_name_of_the_cache(name, small, second_turn):
    cache, inputs = second_turn
    new = inputs | {"pixel_values": inputs["pixel_values"][1:]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert torch.equal(answer(small, new, **{name: cache}), answer(small, inputs))


@pytest.mark.skipif(not TAKES_ENCODED_PICTURES, reason="`generate` takes none before transformers 5.18")
@pytest.mark.parametrize("chunk", [None, 9])
def test_encoded_pictures_that_do_not_fit_are_refused(chunk, small, inputs_of, pictures):
    if chunk and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("these versions do not hand encoded pictures to chunks")
    inputs = inputs_of(asked(pictures[0]))
    pixels = inputs_of(asked(*pictures))["pixel_values"]
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for images in (inputs["pixel_values"], pixels):
        with torch.no_grad():
            encoded = {"image": small.get_image_features(images, return_dict=True)}
        if images is pixels:
            with pytest.raises(ValueError, match="has 16 image tokens, the images give 32"):
                answer(small, texts, mm_encoder_outputs=encoded, prefill_chunk_size=chunk)
        else:
            tokens = answer(small, texts, mm_encoder_outputs=encoded, prefill_chunk_size=chunk)
            assert torch.equal(tokens, answer(small, inputs))


def test_a_cache_that_would_not_be_used_is_refused(small, processor, pictures, second_turn, monkeypatch):
    """transformers would read the whole prompt again, without the pictures that only the cache holds."""
    cache, inputs = second_turn
    picture = PictureCache(small, processor, pictures[0])
    expected = picture.ask(QUESTION, **EIGHT)
    with pytest.raises(ValueError, match="`use_cache` is False"):
        answer(small, inputs | {"pixel_values": inputs["pixel_values"][1:]}, use_cache=False, **{CACHE: cache})
    with pytest.raises(ValueError, match="`use_cache` is False"):
        picture.ask(QUESTION, **EIGHT, use_cache=False)
    monkeypatch.setattr(small.generation_config, "use_cache", False)
    try:
        assert picture.ask(QUESTION, **EIGHT) == expected  # 5.16 may use the cache in spite of the config
    except ValueError as error:
        assert "`use_cache` is False" in str(error)
    answer(small, inputs, **{CACHE: DynamicCache(config=small.config.text_config)})


def test_continuous_batching_of_images_is_refused(small, inputs_of, pictures):
    """transformers leaves the pixels out."""
    inputs = inputs_of(asked(pictures[0]))
    for call in (
        lambda: small.generate_batch(inputs["input_ids"].tolist(), max_new_tokens=2),
        lambda: answer(small, inputs, cache_implementation="paged"),
    ):
        with pytest.raises(ValueError, match="answers without the images in continuous batching"):
            call()


def test_drafts_on_a_cache_are_refused(small, processor, pictures, second_turn):
    cache, inputs = second_turn
    new = inputs | {"pixel_values": inputs["pixel_values"][1:]}
    for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small}):
        with pytest.raises(ValueError, match="cannot draft tokens with a cache that holds a part of the prompt"):
            answer(small, new, **kwargs, **{CACHE: cache})
        with pytest.raises(ValueError, match="leave that out, or `assistant_model` and `prompt_lookup_num_tokens`"):
            PictureCache(small, processor, pictures[0]).ask(QUESTION, **EIGHT, **kwargs)
    empty = DynamicCache(config=small.config.text_config)
    drafted = answer(small, inputs, prompt_lookup_num_tokens=3, **{CACHE: empty})
    assert torch.equal(drafted, answer(small, inputs))


def test_drafts_and_chunks_of_embeddings_are_refused(small, inputs_of, pictures):
    """With `reduce_image_tokens` before transformers 5.18, too: the answers ignored the picture."""
    inputs = inputs_of(asked(pictures[0]))
    embeddings = {"inputs_embeds": small.get_input_embeddings()(inputs["input_ids"]).detach()}
    for kwargs in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small}):
        with pytest.raises(ValueError, match="cannot draft tokens with `inputs_embeds`"):
            answer(small, inputs | embeddings, **kwargs)
    with pytest.raises(ValueError, match="cannot prefill `inputs_embeds` in chunks"):
        answer(small, inputs | embeddings, prefill_chunk_size=5)
    assert torch.equal(answer(small, inputs | embeddings), answer(small, inputs))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def test_transformers_drafts_wrongly_with_embeddings_and_has_no_chunks_of_them(llama):
    ids, other = torch.arange(12)[None] % 5 + 3, torch.arange(12)[None] % 5 + 20
    given = {"input_ids": ids, "inputs_embeds": llama.model.embed_tokens(ids).detach(), **EIGHT}
    assert not torch.equal(llama.generate(**given, prompt_lookup_num_tokens=3), llama.generate(**given))
    given["inputs_embeds"] = llama.model.embed_tokens(other).detach()
    try:
        tokens = llama.generate(**given, prefill_chunk_size=5)
    except RuntimeError:  # 5.24
        return
    assert not torch.equal(tokens, llama.generate(**given))


def test_transformers_reads_the_whole_prompt_again_when_it_drafts_on_a_cache(llama):
    ids, lengths = torch.arange(12)[None] % 5 + 3, []
    llama.model.embed_tokens.register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    for kwargs, read in (({}, 4), ({"prompt_lookup_num_tokens": 2}, 12)):
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(ids[:, :8], use_cache=True, **{CACHE: cache})
        lengths.clear()
        llama.generate(ids, max_new_tokens=2, do_sample=False, **{CACHE: cache}, **kwargs)
        assert lengths[0] >= read and (read == 12 or lengths[0] == read)


def test_an_argument_leaves_the_checkpoint_s_other_settings(small, processor, pictures, monkeypatch):
    """As `generate` does: what a `generation_config` leaves open is taken from the model's."""
    monkeypatch.setattr(small.generation_config, "num_beams", 2)
    cache = PictureCache(small, processor, pictures[0])
    assert cache.ask(QUESTION, generation_config=GenerationConfig(max_new_tokens=8)) == cache.ask(
        QUESTION, max_new_tokens=8
    )


# Arguments of a call


@pytest.mark.parametrize("budget", [16, 4])
def test_other_taps_are_refused_with_any_budget(budget, small, inputs_of, pictures):
    inputs = inputs_of(asked(pictures[0]), max_soft_tokens=budget)
    for other in ({"vision_feature_layer": [1, 2, 3, 4]}, {"vision_feature_select_strategy": "full"}):
        with pytest.raises(ValueError, match="cannot be changed"):
            small(**inputs, **other)
        with pytest.raises(ValueError, match="cannot be changed"):
            answer(small, inputs, **other)
    same = {"vision_feature_layer": small.config.vision_feature_layer}
    assert torch.equal(answer(small, inputs, **same), answer(small, inputs))


@torch.no_grad()
def test_the_tower_s_states_are_given_with_any_budget(small, inputs_of, pictures):
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("its outputs have no encoded images")
    for budget in (16, 4):
        inputs = inputs_of(asked(pictures[0]), max_soft_tokens=budget)
        encoded = small(**inputs, output_hidden_states=True).image_outputs
        assert len(encoded.hidden_states) == small.config.vision_config.num_hidden_layers + 1


# Files of questions


@pytest.mark.parametrize(
    "row", [{"image": "a.png", "prompt": ["What?"]}, {"image": "a.png", "text": 5, "question_id": 1}]
)
def test_a_question_that_is_no_text_is_refused(row, tmp_path):
    """It was answered as if there were none, with the default question."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(ValueError, match=r"question about a.png is (\['What\?'\]|5), expected a string"):
        read_input(tmp_path / "rows.jsonl", QUESTION)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_picture_with_damaged_tags_is_sent_as_it_is_seen(kind, processor, pictures):
    """Without the tags: the server may not read them either."""
    file = BytesIO()
    pictures[0].save(file, kind, exif=b"no EXIF", lossless=True)
    with pytest.raises(SyntaxError):
        Image.open(file).getexif()
    sent = base64.b64decode(_data_url(file.getvalue()).partition(",")[2])
    assert not Image.open(BytesIO(sent)).getexif()
    expected = processor(images=file.getvalue(), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=sent, return_tensors="pt")["pixel_values"], expected)


def test_a_question_may_have_the_line_breaks_of_unicode(tmp_path):
    rows = [{"image": "a.png", "prompt": f"What{mark}is it?"} for mark in "\u2028\u0085\x1c"] + [{"image": "b.png"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    prompts = [row.prompt for row in read_input(tmp_path / "rows.jsonl", QUESTION)]
    assert prompts == [row.get("prompt", QUESTION) for row in rows]
