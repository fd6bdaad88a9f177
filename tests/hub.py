"""A local Hugging Face Hub on loopback, for tests of downloads and pushes.

    with LoopbackHub(tmp_path) as hub:
        hub.add("owner/model", folder)
        hub.add("owner/pictures", folder, kind="datasets")
        hub.answer(503, times=2, path="/commit/")
        command(sys.executable, "train.py", *flags, **hub.variables)
        assert (hub.files("me/result") / "README.md").is_file()

A process with these environment variables uses it over HTTP in place of huggingface.co. There is
one user, "me", with one token and write access to me/…; public repositories are readable by
everyone. A repository has one branch, main, and no history: its sha is a hash of its files. All
uploads are regular ones, so neither LFS nor Xet is used.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

# /api/models/{repo}[/{verb}/{revision}[/{path}]], and /{repo}/resolve/{revision}/{path}
REPOSITORY = re.compile(
    r"/(?:api/)?(?:(models|datasets)/)?([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?"
)


class LoopbackHub:
    """Use as a context manager: the Hub runs while the `with` block is active.

    variables: environment variables for client processes. HF_HOME is inside the Hub's folder,
        empty at first and shared by all processes that use these variables.
    requests: (method, path with query) of each request. Requests to other hosts arrive here too,
        with the full URL as the path, and get a 404.
    commits: (repository, summary, [paths]) of each commit. private: the private repositories.
    """

    user = "me"
    token = "hf_" + 4 * "loopback" + "me"

    def __init__(self, folder):
        self.folder = Path(folder)
        self.requests, self.commits, self.private = [], [], set()
        self.answers = []  # [status, remaining count, part of the path]
        self.lock = threading.Lock()  # one request at a time

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        home = self.folder / "home"
        self.variables = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            # If set in the environment, these would override HF_HOME and expose the user's cache.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` would contact s3.amazonaws.com
            # `datasets` also contacts datasets-server.127.0.0.1. With this Hub as the proxy,
            # requests to other hosts never reach a DNS resolver or the internet.
            "http_proxy": self.url,
            "https_proxy": self.url,
            "no_proxy": "127.0.0.1,localhost",
        }
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo, kind="models"):
        """The folder that contains a repository's files."""
        return self.folder / kind / repo

    def add(self, repo, source, kind="models"):
        """Add a public repository with a copy of a folder's files."""
        shutil.copytree(source, self.files(repo, kind), dirs_exist_ok=True)

    def answer(self, status, times=1, path=""):
        """Answer the next `times` requests whose path contains `path` with a status only.

        A status of 0 closes the connection without a response.
        """
        self.answers.append([status, times, path])


class Refused(Exception):
    """An error response: status, message, and the error code that distinguishes 404s."""


class Handler(BaseHTTPRequestHandler):
    """Handles one request and closes the connection after the response, as in HTTP/1.0."""

    def do_GET(self):
        self.hub, self.extra = self.server.hub, {}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            try:
                status, content = self.route(body)
            except Refused as refused:
                status, message, *code = refused.args
                content = {"error": message}
                self.extra |= {"X-Error-Message": message, "X-Error-Code": "".join(code)}
        if status == 0:
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**self.extra, "Content-Length": len(content)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_CONNECT = do_GET

    def log_message(self, *_):
        pass  # hub.requests records it

    def route(self, body):
        """(status, content) of the response; content is bytes or a JSON-serialisable object."""
        for wanted in self.hub.answers:
            status, times, part = wanted
            if times and part in self.path:
                wanted[1] -= 1
                raise Refused(status, "A test wants this answer")
        bearer = self.headers.get("Authorization")
        if bearer not in (None, f"Bearer {self.hub.token}"):
            raise Refused(401, "Invalid credentials in Authorization header")
        self.known = bearer is not None
        page, _, query = self.path.partition("?")
        if page == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if page == "/api/whoami-v2":
            return self.whoami()
        if page == "/api/repos/create":
            return self.create(**json.loads(body))
        found = REPOSITORY.fullmatch(page)
        if not found:
            raise Refused(404, "This is not here")
        kind, self.repo, verb, revision, path = (part and unquote(part) for part in found.groups())
        self.kind = kind or "models"
        self.folder = self.hub.files(self.repo, self.kind)
        hidden = self.repo in self.hub.private and not self.known
        if hidden or not self.folder.is_dir():
            raise Refused(404, "Repository not found", "RepoNotFound")
        self.extra["X-Repo-Commit"] = sha = oid(self.folder)
        if verb == "auth-check":
            self.check_writer(self.repo)
            return 200, {}
        if revision not in (None, "main", sha):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "resolve":
            return self.resolve(self.folder / path)
        here = entries(self.folder)
        if verb in (None, "revision"):
            return self.info(sha, here)
        if verb == "tree":
            return self.tree(path, "recursive=true" in query, here)
        if verb == "paths-info":
            return 200, [here[path] for path in parse_qs(body.decode())["paths"] if path in here]
        if verb not in ("preupload", "commit"):
            raise Refused(404, "This is not here")
        self.check_writer(self.repo)
        if verb == "preupload":
            return self.preupload(json.loads(body)["files"], here)
        return self.commit([json.loads(line) for line in body.splitlines()], here)

    def check_writer(self, repo):
        if not self.known:
            raise Refused(401, "Invalid username or password.")
        if not repo.startswith(f"{self.hub.user}/"):
            raise Refused(403, f"You don't have the rights to write to {repo}")

    def whoami(self):
        self.check_writer(f"{self.hub.user}/")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return 200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": auth}

    def create(self, name, organization=None, type="model", visibility="public", **_):
        repo, kind = f"{organization or self.hub.user}/{name}", f"{type}s"
        self.check_writer(repo)
        answer = {"url": self.page(repo, kind)}
        if self.hub.files(repo, kind).is_dir():
            return 409, {"error": "You already created this repository", **answer}
        self.hub.files(repo, kind).mkdir(parents=True)
        if visibility == "private":
            self.hub.private.add(repo)
        return 200, answer

    def page(self, repo, kind):
        return f"{self.hub.url}/{repo}" if kind == "models" else f"{self.hub.url}/{kind}/{repo}"

    def info(self, sha, here):
        siblings = [{"rfilename": path} for path, entry in here.items() if entry["type"] == "file"]
        private = self.repo in self.hub.private
        return 200, {"id": self.repo, "sha": sha, "private": private, "siblings": siblings}

    def resolve(self, file):
        if not file.is_file():
            raise Refused(404, "Entry not found", "EntryNotFound")
        self.extra["ETag"] = f'"{oid(file)}"'
        content, size = file.read_bytes(), file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content
        start, end = int(asked[1]), min(int(asked[2] or size) + 1, size)
        self.extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return 206, content[start:end]

    def tree(self, path, recursive, here):
        if path and not (self.folder / path).is_dir():
            raise Refused(404, f"There is no folder {path}", "EntryNotFound")
        below = f"{path}/" if path else ""
        inside = [name for name in here if name.startswith(below)]
        if not recursive:
            inside = [name for name in inside if "/" not in name.removeprefix(below)]
        return 200, [here[name] for name in inside]

    def preupload(self, files, here):
        """Return oids, so that the client can skip unchanged files in its commit."""
        same = {"uploadMode": "regular", "shouldIgnore": False}
        oids = {file["path"]: here.get(file["path"], {}).get("oid") for file in files}
        return 200, {"files": [{"path": p, "oid": known, **same} for p, known in oids.items()]}

    def commit(self, lines, here):
        header, *changes = ((line["key"], line["value"]) for line in lines)
        for key, value in changes:
            path = self.folder / value["path"]
            if key == "file":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(value["content"]))
            elif value["path"].rstrip("/") not in here:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                path.unlink() if key == "deletedFile" else shutil.rmtree(path)
        paths = [value["path"] for _, value in changes]
        self.hub.commits.append((self.repo, header[1]["summary"], paths))
        sha = oid(self.folder)
        url = f"{self.page(self.repo, self.kind)}/commit/{sha}"
        return 200, {"commitOid": sha, "commitUrl": url}


def oid(path):
    """The git blob hash of a file; for a folder, a hash of the names and oids in it."""
    if path.is_dir():
        content = "".join(f"{inside.name} {oid(inside)}\n" for inside in sorted(path.iterdir()))
        return hashlib.sha1(b"tree " + content.encode()).hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entries(folder):
    """{path: the Hub's metadata} for all files and folders of a repository."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, kind = path.relative_to(folder).as_posix(), "directory" if path.is_dir() else "file"
        found[name] = {"type": kind, "path": name, "size": path.stat().st_size, "oid": oid(path)}
    return found
