"""Publishing to a Hub: complete or absent, safe to repeat, and loadable by a stranger who has nothing but the Hub."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from conftest import CARD_FACTS, GOLDENS
from hub_server import OWNER, READ_TOKEN, WRITE_TOKEN, Hub
from huggingface_hub import HfApi, constants, snapshot_download
from packaging import version
from peft import PeftModel
from transformers import BitsAndBytesConfig

from conversion import convert
from hub_card import HubError, check, freeze, gather, plan, publish, write_card
from hub_card.__main__ import main
from hub_card.card import name_base
from hub_card.check import CHECKS
from hub_card.fresh_process import ADAPTERS_OFFLINE
from hub_card.snippet import snippet_of
from modeling_llava_stf import LlavaSTFForConditionalGeneration, LlavaSTFProcessor
from modeling_llava_stf.modeling_llava_stf import NOT_QUANTISED

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("hub_worker.py")
TINY, HALF, ADAPTER = "some/tiny", "some/tiny-half", "some/tiny-lora"
# An older transformers refuses an adapter with modules that were trained in full: it would lose them.
LOADS_ADAPTERS = version.parse(transformers.__version__) >= ADAPTERS_OFFLINE
# The trainer whose pushes are tested, by its name in hub_worker.py: ours, where the extra `train` is installed.
TRAINERS = ["ours" if importlib.util.find_spec("trl") else "transformers"]


def work(hub, home, *arguments, token=WRITE_TOKEN, isolated=False):
    """hub_worker.py in a process of its own; what its last line says."""
    result = subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), str(WORKER), *map(str, arguments)],
        cwd=home,
        env=hub.environment(home, token),
        capture_output=True,
        encoding="utf-8",
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def connect(hub, home, monkeypatch, token=WRITE_TOKEN):
    """This process uses `hub`, and does not wait between its attempts."""
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_XET": not hub.xet,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.utils.logging.set_verbosity_error()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        connect(hub, tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def folder(card_folder, tmp_path):
    return shutil.copytree(card_folder, tmp_path / "tiny")


@pytest.fixture
def small(card_folder, tmp_path):
    """Some files of it: uploading asks for no more than a card."""
    for name in ("README.md", "LICENSE", "example.png", "method.png"):
        (tmp_path / "small").mkdir(exist_ok=True)
        shutil.copy(card_folder / name, tmp_path / "small")
    return tmp_path / "small"


def local_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub, name, revision="main"):
    files = hub.files(name, revision)
    files.pop(".gitattributes")
    return files


# Once: what was published, and what a stranger gets


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """A LoRA run, converted as an adapter beside its base."""
    return convert(
        GOLDENS / "lora", tmp_path_factory.mktemp("adapter") / "lora", base=GOLDENS / "base", keep_adapter=True
    )


@pytest.fixture(scope="module", params=TRAINERS)
def world(request, card_folder, adapter_folder, checkpoint, tmp_path_factory):
    """A Hub with all that we publish and push, and the answers of a stranger to it."""
    home = tmp_path_factory.mktemp("world")
    with Hub() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        connect(hub, home, monkeypatch)
        publish(plan(card_folder, TINY, collection="LLaVA-STF"))

        half = home / "half"
        LlavaSTFForConditionalGeneration.from_pretrained(card_folder, dtype=torch.bfloat16).save_pretrained(half)
        LlavaSTFProcessor.from_pretrained(card_folder).save_pretrained(half)
        write_card(half, gather(half, HALF, CARD_FACTS))
        publish(plan(half, HALF, collection="LLaVA-STF"))

        base = adapter_folder / "base"
        write_card(base, gather(base, "some/base", CARD_FACTS))
        publish(plan(base, "some/base"))
        refused = check_lines(adapter_folder)
        name_base(adapter_folder, "some/base", "v1")
        write_card(adapter_folder, gather(adapter_folder, ADAPTER, CARD_FACTS))
        accepted = check(adapter_folder)
        publish(plan(adapter_folder, ADAPTER, collection="LLaVA-STF"))
        monkeypatch.undo()

        work(hub, home, "push", checkpoint, "some/pushed")
        work(hub, home, "train", request.param, checkpoint, "some/trained", home / "output")
        commits = [commit for commit in hub.repositories["some/trained"].commits if "model.safetensors" in commit.files]
        pinned = [(TINY, "v1", kind) for kind in ("snippet", "pipeline")]
        pinned += [(HALF, "v1", "snippet"), (ADAPTER, "v1", "snippet")]
        pinned += [(ADAPTER, "v1", "adapter")] if LOADS_ADAPTERS else []
        pinned += [("some/pushed", "main", "model")]
        trained = [("some/trained", commit.oid, "model") for commit in commits]
        questions = [
            {"repository": name, "revision": revision, "kind": kind} for name, revision, kind in pinned + trained
        ]
        stranger = tmp_path_factory.mktemp("stranger")
        answers = work(hub, stranger, "load", json.dumps(questions), token="", isolated=True)
        yield {
            "hub": hub,
            "refused": refused,
            "accepted": accepted,
            "commits": commits,
            "output": home / "output",
            "answers": dict(zip([(name, kind) for name, _, kind in pinned], answers, strict=False)),
            "trained": answers[len(pinned) :],
        }


def check_lines(folder):
    return [problem for problem in check(folder) if not problem.startswith("incomplete")]


@pytest.fixture
def reply(processor):
    """New tokens of a model, for a picture and a question, as the stranger asks."""

    def reply(model, image, question, max_new_tokens):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.dtype)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    return reply


def test_a_quantised_variant_joins_the_collection(hub, checkpoint, folder, model, tmp_path):
    pytest.importorskip("bitsandbytes")
    publish(plan(folder, TINY, collection="LLaVA-STF"))
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=NOT_QUANTISED)
    quantised = tmp_path / "quantised"
    LlavaSTFForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=settings
    ).save_pretrained(quantised)
    LlavaSTFProcessor.from_pretrained(checkpoint).save_pretrained(quantised)
    card = gather(quantised, "some/tiny-4bit", replace(CARD_FACTS, base_model=[TINY]))
    write_card(quantised, card)
    assert check(quantised) == []
    publish(plan(quantised, "some/tiny-4bit", collection="LLaVA-STF"))
    text = (quantised / "README.md").read_text(encoding="utf-8")
    assert "base_model_relation: quantized" in text and "| quantised with | bitsandbytes |" in text
    assert f"| parameters | {model.num_parameters():,} |" in text
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [TINY, "some/tiny-4bit"]


def test_what_a_stranger_gets(world, model, reply, processor, adapter_folder, card_folder):
    """One test, because the world that it looks at takes half a minute."""
    answers, shapes = world["answers"], str(GOLDENS / "images" / "shapes.png")
    example, question = str(card_folder / "example.png"), "What is in the picture?"

    def in_words(tokens):
        return processor.decode(tokens, skip_special_tokens=True)

    # A model, by its card's snippet and in a pipeline.
    untrained = reply(model, shapes, "What is shown?", 8)
    assert answers[TINY, "pipeline"] == in_words(untrained)
    assert answers[TINY, "snippet"] == in_words(reply(model, example, question, 32))
    assert isinstance(answers[HALF, "snippet"], str)

    # An adapter, by its card's snippet and by transformers alone; nobody may publish one that names a path.
    base = LlavaSTFForConditionalGeneration.from_pretrained(adapter_folder / "base")
    plain = reply(base, shapes, "What is shown?", 8)
    adapted = PeftModel.from_pretrained(base, adapter_folder).eval()
    assert answers[ADAPTER, "snippet"] == in_words(reply(adapted, example, question, 32))
    if LOADS_ADAPTERS:
        assert answers[ADAPTER, "adapter"] == reply(adapted, shapes, "What is shown?", 8) != plain
    advice = "a place on this machine (render again with --base USER/NAME)"
    assert f"path: adapter_config.json names {str(adapter_folder / 'base')!r}, {advice}" in world["refused"]
    if LOADS_ADAPTERS:
        assert world["accepted"] == []
    else:
        assert "cannot load an adapter offline" in world["accepted"][0]
    files = published(world["hub"], ADAPTER)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "some/base"
    assert not any(name.startswith("base/") for name in files) and "adapter_model.safetensors" in files
    head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == (["some/base"], "adapter")

    # What the library pushes: model and processor, and every save of a trainer. The end is step 2 again.
    assert answers["some/pushed", "model"] == untrained
    titles = [commit.message for commit in world["commits"]]
    assert titles[:-1] == ["Training in progress, step 1", "Training in progress, step 2"]
    first, second, end = world["trained"]
    assert untrained != first != second == end

    # A checkpoint of a run needs a card, and may be published as it is; what the run needs to go on stays at home.
    checkpoint = world["output"] / "checkpoint-2"
    card = gather(checkpoint, "some/trained", CARD_FACTS)
    write_card(checkpoint, card)
    assert card.training["steps"] == "2 of 2" and "## Training" in card.render()
    frozen = freeze(checkpoint)
    assert frozen.refused == [] and [problem for find in CHECKS for problem in find(frozen)] == []
    assert {"optimizer.pt", "training_args.bin", "trainer_state.json"} <= frozen.left_out.keys()

    (collection,) = world["hub"].collections.values()
    assert collection["title"] == "LLaVA-STF" and collection["owner"]["name"] == OWNER
    assert [item["id"] for item in collection["items"]] == [TINY, HALF, ADAPTER]


# Publishing


def test_one_commit_with_all_files_and_a_tag(hub, folder):
    url = publish(plan(folder, TINY))
    assert published(hub, TINY) == published(hub, TINY, "v1") == local_files(folder)
    repository = hub.repositories[TINY]
    assert [commit.message for commit in repository.commits] == ["initial commit", "Publish v1"]
    assert url.startswith(f"{hub.endpoint}/{TINY}/commit/") and not repository.private
    assert len(hub.sent("^PUT .*/1$")) == 1 and len(hub.sent("^PUT .*/5$")) == 1  # the weights went in parts


def test_second_run_sends_nothing(hub, folder):
    publish(plan(folder, TINY, collection="All"))
    before, collections = hub.repositories[TINY].commits[:], json.dumps(hub.collections)
    hub.requests.clear()
    publish(plan(folder, TINY, collection="All"))
    assert not hub.sent("^PUT|/commit/|/tag/")
    assert hub.repositories[TINY].commits == before and json.dumps(hub.collections) == collections


def test_upload_by_xet(folder, tmp_path, monkeypatch):
    """The way that large files go today, if hf_xet is installed; all other tests use Git LFS, which can be watched."""
    with Hub(xet=True) as hub:
        connect(hub, tmp_path, monkeypatch)
        for status in (401, 403):
            hub.fail("GET", "xet-write-token", status=status, times=1)
            with pytest.raises(HubError, match=WORDS[status]) as caught:
                publish(plan(folder, TINY))
            assert not caught.value.again and published(hub, TINY) == {}
        publish(plan(folder, TINY))
        assert hub.sent("xet-write-token") and not hub.sent("^PUT|objects/batch")
        assert published(hub, TINY) == published(hub, TINY, "v1") == local_files(folder)


def test_a_tag_never_moves(hub, folder):
    publish(plan(folder, TINY))
    once = published(hub, TINY)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    hub.requests.clear()
    with pytest.raises(HubError, match="The tag v1 of some/tiny is on other files"):
        publish(plan(folder, TINY))
    assert not hub.sent("^PUT|/commit/") and published(hub, TINY) == once
    write_card(folder, gather(folder, TINY, CARD_FACTS, tag="v2"))
    publish(plan(folder, TINY))
    assert not hub.sent("^PUT")  # the weights and pictures are there already
    assert published(hub, TINY) == published(hub, TINY, "v2") == local_files(folder)
    assert published(hub, TINY, "v1") == once


def test_interrupted_upload_sends_only_the_rest(hub, folder):
    hub.fail("PUT", "/4$")
    with pytest.raises(HubError, match="model.safetensors.*connection broke") as caught:
        publish(plan(folder, TINY))
    assert caught.value.again
    assert published(hub, TINY) == {} and "v1" not in str(hub.repositories[TINY].refs)
    hub.faults.clear()
    sent = {request.split("/")[2] for request in hub.sent("^PUT")}
    hub.requests.clear()
    publish(plan(folder, TINY))
    assert published(hub, TINY) == local_files(folder)
    again = {request.split("/")[2] for request in hub.sent("^PUT")}
    assert len(sent) == 3 and len(again) == 1  # the pictures had arrived


def test_commit_whose_answer_is_lost_is_not_repeated(hub, folder):
    hub.fail("POST", "/commit/", after=True)
    with pytest.raises(HubError, match="Run the same command again"):
        publish(plan(folder, TINY))
    hub.faults.clear()
    publish(plan(folder, TINY))
    assert [commit.message for commit in hub.repositories[TINY].commits] == ["initial commit", "Publish v1"]
    assert published(hub, TINY, "v1") == local_files(folder)


def test_old_weights_are_removed(hub, folder, model):
    publish(plan(folder, TINY))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    write_card(folder, gather(folder, TINY, CARD_FACTS, tag="v2"))
    publish(plan(folder, TINY))
    assert published(hub, TINY) == local_files(folder)
    assert "model.safetensors" not in published(hub, TINY) and "model.safetensors" in published(hub, TINY, "v1")


def test_only_what_would_be_read_is_removed(hub, folder):
    """A leftover `special_tokens_map.json` changes where an answer ends; a leftover adapter, which model is loaded."""
    read = ["adapter_config.json", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json"]
    kept = ["docs.md", "LICENSE.md", "8bit/model.safetensors", "8bit/config.json"]
    HfApi().create_repo(TINY)
    for name in (*read, *kept):
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=TINY)
    publish(plan(folder, TINY))
    assert published(hub, TINY).keys() == local_files(folder).keys() | {*kept}


def test_a_tag_is_no_branch(folder):
    for tag, revision in (("main", None), ("next", "next")):
        write_card(folder, gather(folder, TINY, CARD_FACTS, tag=tag))
        with pytest.raises(ValueError, match=f"The card's tag '{tag}' is a branch"):
            plan(folder, TINY, revision=revision)


def test_a_second_chat_template_is_removed(hub, folder):
    """vLLM does not start with it; older folders have that of stage 1, and so have their repositories."""
    plain = folder / "additional_chat_templates" / "plain.jinja"
    plain.parent.mkdir()
    shutil.copy(ROOT / "modeling_llava_stf" / "plain.jinja", plain)
    (problem,) = check(folder)
    assert problem.startswith(f"code: {plain.relative_to(folder)} is a second chat template, with which vLLM does not")
    publish(plan(freeze(folder, allow_code=[str(plain.relative_to(folder))]), TINY))
    assert str(plain.relative_to(folder)) in published(hub, TINY)
    shutil.rmtree(plain.parent)
    write_card(folder, gather(folder, TINY, CARD_FACTS, tag="v2"))
    publish(plan(folder, TINY))
    assert published(hub, TINY) == local_files(folder)


def test_private_repository(hub, folder, tmp_path):
    publish(plan(folder, TINY, private=True))
    assert hub.repositories[TINY].private
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        snapshot_download(TINY, token=False)
    assert len(local_files(Path(snapshot_download(TINY, local_dir=tmp_path / "copy")))) > len(local_files(folder))


def test_private_is_not_published_into_a_public_repository(hub, folder):
    HfApi().create_repo(TINY)
    with pytest.raises(HubError, match="exists and is public, but --private was asked for"):
        publish(plan(folder, TINY, private=True))
    assert published(hub, TINY) == {}


def test_branch(hub, folder):
    publish(plan(folder, TINY, revision="next"))
    assert published(hub, TINY, "next") == published(hub, TINY, "v1") == local_files(folder)
    assert published(hub, TINY) == {}


def test_pull_request_is_tagged_when_it_is_merged(hub, folder):
    assert publish(plan(folder, TINY, pr=True)) == f"{hub.endpoint}/{TINY}/discussions/1"
    repository = hub.repositories[TINY]
    assert published(hub, TINY) == {} and published(hub, TINY, "refs/pr/1") == local_files(folder)
    assert "refs/tags/v1" not in repository.refs
    repository.refs["refs/heads/main"] = repository.refs["refs/pr/1"]  # merged
    publish(plan(folder, TINY))
    assert repository.refs["refs/tags/v1"] is repository.refs["refs/heads/main"]


def test_card_of_another_repository_is_refused(folder):
    with pytest.raises(ValueError, match="The card is about some/tiny, but you publish to some/other"):
        plan(folder, "some/other")


# What goes wrong on the way: a word for it, an exit code, no token, and nothing half-published

STEPS = {
    "create": ("POST", "/api/repos/create"),
    "look": ("GET", "/refs"),
    "list": ("GET", "/tree/"),
    "yaml": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "verify": ("POST", "/verify"),
    "commit": ("POST", "/commit/"),
    "tag": ("POST", "/tag/"),
    "collection": ("POST", "/api/collections$"),
    "item": ("POST", "/items"),
}
WORDS = {
    401: r"token is not valid \(401\).*hf auth login",
    403: r"token may not do that \(403\).*write access to some",
    404: r"no such thing \(404\)",
    409: r"\(409\)",
    429: r"too many requests \(429\); the Hub asks you to wait 7 seconds",
    500: r"problem of its own \(500\)",
    503: r"problem of its own \(503\)",
    None: "connection broke",
}
# 409 there says that a tag or an item exists already, which is what was wanted.
FINE = {("tag", 409), ("item", 409), ("create", 409)}


@pytest.mark.parametrize("step", STEPS)
def test_failure_at_each_step(step, hub, small, capfd):
    HfApi().create_repo(TINY)
    cases = {status: words for status, words in WORDS.items() if (step, status) not in FINE}
    for status, words in cases.items():
        if (step, status) == ("collection", 409):
            continue  # that answer names the collection, and is what the second run of others gets
        if step == "create" and status in (401, 403):
            hub.repositories.pop(TINY, None)  # with it, huggingface_hub goes on: one may lack the right to create only
        hub.large_files.clear()
        hub.fail(*STEPS[step], status=status, Retry_After="7")
        with pytest.raises(HubError, match=words) as caught:
            publish(plan(small, TINY, collection="All"))
        assert caught.value.again == (status in (429, 500, 503, None))
        assert WRITE_TOKEN not in str(caught.value)
        if step not in ("tag", "collection", "item"):
            assert TINY not in hub.repositories or published(hub, TINY) == {}
        hub.faults.clear()
    publish(plan(small, TINY, collection="All"))
    assert published(hub, TINY) == published(hub, TINY, "v1") == local_files(small)
    assert [item["id"] for item in next(iter(hub.collections.values()))["items"]] == [TINY]
    output, errors = capfd.readouterr()
    assert WRITE_TOKEN not in output + errors


@pytest.mark.parametrize(
    "token, name, words",
    [
        ("", TINY, "not logged in"),
        ("hf_Wrong", TINY, r"token is not valid \(401\)"),
        (READ_TOKEN, TINY, r"token may not do that \(403\)"),
        ("hf_Broken\x0bSecret", TINY, r"Bearer \*\*\*"),
        (WRITE_TOKEN, "other/tiny", r"token may not do that \(403\).*write access to other"),
    ],
)
def test_who_may_publish(token, name, words, hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", token)
    write_card(folder, gather(folder, name, CARD_FACTS))
    with pytest.raises(HubError, match=words) as caught:
        publish(plan(folder, name))
    assert hub.repositories == {} and "Secret" not in str(caught.value)


def test_answers_of_something_else_than_a_hub(hub, small, monkeypatch):
    hub.fail("POST", "/api/validate-yaml", status=502, text="<html>Bad gateway</html>")
    with pytest.raises(HubError, match="not one of a Hub. Is HF_ENDPOINT right") as caught:
        publish(plan(small, TINY))
    assert caught.value.again
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="connection broke"):
        publish(plan(small, TINY))


# The command line, as in the README


def test_render_check_and_publish_from_the_command_line(hub, checkpoint, tmp_path, monkeypatch, capfd):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub_card", *map(str, arguments)])
        status = main()
        return status, *capfd.readouterr()

    status, output, errors = run("publish", folder, TINY)
    assert (status, output) == (2, "") and "- snippet: " in errors and not hub.requests
    options = ["--repo-id", TINY, "--license", "cc-by-nc-4.0", "--run"]
    assert run("render", folder, *options)[:2] == (0, f"wrote {folder / 'README.md'}\n")
    printed = snippet_of((folder / "README.md").read_text(encoding="utf-8"))[1]
    assert printed

    hub.requests.clear()
    status, output, _ = run("publish", folder, TINY, "--dry-run", "--private", "--collection", "All")
    assert status == 0 and output.endswith("nothing was sent\n") and not hub.requests
    assert (
        re.search(r"\d\.\d+M?B? +model.safetensors +sha256 [0-9a-f]{12}\n", output)
        and "not sent  .hub_card.json (hidden)" in output
    )
    assert f"branch main of {hub.endpoint}/{TINY} (private, if it is new)" in output

    hub.fail("POST", "/commit/", status=503, times=1)
    hub.fail("POST", "/api/repos/create", status=403, times=1)
    monkeypatch.setattr("hub_card.__main__.check", lambda folder: [])  # it has passed, and takes seconds
    assert run("publish", folder, TINY)[0] == 3
    assert run("publish", folder, TINY)[0] == 4
    status, output, errors = run("publish", folder, TINY)
    assert status == 0 and "published: " in output and WRITE_TOKEN not in output + errors
    assert published(hub, TINY).keys() == local_files(folder).keys() - {".hub_card.json"}


# The stand-in itself


def test_downloads_have_ranges_and_etags(hub, folder, tmp_path):
    publish(plan(folder, TINY))
    copy = Path(snapshot_download(TINY, revision="v1"))
    assert {name: content for name, content in local_files(copy).items() if name != ".gitattributes"} == local_files(
        folder
    )
    hub.requests.clear()
    snapshot_download(TINY, revision="main")
    assert not hub.sent("^GET .*(cdn|resolve)")  # nothing has changed
    weights = (folder / "model.safetensors").read_bytes()
    address = f"{hub.endpoint}/{TINY}/resolve/v1/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Range": "bytes=1000-"})) as answer:
        assert answer.status == 206 and answer.read() == weights[1000:]
        assert answer.headers["Content-Range"] == f"bytes 1000-{len(weights) - 1}/{len(weights)}"
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"{hub.endpoint}/api/unknown")
