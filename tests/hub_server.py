"""A file-backed Hugging Face Hub on loopback, for the real client to talk to.

    with HubServer(tmp_path) as hub:
        hub.fail("/commit/", 429, times=2, headers={"Retry-After": "1"})
        subprocess.run([sys.executable, "train_ltd.py", "--push_to_hub", ...], env={**os.environ, **hub.env()})
        card = hub.files("tester/my-lora")["README.md"]

It speaks the part of the protocol that huggingface_hub 2.x, diffusers and transformers use for model and dataset
repositories over plain HTTP and LFS: no Xet, no multipart uploads, no pull requests.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

# The real Hub switches to LFS at 10 MB; tests want to meet LFS with small files too.
LFS_THRESHOLD = 1 << 20
LFS_SUFFIXES = (".arrow", ".bin", ".ckpt", ".gz", ".mp4", ".npz", ".parquet", ".png", ".pt", ".pth", ".safetensors")

_API = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+(?:/[^/]+)?)"
_GIT = r"/(?:(?P<kind>dataset)s/)?(?P<repo_id>[^/]+(?:/[^/]+)?)"
_ROUTES = []


class HubError(Exception):
    """What an endpoint raises to answer with an error; `code` is what the client chooses its exception class by."""

    def __init__(self, status, message, code=None, headers=None, **body):
        super().__init__(message)
        self.status = status
        plain = message.encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": plain, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.body = {"error": message, **body}


@dataclass
class Request:
    """A request as the endpoints see it; `role` is "write", "read" or, without a token, None."""

    method: str
    path: str
    query: dict
    headers: Message
    body: bytes
    role: str | None

    def json(self):
        return json.loads(self.body)


@dataclass
class Repo:
    """A repository: branches name commits, a commit holds the whole table of its files."""

    kind: str
    id: str
    private: bool
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)


@dataclass
class Fault:
    """An error to answer the next `times` matching requests with."""

    match: str
    status: int | str
    times: int
    method: str | None
    headers: dict
    message: str

    def matches(self, method, path):
        line = f"{method} {path}"
        return self.times > 0 and self.method in (None, method) and (self.match in line or re.search(self.match, line))


def _route(method, pattern):
    def register(function):
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _lfs_pointer(entry):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{entry['sha256']}\nsize {entry['size']}\n"
    return text.encode()


def _file_json(path, entry):
    info = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["lfs"]:
        info["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": len(_lfs_pointer(entry))}
    return info


class HubServer:
    """The server and its store. `user` may write to its own namespace; `token` writes, `read_token` only reads."""

    def __init__(self, root: Path, user: str = "tester"):
        self.root = Path(root)
        self.user = user
        self.token = f"hf_{secrets.token_hex(17)}"
        self.read_token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self.released = threading.Event()

    def __enter__(self):
        self.root.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # What tests use

    def env(self, token: str | None = None) -> dict[str, str]:
        """Environment of a client process with an empty home of its own; `token=""` logs it out."""
        home = tempfile.mkdtemp(dir=self.root)
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": home,
            # Left over from the caller's environment, these would win over HF_HOME and HF_TOKEN.
            "HF_HUB_CACHE": os.path.join(home, "hub"),
            "HF_TOKEN_PATH": os.path.join(home, "token"),
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fail(self, match, status, times=1, method=None, headers=None, message="injected fault"):
        """Let the next `times` requests whose "METHOD path" contains or regex-matches `match` fail.

        `status` is an HTTP status, or "cut" (the connection is reset in the middle of the upload, or dropped in the
        middle of the download), "lost" (the request is carried out, but its answer never arrives), or "held" (it
        is carried out once `released` is set).
        """
        re.compile(match)
        with self._lock:
            self._faults.append(Fault(match, status, times, method, headers or {}, message))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The content of every file of a revision, `.gitattributes` included as on the real Hub."""
        with self._lock:
            repo = self.repos[repo_type, self._full_id(repo_id)]
            _, commit = self._commit(repo, revision)
            return {path: self.blobs[entry["sha256"]] for path, entry in commit["files"].items()}

    def add(self, repo_id: str, files: dict[str, bytes] | Path, repo_type: str = "model", private: bool = False):
        """A repository with these files, in any namespace: a base model, or somebody else's work."""
        if not isinstance(files, dict):
            folder = Path(files)
            paths = (path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        with self._lock:
            repo = self._new_repo(repo_type, self._full_id(repo_id), private)
            table = {path: self._entry(data, self._is_lfs(path, len(data))) for path, data in files.items()}
            self._add_commit(repo, "main", table)

    # Faults

    def take_fault(self, method, path) -> Fault | None:
        with self._lock:
            fault = next((fault for fault in self._faults if fault.matches(method, path)), None)
            if fault is not None:
                fault.times -= 1
            return fault

    # The store

    def _store(self, data) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return sha256

    def _entry(self, data, lfs):
        if lfs:
            return self._lfs_entry(self._store(data), len(data))
        return {"sha256": self._store(data), "size": len(data), "oid": _git_oid(data), "lfs": False}

    def _lfs_entry(self, sha256, size):
        entry = {"sha256": sha256, "size": size, "lfs": True}
        return {**entry, "oid": _git_oid(_lfs_pointer(entry))}

    def _is_lfs(self, path, size):
        return size > LFS_THRESHOLD or path.endswith(LFS_SUFFIXES) or "tfevents" in path

    def _full_id(self, repo_id):
        return repo_id if "/" in repo_id else f"{self.user}/{repo_id}"

    def _url(self, repo):
        return f"{self.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"

    def _new_repo(self, kind, repo_id, private):
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self._add_commit(repo, "main", {".gitattributes": self._entry(attributes.encode(), False)})
        return repo

    def _add_commit(self, repo, branch, changes):
        """Commit `changes`, a table of entries where None deletes, on top of a branch."""
        parent = repo.branches.get(branch)
        files = {**repo.commits[parent]["files"]} if parent else {}
        files.update(changes)
        files = {path: entry for path, entry in sorted(files.items()) if entry is not None}
        commit = {"parent": parent, "number": len(repo.commits), "files": files}
        sha = hashlib.sha1(json.dumps(commit).encode()).hexdigest()
        repo.commits[sha] = commit
        repo.branches[branch] = sha
        return sha

    def _commit(self, repo, revision):
        sha = repo.branches.get(revision) or revision
        if sha not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Who may do what

    def role(self, authorization) -> str | None:
        """The role behind an Authorization header; a token nobody knows is refused even where none is needed."""
        roles = {"": None, f"Bearer {self.token}": "write", f"Bearer {self.read_token}": "read"}
        if authorization not in roles:
            raise HubError(401, "Invalid credentials in Authorization header")
        return roles[authorization]

    def _is_mine(self, repo_id):
        return repo_id.split("/")[0] == self.user

    def _authorize(self, request, kind, repo_id):
        if request.role is None:
            raise HubError(401, "Invalid username or password.")
        if request.role == "read" or not self._is_mine(repo_id):
            namespace = repo_id.split("/")[0]
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')

    def _repo(self, request, kind, repo_id, write=False) -> Repo:
        repo = self.repos.get((kind, repo_id))
        visible = repo is not None and (not repo.private or (request.role is not None and self._is_mine(repo_id)))
        # The Hub tells the anonymous nothing: 401 both for what is not there and for what they may not touch, and
        # the client reads that as "not found". It does so by URL for https://, where we have to send the code.
        if request.role is None and (write or not visible):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not visible:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and (request.role == "read" or not self._is_mine(repo_id)):
            raise HubError(403, "Authorization error: you have no write access to this repository")
        return repo

    # Endpoints: account and repositories

    @_route("POST", r"/api/validate-yaml")
    def _validate_yaml(self, request):
        content = request.json()["content"]
        license_id = re.search(r"^license: (.*)$", content, re.MULTILINE)
        if license_id and not re.fullmatch(r"[a-z0-9.-]+", license_id[1]):
            raise HubError(400, f'"license" must be one of the known ones, got {license_id[1]}')
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return {"errors": [], "warnings": [] if content.startswith("---") else [warning]}

    @_route("POST", r"/api/repos/create")
    def _create_repo(self, request):
        ask = request.json()
        kind, repo_id = ask.get("type") or "model", f"{ask.get('organization') or self.user}/{ask['name']}"
        self._authorize(request, kind, repo_id)
        if (kind, repo_id) in self.repos:
            url = self._url(self.repos[kind, repo_id])
            raise HubError(409, f"You already created this {kind} repo: {repo_id}", url=url)
        repo = self._new_repo(kind, repo_id, ask.get("visibility") == "private" or bool(ask.get("private")))
        return {"url": self._url(repo), "name": repo.id, "id": repo.id}

    @_route("GET", _API + r"/auth-check(?P<write>/write)?")
    def _auth_check(self, request, kind, repo_id, write=None):
        self._repo(request, kind, repo_id, write=write is not None)
        return {}

    @_route("POST", _API + r"/branch/(?P<name>[^/]+)")
    def _create_branch(self, request, kind, repo_id, name):
        repo = self._repo(request, kind, repo_id, write=True)
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        repo.branches[name] = self._commit(repo, request.json().get("startingPoint", "main"))[0]
        return {}

    # Endpoints: reading

    @_route("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?")
    def _repo_info(self, request, kind, repo_id, revision="main"):
        repo = self._repo(request, kind, repo_id)
        sha, commit = self._commit(repo, revision)
        names = {"id": repo.id, "author": repo.id.split("/")[0], **({"modelId": repo.id} if kind == "model" else {})}
        counts = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {**names, **counts, "sha": sha, "siblings": [{"rfilename": path} for path in commit["files"]]}

    @_route("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, request, kind, repo_id, revision, path=""):
        repo = self._repo(request, kind, repo_id)
        files = self._commit(repo, revision)[1]["files"]
        recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        found = {}
        for name, entry in files.items():
            if not name.startswith(prefix):
                continue
            folders = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, (len(folders) if recursive else min(len(folders), 1)) + 1):
                folder = prefix + "/".join(folders[:depth])
                found[folder] = {"type": "directory", "path": folder, "oid": _git_oid(folder.encode()), "size": 0}
            if recursive or not folders:
                found[name] = _file_json(name, entry)
        if path and not found:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return list(found.values())

    @_route("GET", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, request, repo_id, revision, path, kind="model"):
        sha, commit = self._commit(self._repo(request, kind, repo_id), revision)
        headers = {"X-Repo-Commit": sha}
        if path not in commit["files"]:
            raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
        entry = commit["files"][path]
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers.update({"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"})
        if entry["lfs"]:
            headers.update({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])})
        data = self.blobs[entry["sha256"]]
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not asked or not any(asked.groups()):
            return 200, headers, data
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, headers, data[start:stop]

    # Endpoints: writing

    @_route("POST", _API + r"/preupload/(?P<revision>[^/]+)")
    def _preupload(self, request, kind, repo_id, revision):
        repo = self._repo(request, kind, repo_id, write=True)
        current = self._commit(repo, revision)[1]["files"]
        answers = []
        for file in request.json()["files"]:
            entry = current.get(file["path"])
            # The client compares this with the sha256 of an LFS file, the git hash of a regular one.
            oid = entry and (entry["sha256"] if entry["lfs"] else entry["oid"])
            mode = "lfs" if self._is_lfs(file["path"], file["size"]) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @_route("POST", _GIT + r"\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request, repo_id, kind="model"):
        repo = self._repo(request, kind, repo_id, write=True)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in request.json()["objects"]]
        for item in objects:
            # No actions means that the content is here already.
            if item["oid"] not in self.blobs:
                verify = {"href": f"{self._url(repo)}.git/info/lfs/verify", "header": {}}
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    @_route("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})")
    def _lfs_put(self, request, sha256):
        # As with the real Hub's presigned URLs, having the address is the permission.
        assert self._store(request.body) == sha256
        return {}

    @_route("POST", _GIT + r"\.git/info/lfs/verify")
    def _lfs_verify(self, request, repo_id, kind="model"):
        self._repo(request, kind, repo_id, write=True)
        assert len(self.blobs[request.json()["oid"]]) == request.json()["size"]
        return {}

    @_route("POST", _API + r"/commit/(?P<revision>[^/]+)")
    def _create_commit(self, request, kind, repo_id, revision):
        repo = self._repo(request, kind, repo_id, write=True)
        head = repo.branches[revision]
        current = repo.commits[head]["files"]
        changes = {}
        for operation in map(json.loads, request.body.splitlines()):
            key, value = operation["key"], operation["value"]
            path = value.get("path")
            if key == "file":
                changes[path] = self._entry(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                changes[path] = self._lfs_entry(value["oid"], len(self.blobs[value["oid"]]))
            elif key in ("deletedFile", "deletedFolder"):
                folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
                gone = [name for name in current if name == path or (folder and name.startswith(folder))]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes.update(dict.fromkeys(gone))
        sha = self._add_commit(repo, revision, changes)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self._url(repo)}/commit/{sha}", "hookOutput": ""}

    def answer(self, request):
        """Status, headers and body for a request."""
        # A HEAD is a GET whose body stays here.
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, function in _ROUTES:
            match = pattern.fullmatch(request.path)
            if match and method == route_method:
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                with self._lock:
                    result = function(self, request, **arguments)
                return result if isinstance(result, tuple) else _json(200, {}, result)
        raise HubError(404, f"No endpoint {request.method} {request.path}")


def _json(status, headers, body):
    return status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(body).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # With the default of 5, parallel downloads overflow the queue and wait a second for their next try.
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that goes away is its own business; anything else is a bug here and shows its traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def _serve(self):
        hub, url = self.server.hub, urlsplit(self.path)
        path, length = unquote(url.path), int(self.headers.get("Content-Length", 0))
        hub.requests.append((self.command, path))
        fault = hub.take_fault(self.command, path)
        if fault and fault.status == "held":
            hub.released.wait()
        if fault and fault.status == "cut" and length:
            self.rfile.read(length // 2)
            return self._reset()
        body = self.rfile.read(length)
        try:
            if fault and isinstance(fault.status, int):
                raise HubError(fault.status, fault.message, headers=fault.headers)
            role = hub.role(self.headers.get("Authorization", ""))
            query = parse_qs(url.query, keep_blank_values=True)
            reply = hub.answer(Request(self.command, url.path, query, self.headers, body, role))
        except HubError as error:
            reply = _json(error.status, error.headers, error.body)
        except Exception:
            traceback.print_exc()
            reply = _json(500, {}, {"error": traceback.format_exc()})
        if fault and fault.status == "lost":
            return self._reset()
        self._send(*reply, cut=bool(fault) and fault.status == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, status, headers, data, cut):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut

    def _reset(self):
        """Drop the connection as a crash would: a reset, without the FIN that socketserver sends first."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())
