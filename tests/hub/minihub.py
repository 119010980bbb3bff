"""A stand-in for the Hub, in memory: the endpoints that pushing and pulling a model repository takes, over real HTTP.

hub = MiniHub()
subprocess.run(..., env=os.environ | hub.environment(folder))  # to be set before huggingface_hub is imported
hub.files("tester/name")["README.md"]
hub.failing = 500  # from now on it answers this to everything that would change it
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

OWNER, TOKEN = "tester", "hf_dummy"
REPO = r"([^/]+/[^/]+)"
DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class MiniHub:
    """Repositories as histories of (commit, {path: bytes}). failing: the status of the answer to every POST and PUT."""

    failing: int | None = None
    repos: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    unhandled: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that is to take this for the Hub, with caches of its own in `home`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, repo: str) -> dict[str, bytes]:
        """Path → content, at the last commit."""
        return self.repos[repo][-1][1]

    def commit(self, repo: str, lines: list[dict]) -> str:
        files = dict(self.files(repo))
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.messages.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind in ("deletedFile", "deletedEntry"):
                files.pop(value["path"], None)
        self.repos[repo].append((hashlib.sha1(f"{repo} {len(self.repos[repo])}".encode()).hexdigest(), files))
        return self.repos[repo][-1][0]

    def revision(self, repo: str, name: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.repos[repo]
        return history[-1] if name == "main" else next((commit for commit in history if commit[0] == name), None)


class Handler(BaseHTTPRequestHandler):
    hub: MiniHub
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        path, body = unquote(urlparse(self.path).path), self.read_body()
        if self.hub.failing and self.command in ("POST", "PUT"):
            return self.fail(self.hub.failing, "Failing")
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                repo = match[1] if match.re.groups and "/" in match[1] else None
                if repo and repo not in self.hub.repos:
                    return self.fail(404, "RepoNotFound")
                return answer(self, *match.groups(), body)
        self.hub.unhandled.append(f"{self.command} {self.path}")
        return self.fail(404, "NotFound")

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def log_message(self, *arguments):
        """Says nothing."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, values=None, status: int = 200, raw: bytes | None = None, **headers: str):
        body = json.dumps({} if values is None else values).encode() if raw is None else raw
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = "application/json" if raw is None else "application/octet-stream"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, **headers: str):
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def who_am_i(self, body):
        role = {"type": "access_token", "accessToken": {"role": "write"}}
        self.answer({"type": "user", "name": OWNER, "orgs": [], "auth": role})

    def check_metadata(self, body):
        self.answer({"errors": [], "warnings": []})

    def create(self, body):
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        exists = repo in self.hub.repos
        self.hub.repos.setdefault(repo, [("0" * 40, {})])
        self.answer({"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}, 409 if exists else 200)

    def before_upload(self, repo, revision, body):
        def mode(path):
            return "lfs" if path.endswith((".safetensors", ".bin", ".pt", ".png")) else "regular"

        files = json.loads(body)["files"]
        plan = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None} for f in files]
        self.answer({"files": plan})

    def plan_objects(self, repo, body):
        def upload(wanted):
            actions = {"upload": {"href": f"{self.hub.address}/_lfs/{wanted['oid']}"}}
            return {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True, "actions": actions}

        self.answer({"transfer": "basic", "objects": [upload(wanted) for wanted in json.loads(body)["objects"]]})

    def receive_object(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer()

    def commit(self, repo, revision, body):
        name = self.hub.commit(repo, [json.loads(line) for line in body.splitlines()])
        self.answer({"success": True, "commitOid": name, "commitUrl": f"{self.hub.address}/{repo}/commit/{name}"})

    def tree(self, repo, revision, body):
        _, files = self.hub.revision(repo, revision)
        self.answer([{"type": "file", "path": k, "size": len(v), "oid": blob(v)} for k, v in sorted(files.items())])

    def about(self, repo, revision, body):
        if (found := self.hub.revision(repo, revision or "main")) is None:
            return self.fail(404, "RevisionNotFound")
        about = {"_id": "0", "id": repo, "modelId": repo, "sha": found[0], "private": False, "gated": False}
        about |= {"disabled": False, "downloads": 0, "likes": 0, "tags": [], "lastModified": DATE, "createdAt": DATE}
        return self.answer(about | {"siblings": [{"rfilename": path} for path in found[1]]})

    def download(self, repo, revision, path, body):
        if (found := self.hub.revision(repo, revision)) is None:
            return self.fail(404, "RevisionNotFound")
        commit, files = found
        if path not in files:
            return self.fail(404, "EntryNotFound", X_Repo_Commit=commit)
        return self.answer(raw=files[path], ETag=f'"{blob(files[path])}"', X_Repo_Commit=commit, Accept_Ranges="bytes")


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES = [
    (r"/api/whoami-v2", Handler.who_am_i),
    (r"/api/validate-yaml", Handler.check_metadata),
    (r"/api/repos/create", Handler.create),
    (rf"/api/models/{REPO}/preupload/(.+)", Handler.before_upload),
    (rf"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.plan_objects),
    (r"/_lfs/([0-9a-f]+)", Handler.receive_object),
    (rf"/api/models/{REPO}/tree/([^/]+)/?.*", Handler.tree),
    (rf"/api/models/{REPO}(?:/revision/(.+))?", Handler.about),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.download),
]
