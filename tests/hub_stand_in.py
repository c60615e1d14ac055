"""
A stand-in of the Hugging Face hub on the loopback interface, for the real clients: nothing of theirs is patched.

`huggingface_hub`, and through it transformers, peft and datasets, talk to it by `HF_ENDPOINT`, over HTTP (git-LFS's
protocol for large files, not Xet). What it answers is what the clients' source reads. Repositories are in memory.

    with HubStandIn() as hub:
        hub.add("ann/tiny", Path("folder of a model"))
        subprocess.run([...], env=hub.environment(home=tmp_path))
        hub.commits, hub.requests, hub.files("ann/new")
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hf_dskd.hub.licences import LICENCES


TYPES = {"models": "model", "datasets": "dataset"}
# https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
RELATIONS = ("adapter", "finetune", "merge", "quantized")
# What a new repository's .gitattributes sends to large file storage, of it what occurs here.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".parquet", ".arrow", ".npy", ".npz", ".zip", ".gz", ".png")
REPO_ID = r"[\w.-]+(?:/[\w.-]+)?"
ACTIONS = "revision|tree|paths-info|branch|preupload|commit"
# A name of two parts, or of one that no action follows.
NAME = rf"([^/]+(?:/(?!(?:{ACTIONS}|resolve)(?:/|$))[^/]+)?)"
DEFAULT_USERS = {"hf_write": {"name": "ann", "role": "write"}, "hf_read": {"name": "ann", "role": "read"}}


@dataclass
class File:
    """A file at a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def blob_id(self) -> str:
        """Git's id of what the repository itself holds."""
        stored = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass
class Repository:
    """Its commits, and what the branches and tags point at."""

    repo_id: str
    repo_type: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File], message: str) -> str:
        listing = json.dumps([self.refs.get(ref), message, {path: file.blob_id for path, file in files.items()}])
        sha = hashlib.sha1(f"{self.repo_type} {self.repo_id} {len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


@dataclass
class Commit:
    """One that a client made."""

    repo_id: str
    repo_type: str
    revision: str
    message: str
    added: dict[str, bytes]
    deleted: list[str]
    is_pr: bool


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = "", **answer: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.answer = status, message, code, answer


class HubStandIn:
    """
    The hub. A fresh repository holds `.gitattributes`, as the real one's does.

    Args:
        users (`dict[str, dict]`):
            By token: `name`, `role` (`"write"`, `"read"` or `"fineGrained"`, which may write in its own namespace
            unless `fineGrained` says otherwise as whoami does), and optionally `orgs`, a list of names where it may
            write too.
    """

    def __init__(self, users: dict[str, dict[str, Any]] = DEFAULT_USERS):
        self.lock = threading.RLock()
        self.interrupted = threading.Event()
        self.clear(users)

    def clear(self, users: dict[str, dict[str, Any]]) -> None:
        """Forgets all that it holds and was asked."""
        self.users = users
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[Commit] = []
        self.requests: list[tuple[str, str]] = []
        self._uploads_left: int | None = None
        self._interruption: int | None = None

    def __enter__(self) -> HubStandIn:
        self._server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = "hf_write") -> dict[str, str]:
        """Of a process whose hub this is; `home` holds its cache, `token` None means that nobody is logged in."""
        others = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return environment if token is None else environment | {"HF_TOKEN": token}

    def add(
        self,
        repo_id: str,
        files: Path | dict[str, bytes],
        repo_type: str = "model",
        gated: bool = False,
        card: dict[str, Any] | None = None,
    ) -> str:
        """A repository to be read, with a folder's files; `card` is README.md's metadata. Returns the commit."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        if card is not None:
            metadata = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
            files = {**files, "README.md": f"---\n{metadata}---\n".encode() + files.get("README.md", b"")}
        repository = self.create(repo_id, repo_type, gated=gated)
        content = {path: File(content, is_large(path, content, len(content))) for path, content in files.items()}
        return repository.commit("main", repository.commits[repository.refs["main"]] | content, "as given")

    def create(self, repo_id: str, repo_type: str, private: bool = False, gated: bool = False) -> Repository:
        """A fresh repository."""
        with self.lock:
            repository = Repository(repo_id, repo_type, private, gated)
            attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
            repository.commit("main", {".gitattributes": File(attributes.encode(), False)}, "initial commit")
            self.repositories[repo_type, repo_id] = repository
        return repository

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What the main branch holds, by path."""
        repository = self.repositories[repo_type, repo_id]
        return {path: file.content for path, file in repository.commits[repository.refs["main"]].items()}

    def interrupt_uploads(self, after: int, status: int | None = None) -> None:
        """
        Interrupts, once, the upload of a large file that follows `after` others; `interrupted` is set then.

        The connection is dropped halfway, which the client takes for a bad line: it tries again after a second, so
        that an interruption for good is to end its process once `interrupted` is set. With a `status` such as 403,
        which storage answers to an address that has expired, the client gives up.
        """
        self._uploads_left, self._interruption = after, status
        self.interrupted.clear()

    def interrupts(self) -> bool:
        """Whether the upload that begins now is the one to interrupt."""
        with self.lock:
            if self._uploads_left is None:
                return False
            self._uploads_left -= 1
            if self._uploads_left >= 0:
                return False
            self._uploads_left = None
            return True

    def user(self, authorization: str | None) -> dict[str, Any] | None:
        """Whose token a request carries."""
        if authorization is None:
            return None
        found = self.users.get(authorization.removeprefix("Bearer "))
        if found is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return found

    def may_write(self, user: dict[str, Any] | None, repo_id: str) -> bool:
        """Whether a token may change repositories of that name."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        namespace = repo_id.partition("/")[0]
        if user["role"] == "fineGrained":
            scopes = token_scopes(user)["scoped"]
            return any(
                scope["entity"]["name"] in (namespace, repo_id) and "repo.write" in scope["permissions"]
                for scope in scopes
            )
        return user["role"] == "write" and namespace in (user["name"], *user.get("orgs", ()))

    def readable(self, user: dict[str, Any] | None, repo_type: str, repo_id: str) -> Repository:
        """A repository that a user can see, or else what the hub answers, which doesn't tell why."""
        found = self.repositories.get((repo_type, repo_id))
        hidden = found is not None and found.private and (user is None or not self.owns(user, repo_id))
        if found is None or hidden:
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found

    def owns(self, user: dict[str, Any], repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (user["name"], *user.get("orgs", ()))

    def check_gate(self, user: dict[str, Any] | None, repository: Repository) -> None:
        """The files of a gated repository are for its owner; its name and listing are public."""
        if not repository.gated or (user and self.owns(user, repository.repo_id)):
            return
        name = repository.repo_id
        if user is None:
            raise Refused(401, f"Access to {name} is restricted. You must be authenticated to access it.", "GatedRepo")
        raise Refused(403, f"Access to {name} is restricted and you are not in the authorized list.", "GatedRepo")

    def at(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        """The commit that a branch, a tag, a pull request's ref or a commit's own name means, and its files."""
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]


def token_scopes(user: dict[str, Any]) -> dict[str, Any]:
    """Of a fine-grained token, as whoami tells them; by default those to write in its own namespace."""
    own = {"entity": {"type": "user", "name": user["name"]}, "permissions": ["repo.content.read", "repo.write"]}
    return user.get("fineGrained", {"global": [], "scoped": [own]})


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether a file goes to large file storage: by its name, more than 10 MB, or not text."""
    return path.endswith(LARGE) or size > 10 * 2**20 or b"\0" in sample[:512]


def described(path: str, file: File) -> dict[str, Any]:
    """A file in a tree, as the client reads it."""
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    if file.large:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return entry


def folders(files: dict[str, File]) -> set[str]:
    """Every folder that a file lies in."""
    found = set()
    for path in files:
        parts = path.split("/")[:-1]
        found |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    return found


def described_folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def metadata_of(readme: str) -> tuple[Any, list[str]]:
    """A card's metadata, and what is wrong with it as YAML."""
    block = re.match(r"\s*---\r?\n([\s\S]*?)\r?\n---[ \t]*(?:\r?\n|$)", readme)
    if block is None:
        return None, []
    try:
        return yaml.safe_load(block[1]), []
    except yaml.YAMLError as error:
        return None, [f"YAML Metadata Error: {error}"]


def _strings(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's metadata, as far as the hub's documentation says what is legal."""
    metadata, errors = metadata_of(readme)
    if errors:
        return errors, []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be a mapping"], []
    warnings = []
    licences = _strings(metadata.get("license", []))
    for licence in licences:
        if licence not in LICENCES:
            errors.append(f'"license" with value {licence!r} must be one of {sorted(LICENCES)}')
    if "other" in licences and "license_name" not in metadata:
        warnings.append('"license_name" is missing: "license" is "other"')
    if "base_model_relation" in metadata and metadata["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    for key in ("base_model", "datasets"):
        for name in _strings(metadata.get(key, [])):
            if not isinstance(name, str) or not re.fullmatch(REPO_ID, name):
                errors.append(f'"{key}" with value {name!r} is not valid. Use an id from https://hf.co/{key}.')
    for key in ("tags", "language", "metrics"):
        if any(not isinstance(value, str) for value in _strings(metadata.get(key, []))):
            errors.append(f'"{key}" must be a string or a list of strings')
    return errors + check_model_index(metadata.get("model-index")), warnings


def check_model_index(index: Any) -> list[str]:
    """https://github.com/huggingface/hub-docs/blob/main/modelcard.md: what `model-index` must hold."""
    if index is None:
        return []
    if not isinstance(index, list) or len(index) != 1:
        return ['"model-index" must be a list of one model']
    texts, others = {"name": index[0].get("name")}, {"results": index[0].get("results")}
    for place, result in enumerate(others["results"] or ()):
        where = f"results[{place}]"
        for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
            texts[f"{where}.{part}.{key}"] = (result.get(part) or {}).get(key)
        others[f"{where}.metrics"] = result.get("metrics") or None
        for number, metric in enumerate(result.get("metrics") or ()):
            texts[f"{where}.metrics[{number}].type"] = metric.get("type")
            others[f"{where}.metrics[{number}].value"] = metric.get("value")
    wrong = [name for name, value in texts.items() if not isinstance(value, str)]
    wrong += [name for name, value in others.items() if value is None]
    return [f'"model-index[0].{name}" is required' for name in wrong]


class Server(ThreadingHTTPServer):
    """Says nothing of clients that went away: tests end some."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if self.command == "PUT":
            self.upload(path)
            return
        self.content = self.body()
        try:
            for pattern, methods, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    self.user = self.hub.user(self.headers.get("Authorization"))
                    with self.hub.lock:
                        answer(self, *(None if part is None else unquote(part) for part in match.groups()))
                    return
            raise Refused(404, f"this stand-in of the hub has no {self.command} {path}")
        except Refused as refusal:
            self.refuse(refusal)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(
        self, content: bytes, kind: str = "application/json", status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer(self, content: Any, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status=status)

    def refuse(self, refusal: Refused, **headers: str) -> None:
        about = {"X-Error-Code": refusal.code} if refusal.code else {}
        content = json.dumps({"error": refusal.message, **refusal.answer}).encode()
        self.send(content, status=refusal.status, headers={"X-Error-Message": refusal.message, **about, **headers})

    def repository(self, kind: str | None, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.readable(self.user, TYPES[kind or "models"], repo_id)
        if write and not self.hub.may_write(self.user, repo_id):
            raise Refused(403, "Forbidden: you don't have write access to this repository")
        return repository

    # Accounts and repositories

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "a token", "role": self.user["role"], "createdAt": "2024-01-01T00:00:00.000Z"}
        if self.user["role"] == "fineGrained":
            token["fineGrained"] = token_scopes(self.user)
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.user.get("orgs", ())]
        name = self.user["name"]
        about = {"type": "user", "name": name, "fullname": name, "orgs": organizations}
        self.answer({**about, "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        given = json.loads(self.content)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        kind = given.get("type") or "model"
        repo_id = f"{given.get('organization') or self.user['name']}/{given['name']}"
        if not self.hub.may_write(self.user, repo_id):
            namespace = repo_id.partition("/")[0]
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            raise Refused(409, f"You already created this {kind} repo", url=url)
        private = bool(given.get("private")) or given.get("visibility") == "private"
        self.hub.create(repo_id, kind, private=private)
        self.answer({"url": url, "name": repo_id, "id": repo_id})

    def validate(self) -> None:
        errors, warnings = check_card(json.loads(self.content)["content"])
        said = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        if errors:
            raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors)[:500], **said)
        self.answer(said)

    # Reading

    def info(self, kind: str, repo_id: str, revision: str | None) -> None:
        repository = self.repository(kind, repo_id)
        sha, files = self.hub.at(repository, revision or "main")
        siblings = []
        for path, file in files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": len(file.content), "blobId": file.blob_id}
                if file.large:
                    about = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
                    sibling["lfs"] = about
            siblings.append(sibling)
        readme = files["README.md"].content.decode() if "README.md" in files else ""
        card = metadata_of(readme)[0]
        found = {
            "_id": sha[:24],
            "id": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": sha,
            **dict.fromkeys(("lastModified", "createdAt"), "2024-01-01T00:00:00.000Z"),
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            **{"disabled": False, "downloads": 0, "likes": 0},
            "tags": _strings((card or {}).get("tags", [])),
            "siblings": siblings,
        }
        self.answer(found | ({"cardData": card} if card else {}))

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        _, files = self.hub.at(self.repository(kind, repo_id), revision)
        start = f"{folder}/" if folder else ""
        if folder and folder not in folders(files):
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        entries = [described_folder(path) for path in folders(files)] + [described(*item) for item in files.items()]
        below = [entry for entry in entries if entry["path"].startswith(start)]
        self.answer([entry for entry in below if recursive or "/" not in entry["path"][len(start) :]])

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self.hub.at(self.repository(kind, repo_id), revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.content)["paths"]
        else:
            wanted = parse_qs(self.content.decode()).get("paths", [])
        found = [described(path, files[path]) for path in wanted if path in files]
        self.answer(found + [described_folder(path) for path in wanted if path in folders(files)])

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(kind, repo_id)
        self.hub.check_gate(self.user, repository)
        sha, files = self.hub.at(repository, revision)
        if path not in files:
            self.refuse(Refused(404, "Entry not found", "EntryNotFound"), **{"X-Repo-Commit": sha})
            return
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.etag}"'}
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.send(file.content, "application/octet-stream", headers=headers)
            return
        size = len(file.content)
        first = int(part[1]) if part[1] else max(size - int(part[2]), 0)
        last = min(int(part[2]), size - 1) if part[1] and part[2] else size - 1
        if first >= size:
            raise Refused(416, f"Requested range {part[0]} is not satisfiable: {size} bytes")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send(file.content[first : last + 1], "application/octet-stream", 206, headers)

    # Writing

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        _, files = self.hub.at(self.repository(kind, repo_id, write=True), revision)
        modes = []
        for given in json.loads(self.content)["files"]:
            path = given["path"]
            large = is_large(path, base64.b64decode(given["sample"]), given["size"])
            there = files.get(path)
            mode = "lfs" if large else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
        self.answer({"files": modes})

    def batch(self, kind: str | None, repo_id: str) -> None:
        self.repository(kind, repo_id, write=True)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/verify/{wanted['oid']}"},
            }
            objects.append(wanted if wanted["oid"] in self.hub.objects else {**wanted, "actions": actions})
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, path: str) -> None:
        """To storage, whose addresses are signed: no token comes with it."""
        if self.hub.interrupts():
            if self.hub._interruption is None:
                self.rfile.read(1)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.body()
                self.refuse(Refused(self.hub._interruption, "Request has expired"))
            self.hub.interrupted.set()
            return
        content = self.body()
        oid = path.removeprefix("/storage/")
        if hashlib.sha256(content).hexdigest() != oid:
            self.refuse(Refused(400, f"{oid} is not the SHA-256 of the {len(content)} bytes that came"))
            return
        self.hub.objects[oid] = content
        self.send(b"", "text/plain")

    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.content)["size"]:
            raise Refused(404, f"{oid} was not uploaded")
        self.answer({})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        parent, before = self.hub.at(repository, revision)
        header: dict[str, Any] = {}
        added: dict[str, File] = {}
        deleted: list[str] = []
        for line in self.content.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"{value['path']} points at {value['oid']}, which was not uploaded")
                added[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                if value["path"] not in before:
                    raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                deleted.append(value["path"])
            else:
                raise Refused(400, f"{key!r} is not an operation of a commit")
        if header.get("parentCommit", parent) != parent:
            raise Refused(412, "The expected parent commit is not the branch's last one")
        if "README.md" in added:
            errors, _ = check_card(added["README.md"].content.decode())
            if errors:
                raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors)[:500])
        is_pr = "create_pr" in self.query
        number = sum(name.startswith("refs/pr/") for name in repository.refs) + 1
        ref = f"refs/pr/{number}" if is_pr else revision
        after = {path: file for path, file in before.items() if path not in deleted} | added
        sha = repository.commit(ref, after, header["summary"])
        contents = {path: file.content for path, file in added.items()}
        self.hub.commits.append(
            Commit(repo_id, repository.repo_type, ref, header["summary"], contents, deleted, is_pr)
        )
        home = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{home}/commit/{sha}", "hookOutput": ""}
        self.answer(answer | ({"pullRequestUrl": f"{home}/discussions/{number}"} if is_pr else {}))


KIND = rf"/api/({'|'.join(TYPES)})/{NAME}"
LINK = rf"/(?:(datasets)/)?{NAME}"
ROUTES = [
    ("/api/whoami-v2", ("GET",), Handler.whoami),
    ("/api/repos/create", ("POST",), Handler.create),
    ("/api/validate-yaml", ("POST",), Handler.validate),
    (rf"{KIND}(?:/revision/([^/]+))?", ("GET",), Handler.info),
    (rf"{KIND}/tree/([^/]+)(?:/(.+))?", ("GET",), Handler.tree),
    (rf"{KIND}/paths-info/([^/]+)", ("POST",), Handler.paths_info),
    (rf"{KIND}/preupload/([^/]+)", ("POST",), Handler.preupload),
    (rf"{KIND}/commit/([^/]+)", ("POST",), Handler.commit),
    (rf"{LINK}\.git/info/lfs/objects/batch", ("POST",), Handler.batch),
    (r"/verify/(\w+)", ("POST",), Handler.verify),
    (rf"{LINK}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), Handler.resolve),
]
