# Copyright 2026 The Chain-of-Experts team. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Hub's HTTP calls on loopback, in memory: what `huggingface_hub` needs to create, upload, list and download.

with HubStandIn() as hub:
    subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})

A commit appears whole or not at all and takes an LFS file only if its bytes arrived with the right hash, as on the
real Hub. `hub.stall_after` makes uploads stop half-way, for tests that pull the plug then.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


TOKEN = "hf_StandInStandInStandInStandInStand"
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Commits as dicts of path to content; a branch is a name for one of them."""

    def __init__(self, is_private: bool):
        self.is_private = is_private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    @property
    def main(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class HubStandIn(ThreadingHTTPServer):
    """A Hub with one user, `tester`, whose only valid token is `TOKEN`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.stall_after: int | None = None  # bytes of an upload to take before taking no more
        self.stalled = threading.Event()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables that point `huggingface_hub` here, with caches of its own under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
        }

    def handle_error(self, request, client_address):
        """A client that hangs up in the middle is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubStandIn

    def log_message(self, *arguments):
        pass

    def reply(self, status: int, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str):
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size, limit = int(self.headers.get("Content-Length", 0)), self.server.stall_after
        if self.command == "PUT" and limit is not None and size > limit:
            self.rfile.read(limit)
            self.server.stalled.set()
            self.rfile.read(size)  # until the client gives up
            raise ConnectionAbortedError("the client hung up")
        return self.rfile.read(size)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append((self.command, path))
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        content = self.body()
        if given and given != TOKEN:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        is_user, is_write = given == TOKEN, self.command in ("POST", "DELETE")
        with self.server.lock:
            if path == "api/whoami-v2":
                if not is_user:
                    return self.refuse(401, "", "Invalid credentials in Authorization header")
                return self.reply(200, {"type": "user", "name": "tester", "orgs": []})
            if path.startswith("lfs/"):
                return self.store_blob(path.removeprefix("lfs/"), content)
            if path == "api/validate-yaml":
                return self.check_metadata(json.loads(content)["content"])
            if path == "api/repos/create":
                return self.create(json.loads(content)) if is_user else self.refuse(401, "", "Log in first")
            return self.in_repository(path, content, is_user, is_write)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def check_metadata(self, card: str):
        """The Hub's check of a card's head; one unknown license stands for everything that it refuses."""
        is_known = "license: no-such-license" not in card
        errors = [] if is_known else [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]
        self.reply(200 if is_known else 400, {"errors": errors, "warnings": []})

    def create(self, wanted: dict):
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if name in self.server.repositories:
            return self.reply(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repositories[name] = Repository(is_private)
        return self.reply(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def store_blob(self, oid: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "", "The content does not have this hash")
        self.server.blobs[oid] = content
        return self.reply(200)

    def in_repository(self, path: str, content: bytes, is_user: bool, is_write: bool):
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2]).removesuffix(".git")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.is_private and not is_user):
            return self.refuse(404 if is_user else 401, "RepoNotFound", "Repository not found")
        if is_write and not is_user:
            return self.refuse(401, "", "Log in first")
        action, rest = (parts[2] if len(parts) > 2 else "revision"), parts[3:]
        if action == "info":
            return self.lfs_batch(json.loads(content))
        revision = rest[0] if rest else "main"
        if action == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            return self.reply(200, {})
        oid = repository.resolve(revision)
        if oid is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[oid]
        if action == "revision":
            names = [{"rfilename": file} for file in files]
            return self.reply(200, {"id": name, "sha": oid, "private": repository.is_private, "siblings": names})
        if action == "tree":
            return self.tree(files, "/".join(rest[1:]))
        if action == "preupload":
            return self.preupload(files, json.loads(content)["files"])
        if action == "commit":
            return self.commit(repository, name, revision, content)
        if action == "resolve":
            return self.download(files, oid, "/".join(rest[1:]))
        return self.refuse(404, "EntryNotFound", f"No such call: {path}")

    def tree(self, files: dict[str, bytes], folder: str):
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                if path.endswith(LFS_SUFFIXES):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        return self.reply(200, entries)

    def preupload(self, files: dict[str, bytes], wanted: list[dict]):
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": git_oid(files[file["path"]]) if file["path"] in files else None,
            }
            for file in wanted
        ]
        return self.reply(200, {"files": answer})

    def lfs_batch(self, wanted: dict):
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.blobs:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, name: str, branch: str, content: bytes):
        files = dict(repository.commits[repository.resolve(branch)])
        for line in content.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400, "", f"The content of {value['path']} was never uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repository.commit(branch, files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        return self.reply(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def download(self, files: dict[str, bytes], oid: str, path: str):
        if path not in files:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        is_lfs = path.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(files[path]).hexdigest() if is_lfs else git_oid(files[path])
        return self.reply(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=oid)
