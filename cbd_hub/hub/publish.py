"""Publishing: one repository an anchor, then the chain's own repository, then a Collection.

Every anchor is one commit, loads with plain ``AutoModelForCausalLM.from_pretrained``, and is tagged so that its commit
stays. The manifest comes last and pins those commits. So a push that is killed anywhere leaves the manifest that was
published last, and what it pins, as they were; pushing again uploads what is missing and nothing twice.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from cbd_hub.errors import ChainNotFoundError, PublishError
from cbd_hub.files import locked_folder
from cbd_hub.hub import cards
from cbd_hub.hub.card_results import add_results
from cbd_hub.hub.read import Location, anchor_place, checked_file
from cbd_hub.hub.untrusted import has_chat_template
from cbd_hub.hub.write import Commit, Content, Repository, State, gather
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.manifest import FileEntry, Manifest
from cbd_hub.progress import progress_bar

__all__ = ["Published", "publish", "publish_folder"]

CARD = "README.md"
_WEIGHTS = re.compile(r"(model.*|control_points/.*)\.safetensors(\.index\.json)?")
_TAG = "cbd-{}"
"""Of a commit; the place is for the fingerprint of its files."""
_NOTHING = frozenset({".gitattributes", CARD, "LICENSE"})


@dataclass(frozen=True)
class Published:
    """What a push uploaded, or would upload."""

    chain: Commit
    anchors: tuple[Commit, ...]
    """In the chain's order; those that were published before have no files."""
    collection: str | None
    """URL."""
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        """A table for a person."""
        lines = []
        for kind, commit in [*(("anchor", c) for c in self.anchors), ("chain", self.chain)]:
            what = "as it was" if not commit.uploaded else f"{len(commit.uploaded)} files, {commit.num_bytes:,} bytes"
            if self.dry_run and commit.uploaded:
                what += " to upload"
            where = commit.pull_request or (f"{commit.repo_id}@{commit.sha[:12]}" if commit.sha else commit.repo_id)
            lines.append(f"{kind:<8}{where:<60} {what}")
        if self.collection:
            lines.append(f"{'together':<8}{self.collection}")
        return "\n".join(lines)


def publish(
    manifest: Manifest,
    location: Location,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    collection: bool = True,
    branch: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> Published:
    """Publishes a chain.

    Anchors that lie in repositories already, pinned by the manifest, stay where they are. A card that a user edited,
    here or on the Hub, is not replaced by a generated one. A card that is written again keeps the results that were
    measured of the folder, and those on the Hub for as long as nothing but cards changes there.

    Args:
        manifest: The chain's manifest.
        location: Where its files are.
        repo_id: ``owner/name`` of the chain's repository; anchors get repositories of the same owner.
        private: Whether repositories that are made are private; None is the Hub's default.
        token: Hub token with write permission; None takes it from the usual places.
        collection: Put all of them into a Collection.
        branch: Branch to commit to, made if need be; None is the default branch.
        create_pr: Propose the changes as pull requests instead.
        license: License on the cards instead of the chain's.
        dry_run: Only say what would be uploaded.
        progress: Show progress (HF_HUB_DISABLE_PROGRESS_BARS is obeyed).

    Returns:
        What was uploaded, and where.

    Cost: every file is hashed once, and once more by the client if it is sent; only what differs from the Hub's is.

    Raises:
        PublishError: No permission, a repository that holds something else, or a connection that broke.
        IntegrityError: A file is not what the manifest says; nothing was uploaded then.
    """
    if location.is_local:
        with locked_folder(Path(location.place).expanduser(), "push it", make=False):
            pass  # nobody is building in it
    if license is not None:
        manifest = manifest.model_copy(update={"license": license})
    target = Repository(repo_id, token, branch)
    names = _repository_names(manifest, target)
    top = {name: _checked(location, name, entry) for name, entry in manifest.top_files.items()}
    chat = has_chat_template({name: location.file(name) for name in manifest.tokenizer})
    files = _gather_files(manifest, location, progress)
    state = _usable(target, private)
    repositories = {a.name: Repository(names[a.name], token, branch) for a in manifest.anchors if not a.repo_id}
    states = {name: _usable(repository, private) for name, repository in repositories.items()}
    named = [
        a if a.repo_id else a.model_copy(update={"repo_id": names[a.name], "subfolder": None})
        for a in manifest.anchors
    ]
    planned = manifest.model_copy(update={"anchors": named})  # for the cards, which name neighbors
    send = partial(_upload, private=private, create_pr=create_pr, dry_run=dry_run)

    commits, anchors = [], []
    both = list(zip(manifest.anchors, named, strict=True))
    for anchor, shown in progress_bar(both, "publishing", unit="anchor", enabled=progress):
        if anchor.repo_id:
            commits.append(Commit(anchor.repo_id, anchor.revision or "", (), 0))
            anchors.append(anchor)
            continue
        repository = repositories[anchor.name]
        fresh = cards.anchor_card(planned, shown, repository.repo_id, chain=repo_id)
        card = _card(anchor_place(location, anchor), fresh)
        content: dict[str, Content] = {**{name: top[name] for name in manifest.tokenizer}, **files[anchor.name]}
        title = f"Anchor {anchor.name} of the chain {repo_id}"
        commit = send(repository, content, states[anchor.name], title, card=card)
        commits.append(commit)
        update = {"repo_id": repository.repo_id, "revision": commit.sha or "0" * 40, "subfolder": None}
        anchors.append(anchor.model_copy(update=update))
    pinned = manifest.model_copy(update={"anchors": anchors})
    picture = _optional(location, cards.CURVE_PICTURE)
    fresh = cards.chain_card(pinned, repo_id, folder=picture.parent if picture else None, chat=chat)
    content = {
        **top,
        **({cards.CURVE_PICTURE: Content(picture)} if picture else {}),
        manifests.MANIFEST_NAME: Content(manifests.manifest_text(pinned).encode()),
    }
    title = f"Chain {manifest.name}: {len(anchors)} anchors"
    commit = send(target, content, state, title, card=_card(location, fresh))
    url = None
    if collection and not dry_run:
        members = [repo_id, *(c.repo_id for c in commits)]
        title = f"{manifest.name} (chain)"
        about = f"{repo_id} and its {len(anchors)} anchors: models of any size between them, by cbd_hub"
        url = gather(members, title, about, owner=target.owner, token=token, private=bool(private))
    return Published(commit, tuple(commits), url, dry_run)


def publish_folder(
    folder: Path, repo_id: str, message: str, *, private: bool | None = None, token: str | bool | None = None
) -> Commit:
    """Publishes the files of a model folder in one commit.

    Raises:
        PublishError: No permission, a repository that holds something else, or a connection that broke.
    """
    repository = Repository(repo_id, token)
    state = _usable(repository, private)
    files = {p.name: Content(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."}
    return _upload(repository, files, state, message, private=private)


def _checked(place: Location, name: str, entry: FileEntry) -> Content:
    """A file that is what the manifest says, which has its hash already."""
    return Content(checked_file(place, name, entry), entry.sha256)


def _gather_files(manifest: Manifest, location: Location, progress: bool) -> dict[str, dict[str, Content]]:
    """Every file of the anchors that are to be uploaded, checked against the manifest before anything is sent."""
    ours = [anchor for anchor in manifest.anchors if not anchor.repo_id]
    return {
        anchor.name: {
            name: _checked(anchor_place(location, anchor), name, entry) for name, entry in anchor.files.items()
        }
        for anchor in progress_bar(ours, "checking files", unit="anchor", enabled=progress)
    }


def _repository_names(manifest: Manifest, chain: Repository) -> dict[str, str]:
    """Anchor → repository: its own name if that begins with the chain's, otherwise both."""
    names = {}
    for anchor in manifest.anchors:
        own = anchor.name if anchor.name.startswith(manifest.name) else f"{manifest.name}-{anchor.name}"
        names[anchor.name] = anchor.repo_id or f"{chain.owner}/{own}"
    taken = [*names.values(), chain.repo_id]
    if twice := next((name for name in taken if taken.count(name) > 1), None):
        raise PublishError(f"two parts of the chain would be {twice}; rename an anchor, or name another repository")
    return names


def _usable(repository: Repository, private: bool | None) -> State | None:
    """The state of a repository that may be written to: it holds no other work, and is not public by mistake."""
    whole = Repository(repository.repo_id, repository.token)  # a branch may not be there yet
    state = whole.state()
    if state is None:
        return None
    others, tagged = sorted(set(state.files) - _NOTHING), _TAG.format("[0-9a-f]{12}")
    if others and "cbd-hub" not in state.tags and not whole.has_tag(tagged):  # a person's card may not say it
        raise PublishError(
            f"{repository.repo_id} exists and holds something else ({', '.join(others[:3])}); name another repository "
            "or delete it first (nothing was uploaded)"
        )
    if private and not state.private:
        raise PublishError(
            f"{repository.repo_id} exists and is public; make it private in its settings first, or push without "
            "--private (nothing was uploaded)"
        )
    return state


def _upload(
    repository: Repository,
    files: dict[str, Content],
    state: State | None,
    message: str,
    *,
    card: Content | ModelCard | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Commit:
    """One commit with what differs, and its tag; a generated card gives way to what the Hub's has of its own."""
    if card is not None:
        files = {**files, CARD: card if isinstance(card, Content) else _text(card)}
    if dry_run:
        changed = repository.differing(files, state)
        size = sum(files[name].size for name in changed)
        return Commit(repository.repo_id, state.commit if state else "", tuple(changed), size)
    if state is None or repository.branch is not None:
        repository.create(private)
        state = repository.state()
        if state is None:
            raise PublishError(f"{repository.repo_id} was made and cannot be read; does the token allow it?")
    if isinstance(card, ModelCard) and CARD in state.files and repository.differing({CARD: files[CARD]}, state):
        path = Location(repository.repo_id, state.commit, token=repository.token).file(CARD)
        held = path.read_text(encoding="utf-8")
        if not cards.is_generated(held):
            files = {name: content for name, content in files.items() if name != CARD}
        elif _same_weights(repository.differing(files, state), files):
            files = {**files, CARD: _text(add_results(card, held))}
    stale = [name for name in state.files if _WEIGHTS.fullmatch(name) and name not in files]
    commit = repository.commit(files, message, state=state, delete=stale, create_pr=create_pr)
    if commit.pull_request is None:
        repository.tag(_TAG.format(_fingerprint(files)), commit.sha)
    return commit


def _same_weights(changed: list[str], files: Mapping[str, Content]) -> bool:
    """Whether what was measured still holds; a chain's manifest changes with every card of an anchor, too."""
    pins = {manifests.MANIFEST_NAME} if manifests.CHECKSUMS_NAME in files else set()  # else it alone pins the weights
    return set(changed) <= {CARD} | pins


def _fingerprint(files: Mapping[str, Content]) -> str:
    named = "".join(f"{name}\0{content.sha256}\n" for name, content in sorted(files.items()))
    return hashlib.sha256(named.encode()).hexdigest()[:12]


def _text(card: ModelCard) -> Content:
    return Content(str(card).encode())


def _optional(location: Location, name: str) -> Path | None:
    """A file that a chain may have and its manifest does not name."""
    try:
        return location.file(name)
    except ChainNotFoundError:
        return None


def _card(place: Location, fresh: ModelCard) -> Content | ModelCard:
    """The card that lies beside the files, if a person wrote or changed it; else a fresh one with its results."""
    path = _optional(place, CARD) if place.is_local else None
    data = path.read_bytes() if path else b""
    held = data.decode("utf-8", "replace")
    if held.strip() and not cards.is_generated(held):
        return Content(data)
    return add_results(fresh, held)
