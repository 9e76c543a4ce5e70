"""A stand-in of the Hub on loopback: as much of its HTTP interface as huggingface_hub and transformers ask for.

It keeps repositories in memory: branches of commits, each a mapping of paths to files; contents of large files go to a
store of their own, by their sha256, as on the Hub. Answers, error codes and headers are those that huggingface_hub 2.4
reads. `calls` records every request.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 10 << 20  # bytes; as on the Hub, other files are large if they are no text


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id: of a large file, that of the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        content = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob_id


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        listed = sorted((path, file.blob_id) for path, file in files.items())
        commit = hashlib.sha1(repr((self.branches.get(branch), message, listed)).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def files(self, branch: str = "main") -> dict[str, File]:
        return self.commits[self.branches[branch]]


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    status: int
    sent: int  # bytes of the request's body
    with_token: bool

    def __str__(self) -> str:
        return f"{self.status} {self.method:4} {self.path}" + (f"  {self.sent:,} bytes" if self.sent else "")


class Refusal(Exception):
    """A status, and what the Hub says in body and headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status, self.content = status, {"error": message, **content}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class HubStandIn:
    """Use as a context manager. `users`: the owner of each token that is accepted.

    cut: sha256 of large files in the middle of whose upload the connection is cut.
    multipart: size of the parts in which larger files are asked for; None: all in one.
    """

    def __init__(self, users: dict[str, str]):
        self.users, self.cut, self.multipart = users, set(), None
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.calls: list[Call] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/storage"  # another host, as the Hub's is

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def puts(self) -> list[str]:
        """sha256 of the large files whose contents were sent whole."""
        return [call.path.split("/")[2] for call in self.calls if call.method == "PUT" and call.status == 200]

    def listing(self) -> str:
        return "\n".join(map(str, self.calls))


class Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        path, status = address.path, 0
        try:
            if self.command == "PUT" and path.split("/")[2] in self.hub.cut:
                self.rfile.read(length // 2)
                self.connection.close()
                self.close_connection = True
                length //= 2
                return
            self.body = self.rfile.read(length)
            status, headers, content = self.find(path)
        except Refusal as refusal:
            status, headers, content = refusal.status, refusal.headers, refusal.content
        finally:
            shown = re.sub(r"\b[0-9a-f]{40,}\b", lambda match: match[0] if "/storage/" in path else match[0][:7], path)
            with self.hub.lock:
                self.hub.calls.append(Call(self.command, shown, status, length, self.token is not None))
        self.respond(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def respond(self, status: int, headers: dict[str, str], content: bytes | dict | list) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, path: str) -> tuple[int, dict, bytes | dict | list]:
        name = r"(?P<name>[^/]+/[^/]+)"
        for pattern, method in (
            (r"/api/whoami-v2", self.who_am_i),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_card),
            (rf"/api/models/{name}", self.information),
            (rf"/api/models/{name}/revision/(?P<revision>.+)", self.information),
            (rf"/api/models/{name}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", self.tree),
            (rf"/api/models/{name}/refs", self.refs),
            (rf"/api/models/{name}/preupload/(?P<revision>.+)", self.preupload),
            (rf"/api/models/{name}/branch/(?P<branch>.+)", self.create_branch),
            (rf"/api/models/{name}/commit/(?P<revision>.+)", self.commit),
            (r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.resolve),
            (r"/storage/(?P<sha256>[0-9a-f]{64})(?:/(?P<part>\d+|complete))?", self.storage),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                with self.hub.lock:
                    return method(**{key: value and unquote(value) for key, value in match.groupdict().items()})
        raise Refusal(404, f"no such address: {path}")

    # who may do what

    def user(self) -> str | None:
        if self.token is not None and self.token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(self.token)

    def repository(self, name: str, write: bool = False) -> Repository:
        """To those who may not see a repository, the Hub says that there is none, and to all without a token, 401."""
        user, found = self.user(), self.hub.repositories.get(name)
        if found is None or (found.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and user != name.split("/")[0] and "create_pr" not in self.query:
            raise Refusal(403, "You don't have the rights to write here")
        return found

    def revision_of(self, repository: Repository, revision: str | None) -> str:
        commit = repository.branches.get(revision or "main", revision)
        if commit not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # the Hub's interface

    def who_am_i(self):
        if self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        return 200, {}, {"type": "user", "name": self.user(), "orgs": []}

    def create(self):
        wanted, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if name.split("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        repository = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.commit("main", {".gitattributes": File(attributes, large=False)}, "initial commit")
        self.hub.repositories[name] = repository
        return 200, {}, {"url": url, "name": name}

    def validate_card(self):
        content = json.loads(self.body)["content"]
        metadata = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            parsed = yaml.safe_load(metadata[1]) if metadata else {}
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}]) from None
        problems = [] if isinstance(parsed, dict) else [{"message": "metadata must be a mapping"}]
        if problems:
            raise Refusal(400, "Invalid YAML", errors=problems)
        return 200, {}, {"errors": [], "warnings": [] if parsed else [{"message": "empty or missing yaml metadata"}]}

    def information(self, name, revision=None):
        repository = self.repository(name)
        commit = self.revision_of(repository, revision)
        files = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        return 200, {}, {"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []}

    def tree(self, name, revision, under=None):
        repository = self.repository(name)
        files = repository.commits[self.revision_of(repository, revision)]
        found = {path: file for path, file in files.items() if not under or path.startswith(f"{under}/")}
        if under and not found:
            raise Refusal(404, f"{under} does not exist on {revision}", "EntryNotFound")
        return 200, {}, [tree_entry(path, file) for path, file in sorted(found.items())]

    def refs(self, name):
        branches = self.repository(name).branches.items()
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": commit} for key, commit in branches]
        return 200, {}, {"branches": listed, "converts": [], "tags": []}

    def create_branch(self, name, branch):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        repository.branches[branch] = self.revision_of(repository, json.loads(self.body).get("startingPoint"))
        return 200, {}, {}

    def preupload(self, name, revision):
        repository = self.repository(name, write=True)
        present = repository.commits[self.revision_of(repository, revision)]

        def described(entry):
            large = entry["size"] > LARGE or b"\0" in base64.b64decode(entry["sample"])
            mode = "lfs" if large or entry["path"].endswith(".safetensors") else "regular"
            known = {"oid": present[entry["path"]].etag} if entry["path"] in present else {}
            return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **known}

        return 200, {}, {"files": [described(entry) for entry in json.loads(self.body)["files"]]}

    def batch(self, name):
        user = self.user()
        if user is None or name not in self.hub.repositories:
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return 200, {}, {"transfer": "basic", "objects": [self.action(**o) for o in json.loads(self.body)["objects"]]}

    def action(self, oid, size):
        if oid in self.hub.store:
            return {"oid": oid, "size": size}
        link, length = f"{self.hub.storage}/{oid}", self.hub.multipart
        upload = {"href": link}
        if length and size > length:
            links = {str(part + 1): f"{link}/{part + 1}" for part in range(-(-size // length))}
            upload = {"href": f"{self.hub.endpoint}/storage/{oid}/complete", "header": {"chunk_size": length, **links}}
        return {"oid": oid, "size": size, "actions": {"upload": upload}}

    def storage(self, sha256, part=None):
        if self.command in ("GET", "HEAD"):
            return 200, {"ETag": f'"{sha256}"'}, self.hub.store[sha256]
        content = self.body
        if part == "complete":
            numbers = [entry["partNumber"] for entry in json.loads(self.body)["parts"]]
            content = b"".join(self.hub.parts.pop((sha256, number)) for number in numbers)
        elif part:
            self.hub.parts[sha256, int(part)] = content
            return 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, "the content has another sha256")
        self.hub.store[sha256] = content
        return 200, {}, {}

    def commit(self, name, revision):
        repository = self.repository(name, write=True)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        files = dict(repository.commits[self.revision_of(repository, revision)])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise Refusal(400, f"the content of {value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.store[value["oid"]], large=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {operation['key']}")
        request = None
        if "create_pr" in self.query:
            request = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
            revision = f"refs/pr/{request}"
        commit = repository.commit(revision, files, header["value"]["summary"])
        url = f"{self.hub.endpoint}/{name}"
        link = {"pullRequestUrl": f"{url}/discussions/{request}"} if request else {}
        return 200, {}, {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}", **link}

    def resolve(self, name, revision, file):
        repository = self.repository(name)
        commit = self.revision_of(repository, revision)
        found = repository.commits[commit].get(file)
        if found is None:
            refusal = Refusal(404, f"Entry not found: {file}", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit
            raise refusal
        headers = {"X-Repo-Commit": commit, "ETag": f'"{found.etag}"'}
        if not found.large:
            return 200, headers, found.content
        linked = {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(len(found.content))}
        return 302, headers | linked | {"Location": f"{self.hub.storage}/{found.sha256}"}, b""


def tree_entry(path: str, file: File) -> dict:
    lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130} if file.large else None
    entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    return entry | ({"lfs": lfs} if lfs else {})
