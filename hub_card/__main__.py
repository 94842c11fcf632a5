# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the card of a checkpoint, checks its folder, and publishes it on the Hub.

python -m hub_card render DIR --repo-id USER/NAME --license cc-by-nc-4.0    writes README.md, pictures, LICENSE, NOTICE
python -m hub_card check DIR                                                prints a line for each fault
python -m hub_card publish DIR USER/NAME --dry-run                          checks, and prints what would be uploaded

DIR is a checkpoint of LLaVA-STF, or a PEFT adapter of one. The exit code is 0 after success, 2 if the folder or the
options are refused, 3 if the Hub refuses, and 4 if the Hub or the connection fails (run the same command again).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from .card import (
    ADAPTER_CONFIG_FILE,
    CARD_FILE,
    EXAMPLE_PICTURE,
    FIRST_TAG,
    LICENCES,
    METHOD_PICTURE,
    Facts,
    base_of,
    gather,
    is_adapter,
    name_base,
    write_card,
)
from .check import check
from .files import Frozen, freeze
from .fresh_process import use
from .memory import MEMORY_FILE, recall, refuse_edited, refuse_stale, remember, weights_sha256
from .publish import HubError, plan, publish
from .snippet import snippet_of

NEEDED = {"repo_id": ("--repo-id", "USER/NAME"), "license": ("--license", "cc-by-nc-4.0")}
REFUSED, HUB_REFUSED, TRY_AGAIN, STOPPED = 2, 3, 4, 130
WRITTEN = {MEMORY_FILE, CARD_FILE, METHOD_PICTURE, EXAMPLE_PICTURE, ADAPTER_CONFIG_FILE, *LICENCES}
YES = ("also", "allow_code", "run_code", "time_limit")


def main() -> int:
    arguments = vars(_parser().parse_args())
    commands: dict[str, Callable[..., int]] = {"render": _render, "check": _check, "publish": _publish}
    command = commands[arguments.pop("command")]
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its warnings are about retries, and show signed URLs
    try:
        return command(**arguments)
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return TRY_AGAIN if error.again else HUB_REFUSED
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return STOPPED


def _render(folder: Path, run: bool, **options: Any) -> int:
    adapter = is_adapter(folder)
    _refuse_special(folder)
    refuse_edited(folder)
    before, given = recall(folder, options), {name: value for name, value in options.items() if value is not None}
    known = {name: value for name, value in (before | given).items() if any(value)}  # an empty text removes an option
    missing = [f"{option} {example}" for name, (option, example) in NEEDED.items() if name not in known]
    if missing:
        raise ValueError(f"The card needs more: python -m hub_card render {folder} {' '.join(missing)}")
    weights = weights_sha256(folder)
    refuse_stale(folder, weights, known.keys() - given.keys())
    if adapter:
        known |= _name_base(folder, before, given)
    elif {"base", "base_revision"} & known.keys():
        raise ValueError(
            f"{folder} is a whole model: --base is for adapters, and so is --base-revision (see --base-model)."
        )
    place = {name: known[name] for name in ("repo_id", "tag", "results", "speeds", "recipe") if name in known}
    facts = Facts(**{field.name: known[field.name] for field in fields(Facts) if field.name in known})
    card = gather(folder, facts=facts, **place)
    write_card(folder, card)
    remember(folder, known, weights)
    if run:
        found = use(freeze(folder, run_code=True), snippet_of(card.render())[0])
        write_card(folder, replace(card, printed=found["printed"], printed_on=f"on {found['on']}"))
        remember(folder, known, weights)
    print(f"wrote {folder / CARD_FILE}")
    return 0


def _name_base(folder: Path, before: dict[str, Any], given: dict[str, Any]) -> dict[str, str]:
    """Writes the base that `--base` and `--base-revision` name into an adapter, and returns both options.

    An adapter that names a revision of this base keeps it, unless `--base-revision` says otherwise.

    Raises:
        ValueError: if the adapter names another base than after the last `render`, because it was trained anew.
    """
    found = base_of(folder)
    told = (before.get("base"), before.get("base_revision", FIRST_TAG))
    if told[0] and "base" not in given and found != told:
        raise ValueError(
            f"The adapter's base is {found[0]!r} (revision {found[1]}) now, and was {told[0]!r} (revision {told[1]}) "
            "when its card was rendered: give --base again."
        )
    if not (told[0] or {"base", "base_revision"} & given.keys()):
        return {}
    base = given.get("base") or found[0]
    kept = found[1] if base == found[0] and (found == told or found[1] != "main") else FIRST_TAG
    revision = given.get("base_revision") or kept
    name_base(folder, base, revision)
    return {"base": base, "base_revision": revision}


def _refuse_special(folder: Path) -> None:
    """Refuses pipes, which rendering would wait for, and links in place of files that it writes."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no regular file (a pipe, socket or device): remove it.")
        if path.is_symlink() and path.name in WRITTEN:
            raise ValueError(f"{path} is a symbolic link, which would be written through: remove it.")


def _check(folder: Path, **yes: Any) -> int:
    return _report(freeze(folder, **yes))


def _report(frozen: Frozen) -> int:
    problems = check(frozen)
    if not problems:
        print(f"{frozen.source} may be published")
        return 0
    for problem in problems:
        print(f"- {problem}", file=sys.stderr)
    print(f"error: {frozen.source} may not be published; wrong: {len(problems)}, see above", file=sys.stderr)
    return REFUSED


def _publish(folder: Path, dry_run: bool, **options: Any) -> int:
    frozen = freeze(folder, **{name: options.pop(name) for name in YES})
    refused = _report(frozen)
    if refused:
        return refused
    upload = plan(frozen, **options)
    for line in upload.describe():
        print(line, flush=True)
    if dry_run:
        print("nothing was sent")
        return 0
    print(f"published: {publish(upload)}")
    return 0


def _file(name: str) -> str:
    if not name:
        return name
    path = Path(name).resolve()
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{name} is no regular file")
    return str(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub_card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    render = commands.add_parser(
        "render", help="write the card and its pictures; options are remembered until '' removes them"
    )
    render.add_argument("folder", metavar="DIR", type=Path, help="folder of a checkpoint or an adapter")
    render.add_argument("--repo-id", metavar="USER/NAME", help="repository to publish to")
    render.add_argument("--tag", help=f"revision that the snippet loads (default: {FIRST_TAG})")
    render.add_argument("--run", action="store_true", help="run the snippet and put its output into the card")
    said = render.add_argument_group("facts that no file contains")
    said.add_argument("--license", metavar="ID", help="licence of the weights, by the Hub's identifier")
    said.add_argument(
        "--base-model", metavar="ID", action="append", help="model that the weights were made from (repeatable)"
    )
    said.add_argument("--dataset", metavar="ID", action="append", dest="datasets", help="training dataset (repeatable)")
    said.add_argument(
        "--language", metavar="CODE", action="append", help="language of the model, such as en (repeatable)"
    )
    said.add_argument("--base-license", metavar="TEXT", help="base language model and its licence, in words")
    said.add_argument("--note", metavar="TEXT", help="sentence for the top of the card")
    measured = render.add_argument_group("training and measurements")
    measured.add_argument("--results", metavar="FILE", type=_file, action="append", help="evaluation results, as JSON")
    measured.add_argument(
        "--speed", metavar="FILE", type=_file, action="append", dest="speeds", help="speed results, as JSON"
    )
    measured.add_argument("--recipe", metavar="FILE", type=_file, help="settings of the training, as YAML")
    adapter = render.add_argument_group("adapters")
    adapter.add_argument("--base", metavar="ID", help="Hub id of the base, which is written into adapter_config.json")
    adapter.add_argument(
        "--base-revision", metavar="TAG", help=f"revision of --base (default: the adapter's, or {FIRST_TAG})"
    )

    checked = commands.add_parser("check", help="print what is wrong with a folder")
    checked.add_argument("folder", metavar="DIR", type=Path, help="folder of a checkpoint or an adapter")

    published = commands.add_parser("publish", help="check a folder and upload it in one commit")
    published.add_argument("folder", metavar="DIR", type=Path, help="folder of a checkpoint or an adapter")
    published.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub")
    for command in (checked, published):
        yes = command.add_argument_group("exceptions that you allow")
        yes.add_argument(
            "--also",
            metavar="NAME",
            action="append",
            default=[],
            help="publish this file although it is not on the list",
        )
        yes.add_argument(
            "--allow-code",
            metavar="NAME",
            action="append",
            default=[],
            help="publish this code although it is not this package's",
        )
        yes.add_argument("--run-code", action="store_true", help="run code and snippets that are not this package's")
        yes.add_argument(
            "--time-limit",
            metavar="SECONDS",
            type=float,
            default=1800,
            help="limit for loading and running (default: 1800)",
        )
    published.add_argument("--private", action="store_true", help="create the repository as private")
    published.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    published.add_argument("--pr", action="store_true", help="open a pull request instead")
    published.add_argument("--collection", metavar="TITLE", help="add the repository to this collection of USER")
    published.add_argument("--dry-run", action="store_true", help="print what would be uploaded; upload nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
