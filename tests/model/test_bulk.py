"""`python -m modeling_llava_stf caption`: the same rows however it is cut up, broken off, or answered."""

import base64
import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from random import Random
from threading import Lock, Thread
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawings import drawn
from photos import save_photos
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf import _bulk as bulk
from modeling_llava_stf.__main__ import DEFAULT_MODEL
from modeling_llava_stf.__main__ import main as ask_main

ROOT = Path(__file__).parents[2]
PICTURES, BROKEN = 14, ("broken.png", "sub/no.jpg")
QUESTION = "Is there a red circle?"
SMALL_PARTS = ("--part-size", 3, "--batch-size", 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of drawings, two broken pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    rng = Random(5)
    for number in range(PICTURES):
        name = f"sub/{number:02}.jpg" if number % 3 == 0 else f"{number:02}.png"
        drawn(rng)[1].save(folder / name)
    whole = next(folder.glob("*.png")).read_bytes()
    (folder / BROKEN[0]).write_bytes(whole[: len(whole) // 2])
    (folder / BROKEN[1]).write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


@pytest.fixture
def caption(monkeypatch, capsys):
    """Runs the command in this process: exit status, standard output and error."""
    from transformers.utils import logging

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["command", "caption", *map(str, arguments)])
        status = ask_main()
        return status, *capsys.readouterr()

    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def rows(folder):
    """What all parts hold, in their order."""
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """The rows of one run, in a process of its own."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    done = subprocess.run(command(pictures, folder), cwd=ROOT, capture_output=True, encoding="utf-8", timeout=3600)
    assert done.returncode == 0, done.stderr
    assert "16 of 16 pictures asked about, 2 of them with an error; 0 were there. 6 of 6 parts" in done.stdout
    assert "16/16" in done.stderr
    return rows(folder)


def command(source, folder):
    return [sys.executable, "-m", "modeling_llava_stf", "caption", *map(str, (source, folder, *SMALL_PARTS))]


def test_answers_are_those_of_single_pictures(pictures, tmp_path):
    """In float32, where a batch tips no tie."""
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)
    parser = ArgumentParser()
    bulk.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["caption", *map(str, (pictures, tmp_path, "--batch-size", 5))])
    bulk.caption(arguments, lambda: (processor, model))
    found = rows(tmp_path)
    paths = [str(path.relative_to(pictures)) for path in pictures.rglob("*") if path.suffix in (".png", ".jpg")]
    assert [row["path"] for row in found] == sorted(paths)
    for row in found:
        if row["path"] in BROKEN:
            assert row["answer"] is row["prompt_tokens"] is row["answer_tokens"] is None
            assert row["path"] in row["error"]
            continue
        assert row["error"] is None
        content = [{"type": "image", "image": str(pictures / row["path"])}, {"type": "text", "text": bulk.PROMPT}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=128)[0, length:]
        assert row["answer"] == processor.decode(answer, skip_special_tokens=True).strip()
        assert (row["prompt_tokens"], row["answer_tokens"]) == (length, len(answer))


def test_shards_give_the_rows_of_one_run(pictures, unbroken, tmp_path, caption):
    together = []
    for shard in ("0/2", "1/2"):
        assert caption(pictures, tmp_path / "apart" / shard[0], "--shard", shard, *SMALL_PARTS)[0] == 0
        assert caption(pictures, tmp_path / "one", "--shard", shard, *SMALL_PARTS)[0] == 0
        together += rows(tmp_path / "apart" / shard[0])
    assert len(together) == len(unbroken) and all(row in together for row in unbroken)
    assert rows(tmp_path / "one") == unbroken


def test_a_launcher_numbers_the_shards(pictures, unbroken, tmp_path, caption, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert caption(pictures, tmp_path / "out", *SMALL_PARTS)[0] == 0
    assert rows(tmp_path / "out") == unbroken[3:6]


def test_killed_and_run_again_it_gives_the_rows_of_an_unbroken_run(pictures, unbroken, tmp_path):
    out = tmp_path / "out"
    run = subprocess.Popen(command(pictures, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(out.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    there = {file: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}
    assert 0 < len(there) < 6
    (out / ".part-00005.parquet.tmp").write_bytes(b"PAR1 and no more")
    again = subprocess.run(command(pictures, out), cwd=ROOT, capture_output=True, encoding="utf-8", timeout=3600)
    assert f"{16 - 3 * len(there)} of 16 pictures asked about" in again.stdout
    assert rows(out) == unbroken
    assert {file: file.stat().st_mtime_ns for file in there} == there
    assert not [*out.glob(".*")]


def test_files_give_the_rows_of_the_folder(pictures, unbroken, tmp_path, caption):
    names = [row["path"] for row in unbroken]
    structs = [{"bytes": (pictures / name).read_bytes(), "path": name} for name in names]
    tables = {
        "bytes and path": {"image": structs},
        "path in a struct": {"image": [{"bytes": None, "path": name} for name in names]},
        "bytes": {"image": [one["bytes"] for one in structs], "path": names},
        "path": {"path": names},
        "path as image": {"image": names},
    }
    for number, (kind, table) in enumerate(tables.items()):
        file = pictures.parent / f"{number}.parquet"
        pq.write_table(pa.table(table), file, row_group_size=4)
        assert caption(file, tmp_path / kind, "--images", pictures, *SMALL_PARTS)[0] == 0
        assert without_errors(rows(tmp_path / kind)) == without_errors(unbroken), kind
    listing = pictures / "listing.jsonl"
    listing.write_text("\n".join(json.dumps({"image": name}) for name in names) + "\n\n", encoding="utf-8")
    assert caption(listing, tmp_path / "lines", *SMALL_PARTS)[0] == 0
    assert rows(tmp_path / "lines") == unbroken
    listing.unlink()


def without_errors(found):
    """Their words differ: bytes have no name."""
    return [{**row, "error": row["error"] is not None} for row in found]


def test_a_folder_of_parquet_files_with_prompts_of_their_own(pictures, tmp_path, caption):
    names = sorted(path.name for path in pictures.glob("0*.png"))
    source = tmp_path / "source"
    source.mkdir()
    contents = [(pictures / name).read_bytes() for name in names]
    for number in range(2):
        own = slice(number * 2, number * 2 + 2)
        table = {"image": contents[own], "prompt": [QUESTION, None], "text": ["a caption"] * 2}
        pq.write_table(pa.table(table), source / f"{number}.parquet")
    assert caption(source, tmp_path / "out", *SMALL_PARTS, "--prompt", "How many objects are there?")[0] == 0
    assert [(row["path"], row["prompt"]) for row in rows(tmp_path / "out")] == [
        ("0.parquet:0", QUESTION),
        ("0.parquet:1", "How many objects are there?"),
        ("1.parquet:0", QUESTION),
        ("1.parquet:1", "How many objects are there?"),
    ]


def test_pictures_behind_links_are_asked_about(pictures, tmp_path):
    """A folder of links is common, and links in a circle end."""
    (tmp_path / "train").symlink_to(pictures)
    (tmp_path / "circle").symlink_to(tmp_path)
    found = [row.path for row in bulk.read_input(tmp_path, bulk.PROMPT)]
    assert found == [f"train/{row.path}" for row in bulk.read_input(pictures, bulk.PROMPT)]


def test_a_missing_picture_is_a_row_with_an_error(tmp_path, caption):
    pq.write_table(pa.table({"image": pa.array([None], pa.binary()), "path": [7]}), tmp_path / "one.parquet")
    assert caption(tmp_path / "one.parquet", tmp_path / "out")[0] == 0
    row = rows(tmp_path / "out")[0]
    assert (row["path"], row["answer"]) == ("7", None) and "picture of 0 bytes" in row["error"]


def test_half_a_character_is_an_error_of_its_row(pictures, tmp_path, caption):
    """Texts from the web have them, where an emoji was cut."""
    name = next(pictures.glob("0*.png")).name
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(f'{{"image": "{name}", "prompt": "{p}"}}\n' for p in ("cut \\ud83d", QUESTION)))
    status, output, _ = caption(lines, tmp_path / "out", "--images", pictures)
    assert status == 0 and "2 of 2 pictures asked about, 1 of them with an error" in output
    first, second = rows(tmp_path / "out")
    assert (first["prompt"], first["answer"]) == ("cut ?", None) and "surrogates" in first["error"]
    assert second["answer"] and second["error"] is None


def test_question_files_of_llava(pictures, tmp_path, caption):
    """Their scorers read the lines of all parts, one after the other; pyarrow is not needed."""
    questions = [
        {"question_id": number, "image": image, "text": QUESTION, "category": "default"}
        for number, image in enumerate(["01.png", "02.png", "01.png", BROKEN[0]], start=100)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    for name in ("out", "again"):
        assert caption(file, tmp_path / name, "--images", pictures, *SMALL_PARTS)[0] == 0
    parts = sorted((tmp_path / "out").glob("part-*.jsonl"))
    answers = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    assert len(parts) == 2
    assert [set(answer) for answer in answers] == [
        {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    ] * 4
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [
        (question["question_id"], QUESTION) for question in questions
    ]
    assert all(answer["text"].startswith(("Yes", "No")) for answer in answers[:3])
    assert answers[0]["text"] == answers[2]["text"] and answers[3]["text"] == ""
    assert len({answer["answer_id"] for answer in answers}) == 4 and "error" in answers[3]["metadata"]
    assert [part.read_bytes() for part in parts] == [
        part.read_bytes() for part in sorted((tmp_path / "again").glob("part-*.jsonl"))
    ]


def lines_of(folder):
    parts = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]


def scienceqa(pictures):
    """A file as ScienceQA's in LLaVA: a JSON list of conversations, some without a picture."""
    first = {"from": "human", "value": f"<image>\n{QUESTION}\nAnswer in one word."}
    rest = {"from": "gpt", "value": "Yes"}
    return [
        {"id": "4", "image": "01.png", "conversations": [first, rest]},
        {"id": "5", "conversations": [{**first, "value": " How many objects are there? "}, rest]},
        {"id": "11", "image": "02.png", "conversations": [{**first, "value": f"{QUESTION}\n<image>"}, rest]},
    ]


def test_questions_without_a_picture_are_asked_too(pictures, tmp_path, caption):
    """The answers are those of `generate`. ScienceQA's scorer sees by `<image>` in the prompt what had a picture."""
    file = tmp_path / "llava_test_CQM-A.json"
    file.write_text(json.dumps(scienceqa(pictures), indent=1), encoding="utf-8")
    assert caption(file, tmp_path / "out", "--images", pictures, "--batch-size", 3)[0] == 0
    answers = lines_of(tmp_path / "out")
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [
        ("4", f"<image>\n{QUESTION}\nAnswer in one word."),
        ("5", "How many objects are there?"),
        ("11", f"<image>\n{QUESTION}"),
    ]
    model = LlavaSTFForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype="auto").eval()
    processor = LlavaSTFProcessor.from_pretrained(DEFAULT_MODEL)
    for answer, image in zip(answers, ("01.png", None, "02.png"), strict=True):
        picture = {} if image is None else {"images": Image.open(pictures / image)}
        text = f"USER: {answer['prompt']} ASSISTANT:"
        system = processor.apply_chat_template([{"role": "user", "content": ""}]).split("USER:")[0]
        inputs = processor(text=system + text, add_special_tokens=False, return_tensors="pt", **picture)
        output = model.generate(**inputs.to(model.dtype), do_sample=False, max_new_tokens=128)
        assert answer["text"] == processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["metadata"] == {}


def test_a_question_id_may_come_several_times(pictures, tmp_path, caption):
    """MME asks twice about a picture, and TextVQA's id is that of the picture: their scorers look at the prompts."""
    questions = [
        {"question_id": "code/1.png", "image": "01.png", "text": text}
        for text in (QUESTION, "How many objects are there?", QUESTION)
    ]
    file = tmp_path / "mme.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    assert caption(file, tmp_path / "out", "--images", pictures)[0] == 0
    answers = lines_of(tmp_path / "out")
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [
        (question["question_id"], question["text"]) for question in questions
    ]
    assert answers[0]["text"] == answers[2]["text"] != answers[1]["text"]


def test_a_text_question_with_a_placeholder_has_an_error(tmp_path, caption):
    """And so has none of the others."""
    questions = [
        {"question_id": 1, "text": f"<image>\n{QUESTION}"},
        {"question_id": 2, "image": None, "text": "Hello."},
    ]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    assert caption(file, tmp_path / "out")[0] == 0
    first, second = lines_of(tmp_path / "out")
    assert first["text"] == "" and "names no picture" in first["metadata"]["error"] and second["metadata"] == {}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("q.jsonl", '{"question_id": 1}', "Line 1 of"),
        ("q.jsonl", '{"question_id": 1, "text": 5}', "neither an `image` nor a `text`"),
        ("q.jsonl", '{"question_id": 1, "image": 5, "text": "Why?"}', "no `image` (or `path`)"),
        ("q.jsonl", '{"question_id": 1, "image": [], "text": "Why?"}', "no `image` (or `path`)"),
        ("q.json", "[1]", "Item 1 of"),
        ("q.json", "[", "is not JSON"),
        ("q.json", '[{"id": 1, "conversations": []}]', "no first turn"),
        ("q.json", '[{"conversations": [{"value": "Why?"}]}]', "no `id`"),
    ],
)
def test_damaged_question_files_are_refused(name, content, reason, tmp_path, caption):
    (tmp_path / name).write_text(content, encoding="utf-8")
    status, _, errors = caption(tmp_path / name, tmp_path / "out")
    assert status == 2 and reason in errors and not (tmp_path / "out").exists()


def test_the_actor_of_ray_gives_the_same_rows(pictures, unbroken, monkeypatch):
    """Ray itself is not among the tests' packages: the example was run by hand with 2.60.0 on two cores."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    actor = importlib.import_module("examples.bulk_ray").RayCaptioner(str(DEFAULT_MODEL), bulk.PROMPT, 128)
    some = unbroken[:2] + [row for row in unbroken if row["path"] in BROKEN]
    paths = [row["path"] for row in some]
    columns = actor({"path": paths, "bytes": [(pictures / path).read_bytes() for path in paths]})
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert without_errors(found) == without_errors(some)


def test_the_actor_of_ray_refuses_a_checkpoint_that_lacks_a_weight(tmp_path, monkeypatch):
    folder = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    with pytest.raises(ValueError, match="lacks 1 weights, among them 'lm_head.weight'"):
        importlib.import_module("examples.bulk_ray").RayCaptioner(str(folder), bulk.PROMPT, 128)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--actors", "0"], "--actors is 0, expected at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", " "], "--prompt is empty"),
        ([], "leaves out what begins with _, such as _DSC1.jpg in"),
    ],
)
def test_what_ray_would_ignore_is_refused(options, reason, tmp_path, monkeypatch, capsys):
    """Cameras give the names of such files; Ray leaves them out without a word."""
    (tmp_path / "_SUCCESS.txt").touch()
    (tmp_path / "_DSC1.jpg").touch()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setattr(sys, "argv", ["bulk_ray.py", str(tmp_path), "out", "--model", "model", *options])
    with pytest.raises(SystemExit):
        importlib.import_module("examples.bulk_ray").main()
    assert reason in capsys.readouterr().err


# Servers


class StandIn(ThreadingHTTPServer):
    """Answers with the size and the first pixel of the picture; fails as it is told to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.busy, self.most, self.seen, self.asked, self.trouble = Lock(), 0, 0, [], {}, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": "stand-in"}]})

    def do_POST(self):
        stand_in = self.server
        with stand_in.lock:
            stand_in.busy += 1
            stand_in.most = max(stand_in.most, stand_in.busy)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *images, text = request["messages"][0]["content"]
        if not images:
            self.reply(200, {"choices": [{"message": {"content": f"Without a picture: {text['text']}"}}]})
            return
        url = images[0]["image_url"]["url"]
        picture = Image.open(BytesIO(base64.b64decode(url.partition(",")[2])))
        answer = f"{picture.size} {picture.convert('RGB').getpixel((0, 0))}"
        time.sleep(0.05)
        with stand_in.lock:
            stand_in.busy -= 1
            number = stand_in.asked[answer] = stand_in.asked.get(answer, 0) + 1
            stand_in.seen.append((url.partition(";")[0], request["model"], text["text"], request["temperature"]))
        status = stand_in.trouble.get("always") or (stand_in.trouble.get("first") if number == 1 else None)
        status = status or stand_in.trouble.get("refused", {}).get(answer)
        if status == "no answer":
            self.reply(200, {"choices": []})
        elif status == "hang up":
            self.close_connection = True
        elif status:
            self.reply(status, {"error": "as told"})
        else:
            usage = {"prompt_tokens": 5, "completion_tokens": 7}
            self.reply(200, {"choices": [{"message": {"content": f" {answer}\n"}}], "usage": usage})

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(bulk, "time", SimpleNamespace(sleep=lambda seconds: None))
    stand_in = StandIn()
    thread = Thread(target=stand_in.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()
    thread.join()


@pytest.fixture
def photos(tmp_path):
    """Pictures of different sizes; one is turned by EXIF, one transparent, one broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for side in range(8, 16):
        Image.new("RGB", (side, 4), (side, 0, 0)).save(folder / f"{side:02}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 4), "blue").save(folder / "turned.jpg", exif=turned)
    Image.new("RGBA", (31, 4), (9, 8, 7, 0)).save(folder / "glass.png")
    Image.new("L", (32, 4), 5).save(folder / "grey.jpg")
    (folder / "broken.png").write_bytes(b"no")
    return folder


@pytest.mark.parametrize("trouble", [None, 429, 500, 503, "hang up"])
def test_a_server_is_asked_until_it_answers(server, photos, tmp_path, caption, trouble):
    server.trouble = {"first": trouble}
    url = server.url + ("/v1/" if trouble else "")
    status, output, _ = caption(
        photos, tmp_path / "out", "--server", url, "--concurrency", 3, "--part-size", 5, "--prompt", QUESTION
    )
    assert status == 0 and "12 of 12 pictures asked about, 1 of them with an error" in output
    found = {row["path"]: row for row in rows(tmp_path / "out")}
    assert list(found) == sorted(path.name for path in photos.iterdir())
    assert found["10.png"]["answer"] == "(10, 4) (10, 0, 0)"
    assert (found["10.png"]["prompt_tokens"], found["10.png"]["answer_tokens"]) == (5, 7)
    assert found["turned.jpg"]["answer"].startswith("(4, 30)")
    assert found["glass.png"]["answer"] == "(31, 4) (9, 8, 7)"  # the colour below, as the processor sees it
    assert found["broken.png"]["answer"] is None and "broken.png" in found["broken.png"]["error"]
    assert 1 < server.most <= 3
    assert {seen[1:] for seen in server.seen} == {("stand-in", QUESTION, 0)}
    assert sorted(kind for kind, *_ in server.seen).count("data:image/jpeg") == (1 if trouble is None else 2)
    assert set(server.asked.values()) == {1 if trouble is None else 2}


def test_a_server_that_refuses_every_request_is_an_error(server, photos, tmp_path, caption):
    """The parts are written all the same; the picture that cannot be read was never sent."""
    for status in (400, 413, 500):
        server.trouble = {"always": status}
        code, output, errors = caption(photos, tmp_path / str(status), "--server", server.url)
        assert code == 2 and "12 of 12 pictures asked about, 12 of them with an error" in output
        last = errors.splitlines()[-1]
        assert last.startswith("error: The server refused 11 requests and answered 0. ") and str(status) in last
        errors = {row["path"]: row["error"] for row in rows(tmp_path / str(status))}
        assert all(str(status) in error for path, error in errors.items() if path != "broken.png")


def test_a_request_that_a_server_refuses_is_an_error_of_its_row(server, photos, tmp_path, caption):
    """Some requests of a run: those about one picture."""
    server.trouble = {"refused": {"(31, 4) (9, 8, 7)": 413, "(32, 4) (5, 5, 5)": "no answer"}}
    code, output, _ = caption(photos, tmp_path / "out", "--server", server.url, "--concurrency", 1)
    summary, last = output.splitlines()
    assert code == 0 and "12 of 12 pictures asked about, 3 of them with an error" in summary
    assert last.startswith("The server refused 2 requests and answered 9. The first reason: The server refuses: 413")
    errors = {row["path"]: row["error"] for row in rows(tmp_path / "out") if row["error"]}
    assert errors.keys() == {"broken.png", "glass.png", "grey.jpg"} and "reply has no answer" in errors["grey.jpg"]


def test_pictures_that_cannot_be_read_are_no_refusals(server, tmp_path, caption):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"no")
    code, output, _ = caption(tmp_path / "photos", tmp_path / "out", "--server", server.url)
    assert code == 0 and len(output.splitlines()) == 1 and "1 of them with an error" in output


@pytest.mark.parametrize("status", [401, 404, 503, "hang up"])
def test_a_server_that_is_away_ends_the_run_and_the_next_goes_on(server, photos, tmp_path, caption, status):
    arguments = (photos, tmp_path / "out", "--server", server.url, "--part-size", 5, "--model", "some")
    assert caption(*arguments, "--shard", "0/3")[0] == 0
    server.trouble = {"always": status}
    code, output, errors = caption(*arguments)
    assert (code, output) == (2, "")
    assert "error: The server http://127.0.0.1:" in errors.splitlines()[-1]
    assert len(rows(tmp_path / "out")) == 5
    server.trouble = {}
    assert "7 of 12 pictures asked about" in caption(*arguments)[1]
    assert len(rows(tmp_path / "out")) == 12


def test_a_server_without_models_is_refused_in_one_line(server, photos, tmp_path, caption, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.reply(200, {"data": []}))
    status, output, errors = caption(photos, tmp_path / "out", "--server", server.url)
    assert (status, output) == (2, "") and "name one with --model" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("where", ["here", "server"])
def test_photos_are_turned_and_transparency_is_painted_as_asked(server, pictures, tmp_path, caption, where):
    """The drawing lies on its side, or is drawn on nothing."""
    folder = tmp_path / "photos"
    folder.mkdir()
    drawing = Image.open(pictures / "01.png").convert("RGB")
    drawing.paste((240, 240, 0), (0, 0, 30, 30))
    save_photos(drawing, folder)

    def answers(*options):
        out = tmp_path / f"out{len(options)}"
        assert caption(folder, out, *options, *(("--server", server.url) if where == "server" else ()))[0] == 0
        return {row["path"].removesuffix(".png"): row["answer"] for row in rows(out)}

    found = answers()
    assert found["lying"] == found["upright"] != found["as_it_lies"] == found["nothing"] != found["white"]
    found = answers("--no-do-exif-transpose", "--alpha-background", "white")
    assert found["lying"] == found["as_it_lies"] != found["upright"]
    assert found["nothing"] == found["white"] != found["as_it_lies"]


# Mistakes


def test_a_server_is_asked_without_a_picture(server, pictures, tmp_path, caption):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(scienceqa(pictures)), encoding="utf-8")
    assert caption(file, tmp_path / "out", "--images", pictures, "--server", server.url)[0] == 0
    texts = [answer["text"] for answer in lines_of(tmp_path / "out")]
    assert texts[1] == "Without a picture: How many objects are there?" and texts[0].startswith("(128, 128)")
    assert {asked for _, _, asked, _ in server.seen} == {f"{QUESTION}\nAnswer in one word.", QUESTION}


def test_mistakes_are_one_line(pictures, tmp_path, caption, monkeypatch):
    def refused(*arguments):
        status, output, errors = caption(*arguments)
        assert (status, output, len(errors.splitlines())) == (2, "", 1), errors
        return errors

    empty, lines = tmp_path / "empty", tmp_path / "lines.jsonl"
    empty.mkdir()
    out = tmp_path / "out"
    assert "There is no " in refused(tmp_path / "nowhere", out)
    assert "There are no pictures" in refused(empty, out)
    assert "neither a folder" in refused(pictures / "notes.txt", out)
    for text, reason in (
        ('{"image": "a.png"}\n[]', "Line 2 of"),
        ("{", "Line 1 of"),
        ("[]", "Line 1 of"),
        ('{"text": "Why?"}', "no `image`"),
        ('{"image": "a.png"}\n{"image": "a.png", "question_id": 1}', "all or none"),
        ('{"image": "a.png", "prompt": 0}', "is 0, expected a string"),
        ('{"image": "a.png", "prompt": []}', "is [], expected a string"),
    ):
        lines.write_text(text, encoding="utf-8")
        assert reason in refused(lines, out)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    assert "Cannot read the parquet files" in refused(tmp_path / "bad.parquet", out)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "other.parquet")
    assert "has no column `image` or `path`" in refused(tmp_path / "other.parquet", out)
    mixed = pa.table({"path": ["a.png", "a.png"], "question_id": [1, None], "text": ["Why?", "Where?"]})
    pq.write_table(mixed, tmp_path / "mixed.parquet")
    assert "all or none" in refused(tmp_path / "mixed.parquet", out)
    for shard in ("2/2", "1", "-1/2", "0/0", "a/b"):
        assert "--shard is" in refused(pictures, out, f"--shard={shard}")
    for option in ("max-new-tokens", "batch-size", "part-size", "workers", "concurrency"):
        assert f"--{option} is 0" in refused(pictures, out, f"--{option}", 0)
    assert "--prompt is empty" in refused(pictures, out, "--prompt", " ")
    for limit in (512, 100000):
        assert f"--max-new-tokens is {limit}, expected 1 to 511" in refused(pictures, out, "--max-new-tokens", limit)
    assert "'no-such-colour'" in refused(pictures, out, "--alpha-background", "no-such-colour")
    assert "no folder" in refused(pictures, out, "--model", str(tmp_path / "no_model"))
    assert "--server is 'localhost:1'" in refused(pictures, out, "--server", "localhost:1")
    assert "--revision is for" in refused(pictures, out, "--server", "http://localhost:1", "--revision", "main")
    assert not out.exists()
    assert "is not empty" in refused(pictures, pictures)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'llava-stf[bulk]'" in refused(pictures, out)


def test_another_run_is_not_mixed_with_the_parts_of_one(pictures, tmp_path, caption):
    out = tmp_path / "out"
    assert caption(pictures, out, "--part-size", 3, "--shard", "5/6")[0] == 0
    there = {file: file.read_bytes() for file in out.iterdir()}
    for changed in (
        ("--part-size", 4),
        ("--prompt", QUESTION),
        ("--max-new-tokens", 5),
        ("--revision", "main"),
        ("--no-do-exif-transpose",),
        ("--alpha-background", "white"),
        ("--images", str(tmp_path)),
    ):
        status, _, errors = caption(pictures, out, "--part-size", 3, *changed)
        assert status == 2 and "holds another run" in errors
    others = shutil.copytree(pictures, tmp_path / "others")  # other pictures of the same names
    assert "holds another run: input was" in caption(others, out, "--part-size", 3)[2]
    assert {file: file.read_bytes() for file in out.iterdir()} == there
    assert "0 of 1 pictures asked about" in caption(pictures, out, "--part-size", 3, "--shard", "5/6")[1]
