"""A stand-in for the Hub on this machine: serves folders as model repositories, for downloads only."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, Path]):
    """Serves each folder under its repository id, at the branch `main` and the commit `COMMIT`; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = self.path.split("?")[0]
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = info or file
            if match is None or match[1] not in repositories:
                return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
            if (info or [None] * 4)[3] not in (None, "main", COMMIT) or (file and file[2] not in ("main", COMMIT)):
                return self.answer(404, b'{"error": "no such revision"}', {"X-Error-Code": "RevisionNotFound"}, body)
            folder = repositories[match[1]]
            if info:
                return self.answer(200, json.dumps(self.listing(info, folder)).encode(), {}, body)
            target = folder / file[3]
            if not target.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            content = target.read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, content, headers, body)

        def listing(self, info, folder):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            if info[2] == "tree":
                return [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in names.items()]
            return {"id": info[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

        def answer(self, status, content, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
