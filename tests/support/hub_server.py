"""A stand-in for the Hub on this machine: over HTTP and in memory, what `huggingface_hub` speaks about models.

    with Hub() as hub:
        commit = hub.add("some/model", folder)
        subprocess.run(..., env=hub.environment(home))  # HF_ENDPOINT, an empty cache, a token that may write

Repositories with branches, tags, pull requests and commits; large files by Git LFS (whole or in parts) or by Xet, whose
own client keeps them in a folder here; downloads with redirects, etags and ranges; users, private repositories and
collections. `Hub.fail` makes a request fail, `Hub.requests` is the log. What it does not know is an error 501.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "some"
WRITE_TOKEN = "hf_WriteTokenOfTheStandInHub"
READ_TOKEN = "hf_ReadTokenOfTheStandInHub"
TOKENS = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
LARGE_FILES = (".safetensors", ".bin", ".png", ".model")
# Files above this size are uploaded in parts of it (the real Hub: from some gigabytes on).
PART_SIZE = 400_000
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class Answer(Exception):  # noqa: N818 (an answer is not always an error)
    """Ends the handling of a request."""

    def __init__(self, status: int, content: Any = None, **headers: str):
        super().__init__(status)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


def error(status: int, message: str, code: str = "") -> Answer:
    headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
    return Answer(status, {"error": message}, **headers)


@dataclass(frozen=True)
class File:
    """A file of a commit; a large one is known by its SHA-256 alone."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        blob = f"oid sha256:{self.sha256}".encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    refs: dict[str, Commit] = field(default_factory=dict)  # refs/heads/..., refs/tags/..., refs/pr/...
    commits: list[Commit] = field(default_factory=list)

    def find(self, revision: str) -> Commit:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        for commit in self.commits:
            if commit.oid == revision:
                return commit
        raise error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, ref: str, message: str, files: dict[str, File]) -> Commit:
        named = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        text = f"{len(self.commits)} {ref} {message}\n{named}"
        self.refs[ref] = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.commits.append(self.refs[ref])
        return self.refs[ref]


@dataclass
class Fault:
    """`times` requests that match are answered with `status`, or with a closed connection if there is none."""

    method: str
    path: str
    status: int | None
    times: int
    headers: dict[str, str]
    text: str  # of the answer
    after: bool  # the request is carried out, and only its answer is lost


class Hub:
    """The server; a context manager."""

    def __init__(self, xet: bool = False):
        self.xet = xet
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict] = {}
        self.large_files: dict[str, bytes] = {}  # by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []  # "METHOD /path"
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "Hub":
        self.folder = tempfile.TemporaryDirectory()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Large files are on another host, to which a client must not send its token.
        self.storage = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.folder.cleanup()

    def environment(self, home: Path, token: str = WRITE_TOKEN) -> dict[str, str]:
        """Variables for a client that knows this Hub, with its caches in `home`."""
        names = {"HF_HOME": home, "HF_HUB_CACHE": home / "hub", "HF_MODULES_CACHE": home / "modules"}
        return (
            {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
            | {name: str(path) for name, path in names.items()}
            | {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}
            | ({"HF_TOKEN": token} if token else {})
        )

    def add(self, name: str, folder: Path) -> str:
        """Puts a folder here as a repository; returns its commit."""
        files = {}
        for path in folder.rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = File(path.read_bytes(), path.name.endswith(LARGE_FILES))
        self.repositories[name] = Repository()
        return self.repositories[name].commit("refs/heads/main", "initial commit", files).oid

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.repositories[name].find(revision).files.items()}

    def fail(
        self,
        method: str,
        path: str,
        status: int | None = None,
        times: int = 1_000_000,
        text: str = '{"error": "made to fail"}',
        after: bool = False,
        **headers: str,
    ) -> None:
        """Lets requests fail whose path has a match of the pattern `path`."""
        self.faults.append(Fault(method, path, status, times, headers, text, after))

    def sent(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: in two, the second one waits for 40 ms

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        target = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(target.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {target.path}")
            fault = self._fault(target.path)
            try:
                if fault and fault.status and not fault.after:
                    raise Answer(fault.status, fault.text.encode(), **fault.headers)
                if fault is None or fault.after:
                    self._route(target.path, body)
            except Answer as answer:
                if fault is None or (fault.status and not fault.after):
                    return self._send(answer)
        self.close_connection = True  # without an answer
        self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_GET

    def _fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def _route(self, path: str, body: bytes) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for pattern, handle in ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                raise Answer(200, handle(self, body=body, **groups))
        raise error(501, f"The stand-in does not know {method} {path}")

    # Who asks, and what they may

    def _role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise error(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _require_writer(self, owner: str) -> None:
        role = self._role()
        if role is None:
            raise error(401, "Invalid username or password.")
        if role != "write" or owner != OWNER:
            raise error(403, f"You don't have the rights to write to the namespace {owner}")

    def _require_no_token(self) -> None:
        if "Authorization" in self.headers:
            raise error(400, "The storage was sent a token of the Hub")

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._role() is None):
            raise error(404 if self._role() else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_writer(name.split("/")[0])
        return repository

    # Accounts, repositories and their refs

    def whoami(self, body: bytes) -> dict:
        role = self._role()
        if role is None:
            raise error(401, "Invalid username or password.")
        return {"type": "user", "name": OWNER, "auth": {"accessToken": {"role": role}}, "orgs": []}

    def create(self, body: bytes) -> dict:
        asked = json.loads(body)
        owner = asked.get("organization") or OWNER
        self._require_writer(owner)
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            raise Answer(409, {"error": "You already created this model repo", **answer})
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        attributes = File("".join(f"*{suffix} filter=lfs\n" for suffix in LARGE_FILES).encode(), large=False)
        self.hub.repositories[name].commit("refs/heads/main", "initial commit", {".gitattributes": attributes})
        return answer

    def info(self, id: str, body: bytes, revision: str = "main") -> dict:
        repository = self._repository(id)
        commit = repository.find(revision)
        siblings = [{"rfilename": name, "size": len(file.content)} for name, file in commit.files.items()]
        return {"id": id, "modelId": id, "sha": commit.oid, "private": repository.private, "siblings": siblings}

    def refs(self, id: str, body: bytes) -> dict:
        found: dict[str, list] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, commit in self._repository(id).refs.items():
            prefix = next(prefix for prefix in kinds if ref.startswith(prefix))
            found[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.oid})
        return found

    def branch(self, id: str, name: str, body: bytes) -> None:
        repository = self._repository(id, write=True)
        if f"refs/heads/{name}" in repository.refs:
            raise error(409, f"Reference already exists: refs/heads/{name}")
        repository.refs[f"refs/heads/{name}"] = repository.find(json.loads(body or b"{}").get("startingPoint", "main"))

    def tag(self, id: str, revision: str, body: bytes) -> None:
        repository, ref = self._repository(id, write=True), f"refs/tags/{json.loads(body)['tag']}"
        if ref in repository.refs:
            raise error(409, f"Tag reference exists already: {ref}")
        repository.refs[ref] = repository.find(revision)

    # Listings and downloads

    def _described(self, name: str, file: File) -> dict:
        described: dict[str, Any] = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
        if file.large:
            described["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        return described

    def tree(self, id: str, revision: str, body: bytes, path: str = "") -> list[dict]:
        """The files below a folder; sub-folders themselves are not listed."""
        files = self._repository(id).find(revision).files
        inside = [self._described(name, file) for name, file in files.items() if name.startswith(path)]
        if not inside and path:
            raise error(404, f"{path} does not exist", "EntryNotFound")
        return inside

    def paths_info(self, id: str, revision: str, body: bytes) -> list[dict]:
        files, asked = self._repository(id).find(revision).files, parse_qs(body.decode()).get("paths", [])
        return [self._described(name, files[name]) for name in asked if name in files]

    def resolve(self, id: str, revision: str, path: str, body: bytes) -> bytes:
        commit = self._repository(id).find(revision)
        if path not in commit.files:
            raise Answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        file = commit.files[path]
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{file.oid}"'}
        if not file.large:
            raise Answer(200, file.content, **headers)
        self.hub.large_files[file.sha256] = file.content
        headers |= {"X_Linked_Etag": f'"{file.sha256}"', "X_Linked_Size": str(len(file.content))}
        raise Answer(302, b"", Location=f"{self.hub.storage}/cdn/{file.sha256}", **headers)

    def cdn(self, oid: str, body: bytes) -> bytes:
        self._require_no_token()
        content, asked = self.hub.large_files[oid], re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None:
            return content
        start, size = int(asked[1]), len(content)
        if start >= size:
            raise Answer(416, b"", Content_Range=f"bytes */{size}")
        raise Answer(206, content[start:], Content_Range=f"bytes {start}-{size - 1}/{size}")

    # Uploads

    def validate_yaml(self, body: bytes) -> dict:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if head is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            metadata = yaml.safe_load(head[1])
        except yaml.YAMLError as problem:
            raise Answer(400, {"errors": [{"message": str(problem)}], "warnings": []}) from problem
        if not isinstance(metadata.get("license", ""), str):
            raise Answer(400, {"errors": [{"message": '"license" must be a string'}], "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, id: str, revision: str, body: bytes) -> dict:
        commit = self._repository(id, write=True).find(revision)
        answers = []
        for asked in json.loads(body)["files"]:
            is_large = asked["path"].endswith(LARGE_FILES) or b"\0" in base64.b64decode(asked["sample"])
            old = commit.files.get(asked["path"])
            oid = None if old is None else old.sha256 if old.large else old.oid
            mode = "lfs" if is_large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, id: str, body: bytes) -> dict:
        self._repository(id, write=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.hub.large_files:
                url = f"{self.hub.storage}/lfs/{asked['oid']}"
                upload: dict[str, Any] = {"href": url}
                if asked["size"] > PART_SIZE:
                    parts = range(1, -(-asked["size"] // PART_SIZE) + 1)
                    header = {"chunk_size": str(PART_SIZE), **{str(part): f"{url}/{part}" for part in parts}}
                    upload = {"href": f"{url}/complete", "header": header}
                asked["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
            objects.append(asked)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, body: bytes, part: str = "") -> dict:
        self._require_no_token()
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            raise Answer(200, {}, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        return self._keep(oid, body)

    def lfs_complete(self, oid: str, body: bytes) -> dict:
        parts = self.hub.parts.pop(oid)
        return self._keep(oid, b"".join(parts[part["partNumber"]] for part in json.loads(body)["parts"]))

    def _keep(self, oid: str, content: bytes) -> dict:
        if hashlib.sha256(content).hexdigest() != oid:
            raise error(422, f"The content is not that of {oid}")
        self.hub.large_files[oid] = content
        return {}

    def lfs_verify(self, oid: str, body: bytes) -> dict:
        if oid not in self.hub.large_files:
            raise error(404, f"There is no object {oid}")
        return {}

    def xet_token(self, id: str, body: bytes, revision: str = "main") -> dict:
        """Sends the Xet client to a folder of this machine: it has a store for tests of its own, `local://`."""
        self._repository(id, write=True)
        return {"casUrl": f"local://{self.hub.folder.name}", "exp": int(time.time()) + 3600, "accessToken": "none"}

    def commit(self, id: str, revision: str, body: bytes) -> dict:
        repository = self._repository(id, write=True)
        files, header = dict(repository.find(revision).files), {}
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if self.hub.xet:
                    self.hub.large_files |= read_xet_store(Path(self.hub.folder.name), value["oid"])
                if value["oid"] not in self.hub.large_files:
                    raise error(400, f"The large file {value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large_files[value["oid"]], large=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise error(501, f"The stand-in does not know the operation {key}")
        if header.get("parentCommit", repository.find(revision).oid) != repository.find(revision).oid:
            raise error(412, "A commit has happened since. Please refresh and try again.")
        is_pr = self.query.get("create_pr") == "1"
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        commit = repository.commit(f"refs/pr/{number}" if is_pr else f"refs/heads/{revision}", header["summary"], files)
        urls = {"pullRequestUrl": f"{self.hub.endpoint}/{id}/discussions/{number}"} if is_pr else {}
        return {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.endpoint}/{id}/commit/x", **urls}

    # Collections

    def create_collection(self, body: bytes) -> dict:
        asked = json.loads(body)
        self._require_writer(asked["namespace"])
        slug = f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-0123456789abcdef01234567"
        if slug in self.hub.collections:
            raise Answer(409, {"error": "This collection exists already", "slug": slug})
        self.hub.collections[slug] = {
            "slug": slug,
            "title": asked["title"],
            "owner": {"name": asked["namespace"]},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": asked.get("private", False),
            "theme": "blue",
            "upvotes": 0,
        }
        return self.hub.collections[slug]

    def collection(self, slug: str, body: bytes) -> dict:
        if slug not in self.hub.collections:
            raise error(404, "Collection not found")
        return self.hub.collections[slug]

    def add_to_collection(self, slug: str, body: bytes) -> dict:
        self._require_writer(slug.split("/")[0])
        collection, item = self.collection(slug, body), json.loads(body)["item"]
        self._repository(item["id"])
        if item["id"] in [known["id"] for known in collection["items"]]:
            raise error(409, "The item is already in the collection")
        position = len(collection["items"])
        collection["items"].append({"_id": f"{position:024x}", "position": position, **item})
        return collection


def read_xet_store(folder: Path, oid: str) -> dict[str, bytes]:
    """The large file with this SHA-256, if the Xet client has put it into its store `local://folder`.

    A shard of the store lists files: 48 bytes of header, then for each file its hash, flags and number of entries (48
    bytes), that many entries of 48 bytes, as many again to verify them, and 48 bytes that begin with the SHA-256.
    """
    for shard in (folder / "xet" / "xorbs" / "shards").glob("*.mdb"):
        content, position = shard.read_bytes(), 48
        while content[position : position + 32] != b"\xff" * 32:  # the end of the list
            xet_hash, flags, entries = struct.unpack_from("<32sII", content, position)
            position += 48 * (1 + entries * (2 if flags >> 31 & 1 else 1))
            if _in_words(content[position : position + 32]) == oid:
                return {oid: _read_from_xet(folder, _in_words(xet_hash))}
            position += 48 * (flags >> 30 & 1)
    return {}


def _in_words(digest: bytes) -> str:
    """Xet writes a hash as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


def _read_from_xet(folder: Path, xet_hash: str) -> bytes:
    from hf_xet import XetFileInfo, XetSession

    target = folder / "restored"
    store = {"endpoint": f"local://{folder}", "token": "none", "token_expiry_unix_secs": int(time.time()) + 3600}
    with XetSession().new_file_download_group(**store) as group:
        group.start_download_file(XetFileInfo(xet_hash, None), str(target))
    return target.read_bytes()


ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (r"POST /api/collections", _Handler.create_collection),
    (r"GET /api/collections/(?P<slug>[^/]+/[^/]+)", _Handler.collection),
    (r"POST /api/collections/(?P<slug>[^/]+/[^/]+)/items", _Handler.add_to_collection),
    (rf"GET /api/models/{ID}", _Handler.info),
    (rf"GET /api/models/{ID}/revision/{REVISION}", _Handler.info),
    (rf"GET /api/models/{ID}/tree/{REVISION}(?:/(?P<path>.*))?", _Handler.tree),
    (rf"POST /api/models/{ID}/paths-info/{REVISION}", _Handler.paths_info),
    (rf"GET /api/models/{ID}/refs", _Handler.refs),
    (rf"POST /api/models/{ID}/branch/(?P<name>[^/]+)", _Handler.branch),
    (rf"POST /api/models/{ID}/tag/{REVISION}", _Handler.tag),
    (rf"POST /api/models/{ID}/preupload/{REVISION}", _Handler.preupload),
    (rf"POST /api/models/{ID}/commit/{REVISION}", _Handler.commit),
    (rf"GET /api/models/{ID}/xet-write-token(?:/{REVISION})?", _Handler.xet_token),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", _Handler.lfs_put),
    (r"POST /lfs/(?P<oid>[0-9a-f]{64})/complete", _Handler.lfs_complete),
    (r"POST /lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    (rf"GET /{ID}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
    (r"GET /cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
]
