"""Damaged folders end in one line and leave nothing behind; a fault of ours ends in a traceback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS

from conversion import ConversionError, convert
from conversion.__main__ import main
from conversion.checkpoints.weights import read_folder

SHARD = "pytorch_model-00002-of-00003.bin"
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def folders(tmp_path):
    """A golden run and its tower, to damage."""
    for name in ("original", "clip"):
        shutil.copytree(GOLDENS / name, tmp_path / name)
    return tmp_path


def command(folder, *more):
    return [str(folder / "original"), str(folder / "out"), "--vision-tower", str(folder / "clip"), *more]


def edit_json(file, edit):
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def setting(name, value, file="original/config.json"):
    return pytest.param(
        lambda folder: edit_json(folder / file, lambda content: content.update({name: value})),
        id=f"{name}={value!r:.20}",
    )


def in_index(edit, name):
    return pytest.param(lambda folder: edit_json(folder / "original" / INDEX, edit), id=f"index-{name}")


def bytes_in(file, content, name):
    return pytest.param(lambda folder: (folder / file).write_bytes(content), id=f"{name}-{Path(file).name}")


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    # By a short name: the address of a socket has 108 bytes at most.
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        server.bind(path.name)


def in_place(make, file):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return pytest.param(damage, id=f"{make.__name__}-{Path(file).name}")


def shard(content, name):
    return pytest.param(lambda folder: torch.save(content, folder / "original" / SHARD), id=f"shard-{name}")


def without_tower_layers(folder):
    edit_json(folder / "clip" / "config.json", lambda content: content.update(num_hidden_layers=20000))


def one_file(key, tensor):
    """The whole run in one file, with another tensor in the place of one weight; without it for None."""

    def damage(folder):
        state = {name: weight.load().clone() for name, weight in read_folder(folder / "original").items()}
        for file in (folder / "original").glob("pytorch_model*"):
            file.unlink()
        state = {name: value for name, value in (state | {key: tensor}).items() if value is not None}
        torch.save(state, folder / "original" / "pytorch_model.bin")

    return pytest.param(damage, id=f"{key} {None if tensor is None else tuple(tensor.shape)}")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n"
MATRICES = ("model.embed_tokens", "lm_head", "model.mm_projector_crosslayer.0", "model.mm_projector.0")

DAMAGE = [
    # Not a file at all: some would be read for ever.
    *(in_place(pipe, f"original/{name}") for name in ("config.json", SHARD, INDEX, "tokenizer.model")),
    *(in_place(pipe, f"original/{name}") for name in ("tokenizer_config.json", "tokenizer.json")),
    *(in_place(pipe, f"clip/{name}") for name in ("config.json", "preprocessor_config.json")),
    *(in_place(Path.mkdir, f"original/{name}") for name in ("config.json", SHARD, INDEX, "tokenizer.model")),
    *(in_place(endless, f"original/{name}") for name in ("config.json", SHARD, "tokenizer.model")),
    in_place(unix_socket, "original/config.json"),
    # Not what the name says.
    *(bytes_in(f"original/{name}", b"", "empty") for name in ("config.json", SHARD, INDEX, "tokenizer.model")),
    *(bytes_in(f"original/{name}", b"\0" * 64, "zeros") for name in ("config.json", SHARD, "tokenizer.model")),
    *(bytes_in(f"original/{name}", b"[1]", "list") for name in (INDEX, "tokenizer_config.json", "tokenizer.json")),
    *(bytes_in(f"original/{name}", b"{}", "object") for name in ("config.json", INDEX, "tokenizer.json")),
    bytes_in("original/config.json", b"[" * 200_000, "deep"),
    bytes_in("original/config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}", "number"),
    bytes_in("original/config.json", "{}".encode("utf-16"), "utf-16"),
    bytes_in("clip/config.json", b"[]", "list"),
    # Wrong types, and sizes that no weights have.
    setting("num_hidden_layers", 20000),
    setting("num_hidden_layers", "2"),
    setting("num_hidden_layers", 10**12),
    setting("hidden_size", 4 * 10**15),
    setting("rope_theta", 10**400),
    setting("rope_scaling", {"type": "linear", "factor": 10**400}),
    setting("bos_token_id", 9999),
    setting("eos_token_id", -1),
    setting("eos_token_id", [2, 420]),
    setting("eos_token_id", True),
    setting("hidden_size", None),
    setting("hidden_size", 0),
    setting("num_attention_heads", [4]),
    setting("num_key_value_heads", 0),
    setting("vocab_size", "420"),
    setting("hidden_act", 5),
    setting("model_type", 5),
    setting("rope_scaling", "linear"),
    setting("mm_vision_select_layer", "last"),
    pytest.param(without_tower_layers, id="tower of 20000 layers"),
    setting("image_size", "56", "clip/config.json"),
    setting("patch_size", 0, "clip/config.json"),
    setting("image_size", None, "clip/config.json"),
    setting("size", {}, "clip/preprocessor_config.json"),
    setting("crop_size", "x", "clip/preprocessor_config.json"),
    setting("bos_token", 5, "original/tokenizer_config.json"),
    # Indices and shards.
    in_index(lambda index: index.pop("weight_map"), "without a map"),
    in_index(lambda index: index.update(weight_map=["a"]), "of a list"),
    in_index(lambda index: index["weight_map"].update({"model.norm.weight": 5}), "with a number"),
    in_index(lambda index: index["weight_map"].update({"model.norm.weight": "."}), "with a folder"),
    shard([1], "list"),
    shard({1: torch.ones(2)}, "numbered"),
    shard({"a": {"b": torch.ones(2)}}, "nested"),
    shard({"a": torch.eye(3).to_sparse()}, "sparse"),
    shard({"model.layers.x.weight": torch.ones(2)}, "unknown layer"),
    *(
        one_file(f"{name}.weight", tensor)
        for name in MATRICES
        for tensor in (None, torch.tensor(1.0), torch.ones(2, 2, 2))
    ),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_ends_in_one_line(damage, folders, monkeypatch, capsys):
    damage(folders)
    before = sorted(folders.iterdir())
    monkeypatch.setattr(sys, "argv", ["conversion", *command(folders)])
    assert main() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and len(error) < 600
    assert sorted(folders.iterdir()) == before


@pytest.mark.parametrize("name", [SHARD, "tokenizer.model", "config.json"])
def test_a_pointer_of_git_lfs_is_called_by_its_name(name, folders):
    (folders / "original" / name).write_bytes(POINTER)
    with pytest.raises(ConversionError, match=rf"{name} is a pointer of Git LFS, .*git lfs pull"):
        convert(folders / "original", folders / "out", vision_tower=folders / "clip")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("convert.plan", ValueError),
        ("source.build_config", TypeError),
        ("source.build_text_config", RuntimeError),
        ("source.load_tokenizer", KeyError),
        ("plan.check_complete", ZeroDivisionError),
        ("write.write_folder", AttributeError),
    ],
)
def test_a_fault_of_ours_ends_in_a_traceback(place, error, folders, monkeypatch):
    def fault(*arguments, **options):
        raise error("ours")

    module, name = place.split(".")
    # By the name of the module: the package has a function `convert`.
    monkeypatch.setattr(sys.modules[f"conversion.{module}"], name, fault)
    monkeypatch.setattr(sys, "argv", ["conversion", *command(folders)])
    with pytest.raises(error, match="ours"):
        main()
    assert {path.name for path in folders.iterdir()} == {"original", "clip"}


def test_a_full_disk_ends_in_one_line(folders, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conversion.write.write_folder", full)
    monkeypatch.setattr(sys, "argv", ["conversion", *command(folders)])
    assert main() == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {path.name for path in folders.iterdir()} == {"original", "clip"}


SLOW_WORKER = """
import sys, time
from conversion.checkpoints import weights
from conversion.__main__ import main
from conversion.checkpoints.weights import read_folder

whole = weights.tensor_bytes
weights.tensor_bytes = lambda tensor: (time.sleep(0.05), whole(tensor))[1]
sys.exit(main())
"""


def test_ctrl_c_ends_in_one_line_and_leaves_nothing(folders):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WORKER, *command(folders)],
        cwd=GOLDENS.parents[1],
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts what runs in the background with SIGINT ignored, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(folders.glob(".out@*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "interrupted; nothing was written" and "Traceback" not in error
    assert {path.name for path in folders.iterdir()} == {"original", "clip"}


# Leftovers of a killed conversion


def process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_what_a_killed_process_of_this_host_left_is_removed(folders, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    ended, running = process_that_has_ended(), os.getppid()
    gone = [f".out@here@{ended}.partial", f".out@here@{os.getpid()}.partial"]
    kept = [
        f".out@here@{running}.partial",
        f".out@there@{ended}.partial",  # another host's; its processes are not to be seen from here
        f".out@2@here@{ended}.partial",  # of the destination `out@2`
        f".outer@here@{ended}.partial",
        f".out.{ended}.partial",
        f".out.1.{ended}.partial",
        ".out@here@.partial",
        ".out@here@old.partial",
        "out.partial",
    ]
    for name in gone + kept:
        (folders / name).mkdir()
        (folders / name / "mine.txt").write_text("keep")
    convert(GOLDENS / "original", folders / "out")
    names = {path.name for path in folders.iterdir()}
    assert names == {"original", "clip", "out", *kept}


def test_a_name_with_special_characters_is_no_pattern(folders):
    left = folders / f".outa@{socket.gethostname()}@{process_that_has_ended()}.partial"
    left.mkdir()
    convert(GOLDENS / "original", folders / "out[a]")
    assert left.exists() and (folders / "out[a]" / "config.json").exists()


def test_a_destination_is_never_called_as_what_is_unfinished(folders):
    with pytest.raises(ConversionError, match="name of an unfinished folder"):
        convert(GOLDENS / "original", folders / f".out@{socket.gethostname()}@1.partial")


@pytest.mark.parametrize("name, reason", [("/proc", "is a mount point"), (os.fsdecode(b"\xff"), "is not UTF-8")])
def test_a_destination_that_cannot_be_made(name, reason, folders, monkeypatch, capsys):
    """Both would fail at the end, after all the work."""
    arguments = command(folders)
    arguments[1] = str(folders / name)
    monkeypatch.setattr(sys, "argv", ["conversion", *arguments])
    assert main() == 2
    said = capsys.readouterr()
    assert reason in said.err and len(said.err.splitlines()) == 1 and not said.out
