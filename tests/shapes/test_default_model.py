"""The small model of this repository: alone or in company, compiled, quantised, converted, and taught more."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from conversion import convert, convert_back
from examples.shapes.ablation import build
from examples.shapes.ablation_report import Questions, Results, tables, told
from examples.shapes.connectors import ELASTIC, SYSTEMS
from examples.shapes.evaluate import accuracy_table, ask, score
from examples.shapes.generate import generate
from examples.shapes.pictograms import FAMILIES
from examples.shapes.scenes import SIDE
from examples.shapes.text import CHAT_TEMPLATE, read_rows
from hub_card.check import check
from hub_card.files import own_code
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"
SCENES = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes of the committed sample of objects; all artists draw them."""
    return generate(tmp_path_factory.mktemp("shapes") / "data", scenes=1, test_scenes=SCENES)


@pytest.fixture(scope="module")
def rows(data):
    return read_rows(data / "test.json")


@pytest.fixture(scope="module")
def processor():
    return LlavaSTFProcessor.from_pretrained(MODEL)


def load(folder=MODEL, **options):
    return LlavaSTFForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def answers(data, rows, processor):
    return ask(load(), processor, data, rows)


def share(answers, data, rows):
    """Right answers, captions left out."""
    kinds = score(answers, rows, read_rows(data / "truth.jsonl"))["kinds"]
    parts = [part for kind, of_kind in kinds.items() if kind != "caption" for part in of_kind.values()]
    return sum(part["right"] for part in parts) / sum(part["questions"] for part in parts)


def test_it_answers_as_its_evaluation_says(answers, data, rows):
    """The evaluation has all objects, and the sample a few: their shares are near each other."""
    record = json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))
    parts = [part for of_kind in record["kinds"].values() for part in of_kind.values()]
    asked = sum(part["questions"] for part in parts)
    assert asked - sum(part["right"] for part in parts) == len(record["mistakes"])
    right = len(rows) - len(score(answers, rows, read_rows(data / "truth.jsonl"))["mistakes"])
    assert abs(right / len(rows) - (1 - len(record["mistakes"]) / asked)) < 0.1
    assert share(answers, data, rows) > 0.8


def test_alone_as_in_a_batch(answers, data, rows, processor):
    model = load()
    some = rows[:: len(rows) // 20]
    assert ask(model, processor, data, some, batch_size=1) == {row["id"]: answers[row["id"]] for row in some}


def test_it_looks_at_the_picture(answers, data, rows, processor):
    """With the pictures of others it answers worse: it does not guess from the question."""
    pictures = [row["image"] for row in rows]
    exchanged = [
        {**row, "image": picture} for row, picture in zip(rows, pictures[len(rows) // 2 :] + pictures, strict=False)
    ]
    assert share(ask(load(), processor, data, exchanged), data, rows) < share(answers, data, rows) - 0.3


def test_there_and_back_it_gives_the_same_answers(answers, data, rows, tmp_path):
    original = convert_back(MODEL, tmp_path / "original")
    again = convert(original, tmp_path / "again", vision_tower=MODEL, tokenizer=MODEL)
    some = rows[:: len(rows) // 60]
    found = ask(load(again), LlavaSTFProcessor.from_pretrained(again), data, some)
    assert found == {row["id"]: answers[row["id"]] for row in some}


def test_compiled_it_gives_the_same_answers(answers, data, rows, processor):
    model = load()
    model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=True)
    some = rows[:: len(rows) // 20]
    assert ask(model, processor, data, some) == {row["id"]: answers[row["id"]] for row in some}


def test_in_8_bit_it_answers_as_well(answers, data, rows, processor):
    pytest.importorskip("bitsandbytes")
    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    model = load(quantization_config=quantisation)
    kinds = {type(module).__name__ for module in model.model.language_model.modules()}
    assert "Linear8bitLt" in kinds
    assert share(ask(model, processor, data, rows), data, rows) >= share(answers, data, rows) - 0.01


def test_the_first_connector_is_stock_llava():
    model, _ = build(SYSTEMS[0], MODEL, seed=0)
    config = model.config
    stock_config = LlavaConfig(
        vision_config=config.vision_config, text_config=config.text_config, image_token_id=config.image_token_id
    )
    stock = LlavaForConditionalGeneration(stock_config).float()
    stock.load_state_dict(model.state_dict())
    ids = torch.full((1, config.tokens_per_image + 4), config.image_token_id)
    ids[0, -4:] = torch.arange(10, 14)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    others = [token for token in range(config.text_config.vocab_size) if token != config.image_token_id]
    with torch.no_grad():
        ours, theirs = (network.eval()(**inputs).logits[..., others] for network in (model, stock))
    torch.testing.assert_close(ours, theirs)


def rows_of_tables(text):
    return {line for line in text.splitlines() if line.startswith("|")}


def test_the_page_s_numbers_are_those_of_the_results():
    page = rows_of_tables((ROOT / "docs" / "small_model.md").read_text(encoding="utf-8"))
    kinds = json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))["kinds"]
    assert rows_of_tables(accuracy_table(kinds)) <= page


@pytest.mark.parametrize(("step", "entries"), [("language-model", "log"), ("warm-up", "imitation")])
def test_the_page_s_losses_are_those_of_the_logs(step, entries):
    page = (ROOT / "docs" / "small_model.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"\| the {step.replace('-m', ' m')} \|(.*)", page)
    log = json.loads((MODEL / f"log_{step}.json").read_text(encoding="utf-8"))[entries]
    losses = {entry["step"]: entry["loss"] for entry in log}
    first, last = re.findall(r"(\d\.\d+) after (\d+)", row)
    for loss, after in (first, last):
        assert float(loss) == round(losses[int(after)], 2)


def test_the_folder_is_small_and_complete():
    assert (MODEL / "model.safetensors").stat().st_size < 8e6
    assert check(MODEL) == []


def test_the_page_of_connectors_has_its_results():
    results = (ROOT / "examples" / "shapes" / "ablation" / "results.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
    assert len(rows_of_tables(results)) > 8 and rows_of_tables(results) <= rows_of_tables(page)
    raw = json.loads((ROOT / "examples" / "shapes" / "ablation" / "results.json").read_text(encoding="utf-8"))
    found = Results(Questions(tuple(raw["questions"]), tuple(raw["questions"].values())), raw["runs"])
    assert tables(found) == results.strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in ("MBTF", "MBTF + STF", "MBTF + STF for 4", "average pooling", "LLaVA-1.5, picture halved"):
        assert str(found.difference(row, told(found))) in readme
    assert f"with as much training time: {found.difference('MBTF + STF', told(found), 'time')}" in readme
    elastic = (ROOT / "docs" / "train_elastic.md").read_text(encoding="utf-8")
    for row, alone in ((ELASTIC, "MBTF + STF"), (f"{ELASTIC} at 4", "MBTF + STF for 4")):
        lost = found.difference(alone, told(found), other=row)
        assert f"{lost.mean:.1f} ± {lost.half:.1f} less with" in elastic


@pytest.mark.parametrize(
    ("family", "on_the_card", "in_the_notice"),
    [
        ("noto", "Noto Emoji", "Noto Emoji,"),
        ("noto-v1", "and its first version (Google, Apache-2.0)", "Noto Emoji (v1), by Google"),
        ("twemoji", "Twemoji (Twitter and others, CC BY 4.0)", "(Twemoji) by Twitter"),
        ("emojione", "Emoji One 2.3 (CC BY 4.0)", "Emoji One 2.3 by Emoji One"),
        ("fxemoji", "Firefox OS Emoji (Mozilla, Apache-2.0)", "Firefox OS Emoji (FxEmojis) by Mozilla"),
        ("fluent-emoji-flat", "Fluent Emoji Flat (Microsoft, MIT)", "Fluent Emoji Flat by Microsoft"),
    ],
)
def test_card_and_notice_name_the_artists(family, on_the_card, in_the_notice):
    assert family in FAMILIES and len(FAMILIES) == 6
    assert on_the_card in (MODEL / "README.md").read_text(encoding="utf-8")
    for notice in (MODEL / "NOTICE", ROOT / "NOTICE"):
        assert in_the_notice in notice.read_text(encoding="utf-8")


def test_its_code_is_this_package_s():
    for file in [*MODEL.glob("*.py"), *MODEL.rglob("*.jinja")]:
        assert file.read_bytes() in own_code(file.name), f"{file} differs from the package's: run `make sync-model`"
    assert (MODEL / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE, "run `make sync-model`"
    package = ROOT / "modeling_llava_stf"
    assert {file.name for file in MODEL.glob("*.py")} == {file.name for file in package.glob("[a-z]*.py")}


def test_sync_model_copies_files_that_exist():
    copied = re.findall(r"\tcp (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [len(list(ROOT.glob(name))) for name in copied] == [3, 1]
