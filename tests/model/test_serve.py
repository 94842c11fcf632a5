"""`python -m modeling_llava_stf serve`: its arguments and errors. `make test-serving` asks its server."""

import sys

import pytest
import transformers.cli.serve
from conftest import GOLDENS

import modeling_llava_stf.__main__ as command


@pytest.fixture
def serve(monkeypatch, capsys):
    """Runs the command in this process: exit status, standard output and error."""
    from transformers.utils import logging

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["command", "serve", *map(str, arguments)])
        try:
            status = command.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    monkeypatch.setattr(command, "is_serve_available", lambda: True)
    verbosity = logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def started(monkeypatch):
    """What the server was started with; it is not."""
    calls = []

    def server(force_model: str, port: int = 8000, trust_remote_code: bool = False):
        calls.append((force_model, port, trust_remote_code))

    monkeypatch.setattr(transformers.cli.serve, "Serve", server)
    return calls


def test_options_are_passed_on(serve, started, checkpoint):
    assert serve(checkpoint, "--port", 8123)[0] == 0
    assert started == [(str(checkpoint), 8123, False)]


def test_an_option_that_the_server_does_not_have(serve, started, checkpoint):
    status, _, errors = serve(checkpoint, "--prot", 8123)
    assert (status, started) == (2, []) and "No such option" in errors and "--prot" in errors


def test_an_at_sign_in_the_name_of_a_folder(serve, started, checkpoint, tmp_path):
    (tmp_path / "a@b").symlink_to(checkpoint)
    assert serve(tmp_path / "a@b")[0] == 0 and started


WRONG = {
    "no folder": ("/nowhere", "There is no folder '/nowhere'"),
    "no checkpoint": (GOLDENS, "it has no config.json"),
    "another model": (GOLDENS / "original", "`llava_llama` model, expected `llava_stf`"),
    "not on the Hub": ("nobody/nothing@v1", "in the cached files"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_checkpoint_is_refused(name, serve, started, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, words = WRONG[name]
    status, output, errors = serve(model)
    assert (status, output, started) == (2, "", []) and words in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_the_server_s_packages_are_named(serve, started, checkpoint, monkeypatch):
    monkeypatch.setattr(command, "is_serve_available", lambda: False)
    status, output, errors = serve(checkpoint)
    assert (status, output, started) == (2, "", [])
    assert 'pip install "transformers[serving]"' in errors and errors.count("\n") == 1
