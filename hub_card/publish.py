# Copyright 2026 The LLaVA-STF for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""Uploads a checked folder to the Hub in one commit, complete or not at all. It is safe to repeat."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from tqdm import tqdm

from .card import CARD_FILE, FIRST_TAG
from .files import Frozen, freeze, is_read, shown
from .snippet import named_in, snippet_of

# Old weights in the same folder might be loaded instead of the new ones.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
TRY_AGAIN = "Run the same command again: what has arrived is not sent twice."


class HubError(Exception):
    """Says that the Hub refused or could not be reached; `again` is true if repeating the command may help."""

    def __init__(self, message: str, again: bool):
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Upload:
    """Describes what will be uploaded, and where."""

    frozen: Frozen
    repo_id: str
    tag: str
    private: bool = False
    revision: str = "main"
    pr: bool = False
    collection: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.frozen.files.values())

    def describe(self) -> Iterator[str]:
        """Yields lines that describe the upload."""
        for name, file in self.frozen.files.items():
            yield f"{_size(file.size):>10}  {name}  sha256 {file.sha256[:12]}"
        for name, reason in self.frozen.left_out.items():
            yield f"{'not sent':>10}  {shown(name)} ({reason})"
        kind = (
            "private, if it is new" if self.private else "public, if it is new and the account does not say otherwise"
        )
        target = "a pull request on" if self.pr else f"branch {self.revision} of"
        place = f"{HfApi().endpoint}/{self.repo_id} ({kind})"
        yield f"{len(self.frozen.files)} files, {_size(self.size)}, in one commit to {target} {place}"
        later = " (publish again when the pull request is merged)" if self.pr else ""
        yield f"tag {self.tag}, which the card's snippet asks for{later}"
        if self.collection:
            yield f"collection {self.collection!r} of {self.repo_id.split('/')[0]}"


def _size(number: int) -> str:
    return tqdm.format_sizeof(number, "B")


def plan(
    folder: Path | Frozen,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    pr: bool = False,
    collection: str | None = None,
) -> Upload:
    """Returns what an upload would do, without sending anything.

    Args:
        folder: a frozen folder that [`check`] has checked, or a path to freeze now.

    Raises:
        ValueError: if a file may not be published, if the card is about another repository, or if its tag is a branch.
    """
    frozen = folder if isinstance(folder, Frozen) else freeze(folder)
    if frozen.refused:
        raise ValueError(frozen.refused[0])
    if CARD_FILE not in frozen.files:
        raise ValueError(f"{frozen.source} has no {CARD_FILE}: python -m hub_card render {frozen.source}")
    named, tag = named_in(snippet_of(frozen.read(CARD_FILE).decode("utf-8"))[0])
    if named != repo_id:
        raise ValueError(
            f"The card is about {named}, but you publish to {repo_id}. Render it again: python -m hub_card render "
            f"{frozen.source} --repo-id {repo_id}"
        )
    if tag in ("main", revision):
        raise ValueError(
            f"The card's tag {tag!r} is a branch, which moves. Render it with a tag of its own: "
            f"python -m hub_card render {frozen.source} --tag {FIRST_TAG}"
        )
    return Upload(frozen, repo_id, tag, private, revision or "main", pr, collection or "")


def publish(upload: Upload) -> str:
    """Creates the repository, uploads in one commit, tags the commit, and adds the repository to the collection.

    Nothing is visible before the commit. A repeated call uploads only what is missing, and makes no commit if nothing
    is. The same commit deletes what would be loaded with the new files: weights, configurations, tokenizer files, code
    and chat templates on the branch that the folder does not have. Its message names them.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    api, name = HfApi(), upload.repo_id
    if get_token() is None:
        raise HubError(
            "You are not logged in: run `hf auth login`, or set HF_TOKEN to a token that may write.", again=False
        )
    with _step(f"creating {name}", name):
        api.create_repo(name, private=upload.private or None, exist_ok=True)
    with _step(f"looking at {name}", name):
        if upload.private and not api.repo_info(name).private:
            raise HubError(f"{name} exists and is public, but --private was asked for. Nothing was sent.", again=False)
        refs = api.list_repo_refs(name)
        is_tagged = upload.tag in {tag.name for tag in refs.tags}
        if is_tagged and not _same_files(api, upload):
            raise HubError(
                f"The tag {upload.tag} of {name} is on other files, which others rely on. Nothing was sent: render the "
                "card with the next tag (--tag).",
                again=False,
            )
    if upload.revision not in {branch.name for branch in refs.branches}:
        with _step(f"creating the branch {upload.revision}", name):
            api.create_branch(name, branch=upload.revision, exist_ok=True)
    with _step(f"uploading to {name}", name):
        operations = _operations(api, upload)
        _upload(api, upload, operations)
        commit = api.create_commit(
            name,
            operations,
            commit_message=f"Publish {upload.tag}",
            commit_description=_deletions(operations),
            revision=upload.revision,
            create_pr=upload.pr,
        )
    if not upload.pr and not is_tagged:
        with _step(f"tagging {name} as {upload.tag}", name):
            api.create_tag(name, tag=upload.tag, revision=commit.oid, exist_ok=True)
    if upload.collection:
        with _step(f"adding {name} to the collection {upload.collection!r}", name):
            owner = name.split("/")[0]
            slug = api.create_collection(upload.collection, namespace=owner, exists_ok=True).slug
            api.add_collection_item(slug, item_id=name, item_type="model", exists_ok=True)
    return commit.pr_url or commit.commit_url


def _operations(api: HfApi, upload: Upload) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Adds all files (huggingface_hub skips unchanged ones) and deletes what must not stay of an earlier upload."""
    names = upload.frozen.files.keys()
    there = api.list_repo_files(upload.repo_id, revision=upload.revision)
    old = [name for name in there if name not in names and _would_act(name)]
    return [
        *(CommitOperationAdd(name, str(upload.frozen.folder / name)) for name in sorted(names)),
        *(CommitOperationDelete(name) for name in old),
    ]


def _deletions(operations: list[CommitOperationAdd | CommitOperationDelete]) -> str:
    names = [operation.path_in_repo for operation in operations if isinstance(operation, CommitOperationDelete)]
    return f"Deleted, because this version does not have them: {', '.join(names)}" if names else ""


def _upload(api: HfApi, upload: Upload, operations: list[CommitOperationAdd | CommitOperationDelete]) -> None:
    """Uploads large files, still without a commit, and compares all files with the frozen list."""
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    api.preupload_lfs_files(upload.repo_id, additions, revision=upload.revision, create_pr=upload.pr, free_memory=False)
    files = upload.frozen.files
    changed = [
        added.path_in_repo for added in additions if added.upload_info.sha256.hex() != files[added.path_in_repo].sha256
    ]
    if changed:
        raise HubError(
            f"{', '.join(changed)} changed after it was checked. Nothing was committed: run the same command again.",
            again=False,
        )


def _same_files(api: HfApi, upload: Upload) -> bool:
    """Returns whether the tag has the frozen files, by their checksums."""
    found = api.verify_repo_checksums(upload.repo_id, revision=upload.tag, local_dir=upload.frozen.folder)
    new = upload.frozen.files.keys() & set(found.extra_paths)
    old = [path for path in found.missing_paths if _would_act(path)]
    return not (found.mismatches or new or old)


def _would_act(name: str) -> bool:
    """Returns whether a file of an earlier upload would change what is loaded from the new one."""
    return is_read(name) or ("/" not in name and name.endswith(WEIGHT_SUFFIXES))


@contextmanager
def _step(doing: str, repo_id: str) -> Iterator[None]:
    """Converts errors of a step to a [`HubError`] that says what was being done."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _in_words(error, doing, repo_id) from error


def _in_words(error: BaseException, doing: str, repo_id: str) -> HubError:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading"; its cause says why
        return _in_words(error.__cause__, f"{doing} ({_said(error)})", repo_id)
    status = _status(error)
    owner = repo_id.split("/")[0]
    reasons = {
        401: "the token is not valid (401). Run `hf auth login`, or set HF_TOKEN to a token that may write.",
        403: f"the token may not do that (403). It needs write access to {owner}.",
        404: f"there is no such thing (404). Is {repo_id} spelled right, and may your token see it?",
        409: "something else is changing it, or has that name already (409). Look at it, and run the command again.",
        412: "somebody else committed in the meantime (412). Look at it, and run the command again.",
        413: "a file is too large for the Hub (413).",
        429: f"too many requests (429){_wait(error)}. {TRY_AGAIN}",
    }
    if status in reasons:
        return HubError(f"While {doing}: {reasons[status]}", again=status == 429)
    if status is not None and status >= 500:
        return HubError(f"While {doing}: the Hub has a problem of its own ({status}). {TRY_AGAIN}", again=True)
    if isinstance(error, json.JSONDecodeError):
        return HubError(f"While {doing}: the answer is not one of a Hub. Is HF_ENDPOINT right? {TRY_AGAIN}", again=True)
    if status is not None or isinstance(error, ValueError):
        return HubError(f"While {doing}: the Hub refuses: {_said(error)}", again=False)
    return HubError(f"While {doing}: the connection broke ({_said(error)}). {TRY_AGAIN}", again=True)


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error; the Xet client gives it only in its message, as `(403 Forbidden)`."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    found = re.search(r"\((\d{3}) [A-Z]", str(error))
    return int(found[1]) if found else None


def _wait(error: BaseException) -> str:
    seconds = error.response.headers.get("Retry-After") if isinstance(error, HfHubHTTPError) else None
    return f"; the Hub asks you to wait {seconds} seconds" if seconds else ""


def _said(error: BaseException) -> str:
    """Returns an error in one line, without the token: httpx prints a header that it refuses."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"Bearer [^\s'\"]+", "Bearer ***", text)
