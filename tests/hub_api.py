"""What a Hugging Face Hub answers about models: the routes that huggingface_hub and transformers call.

:class:`Hub` holds users, repositories and collections (see :mod:`hub_store`) and turns requests into answers;
:mod:`hub_server` serves it. A request's body is in memory before its handler starts, so none waits: each is atomic.
"""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import parse_qs, unquote

from hub_store import Collection, Commit, HubError, Repository, User, front_matter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

__all__ = ["Hub"]


class Hub:
    """Users, repositories and collections, and the application that answers requests about them.

    Args:
        lfs_threshold: Size in bytes from which a file belongs to LFS; every ``*.safetensors`` does.
        redirect: Whether LFS files are read through a redirect to the storage, which is of another origin.
    """

    endpoint = storage = ""
    """Origins of the Hub and of the storage that LFS files are written to."""

    def __init__(self, lfs_threshold: int = 10_000, redirect: bool = False) -> None:
        self.lfs_threshold, self.redirect = lfs_threshold, redirect
        self.ranges = True
        """Whether ranges are answered; if not, the whole file is sent instead."""
        self.repos: dict[str, Repository] = {}
        """By ``owner/name``."""
        self.collections: dict[str, Collection] = {}
        """By slug."""
        self.uploads: list[str] = []
        """The sha256 of every LFS object that was uploaded, repetitions included."""
        self._users: dict[str, User] = {}
        self.app = Starlette(routes=self._routes(), exception_handlers={HubError: _refuse})

    def add_user(self, name: str, token: str, write: bool = True, orgs: Iterable[str] = ()) -> None:
        """Lets a token act for a user, who may write to the namespaces of that name and of the organizations."""
        self._users[token] = User(name, write, tuple(orgs))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision, by path."""
        return {path: blob.data for path, blob in self.repos[repo_id].resolve(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        return self.repos[repo_id].log(revision)

    def set_private(self, repo_id: str, private: bool) -> None:
        """Hides a repository from all but its owner, or shows it."""
        self.repos[repo_id].private = private

    def set_gated(self, repo_id: str, granted: Iterable[str] = ()) -> None:
        """Lets only its owner and the named users and organizations read a repository's files."""
        self.repos[repo_id].gated = "manual"
        self.repos[repo_id].granted = set(granted)

    # -- who may do what ----------------------------------------------------------------------------------------------

    def _user(self, asked: Request) -> User | None:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self._users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self._users.get(token)

    def _member(self, asked: Request, namespace: str | None, exempt: bool = False) -> User:
        """The user who asks, if they may write to a namespace (None: their own) or are exempt from membership."""
        user = self._user(asked)
        if user is None:
            # Over https the client takes every 401 for a missing repository; over http it needs the code for that.
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if not user.write or not (exempt or namespace is None or namespace in user.namespaces):
            raise HubError(403, None, f"Forbidden: {user.name} may not write to {namespace or user.name}")
        return user

    def _repo(self, asked: Request, content: bool = False) -> Repository:
        """The repository of a path, if the user who asks may see it, and its content where that is wanted."""
        user = self._user(asked)
        repo = self.repos.get(_repo_id(asked))
        if repo is None or not repo.visible_to(user):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and not repo.open_to(user):
            raise HubError(403 if user else 401, "GatedRepo", f"Access to model {_repo_id(asked)} is restricted.")
        return repo

    def _writable(
        self, asked: Request, revision: str | None = None, create_pr: bool = False
    ) -> tuple[Repository, User]:
        """The repository of a path and the user who asks, if they may write to a revision or open a pull request."""
        repo, user = self._repo(asked), self._user(asked)
        exempt = create_pr or (user is not None and repo.authors.get(revision or "") == user.name)
        return repo, self._member(asked, repo.owner, exempt)

    # -- routes -------------------------------------------------------------------------------------------------------

    def _routes(self) -> list[Route]:
        model, lfs = "/api/models/{owner}/{name}", "/{owner}/{name}.git/info/lfs/objects"
        table: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "GET /api/whoami-v2": self._whoami,
            "POST /api/validate-yaml": self._validate_yaml,
            "POST /api/repos/create": self._create,
            "DELETE /api/repos/delete": self._delete,
            "POST /api/repos/move": self._move,
            f"GET {model}": self._info,
            f"GET {model}/revision/{{revision}}": self._info,
            f"GET {model}/tree/{{revision}}": self._tree,
            f"GET {model}/tree/{{revision}}/{{path:path}}": self._tree,
            f"POST {model}/paths-info/{{revision}}": self._paths_info,
            f"GET {model}/refs": self._refs,
            f"GET {model}/commits/{{revision}}": self._commits,
            f"POST {model}/branch/{{branch}}": self._create_branch,
            f"DELETE {model}/branch/{{branch}}": self._delete_branch,
            f"POST {model}/tag/{{revision}}": self._create_tag,
            f"DELETE {model}/tag/{{revision}}": self._delete_tag,
            f"PUT {model}/settings": self._settings,
            f"POST {model}/preupload/{{revision}}": self._preupload,
            f"POST {model}/commit/{{revision}}": self._commit,
            f"POST {lfs}/batch": self._batch,
            f"POST {lfs}/verify": self._verify,
            "PUT /storage/{owner}/{name}/{oid}": self._put_object,
            "GET /storage/{owner}/{name}/{oid}": self._get_object,
            "GET /{owner}/{name}/resolve/{revision}/{path:path}": self._resolve,
            "GET /api/collections": self._list_collections,
            "POST /api/collections": self._create_collection,
            "GET /api/collections/{owner}/{name}": self._get_collection,
            "POST /api/collections/{owner}/{name}/items": self._add_item,
        }
        return [Route(line.split()[1], handler, methods=[line.split()[0]]) for line, handler in table.items()]

    async def _whoami(self, asked: Request) -> Response:
        if (user := self._user(asked)) is None:
            raise HubError(401, None, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        token = {"displayName": "test", "role": "write" if user.write else "read"}
        return JSONResponse({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    async def _validate_yaml(self, asked: Request) -> Response:
        metadata = front_matter((await asked.json())["content"])
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [], "warnings": warnings})

    async def _create(self, asked: Request) -> Response:
        wanted = await asked.json()
        user = self._member(asked, wanted["organization"])
        owner = wanted["organization"] or user.name
        repo_id, url = f"{owner}/{wanted['name']}", f"{self.endpoint}/{owner}/{wanted['name']}"
        if repo_id in self.repos:
            raise HubError(409, None, "You already created this model repo", url=url)
        self.repos[repo_id] = Repository(owner, private=wanted.get("visibility") == "private")
        return JSONResponse({"name": repo_id, "url": url})

    async def _delete(self, asked: Request) -> Response:
        wanted = await asked.json()
        user = self._member(asked, wanted["organization"])
        repo_id = f"{wanted['organization'] or user.name}/{wanted['name']}"
        if self.repos.pop(repo_id, None) is None:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return Response()

    async def _move(self, asked: Request) -> Response:
        wanted = await asked.json()
        old, new = wanted["fromRepo"], wanted["toRepo"]
        for repo_id in (old, new):
            self._member(asked, repo_id.split("/")[0])
        if new in self.repos or old not in self.repos:
            raise HubError(409 if new in self.repos else 404, None, f"Cannot move {old} to {new}")
        self.repos[new] = self.repos.pop(old)
        self.repos[new].owner = new.split("/")[0]
        return Response()

    async def _info(self, asked: Request) -> Response:
        blobs = asked.query_params.get("blobs") == "true"
        return JSONResponse(self._repo(asked).info(_repo_id(asked), _part(asked, "revision") or "main", blobs))

    async def _tree(self, asked: Request) -> Response:
        repo, recursive = self._repo(asked), asked.query_params.get("recursive") == "true"
        return JSONResponse(repo.tree(repo.resolve(_part(asked, "revision")), _part(asked, "path"), recursive))

    async def _paths_info(self, asked: Request) -> Response:
        repo, form = self._repo(asked), parse_qs((await asked.body()).decode())
        entries = repo.tree(repo.resolve(_part(asked, "revision")))
        return JSONResponse([entry for entry in entries if entry["path"] in form["paths"]])

    async def _refs(self, asked: Request) -> Response:
        repo = self._repo(asked)
        refs = {"branches": repo.named("refs/heads/"), "tags": repo.named("refs/tags/"), "converts": []}
        return JSONResponse({**refs, "pullRequests": repo.named("refs/pr/")})

    async def _commits(self, asked: Request) -> Response:
        commits = self._repo(asked).log(_part(asked, "revision"))
        shown = [{"id": c.oid, "title": c.title, "message": c.message, "date": c.date} for c in commits]
        return JSONResponse([{**s, "authors": [{"user": c.author}]} for s, c in zip(shown, commits, strict=True)])

    async def _create_branch(self, asked: Request) -> Response:
        start = (await asked.json()).get("startingPoint", "main")
        self._writable(asked)[0].point(f"refs/heads/{_part(asked, 'branch')}", start)
        return Response(status_code=201)

    async def _delete_branch(self, asked: Request) -> Response:
        self._writable(asked)[0].unpoint(f"refs/heads/{_part(asked, 'branch')}")
        return Response()

    async def _create_tag(self, asked: Request) -> Response:
        tag = (await asked.json())["tag"]
        self._writable(asked)[0].point(f"refs/tags/{tag}", _part(asked, "revision"))
        return Response(status_code=201)

    async def _delete_tag(self, asked: Request) -> Response:
        self._writable(asked)[0].unpoint(f"refs/tags/{_part(asked, 'revision')}")
        return Response()

    async def _settings(self, asked: Request) -> Response:
        wanted, (repo, _) = await asked.json(), self._writable(asked)
        repo.private = wanted.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = wanted.get("gated", repo.gated)
        return JSONResponse({"private": repo.private, "gated": repo.gated})

    # -- writing and reading files ------------------------------------------------------------------------------------

    async def _preupload(self, asked: Request) -> Response:
        revision, create_pr = _part(asked, "revision"), "create_pr" in asked.query_params
        repo, _ = self._writable(asked, revision, create_pr)
        files = repo.resolve(revision).files
        modes = []
        for file in (await asked.json())["files"]:
            lfs = file["size"] >= self.lfs_threshold or file["path"].endswith(".safetensors")
            known = {"oid": files[file["path"]].etag} if file["path"] in files else {}
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known}
            )
        return JSONResponse({"files": modes})

    async def _commit(self, asked: Request) -> Response:
        revision, create_pr = _part(asked, "revision"), "create_pr" in asked.query_params
        lines = (await asked.body()).splitlines()
        repo, user = self._writable(asked, revision, create_pr)
        ref, commit = repo.push(revision, lines, user.name, create_pr)
        page = f"{self.endpoint}/{_repo_id(asked)}"
        pull_request = {"pullRequestUrl": f"{page}/discussions/{ref.split('/')[-1]}"} if create_pr else {}
        return JSONResponse({"commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}", **pull_request})

    async def _batch(self, asked: Request) -> Response:
        wanted = await asked.json()
        revision = wanted.get("ref", {}).get("name")
        repo, _ = self._writable(asked, revision, create_pr=revision is None)  # a pull request names no revision
        page = _repo_id(asked)
        objects = []
        for entry in wanted["objects"]:
            upload = {"href": f"{self.storage}/storage/{page}/{entry['oid']}"}
            verify = {"href": f"{self.endpoint}/{page}.git/info/lfs/objects/verify"}
            actions = {} if entry["oid"] in repo.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**entry, **actions})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _put_object(self, asked: Request) -> Response:
        body, oid = await asked.body(), _part(asked, "oid")
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, None, f"The content is not that of {oid}")
        self.repos[_repo_id(asked)].objects[oid] = body
        self.uploads.append(oid)
        return Response()

    async def _verify(self, asked: Request) -> Response:
        wanted, repo = await asked.json(), self._repo(asked)
        if len(repo.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, None, f"There is no object {wanted['oid']} of {wanted['size']} bytes")
        return Response()

    async def _resolve(self, asked: Request) -> Response:
        commit, blob = self._repo(asked, content=True).file(_part(asked, "revision"), _part(asked, "path"))
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.etag}"'}
        if blob.lfs and self.redirect:
            headers["Location"] = f"{self.storage}/storage/{_repo_id(asked)}/{blob.sha256}"
            return Response(status_code=302, headers=headers)
        return _content(blob.data, asked.headers.get("range") if self.ranges else None, headers)

    async def _get_object(self, asked: Request) -> Response:
        oid = _part(asked, "oid")
        if "authorization" in asked.headers:
            raise HubError(400, None, "Only one auth mechanism allowed")  # a signed address needs no token
        data = self.repos[_repo_id(asked)].objects[oid]
        return _content(data, asked.headers.get("range") if self.ranges else None, {"ETag": f'"{oid}"'})

    # -- collections --------------------------------------------------------------------------------------------------

    def _collection(self, asked: Request) -> Collection:
        user, collection = self._user(asked), self.collections.get(_repo_id(asked))
        if collection is None or (collection.private and not (user and collection.owner in user.namespaces)):
            raise HubError(404, None, "Collection not found")
        return collection

    async def _list_collections(self, asked: Request) -> Response:
        owner, item = asked.query_params.get("owner"), asked.query_params.get("item")
        found = [
            {key: value for key, value in collection.to_dict().items() if key != "position"}
            for collection in self.collections.values()
            if not collection.private
            and owner in (None, collection.owner)
            and (item is None or item in [f"{entry['type']}s/{entry['id']}" for entry in collection.items])
        ]
        return JSONResponse(found)

    async def _create_collection(self, asked: Request) -> Response:
        wanted = await asked.json()
        owner, title = wanted["namespace"], wanted["title"]
        self._member(asked, owner)
        for slug, collection in self.collections.items():
            if (collection.owner, collection.title) == (owner, title):
                raise HubError(409, None, "This collection already exists", slug=slug)
        slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{secrets.token_hex(12)}"
        self.collections[slug] = Collection(slug, title, owner, wanted.get("description"), wanted["private"])
        return JSONResponse(self.collections[slug].to_dict())

    async def _get_collection(self, asked: Request) -> Response:
        return JSONResponse(self._collection(asked).to_dict())

    async def _add_item(self, asked: Request) -> Response:
        wanted, collection = await asked.json(), self._collection(asked)
        self._member(asked, collection.owner)
        item = wanted["item"]
        repo = self.repos.get(item["id"])
        if repo is None or not repo.visible_to(self._user(asked)):
            raise HubError(404, None, f"There is no {item['type']} {item['id']}")
        if any((entry["type"], entry["id"]) == (item["type"], item["id"]) for entry in collection.items):
            raise HubError(409, None, f"{item['id']} is in the collection already")
        note = {"note": {"text": wanted["note"]}} if "note" in wanted else {}
        collection.items.append({"_id": secrets.token_hex(12), **item, "position": len(collection.items), **note})
        return JSONResponse(collection.to_dict())


def _part(asked: Request, name: str) -> str:
    """A part of the path, unquoted; empty if the route has none of that name."""
    return unquote(asked.path_params.get(name, ""))


def _repo_id(asked: Request) -> str:
    return f"{_part(asked, 'owner')}/{_part(asked, 'name')}"


def _content(data: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    """A file, or the range of it that was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    bounds = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "bytes=-")
    if bounds is None or not any(bounds.groups()):
        return Response(data, headers=headers)
    first, last = bounds.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], status_code=206, headers=headers)


async def _refuse(asked: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    message = " ".join(error.message.split()).encode("ascii", "replace").decode()  # headers hold one line of ASCII
    headers = {**error.headers, "X-Error-Message": message}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message, **error.fields}, error.status, headers)
