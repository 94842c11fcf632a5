"""What is published of a folder: what is on the list, is what its name says, was checked, and nothing else."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import numpy
import pytest
from hub_server import Hub
from safetensors.torch import load_file, save_file
from test_hub_card import edit_card, edit_json, write_chunk
from test_hub_publish import TINY, connect, local_files, published

from hub_card import HubError, check, freeze, plan, publish
from hub_card.__main__ import main
from hub_card.card import ROOT
from hub_card.check import check_kinds
from hub_card.fresh_process import use
from hub_card.secrets import secrets_in
from hub_card.snippet import snippet_of

CHECK = sys.modules["hub_card.check"]  # the module; the package has a function of that name
LETTERS = "kT3bQ9xWm2Rf7LzV5cHs8YdN4pJg6AuEi1oPqXwZtBnMvCrKySaDhFjGlUeTyRiO"
HEX = "3f9a1c7e5b2d8046" * 8
UPPER = "Q7ZK2M5XW3RB6TNY" * 4


@pytest.fixture
def folder(card_folder, tmp_path):
    return shutil.copytree(card_folder, tmp_path / "tiny")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        connect(hub, tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def run(monkeypatch, capsys):
    """`python -m hub_card ...` in this process: exit status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["hub_card", *map(str, arguments)])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def found(monkeypatch):
    """What `check` finds, without the minutes of loading; a folder in which it finds nothing gives nothing."""
    monkeypatch.setattr(CHECK, "check_use", lambda frozen: [])
    return lambda folder, **options: check(folder, **options)


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# What is not a file of the folder


def replace_by_link(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


LINKS = {
    "out of the folder": ("vocab.json", "/etc/passwd"),
    "a file of the list": ("NOTICE", "/etc/passwd"),
    "inside": ("tokenizer.model", "README.md"),
    "dangling": ("merges.txt", "nowhere"),
    "a folder": ("additional_chat_templates", "/etc"),
    "weights": ("model-00001-of-00002.safetensors", "model.safetensors"),
}


@pytest.mark.parametrize("link", LINKS)
def test_links_are_refused_by_name(link, folder, found):
    name, target = LINKS[link]
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    replace_by_link(folder, name, target)
    assert any(problem.startswith(f"link: {name} is a symbolic link") for problem in found(folder))
    assert not any(file.startswith(name) for file in freeze(folder).files)
    with pytest.raises(ValueError, match=f"link: {name}"):
        plan(folder, TINY)


def test_rendering_does_not_write_through_links(folder, run, tmp_path):
    put(tmp_path, "other", "mine")
    replace_by_link(folder, "README.md", tmp_path / "other")
    status, _, errors = run("render", folder, "--repo-id", TINY, "--license", "mit")
    assert status == 2 and "README.md is a symbolic link" in errors and (tmp_path / "other").read_text() == "mine"


def test_hard_links_are_files(folder, found, tmp_path):
    os.link(folder / "NOTICE", tmp_path / "other")
    assert found(folder) == []


@pytest.mark.parametrize("name", ["config.json", "extra", "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets_are_refused_without_opening(name, kind, folder, found, run):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
        status, _, errors = run("render", folder, "--repo-id", TINY, "--license", "mit")
        assert status == 2 and f"{name} is no regular file" in errors
    else:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has to be short
        socket.socket(socket.AF_UNIX).bind(name)
        os.chdir(here)
    assert f"special: {name} is no regular file (a pipe, socket or device)" in found(folder)


LEFT_OUT = (
    "wandb/run-1/files/config.yaml runs/x logs/y completions/completions_00001.parquet events.out.tfevents.1.host.2 "
    "train.log trainer_state.json checkpoint-7/optimizer.pt global_step7/zero.pt __pycache__/x.pyc .cache/x .env "
    "config.json.bak README.md~ .config.json.swp evaluation.json log_stage1.json train_results.json recipe.yaml "
    "curves.png training_run.json zero_to_fp32.py zero_to_torch.py latest pytorch_model_fsdp_0/x optimizer_0/x"
).split()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_leftovers_stay_at_home(name, folder, found):
    put(folder, name, "hf_" + "a" * 34)
    assert found(folder) == []
    left_out = freeze(folder).left_out
    assert len(left_out) == 1 and name.startswith(next(iter(left_out)))


@pytest.mark.parametrize("name", ["data.json", "images/a.png", "notes.md", "sub/README.md", "metrics.csv", "x", "é\n"])
def test_what_is_not_on_the_list_needs_a_yes(name, folder, found):
    put(folder, name, "{}")
    (problem,) = found(folder)
    assert problem.startswith("unknown: ") and "not on the list" in problem and "\n" not in problem


def test_a_yes_sends_a_file_that_can_be_checked(folder, found, hub):
    put(folder, "notes/data.json", '{"a": 1}')
    put(folder, "movie.xyz", "?")
    (problem,) = found(folder, also=["notes/data.json", "movie.xyz"])
    assert problem.startswith("unknown: movie.xyz is of no kind that can be checked")
    (folder / "movie.xyz").unlink()
    assert found(folder, also=["notes/data.json"]) == []
    assert found(folder, also=["notes/data.json", "no.json"]) == ["unknown: no.json is not there, but was asked for"]
    publish(plan(freeze(folder, also=["notes/data.json"]), TINY))
    assert published(hub, TINY)["notes/data.json"] == b'{"a": 1}'


# Pickles, archives and other kinds than the name says


def archived(content, kind):
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            information = tarfile.TarInfo("x")
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    else:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("x", content)
    return buffer.getvalue()


def saved(array):
    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Command:
    def __reduce__(self):
        return os.system, ("true",)


PICKLES = {f"protocol {protocol}": pickle.dumps(Command(), protocol) for protocol in range(6)}
CONTENTS = PICKLES | {
    "values": pickle.dumps({"a": [1, 2]}, 0),
    "objects of numpy": saved(numpy.array([Command()], dtype=object)),
    "gzip": gzip.compress(PICKLES["protocol 4"]),
    "bzip2": bz2.compress(PICKLES["protocol 4"]),
    "xz": lzma.compress(PICKLES["protocol 4"]),
    "tar": archived(PICKLES["protocol 4"], "tar"),
    "zip": archived(PICKLES["protocol 4"], "zip"),
    "zip behind text": b"# A card\n" + archived(PICKLES["protocol 4"], "zip"),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "msgpack": b"\x82\xa1a\x01\xa1b\x02",
}
NAMES = ["weights.npy", "weights.PT", "model.h5", "notes.md", "x", "x.pkl.gz", "merges.txt", "vocab.json", "NOTICE.txt"]
NAMES += ["tokenizer.model", "x.keras", "x.msgpack"]


@pytest.mark.parametrize("content", CONTENTS)
def test_pickles_and_archives_have_no_name_to_pass_under(content, tmp_path):
    for name in NAMES:
        path = put(tmp_path, name, CONTENTS[content])
        for also in ([], [name]):
            frozen = freeze(tmp_path, also=also)
            (problem,) = [*frozen.refused, *check_kinds(frozen)]
            assert name in problem
        path.unlink()


def test_nothing_hides_behind_a_picture_or_weights(folder, found):
    hidden = archived(PICKLES["protocol 4"], "zip")
    original = (folder / "example.png").read_bytes()
    for content, expected in {
        original + hidden: "bytes behind its end",
        original + PICKLES["protocol 0"]: "bytes behind its end",
        original[:-30]: "cut off",
        b"GIF89a" + original: "is not a PNG",
    }.items():
        (folder / "example.png").write_bytes(content)
        (problem,) = found(folder)
        assert problem.startswith("damaged: example.png ") and expected in problem
    for name, expected in ((b"tEXt", "has an archive in it"), (b"abCd", "the chunks b'abCd'")):
        (folder / "example.png").write_bytes(original)
        write_chunk(folder / "example.png", name, hidden)
        (problem,) = found(folder)
        assert expected in problem
    (folder / "example.png").write_bytes(original)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + hidden)
    assert any(problem.startswith("weights: Cannot read") for problem in found(folder))


# Code

CHANGED = b"\nimport os\nos.system('true')\n"
CODE = {
    "handler.py": CHANGED,
    "custom_generate/generate.py": CHANGED,
    "requirements.txt": b"https://some.org/x.whl\n",
    "install.sh": b"true\n",
    "more.ipynb": b"{}",
    "additional_chat_templates/other.jinja": b"{{ messages }}",
}


@pytest.mark.parametrize("name", CODE)
def test_code_needs_a_yes(name, folder, found):
    put(folder, name, CODE[name])
    (problem,) = found(folder)
    top = f"{name.split('/')[0]}/"
    assert problem.startswith((f"code: {name} ", f"unknown: {top} "))
    assert found(folder, allow_code=[name]) == []


def test_compiled_code_never_passes(folder, found, tmp_path):
    (tmp_path / "x.py").write_text("x = 1")
    py_compile.compile(str(tmp_path / "x.py"), cfile=str(folder / "handler.pyc"))
    put(folder, "fused.so", b"\x7fELF\0\0")
    assert [problem.split(" is ")[0] for problem in found(folder)] == ["code: fused.so", "code: handler.pyc"]
    problems = found(folder, allow_code=["handler.pyc", "fused.so"])
    assert [problem.split(":")[0] for problem in problems] == ["damaged", "damaged"]


@pytest.mark.parametrize("name", ["modeling_llava_stf.py", "processing_llava_stf.py", "chat_template.jinja"])
def test_changed_code_of_ours_needs_a_yes(name, folder, found):
    put(folder, name, (folder / name).read_bytes() + CHANGED)
    assert found(folder) == [f"code: {name} differs from this package's; look at it, and say --allow-code {name}"]
    assert found(folder, allow_code=[name]) == []
    with pytest.raises(ValueError, match=f"code: {name} differs"):
        plan(folder, TINY)


def test_code_of_another_repository_is_refused(folder, found):
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        before = (folder / name).read_bytes()
        edit_json(folder / name, auto_map={"AutoModel": ["other/repo--modeling.X", None]})
        (problem,) = found(folder)
        assert problem.startswith(f"code: {name} takes code from another repository, 'other/repo--modeling.X'")
        (folder / name).write_bytes(before)
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    (problem,) = found(folder)
    assert problem.startswith("code: tokenizer_config.json has a chat template that differs")
    assert found(folder, allow_code=["tokenizer_config.json"]) == []


def test_foreign_code_is_run_only_after_a_yes(folder, tmp_path, capsys):
    mark = tmp_path / "was-run"
    code = f"\nfrom pathlib import Path\nPath({str(mark)!r}).touch()\n".encode()
    put(folder, "modeling_llava_stf.py", (folder / "modeling_llava_stf.py").read_bytes() + code)
    name = ["modeling_llava_stf.py"]
    problems = check(folder, allow_code=name)
    assert [problem for problem in problems if not problem.startswith("path: ")] == [] and not mark.exists()
    frozen = freeze(folder, allow_code=name, run_code=True)
    use(frozen, snippet_of(frozen.read("README.md").decode())[0])
    assert mark.exists()


def test_foreign_code_that_is_not_run_is_named(folder, capsys, tmp_path):
    put(folder, "handler.py", CHANGED)
    assert check(folder, allow_code=["handler.py"]) == []
    assert "not loaded: handler.py is not this package's code (--run-code loads it)" in capsys.readouterr().err


# Secrets and paths

TOKENS = {
    "Hugging Face": "hf_" + "bQwErTyUiOpAsDfGhJkLzXcVbNmQwErTyU",
    "AWS": "AKIA" + "Q7ZK2M5XW3RB6TNY",
    "GitHub": "ghp_" + LETTERS[:36],
    "GitHub, fine": f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}",
    "GitLab": "glpat-" + LETTERS[:20],
    "OpenAI": f"sk-proj-{LETTERS}T3BlbkFJ{LETTERS}",
    "Anthropic": f"sk-ant-api03-{(LETTERS * 2)[:93]}AA",
    "Google": "AIza" + LETTERS[:35],
    "Google, OAuth": "GOCSPX-" + LETTERS[:28],
    "Slack": f"xoxb-123456789012-123456789012-{LETTERS[:24]}",
    "Slack, hook": f"https://hooks.slack.com/services/T{UPPER[:8]}/B{UPPER[:10]}/{LETTERS[:24]}",
    "Stripe": "sk_live_" + LETTERS[:24],
    "Twilio": "SK" + HEX[:32],
    "SendGrid": f"SG.{LETTERS[:22]}.{LETTERS[:43]}",
    "Mailgun": "key-" + HEX[:32],
    "Mailchimp": HEX[:32] + "-us12",
    "npm": "npm_" + LETTERS[:36],
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + LETTERS * 2,
    "Docker": "dckr_pat_" + LETTERS[:27],
    "W&B": "WANDB_API_KEY=" + HEX[:40],
    "Replicate": "r8_" + LETTERS[:37],
    "Groq": "gsk_" + LETTERS[:52],
    "Cohere": "COHERE_API_KEY=" + LETTERS[:40],
    "NVIDIA": "nvapi-" + LETTERS,
    "Databricks": "dapi" + HEX[:32],
    "DigitalOcean": "dop_v1_" + HEX[:64],
    "Heroku": "HRKU-AA" + LETTERS[:58],
    "Vault": "hvs." + (LETTERS * 2)[:90],
    "Azure": f"AccountKey={(LETTERS * 2)[:86]}==",
    "Discord": f"MTk4NjIyNDgzNDcxOTI1MjQ4.Gk3bQ9.{LETTERS[:38]}",
    "Telegram": "1585910345:AA" + LETTERS[:33],
    "Notion": "ntn_" + LETTERS[:46],
    "Linear": "lin_api_" + LETTERS[:40],
    "Atlassian": "ATATT3xFfGF0" + LETTERS * 3,
    "Shopify": "shpat_" + HEX[:32],
    "New Relic": "NRAK-" + UPPER[:27],
    "Grafana": f"glsa_{LETTERS[:32]}_{HEX[:8]}",
    "Tailscale": f"tskey-auth-{LETTERS[:12]}-{LETTERS[:32]}",
    "JWT": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.{LETTERS[:43]}",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n",
    "URL": "https://user:kT3bQ9xWm2Rf@example.org/x",
    "database": "postgres://admin:kT3bQ9xW@db.internal:5432/x",
    "password": 'password = "kT3bQ9xWm2Rf"',
    "bearer": "Authorization: Bearer " + LETTERS[:40],
}


@pytest.mark.parametrize("vendor", TOKENS)
def test_secrets_of_well_known_vendors_are_found(vendor):
    token = TOKENS[vendor]
    assert secrets_in(f"See {token} for more.\n"), "plain"
    assert secrets_in(json.dumps({"a": token})), "in JSON"
    assert secrets_in(f"({token})".encode("utf-16")), "UTF-16"
    assert secrets_in("".join(f"\\u{ord(letter):04x}" for letter in token)), "escaped"


@pytest.mark.parametrize(
    "vendor", ["Hugging Face", "AWS", "GitHub", "GitLab", "Anthropic", "Slack", "Stripe", "NVIDIA"]
)
def test_secrets_are_found_in_a_word(vendor):
    assert secrets_in(f"my{TOKENS[vendor]}")


def test_secrets_are_found_wherever_they_are(folder, found):
    token = TOKENS["Hugging Face"]
    weights = folder / "model.safetensors"
    before = local_files(folder)

    def restore():
        shutil.rmtree(folder)
        for name, content in before.items():
            put(folder, name, content)

    for place in (
        lambda: edit_json(folder / "config.json", **{token: 1}),
        lambda: edit_json(folder / "tokenizer.json", added=token),
        lambda: save_file(load_file(weights), weights, {"format": "pt", "x": token}),
        lambda: write_chunk(folder / "example.png", b"tEXt", f"Comment\0{token}".encode()),
        lambda: write_chunk(folder / "example.png", b"zTXt", b"Comment\0\0" + zlib.compress(token.encode())),
        lambda: edit_card(folder, "## Use", f"my{token}\n\n## Use"),
        lambda: put(folder, f"{token}.json", "{}"),
        lambda: put(folder, "notes.md", f"x {token}".encode("utf-16")),
    ):
        place()
        problems = found(folder)
        assert len(problems) == 1 and problems[0].startswith("secret: ") and token not in problems[0]
        restore()


def test_no_false_alarm_in_ordinary_files(found):
    assert found(ROOT / "examples" / "shapes" / "model") == []
    for path in [*(ROOT / "training").glob("*.py"), *(ROOT / "hub_card").glob("*.py"), ROOT / "README.md"]:
        if path.name != "secrets.py":
            assert secrets_in(path.read_bytes()) == [], path
    assert secrets_in((ROOT / "tests" / "goldens" / "keys_7b.json").read_bytes()) == []


def test_paths_are_found_in_names_and_escapes(folder, found):
    edit_json(folder / "generation_config.json", **{"/home/me/run": 1})
    assert found(folder) == ["path: generation_config.json names '/home/me/run', a place on this machine"]
    put(folder, "generation_config.json", '{"a": "\\u002fhome\\/me\\/run"}')
    assert found(folder) == ["path: generation_config.json names '/home/me/run', a place on this machine"]
    put(folder, "generation_config.json", "{}")
    edit_card(folder, "tags:\n", "/home/me/key: 1\ntags:\n")
    assert found(folder) == ["path: README.md names '/home/me/key:', a place on this machine"]


# No input may hang a check, or fill the memory


def sparse(path, size=10 * 2**30):
    with path.open("wb") as file:
        file.truncate(size)


def bomb():
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    return "\n".join(lines) + "\npipeline_tag: *a59\n"


def png_of(width, height):
    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


HEAVY = {
    "words with points": (lambda f: edit_card(f, "## Use", "a." * 400_000 + "\n\n## Use"), ""),
    "one line": (lambda f: put(f, "tokenizer.json", json.dumps({"x": "a" * 3_000_000})), ""),
    "long card": (lambda f: put(f, "README.md", "---\n" * 1_000_000), "too large: README.md"),
    "deep": (lambda f: put(f, "config.json", "[" * 100_000 + "]" * 100_000), "damaged: config.json is nested"),
    "rather deep": (lambda f: put(f, "config.json", '{"a":' * 400 + "1" + "}" * 400), "damaged: config.json is nested"),
    "long number": (lambda f: put(f, "config.json", "1" * 100_000), "damaged: config.json is not JSON"),
    "references": (lambda f: edit_card(f, "tags:\n", bomb() + "tags:\n"), "references (`*name`)"),
    "brackets of YAML": (lambda f: edit_card(f, "tags:\n", "x: " + "[" * 5000 + "\ntags:\n"), "opening brackets"),
    "deep YAML": (lambda f: edit_card(f, "tags:\n", "x:\n" + "- " * 50_000 + "a\ntags:\n"), "nested too deep"),
    "lines of YAML": (lambda f: edit_card(f, "tags:\n", "\n" * 300_000 + "tags:\n"), "the most is 200000"),
    "sparse": (lambda f: sparse(f / "tokenizer.json"), "too large: tokenizer.json"),
    "sparse weights": (lambda f: sparse(f / "model.safetensors"), "weights: Cannot read"),
    "sparse unknown": (lambda f: sparse(f / "x.gguf"), "unknown: x.gguf"),
    "huge picture": (lambda f: put(f, "example.png", png_of(60_000, 60_000)), "3600000000 pixels"),
}


@pytest.mark.parametrize("heavy", HEAVY)
def test_no_input_hangs_a_check(heavy, folder, found):
    make, expected = HEAVY[heavy]
    make(folder)
    problems = found(folder)
    assert any(expected in problem for problem in problems) if expected else problems == []


ODD = {
    "a list": (lambda f: put(f, "config.json", "[1]"), "damaged: config.json is no object"),
    "an adapter's list": (lambda f: put(f, "adapter_config.json", "[1]"), "damaged: adapter_config.json is no object"),
    "an adapter's number": (
        lambda f: edit_json(put(f, "adapter_config.json", "{}"), base_model_name_or_path=5),
        "path: the adapter's base is 5",
    ),
    "an index of another folder": (
        lambda f: put(f, "model.safetensors.index.json", '{"weight_map": {"a": "../../../../etc/passwd"}}'),
        "weights: model.safetensors.index.json names '../../../../etc/passwd'",
    ),
    "an index without names": (
        lambda f: put(f, "model.safetensors.index.json", '{"weight_map": [1]}'),
        "weights: model.safetensors.index.json names [1]",
    ),
    "a folder": (lambda f: (f / "README.md").unlink() or (f / "README.md").mkdir(), "unknown: README.md/ is not on"),
    "an object of Python": (
        lambda f: edit_card(f, "tags:\n", "x: !!python/object/apply:os.system [true]\ntags:\n"),
        "the YAML of README.md is not valid",
    ),
    "an odd head": (lambda f: edit_card(f, "tags:\n", "? [a]\n: 1\ntags:\n"), "the YAML of README.md is not valid"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_files_are_a_line(odd, folder, found):
    make, expected = ODD[odd]
    make(folder)
    problems = found(folder)
    assert any(expected in problem for problem in problems), problems


def test_names_in_a_card_are_no_way_out(folder, tmp_path):
    """The other process finds the folder under the card's names, in a folder of its own."""
    for names in ('"some/tiny", "../../../../../escaped"', '"../tiny", "v1"', '"some/tiny", "a/../../b"'):
        with pytest.raises(ValueError, match="is no place on the Hub"):
            use(freeze(folder), f"repository, revision = {names}\n")


def test_many_files_are_not_all_read(folder, found):
    for number in range(1000):
        put(folder, f"{number}.jpg", b"\xff\xd8" + bytes(100_000))
    assert len(found(folder)) == 101


# What is checked is what is sent


def test_what_changes_after_the_check_is_not_sent(hub, folder):
    before = local_files(folder)
    frozen = freeze(folder)
    put(folder, "added.json", "{}")
    put(folder, "config.json", '{"changed": 1}')
    (folder / "NOTICE").unlink()
    replace_by_link(folder, "LICENSE", "/etc/passwd")
    publish(plan(frozen, TINY))
    assert published(hub, TINY) == before


def test_weights_that_change_after_the_check_are_refused(hub, folder):
    upload = plan(freeze(folder), TINY)
    weights = (folder / "model.safetensors").read_bytes()
    put(folder, "model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(HubError, match="model.safetensors changed after it was checked. Nothing was committed"):
        publish(upload)
    assert published(hub, TINY) == {}


def test_publish_checks_what_it_sends_while_files_come(hub, folder, run, monkeypatch):
    """A file that is written while the folder is loaded in the other process stays at home."""
    monkeypatch.setattr(CHECK, "use", lambda frozen, snippet: put(folder, "late.json", "{}") and USED)
    status, output, errors = run("publish", folder, TINY)
    assert status == 0, errors
    assert "late.json" not in published(hub, TINY) and (folder / "late.json").exists()
    status, _, errors = run("publish", folder, TINY)
    assert status == 2 and "unknown: late.json" in errors


USED = {"wrong": [], "tokens_per_image": 4, "printed": "", "on": "cpu"}


def test_yes_on_the_command_line(folder, run, monkeypatch):
    monkeypatch.setattr(CHECK, "use", lambda frozen, snippet: USED)
    put(folder, "data.json", "{}")
    put(folder, "handler.py", "x = 1\n")
    status, _, errors = run("check", folder)
    assert status == 2 and "--also data.json" in errors and "--allow-code handler.py" in errors
    assert run("check", folder, "--also", "data.json", "--allow-code", "handler.py")[0] == 0


# The process that loads the folder


def test_the_other_process_has_no_secrets(folder, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "http://user:secret@some.org")
    first = snippet_of((folder / "README.md").read_text(encoding="utf-8"))[0].splitlines()
    line = next(line for line in first if line.startswith("repository, revision"))
    ask = """
import json, os, socket
from huggingface_hub import get_token
try:
    socket.create_connection(("127.0.0.1", 9))
except OSError as error:
    said = str(error)
print(json.dumps([dict(os.environ), os.path.expanduser("~"), get_token(), said]))
"""
    environment, home, token, said = json.loads(use(freeze(folder), line + ask)["printed"])
    assert "secret" not in str(environment) and token is None
    assert home == environment["HOME"] != os.path.expanduser("~") and not os.path.exists(home)
    assert said == "the check of a model runs offline"


ENDLESS = 'repository, revision = "some/tiny", "v1"\nimport os, sys, time\n'


def test_the_other_process_has_a_time_limit(folder):
    with pytest.raises(ValueError, match="it took longer than 1 seconds in a fresh process"):
        use(freeze(folder, time_limit=1), ENDLESS + "while True: pass")


@pytest.mark.parametrize("snippet", ["os._exit(0)", "sys.exit()"])
def test_a_process_without_an_answer_is_an_error(snippet, folder):
    with pytest.raises(ValueError, match="does not load in a fresh process"):
        use(freeze(folder), ENDLESS + snippet)


def test_the_other_process_ends_with_its_parent(folder, tmp_path):
    note = tmp_path / "pids"
    snippet = ENDLESS + (
        "import subprocess\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}\\n')\n"
        "time.sleep(600)"
    )
    script = "from pathlib import Path\nfrom hub_card import freeze\nfrom hub_card.fresh_process import use\n"
    script += f"use(freeze(Path({str(folder)!r})), {snippet!r})"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while parent.poll() is None and not (note.exists() and note.read_text().endswith("\n")):
        time.sleep(0.2)
    pids = note.read_text().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(is_running(pid) for pid in pids):
        time.sleep(0.2)


def is_running(pid):
    """Whether a process runs; one that has ended may still wait for its parent's notice."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
