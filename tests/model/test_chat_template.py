"""The chat templates render the original's conversations to the character, and mark the original's targets."""

import json
import shutil
from pathlib import Path

import jinja2
import jinja2.ext
import pytest
from conftest import GOLDENS
from jinja2 import TemplateError
from PIL import Image

from conversion.checkpoints.folders import TEMPLATES as CHAT_TEMPLATES
from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import LlavaSTFProcessor
from modeling_llava_stf.processing_llava_stf import PLAIN

TEMPLATES = {
    "default": (CHAT_TEMPLATES / "vicuna_v1.jinja").read_text(encoding="utf-8"),
    "plain": PLAIN.read_text(encoding="utf-8"),
}
ROLES = {"human": "user", "gpt": "assistant"}
# The original loses every target of this row, because its tokens are counted one short; ours keeps both answers.
FAULTY = "answer_contains_separator"


@pytest.fixture(params=["legacy_true", "legacy_false"])
def mode(request):
    return request.param


@pytest.fixture
def mode_processor(mode, processor):
    """The processor with the golden tokenizer of either `legacy` mode."""
    folder = {"legacy_true": "original", "legacy_false": "tokenizer_legacy_false"}[mode]
    return LlavaSTFProcessor(
        image_processor=processor.image_processor,
        tokenizer=load_tokenizer(GOLDENS / folder, 4096),
        patch_size=processor.patch_size,
        fusion_window=processor.fusion_window,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
    )


def messages_of(row):
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def structured(row, **image):
    """The same conversation with one image item in place of the placeholders of a message."""
    messages = []
    for message in messages_of(row):
        text = message["content"]
        item = [{"type": "image", **image}] if "<image>" in text else []
        text = text.replace("<image>", "").strip() if item else text
        messages.append({"role": message["role"], "content": [*item, {"type": "text", "text": text}]})
    return messages


def rows_and_goldens(goldens, mode, template):
    expected = goldens["sft"][mode] if template == "default" else goldens["sft"]["plain"][mode]
    file = "sft_conversations.json" if template == "default" else "sft_plain.json"
    rows = {row["id"]: row for row in json.loads((GOLDENS / file).read_text(encoding="utf-8"))}
    return [(rows[golden["id"]], golden) for golden in expected]


@pytest.mark.parametrize("template", ["default", "plain"])
@pytest.mark.parametrize("form", [messages_of, structured])
def test_renders_the_original(template, form, mode, goldens, mode_processor):
    for row, golden in rows_and_goldens(goldens, mode, template):
        text = mode_processor.apply_chat_template(form(row), chat_template=TEMPLATES[template])
        assert text == mode_processor.tokenizer.bos_token + golden["rendered"], row["id"]


@pytest.mark.parametrize("template", ["default", "plain"])
def test_ids_and_targets_are_the_original_s(template, mode, goldens, mode_processor, picture):
    per_image = goldens["tokens_per_image"]
    for row, golden in rows_and_goldens(goldens, mode, template):
        image = {"image": picture(row["image"])} if golden["has_image"] else {}
        encoded = mode_processor.apply_chat_template(
            structured(row, **image),
            chat_template=TEMPLATES[template],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, targets = [], []
        for token, label in zip(golden["input_ids"], golden["labels"], strict=True):
            repeats = per_image if token == goldens["image_token_id"] else 1
            ids += [mode_processor.image_token_id if repeats > 1 else token] * repeats
            targets += [label] * repeats
        assert flat(encoded["input_ids"]) == ids, row["id"]
        masked = [token if keep else -100 for token, keep in zip(ids, flat(encoded["assistant_masks"]), strict=True)]
        if row["id"] == FAULTY:
            assert set(targets) == {-100} and masked.count(mode_processor.tokenizer.eos_token_id) == 2
        else:
            assert masked == targets, row["id"]


def flat(ids):
    return ids[0] if isinstance(ids[0], list) else ids


def test_raw_prompts(mode, goldens, mode_processor):
    tokenizer = mode_processor.tokenizer
    for row in goldens["tokenize"]:
        ids = [-200 if token == tokenizer.image_token_id else token for token in tokenizer(row["prompt"]).input_ids]
        assert ids == row[mode], row["prompt"]


def test_each_piece_between_images_is_tokenized_on_its_own(mode, mode_processor):
    """The rule itself, for texts that the goldens do not have."""
    tokenizer = mode_processor.tokenizer
    for text in (
        "<image>\n\nHi",
        "a<image> <image>b",
        "<image></s>USER: x",
        "x <image>",
        "<image>é<image>\n",
        "  <image>  y",
    ):
        pieces = [tokenizer(piece).input_ids[1:] for piece in text.split("<image>")]
        expected = [tokenizer.bos_token_id, *pieces[0]]
        for piece in pieces[1:]:
            expected += [tokenizer.image_token_id, *piece]
        assert tokenizer(text).input_ids == expected, text


def test_reloaded_tokenizer_is_the_same(mode, mode_processor, goldens, tmp_path):
    mode_processor.save_pretrained(tmp_path)
    reloaded = LlavaSTFProcessor.from_pretrained(tmp_path)
    for row in goldens["tokenize"]:
        assert reloaded.tokenizer(row["prompt"]).input_ids == mode_processor.tokenizer(row["prompt"]).input_ids
    assert reloaded.tokenizer.padding_side == "left"
    assert reloaded.chat_template == mode_processor.chat_template


# Older folders have the template of stage 1 beside the default one


@pytest.fixture
def old_folder(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "old")
    (folder / "additional_chat_templates").mkdir()
    shutil.copy(PLAIN, folder / "additional_chat_templates")
    return folder


def test_an_older_folder_loads_and_is_saved_with_one_template(old_folder, tmp_path):
    """vLLM does not start with two."""
    processor = LlavaSTFProcessor.from_pretrained(old_folder)
    assert processor.chat_template == processor.tokenizer.chat_template == TEMPLATES
    caption = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "Hi"}]
    assert processor.apply_chat_template(caption, chat_template="plain") == "<s><image>Hi\n"
    assert processor.apply_chat_template(caption).endswith("USER: <image> ASSISTANT: Hi</s>")
    processor.save_pretrained(tmp_path / "saved")
    assert processor.chat_template == processor.tokenizer.chat_template == TEMPLATES
    assert not (tmp_path / "saved" / "additional_chat_templates").exists()
    assert LlavaSTFProcessor.from_pretrained(tmp_path / "saved").chat_template == TEMPLATES["default"]


def test_a_template_of_the_user_s_own_is_saved(old_folder, tmp_path):
    (old_folder / "additional_chat_templates" / "brief.jinja").write_text("{{ messages }}")
    LlavaSTFProcessor.from_pretrained(old_folder).save_pretrained(tmp_path / "saved")
    saved = LlavaSTFProcessor.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == {"default": TEMPLATES["default"], "brief": "{{ messages }}"}


def test_a_name_of_no_template_is_not_the_prompt(processor, monkeypatch):
    question = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="no chat template 'brief': expected one of default, .* the installed package"):
        processor.apply_chat_template(question, chat_template="brief")
    assert processor.apply_chat_template(question, "{{ messages[0].content }}") == "Hi"
    monkeypatch.setattr("modeling_llava_stf.processing_llava_stf.PLAIN", Path("none"))  # as a checkpoint's own code
    with pytest.raises(ValueError, match="no chat template 'plain'"):
        processor.apply_chat_template(question, chat_template="plain")


def test_the_installed_package_has_the_template_of_stage_1(processor):
    caption = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "Hi"}]
    assert processor.apply_chat_template(caption, chat_template="plain") == "<s><image>Hi\n"


def test_generation_prompt(processor):
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text.endswith("USER: <image>\nWhat is it? ASSISTANT:")
    assert processor.apply_chat_template(conversation).endswith("What is it? ")


def test_system_text_images_and_videos(processor):
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Compare "},
                    {"type": "image"},
                    {"type": "video"},
                    {"type": "text", "text": "these."},
                ],
            },
            {"role": "assistant", "content": ""},
        ]
    )
    assert text == "<s>Be brief. USER: <image>\n<video>\nCompare these. ASSISTANT: </s>"


@pytest.mark.parametrize(
    ("roles", "message"),
    [(["user", "user"], "take turns"), (["user", "assistant", "assistant"], "take turns"), (["tool"], "tool")],
)
def test_refuses_conversations_that_it_cannot_render(roles, message, processor):
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template([{"role": role, "content": "x"} for role in roles])


def test_answers_about_a_picture_in_the_conversation(processor, model, picture):
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": picture("wide.png")}, {"type": "text", "text": "Hm?"}]}
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    direct = processor(
        images=Image.open(GOLDENS / "images" / "wide.png"),
        text=processor.apply_chat_template(conversation, add_generation_prompt=True),
        add_special_tokens=False,
        return_tensors="pt",
    )
    for name in direct:
        assert (inputs[name] == direct[name]).all()
    assert model(**inputs).logits.isfinite().all()


# What has no place in a conversation is refused, at inference as in training


def text(value, /, **keys):
    return {"type": "text", "text": value, **keys}


PICTURE = {"type": "image"}
REFUSED_CONTENTS = {
    "null": (None, "neither a text nor a list of parts"),
    "a number": (4, "neither a text nor a list of parts"),
    "an object": ({"text": "Hi"}, "neither a text nor a list of parts"),
    "null as text": ([text(None)], "expected a string as its 'text'"),
    "a number as text": ([text(4)], "expected a string as its 'text'"),
    "a bool as text": ([text(True)], "expected a string as its 'text'"),
    "a list as text": ([text(["Hi"])], "expected a string as its 'text'"),
    "no text": ([{"type": "text"}], "expected a string as its 'text'"),
    "value for text": ([{"type": "text", "value": "Hi"}], "expected a string as its 'text'"),
    "value beside text": ([text("Hi", value="Ho")], "has 'value' beside its text"),
    "a picture beside text": ([text("Hi", image="a.png")], "has 'image' beside its text"),
    "a string as part": (["Hi"], "A part of the content is Hi, expected one with the 'type'"),
    "null as part": ([None], "expected one with the 'type' 'text', 'image' or 'video'"),
    "an unknown part": ([{"type": "audio", "audio": "a.wav"}], "expected one with the 'type'"),
    "an image_url": ([{"type": "image_url", "image_url": {"url": "a.png"}}], "expected one with the 'type'"),
    "no type": ([{"text": "Hi"}], "expected one with the 'type'"),
    "a picture with a text": ([{**PICTURE, "text": "A cat"}, text("Hi")], "it has no text of its own"),
}
REFUSED_MESSAGES = {
    "no role": ([{"content": "Hi"}], "role"),
    "a list as role": ([{"role": ["user"], "content": "Hi"}], "role"),
    "keys of LLaVA": ([{"from": "human", "value": "Hi"}], "role"),
    "a picture in an answer": ([{"role": "assistant", "content": [text("Hi"), PICTURE]}], "message of 'user'"),
    "a tool call": ([{"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f"}]}], "has 'tool_calls'"),
    "a name": ([{"role": "user", "content": "Hi", "name": "Eve"}], "has 'name'"),
    "pictures of the message": ([{"role": "user", "content": "Hi", "images": ["a.png"]}], "has 'images'"),
    "a thought": ([{"role": "assistant", "content": "Hi", "reasoning_content": "Hm"}], "has 'reasoning_content'"),
    "weight 0": ([{"role": "assistant", "content": "Hi", "weight": 0}], "has the weight 0"),
}


def refused(processor, template, messages):
    question = [{"role": "user", "content": [PICTURE, text("Hi")]}] if messages[0].get("role") == "assistant" else []
    with pytest.raises(TemplateError) as caught:
        processor.tokenizer.apply_chat_template(question + messages, chat_template=TEMPLATES[template], tokenize=False)
    return str(caught.value)


@pytest.mark.parametrize("template", ["default", "plain"])
@pytest.mark.parametrize("name", REFUSED_CONTENTS)
def test_refuses_contents_that_it_does_not_know(name, template, processor):
    content, message = REFUSED_CONTENTS[name]
    for role in ("user", "assistant"):
        assert message in refused(processor, template, [{"role": role, "content": content}])


@pytest.mark.parametrize("template", ["default", "plain"])
@pytest.mark.parametrize("name", REFUSED_MESSAGES)
def test_refuses_messages_that_it_does_not_know(name, template, processor):
    messages, message = REFUSED_MESSAGES[name]
    assert message in refused(processor, template, messages)


def test_refuses_a_placeholder_beside_a_picture(processor):
    messages = [{"role": "user", "content": [PICTURE, text("What is <image>?")]}]
    assert "leave out one of them" in refused(processor, "default", messages)


@pytest.mark.parametrize("content", ["<image>\nWhat is <video>?", [text("<video><image>Hi")]])
def test_refuses_the_placeholders_of_an_image_and_a_video_in_one_text(content, processor):
    """One of them would be lost."""
    messages = [{"role": "user", "content": content}]
    assert "expected one of them" in refused(processor, "default", messages)


LITERAL = {
    "alone": [{"role": "user", "content": [text("What is an <image>?")]}],
    "a video": [{"role": "user", "content": [text("<video>\nWhat happens?")]}],
    "in parts": [{"role": "user", "content": [text("Is "), text("<image>"), text(" a tag?")]}],
    "after a picture": [
        {"role": "user", "content": [PICTURE, text("Hi")]},
        {"role": "assistant", "content": [text("Ho")]},
        {"role": "user", "content": [text("And this <image>?")]},
    ],
    "before a picture": [
        {"role": "user", "content": [text("This <image>?")]},
        {"role": "assistant", "content": [text("Ho")]},
        {"role": "user", "content": [PICTURE, text("Hi")]},
    ],
    "system": [{"role": "system", "content": [text("<image>")]}, {"role": "user", "content": [text("Hi")]}],
    "an answer": [
        {"role": "user", "content": [PICTURE, text("Hi")]},
        {"role": "assistant", "content": [text("It is <image>.")]},
    ],
    "an answer before": [{"role": "assistant", "content": [text("<video>")]}],
}


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("name", LITERAL)
def test_refuses_a_placeholder_in_a_list_of_parts(name, tokenize, processor):
    """vLLM (0.32) makes such lists of all strings; it answered, with 200, about a picture that was not there."""
    with pytest.raises(TemplateError, match=r"placeholder (of an image or a video|<(image|video)>), (which|but)"):
        processor.apply_chat_template(LITERAL[name], tokenize=tokenize, return_dict=True)


def test_a_placeholder_in_a_string_needs_its_picture(processor, picture):
    """LLaVA's data are such strings."""
    messages = [{"role": "user", "content": "<image>\nWhat is this?"}]
    prompt = processor.apply_chat_template(messages)
    assert prompt.endswith("USER: <image>\nWhat is this? ")
    assert processor(images=picture("wide.png"), text=prompt)["input_ids"]
    with pytest.raises(ValueError, match="image"):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True)


@pytest.mark.parametrize("template", ["default", "plain"])
@pytest.mark.parametrize("given", ["tools", "documents"])
def test_refuses_tools_and_documents(given, template, processor):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(TemplateError, match="no place for tools or documents"):
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": "<image>"}],
            chat_template=TEMPLATES[template],
            tokenize=False,
            **{given: [tool]},
        )


def test_what_means_nothing_is_no_reason_to_refuse(processor):
    """Datasets and clients give each message all keys that any of them has."""
    nothing = {"name": None, "tool_calls": [], "weight": None}
    parts = [{**PICTURE, "text": None, "index": 0, "image": "a.png"}, text("Hi", image=None, index=None)]
    messages = [
        {"role": "user", "content": parts, **nothing},
        {"role": "assistant", "content": "Ho", **nothing, "weight": 1},
    ]
    rendered = processor.tokenizer.apply_chat_template(messages, chat_template=TEMPLATES["default"], tokenize=False)
    assert rendered.endswith("USER: <image>\nHi ASSISTANT: Ho</s>")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([text("one"), PICTURE, text("two"), PICTURE, text("cmp")], "<image>\n<image>\none\ntwo\ncmp"),
        ([text("one "), PICTURE, text("two")], "<image>\none two"),
        ([text("one"), text("\ntwo"), text(""), text("three")], "one\ntwo\nthree"),
        ([PICTURE, text("one")], "<image>\none"),
    ],
)
def test_texts_are_not_glued_together(parts, expected, processor):
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert rendered.split("USER: ")[1] == expected + " "
    answer = [part for part in parts if part != PICTURE]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    )
    assert rendered.split("ASSISTANT: ")[1] == expected.replace("<image>\n", "") + "</s>"


@pytest.mark.parametrize("roles", [["system"], ["user", "user"], ["user", "assistant", "user"]])
def test_plain_is_one_picture_and_one_caption(roles, processor):
    messages = [{"role": role, "content": "x"} for role in roles]
    expected = "expected one message of 'user' with the image and one of 'assistant' with its caption"
    assert expected in refused(processor, "plain", messages)


def test_both_templates_read_a_message_alike(processor):
    start, end = "{%- macro text_of", "{%- endmacro -%}"
    macros = {text[text.index(start) : text.index(end)] for text in TEMPLATES.values()}
    assert len(macros) == 1


@pytest.mark.parametrize("template", ["default", "plain"])
def test_engines_see_that_contents_are_lists_of_parts(template, processor):
    """vLLM (0.32) gives a template strings, in which one picture has a place, unless a loop goes over the contents."""
    tree = jinja2.Environment(extensions=[GenerationTag]).parse(TEMPLATES[template])
    contents = [
        loop
        for loop in tree.find_all(jinja2.nodes.For)
        if isinstance(loop.iter, jinja2.nodes.Getitem)
        and (loop.iter.node.name, loop.iter.arg.value) == ("message", "content")
    ]
    assert contents


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, which transformers adds."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
