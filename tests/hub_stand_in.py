"""A server on loopback that speaks as much of the Hub's HTTP interface as uploading and loading a model takes.

It keeps repositories in memory. Writing needs the token; large files go through the LFS interface, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"
USER = "you"
LARGE = (".safetensors", ".bin", ".pt")


class Hub(ThreadingHTTPServer):
    """repositories: name -> {"private": bool, "branches": {branch: [(commit, message, {path: content})]}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.large, self.asked = {}, {}, []

    def files(self, repo, revision="main"):
        """The files of the newest commit of a branch, or of a commit."""
        branches = self.repositories[repo]["branches"]
        if revision in branches:
            return branches[revision][-1][2]
        return next(files for history in branches.values() for commit, _, files in history if commit == revision)

    def put(self, repo, files):
        """A repository as somebody else made it."""
        self.repositories[repo] = {"private": False, "branches": {"main": [(commit_of(files), "", dict(files))]}}


def commit_of(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Refusal(Exception):
    """A status, and the code by which the client knows what it means."""


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        """Nothing on stderr."""

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, path))
        try:
            for pattern, method, respond in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return respond(self, body, *found.groups())
            raise Refusal(404, "EntryNotFound")
        except Refusal as refusal:
            status, code = refusal.args
            return self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, told, status=200):
        self.send(status, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def writer(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized")

    def repository(self, repo):
        if repo not in self.server.repositories:
            raise Refusal(404, "RepoNotFound")
        return self.server.repositories[repo]

    def create(self, body):
        self.writer()
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"
        status = 409 if repo in self.server.repositories else 200
        empty = {"main": [("0" * 40, "initial commit", {})]}
        self.server.repositories.setdefault(repo, {"private": bool(private), "branches": empty})
        self.send_json({"url": f"{self.server.endpoint}/{repo}", "name": repo}, status)

    def validate(self, body):
        text = json.loads(body)["content"]
        front = yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL)[1])
        wrong = [
            name
            for name, kind in {"tags": list, "library_name": str, "license": str, "base_model": (str, list)}.items()
            if not isinstance(front.get(name, kind() if isinstance(kind, type) else ""), kind)
        ]
        wrong += [tag for tag in front.get("tags", []) if not isinstance(tag, str)]
        for entry in front.get("model-index", []):
            for result in entry["results"]:
                wrong += [key for key in ("task", "dataset", "metrics") if key not in result]
                wrong += [key for key in ("type", "name") if key not in result["dataset"]]
        errors = [{"message": f"{name} is wrong"} for name in wrong]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body, repo, _revision):
        self.writer()
        self.repository(repo)
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.send_json({"files": modes})

    def lfs_batch(self, body, repo):
        self.writer()
        self.repository(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.endpoint}/large/{asked['oid']}", "header": {}}
            known = {} if asked["oid"] in self.server.large else {"actions": {"upload": upload}}
            objects.append({"oid": asked["oid"], "size": asked["size"], **known})
        self.send_json({"transfer": "basic", "objects": objects})

    def keep_large(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "WrongHash")
        self.server.large[oid] = body
        self.send(200)

    def branch(self, body, repo, name):
        self.writer()
        branches = self.repository(repo)["branches"]
        status = 409 if name in branches else 200
        branches.setdefault(name, list(branches["main"]))
        self.send_json({}, status)

    def commit(self, body, repo, revision):
        self.writer()
        history = self.repository(repo)["branches"].get(revision)
        if history is None:
            raise Refusal(404, "RevisionNotFound")
        files, message = dict(history[-1][2]), ""
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        history.append((commit_of(files), message, files))
        told = {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{history[-1][0]}", "commitOid": history[-1][0]}
        self.send_json({"success": True, **told})

    def about(self, _body, repo, revision="main"):
        files = self.revision(repo, revision)
        told = {"id": repo, "sha": commit_of(files), "private": self.repository(repo)["private"], "tags": []}
        self.send_json({**told, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, _body, repo, revision, folder=""):
        files = self.revision(repo, revision)
        inside = {path: x for path, x in files.items() if path.startswith(folder and f"{folder}/")}
        if folder and not inside:
            raise Refusal(404, "EntryNotFound")
        entry = {"type": "file", "oid": "0"}
        self.send_json([{**entry, "path": path, "size": len(content)} for path, content in inside.items()])

    def resolve(self, _body, repo, revision, path):
        files = self.revision(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        about = {"X-Repo-Commit": commit_of(files), "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
        self.send(200, files[path], about)

    def revision(self, repo, revision):
        self.repository(repo)
        try:
            return self.server.files(repo, revision)
        except StopIteration:
            raise Refusal(404, "RevisionNotFound") from None


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", ("POST",), Request.create),
    (r"/api/validate-yaml", ("POST",), Request.validate),
    (rf"/api/models/{REPO}/preupload/(.+)", ("POST",), Request.preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", ("POST",), Request.lfs_batch),
    (r"/large/(\w+)", ("PUT",), Request.keep_large),
    (rf"/api/models/{REPO}/branch/(.+)", ("POST",), Request.branch),
    (rf"/api/models/{REPO}/commit/(.+)", ("POST",), Request.commit),
    (rf"/api/models/{REPO}", ("GET",), Request.about),
    (rf"/api/models/{REPO}/revision/(.+)", ("GET",), Request.about),
    (rf"/api/models/{REPO}/tree/([^/]+)/?(.*)", ("GET",), Request.tree),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), Request.resolve),
]


@contextmanager
def serving():
    """The server, running in a thread of its own."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextmanager
def client_of(hub, cache, monkeypatch):
    """The settings of huggingface_hub that HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN and HF_HUB_DISABLE_XET stand for."""
    from huggingface_hub import constants, hf_api

    with monkeypatch.context() as settings:
        settings.setattr(constants, "ENDPOINT", hub.endpoint)
        # made on import or at first use, with the endpoint of that moment
        settings.setattr(hf_api.api, "endpoint", hub.endpoint)
        settings.setattr("transformers.utils.hub._hf_api", None, raising=False)
        settings.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        settings.setattr(constants, "HF_HUB_CACHE", str(cache))
        settings.setattr(constants, "HF_HUB_DISABLE_XET", True)
        settings.setattr(constants, "HF_HUB_OFFLINE", False)
        settings.setenv("HF_TOKEN", TOKEN)
        yield
