"""The page of `examples/space` in a headless browser: `make test-space`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from threading import enumerate as threads

import pytest
from huggingface_hub.utils import httpx

gradio = pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
PICTURE, OTHER = SPACE / "pictures" / "four.png", SPACE / "pictures" / "word.png"
FIRST, SECOND = "Describe the picture.", "Where is the frog?"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
SECONDS = 120  # that something may take on a busy machine
# Texts that the last answer had, one after the other.
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll('.bot.message');
        const text = answers.length ? answers[answers.length - 1].innerText.trim() : '';
        if (text && window.seen[window.seen.length - 1] !== text) window.seen.push(text);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Pace:
    """Makes the model wait before each token: a reader sees the words come, and has the time to stop them."""

    seconds, steps = 0.0, 0
    whole = 0  # steps of the whole answer to the first question

    def __call__(self, *_):
        self.steps += 1
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def pace():
    return Pace()


@pytest.fixture(scope="module")
def address(pace, tmp_path_factory):
    """The page, served by this process."""
    temporary = tmp_path_factory.mktemp("uploads")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(temporary))
    patch.syspath_prepend(SPACE)
    import app
    from chat import Chat

    processor, network = app._load(app._default_model(), None)
    network.register_forward_pre_hook(pace)
    chat = Chat(processor, network)
    assert [*chat.answer(PICTURE, [], FIRST)]
    pace.whole = pace.steps
    page = app.build(chat, app.SMALL)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    yield url
    overlays = {*temporary.rglob("image.png")}
    page.close()
    patch.undo()
    assert overlays
    wait_until(lambda: not [path for path in overlays if path.exists()])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address, pace):
    """The page as it opens; no request may leave the machine."""
    pace.seconds = 0.0
    requested = []
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.set_default_timeout(SECONDS * 1000)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("textarea")
    page.evaluate(WATCH)
    yield page
    page.close()
    assert requested and all(url.startswith((address, "data:", "blob:")) for url in requested)


def upload(page, path):
    page.set_input_files("input[type=file]", path)


def ask(page, question):
    page.fill("textarea", question)
    page.keyboard.press("Enter")


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def answering():
    return [thread for thread in threads() if thread.name.startswith("answer")]


def answers(page):
    return [text.strip() for text in page.locator(".bot.message").all_inner_texts()]


def wait_for_answer(page, count):
    page.wait_for_function(f"document.querySelectorAll('.bot.message').length == {count}")
    page.wait_for_selector("[data-testid=submit-button]")
    return answers(page)[-1]


def test_a_picture_is_asked_about_twice(page, pace):
    upload(page, PICTURE)
    page.wait_for_selector("#seen img")
    assert "8 x 8 patches (thin lines) become 4 x 4 tokens (thick)" in page.inner_text("body")
    assert page.locator("#seen img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [576, 576]
    pace.seconds = 0.05
    ask(page, "Is there an animal?")
    first = wait_for_answer(page, 1)
    texts = page.evaluate("window.seen")
    assert len(set(texts)) > 3 and texts[-1] == first and "frog" in first
    assert all(first.startswith(text) for text in texts)
    pace.seconds = 0.0
    ask(page, SECOND)
    assert wait_for_answer(page, 2).startswith("The frog is")
    assert answers(page)[0] == first
    figures = page.inner_text("#figures").split()
    assert figures[:1] == ["16"] and "64" in figures and "LLaVA-1.5" in figures
    assert "first word after" in page.inner_text("#figures") and " of them new" in page.inner_text("#figures")
    if os.environ.get("SCREENSHOT"):
        page.mouse.move(0, 0)
        page.screenshot(path=os.environ["SCREENSHOT"], clip={"x": 90, "y": 0, "width": 1000, "height": 900})


def test_a_picked_picture_begins_a_new_conversation(page):
    page.locator(".gallery-item").nth(0).click()
    page.wait_for_selector("#seen img")
    ask(page, FIRST)
    wait_for_answer(page, 1)
    page.locator(".gallery-item").nth(1).click()
    page.wait_for_function("document.querySelectorAll('.bot.message').length == 0")
    page.get_by_text(FIRST, exact=True).first.click()
    page.wait_for_function(f"document.querySelector('textarea').value == '{FIRST}'")
    page.locator("textarea").press("Enter")
    wait_for_answer(page, 1)


def test_a_question_without_an_answer_is_no_turn(address):
    import app

    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}], "metadata": None, "options": None}

    history = [message("user", "a"), message("user", "b"), message("assistant", "c"), message("user", "d")]
    assert app.turns(history) == [("b", "c")] and app.turns([]) == []


def test_stop_ends_the_answer_and_its_thread(page, pace):
    upload(page, PICTURE)
    page.wait_for_selector("#seen img")
    pace.seconds, pace.steps = 1.0, 0
    ask(page, FIRST)
    page.wait_for_function("window.seen.length > 1")
    page.get_by_text("Stop", exact=True).click()
    page.wait_for_selector("[data-testid=submit-button]")
    wait_until(lambda: not answering())
    assert 2 < pace.steps < pace.whole - 3
    pace.seconds = 0.0
    stopped = answers(page)[-1]
    assert "bottom right" not in stopped
    ask(page, SECOND)
    assert wait_for_answer(page, 2)
    assert answers(page)[0] == stopped


def test_a_page_that_is_closed_ends_its_answer(browser, address, pace):
    page = browser.new_page()
    page.set_default_timeout(SECONDS * 1000)
    page.goto(address)
    page.wait_for_selector("textarea")
    pace.seconds = 0.0
    upload(page, PICTURE)
    page.wait_for_selector("#seen img")
    pace.seconds, pace.steps = 1.0, 0
    ask(page, FIRST)
    page.wait_for_selector(".bot.message")
    page.close()
    wait_until(lambda: not answering())
    assert 0 < pace.steps < pace.whole - 3


def test_mistakes_are_said_in_words(page, tmp_path):
    ask(page, FIRST)
    page.get_by_text("There is no picture: choose one first.").wait_for()
    assert page.input_value("textarea") == FIRST and not answers(page)
    broken = tmp_path / "broken.png"
    for content in (PICTURE.read_bytes()[:1000], b"no picture"):
        broken.write_bytes(content)
        upload(page, broken)
        page.get_by_text("Cannot read the picture 'broken.png'").first.wait_for()
        assert not page.locator("#seen img").count()
        page.get_by_label("Remove Image").click()
        page.locator(".toast-close").first.click()
    upload(page, PICTURE)
    page.wait_for_selector("#seen img")
    ask(page, "word " * 600)
    page.get_by_text("the context holds 512").wait_for()
    ask(page, "What is <image>?")
    page.get_by_text("placeholder").first.wait_for()
    ask(page, SECOND)
    assert wait_for_answer(page, 1).startswith("The frog is")


def test_the_folder_of_a_space_runs_and_leaves_no_files(tmp_path):
    """It is made by the commands of its README, and has no other way to the package."""
    commands = (SPACE / "README.md").read_text("utf-8").split("## Make it a Space")[1].split("```bash\n")[1]
    commands = commands.split("hf upload")[0].replace("my-space", str(tmp_path / "my-space"))
    subprocess.run(["bash", "-ec", commands], cwd=ROOT, check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL")}
    environment |= {"GRADIO_TEMP_DIR": str(tmp_path / "uploads"), "GRADIO_SERVER_PORT": str(free_port())}
    url = f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}"
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=tmp_path / "my-space",
        env=environment,
        stdout=log,
        stderr=log,
        # A shell without job control starts what runs in the background with SIGINT ignored, and so would this be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: answers_at(url) or server.poll() is not None)
        assert "LLaVA-STF" in answers_at(url), (tmp_path / "log").read_text()
        httpx.post(
            f"{url}/gradio_api/upload", files={"files": ("mine.png", OTHER.read_bytes() + b" ")}
        ).raise_for_status()
        assert [*(tmp_path / "uploads").rglob("mine.png")]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(SECONDS)
    left = {path.name for path in (tmp_path / "uploads").rglob("*") if path.is_file()}
    assert left == {path.name for path in (SPACE / "pictures").iterdir()}  # Gradio keeps the copies of the samples


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers_at(url):
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def test_a_wrong_model_is_refused_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, SPACE / "app.py", "--model", tmp_path / "none"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "There is no folder" in done.stderr.splitlines()[-1]
