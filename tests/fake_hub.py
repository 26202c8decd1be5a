"""A Hugging Face Hub on localhost with one repository, of a model or of a data set.

It answers as huggingface.co does: listings, a relative redirect for small files and an absolute one for large files,
commits, entity tags and error codes in headers.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants


class FakeHub:
    """One repository, ``owner/name``.

    Attributes
    ----------
    commits
        Files of each commit.
    refs
        Commit of each branch and tag.
    refused
        Part of a path to the status and the X-Error-Code that it gets.
    fetched, seen
        Files whose content was sent, and paths that were asked for.
    """

    def __init__(self, commits: dict[str, dict[str, bytes]], refs: dict[str, str]) -> None:
        self.commits = commits
        self.refs = refs
        self.refused: dict[str, tuple[int, str]] = {}
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.seen.append(path)
        for part, (status, code) in self.refused.items():
            if part in path:
                return status, {"X-Error-Code": code} if code else {}, b""
        words = path.strip("/").split("/")
        if words[0] == "stored":
            commit, name = words[1], "/".join(words[2:])
            self.fetched += [name] if method == "GET" else []
            return 200, self._headers(commit, name), self.commits[commit][name]
        is_api = words[0] == "api"
        words = words[2:] if is_api else words[words[0] == "datasets" :]
        if words[:2] != ["owner", "name"]:
            return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}, b""
        revision = unquote(words[3])
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if words[2] in ("tree", "paths-info"):
            below = "/".join(words[4:])
            files = {name: body for name, body in self.commits[commit].items() if name.startswith(below)}
            folders = sorted({str(parent) for name in files for parent in PurePosixPath(name).parents} - {".", below})
            found = [{"type": "directory", "path": name, "oid": "0"} for name in folders]
            found += [{"type": "file", "path": name, "size": len(b), "oid": "0"} for name, b in files.items()]
            return 200, {}, json.dumps(found).encode()
        if is_api:
            siblings = [{"rfilename": name} for name in self.commits[commit]]
            return 200, {}, json.dumps({"id": "owner/name", "sha": commit, "siblings": siblings}).encode()
        name = "/".join(words[4:])
        if name not in self.commits[commit]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = self._headers(commit, name)
        if name.endswith(".safetensors"):
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(self.commits[commit][name]))}
            return 302, headers | linked | {"Location": f"{constants.ENDPOINT}/stored/{commit}/{name}"}, b""
        return 307, headers | {"Location": f"/stored/{commit}/{name}"}, b""

    def _headers(self, commit: str, name: str) -> dict[str, str]:
        return {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(self.commits[commit][name]).hexdigest()}"'}


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, *, offline: bool = False) -> None:
    """Point the client, whose settings are read from the environment once, to another Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def point_datasets_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path, *, offline: bool = False) -> None:
    """Point the library ``datasets`` to another Hub and an empty cache."""
    import datasets

    point_at(monkeypatch, endpoint, offline=offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "datasets" / "downloads")
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # another server, which converts published files
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@contextmanager
def served(fake: FakeHub) -> Iterator[str]:
    """Answer for `fake` on localhost; gives the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))  # else the next request would begin with it
            status, headers, body = fake.answer(self.command, unquote(urlsplit(self.path).path))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
