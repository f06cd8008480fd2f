"""A Hugging Face hub on this machine, for tests: folders under the names of models, and errors for other names."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GATED = "gated"
"""In place of a folder: a gated model."""


@contextlib.contextmanager
def fake_hub(models: Mapping[str, Mapping[str, Path | str]]):
    """The address of a hub that runs in the context, and a list of the requested paths.

    Args:
        models: folders, or GATED, by names such as "tiny/gpt2" and then by revision.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.path)
            path = self.path.partition("?")[0].strip("/").split("/")
            match path:
                case ["api", "models", owner, name, *rest]:
                    self.answer_api(f"{owner}/{name}", rest)
                case [owner, name, "resolve", revision, *file]:
                    self.answer_file(f"{owner}/{name}", revision, "/".join(file))
                case _:
                    self.answer(404, b"{}")

        def do_HEAD(self):
            self.do_GET()

        def answer_api(self, name, rest):
            kind, revision = (*rest, "main", "main")[:2] if rest else ("revision", "main")
            if name not in models:
                self.answer(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            elif (folder := find(name, revision)) is None:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = [] if folder == GATED else [path for path in sorted(folder.rglob("*")) if path.is_file()]
                names = ["config.json"] if folder == GATED else [str(path.relative_to(folder)) for path in files]
                if kind == "tree":
                    sizes = [10] if folder == GATED else [path.stat().st_size for path in files]
                    entries = zip(names, sizes, strict=True)
                    value = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in entries]
                else:
                    siblings = [{"rfilename": name} for name in names]
                    value = {"id": name, "sha": commit(name, revision), "siblings": siblings}
                self.answer(200, json.dumps(value).encode())

        def answer_file(self, name, revision, file):
            folder = find(name, revision)
            if folder == GATED:
                self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
                return
            data = (folder / file).read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": commit(name, revision)})

        def answer(self, status, data, headers=None):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    def commit(name, revision):
        return revision if len(revision) == 40 else hashlib.sha1(f"{name} {revision}".encode()).hexdigest()

    def find(name, revision):
        folders = models[name]
        return folders.get(revision) or {commit(name, known): folder for known, folder in folders.items()}.get(revision)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join(10)
