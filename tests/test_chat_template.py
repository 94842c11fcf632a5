"""The chat templates render the original's conversations to the character, and mark the original's targets."""

import json

import pytest
from conftest import GOLDENS
from PIL import Image

from conversion.tokenizer import load_tokenizer
from modeling_llava_stf import LlavaSTFProcessor

ROLES = {"human": "user", "gpt": "assistant"}
# The original loses every target of this row, as METHOD's list of faults says; ours keeps both answers.
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
        text = mode_processor.apply_chat_template(form(row), chat_template=mode_processor.chat_template[template])
        assert text == mode_processor.tokenizer.bos_token + golden["rendered"], row["id"]


@pytest.mark.parametrize("template", ["default", "plain"])
def test_ids_and_targets_are_the_original_s(template, mode, goldens, mode_processor, picture):
    per_image = goldens["tokens_per_image"]
    for row, golden in rows_and_goldens(goldens, mode, template):
        image = {"image": picture(row["image"])} if golden["has_image"] else {}
        encoded = mode_processor.apply_chat_template(
            structured(row, **image),
            chat_template=mode_processor.chat_template[template],
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
