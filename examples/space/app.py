# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Shows a web page: choose a picture, ask about it, and see how many vision tokens the answer took.

python examples/space/app.py [--model DIR_OR_HUB_ID] [--revision COMMIT] [--host 0.0.0.0] [--port 7860]
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from chat import Answer, Chat, Turn
from huggingface_hub.errors import StrictDataclassError

from modeling_llava_stf.__main__ import _default_model, _load

PICTURES = Path(__file__).parent / "pictures"
EXAMPLES = [[str(path)] for path in sorted(PICTURES.glob("*.png"))]
QUESTIONS = ["Describe the picture.", "What is written in the picture?", "Where is the frog?"]
# Temporary files (uploads and overlays) are looked at this often, and deleted at this age; all of them at the end.
CLEAN_EVERY, CLEAN_AFTER = 600, 3600  # seconds
# Fonts of the system: the default theme asks a font server.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
SMALL = "The model is the small one of this repository: it knows drawn objects (emoji) and nothing else."
WHAT_IT_SEES = "**What the model sees:** {0} x {0} patches (thin lines) become {1} x {1} tokens (thick)"
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto; }
.figures { display: flex; gap: 8px; }
.figures div { flex: 1; padding: 8px 10px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.figures b { display: block; font-size: 1.45em; line-height: 1.3; }
.gallery-item img { max-height: 64px; }
.figures .ours { border-color: #ffc400; }
"""
LAUNCH = {"max_file_size": "32mb", "show_error": True, "css": CSS, "theme": THEME, "footer_links": []}


def build(chat: Chat, title: str) -> gr.Blocks:
    """The page; it answers one question at a time, and the others wait."""
    with gr.Blocks(title="LLaVA-STF", delete_cache=(CLEAN_EVERY, CLEAN_AFTER), analytics_enabled=False) as page:
        gr.Markdown(
            f"# LLaVA-STF\nAsk about a picture. Token fusion makes one vision token of several patches. {title}"
        )
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,  # the file as it was uploaded: the model's own processor turns and converts it
                    sources=["upload", "clipboard"],
                    height=210,
                    buttons=[],
                )
                # The processor says what is wrong with a file. (For a subclass Gradio 6.31 would write app.pyi.)
                picture.preprocess = lambda upload: upload and upload.path
                gr.Examples(EXAMPLES, picture, label="Or pick one")
                gr.Markdown(WHAT_IT_SEES.format(*chat.grids))
                seen = gr.Image(
                    show_label=False,
                    format="png",
                    interactive=False,
                    height=320,
                    buttons=["fullscreen"],
                    elem_id="seen",
                )
            with gr.Column(scale=3):
                talk = gr.Chatbot(
                    show_label=False, height=460, buttons=[], placeholder="Choose a picture and ask about it."
                )
                box = gr.Textbox(
                    placeholder="Ask about the picture", show_label=False, submit_btn="Ask", max_lines=4, autofocus=True
                )
                gr.Examples(QUESTIONS, box, label="For example")
                figures = gr.HTML(show_figures(chat), padding=False, elem_id="figures")

        def show(path: str | None) -> Iterator[tuple]:
            """Begins a new conversation."""
            try:
                yield chat.overlay(path) if path else None, [], show_figures(chat)
            except ValueError as error:
                yield None, [], show_figures(chat)
                raise gr.Error(str(error), title="The picture cannot be used") from error

        def answer(path: str | None, question: str, history: list[dict]) -> Iterator[tuple]:
            asked = [*history, {"role": "user", "content": question}]
            try:
                if not path:
                    raise ValueError("There is no picture: choose one first.")
                yield asked, gr.Textbox("", submit_btn=False, stop_btn="Stop"), show_figures(chat)
                for found in chat.answer(path, turns(history), question):
                    so_far = [*asked, {"role": "assistant", "content": found.text}]
                    yield so_far, gr.skip(), show_figures(chat, found)
                yield gr.skip(), ready(), gr.skip()
            except ValueError as error:
                yield history, ready(question), show_figures(chat)
                raise gr.Error(str(error), title="There is no answer") from error

        answering = box.submit(answer, [picture, box, talk], [talk, box, figures], show_progress="hidden")
        gr.on([box.stop, talk.clear], ready, None, box, cancels=answering)
        picture.change(show, picture, [seen, talk, figures], cancels=answering).then(ready, None, box)
    return page


def ready(question: str | None = None) -> gr.Textbox:
    """The text box between two answers, with what is in it or with a question that had none."""
    value = {} if question is None else {"value": question}
    return gr.Textbox(submit_btn="Ask", stop_btn=False, **value)


def show_figures(chat: Chat, answer: Answer | None = None) -> str:
    """Vision tokens of the picture, here and in LLaVA-1.5, and what the answer took."""
    patches, tokens = chat.grids
    figures = [("ours", tokens**2, "vision tokens for the picture"), ("", patches**2, "in LLaVA-1.5")]
    if answer:
        figures += [
            ("", f"{answer.seconds:.2f} s", f"first word after {answer.first_word:.2f} s"),
            ("", answer.prompt_tokens, f"prompt tokens, {answer.new_tokens} of them new"),
        ]
    tiles = "".join(f'<div class="{kind}"><b>{number}</b>{words}</div>' for kind, number, words in figures)
    return f'<div class="figures">{tiles}</div>'


def turns(history: list[dict]) -> list[Turn]:
    """Questions with their answers, as the page shows them; a question that was stopped before its answer is none."""
    texts = [(message["role"], "".join(part["text"] for part in message["content"])) for message in history]
    pairs = zip(texts, texts[1:], strict=False)
    return [(asked, said) for (role, asked), (next_role, said) in pairs if (role, next_role) == ("user", "assistant")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Opens a page on which a LLaVA-STF model answers about pictures.")
    model = os.environ.get("MODEL")  # a Space has variables instead of options
    parser.add_argument("--model", default=model, help="folder or Hub id (default: $MODEL, else the small model)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer in tokens (default: 512)")
    parser.add_argument(
        "--kept-tokens", type=int, default=8192, help="tokens of conversations in memory (default: 8192)"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; in a Space all)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {arguments.max_new_tokens}, expected at least 1")
    try:
        processor, network = _load(arguments.model or _default_model(), arguments.revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    chat = Chat(processor, network, arguments.max_new_tokens, arguments.kept_tokens)
    title = f"The model is `{arguments.model}`." if arguments.model else SMALL
    build(chat, title).launch(server_name=arguments.host, server_port=arguments.port, **LAUNCH)
    return 0


if __name__ == "__main__":
    sys.exit(main())
