"""Pulling a chain from a real server: what is fetched, how often, and what faults on the way do."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import Client, Done
from hub_server import Fault, HubServer
from make_chain import add_control_points, add_tokenizer, make_chain, variant_model

from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.interpolation.ranges import count_bytes

LOAD = """
import hashlib
try:
    model = from_chain(repo, cache_dir=cache, **options)
except CbdError as error:
    print(type(error).__name__, error)
    raise SystemExit(1)
print(json.dumps(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()))
"""
SIZE = {"num_parameters": "100k"}


def digest(folder: Path, **options: Any) -> str:
    import hashlib

    model = from_chain(folder, **(options or SIZE))
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@pytest.fixture(scope="module", params=[False, True], ids=["direct", "storage"])
def hub(request: pytest.FixtureRequest) -> Iterator[HubServer]:
    """With its files on the Hub's own host, and behind a redirect to another, as large files are."""
    with HubServer(redirect=request.param) as server:
        server.add_user("owner", "hf_owner", orgs=("org",))
        yield server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_chain(tmp_path_factory.mktemp("chains") / "c", variant_model("llama", vocab_size=320)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of a megabyte, most of the weights in them: what ranges are for."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 100}
    model = variant_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=32, **shape)
    steps = [{"layers": 4, "hidden": 128, "ffn": 512, "kv_heads": 2, "q_per_kv": 2, "head_dim": 32, "vocab": 100}]
    known = Chain.from_pretrained(make_chain(tmp_path_factory.mktemp("probe") / "p", model)).manifest
    sizes = {**known.sizes(known.anchors[0]), "layers": 4}
    assert set(steps[0]) & set(sizes)
    return make_chain(tmp_path_factory.mktemp("chains") / "large", model, [sizes])


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory, tiny: Path, large: Path) -> Iterator[Client]:
    with Client(hub.environment(tmp_path_factory.mktemp("home"), "hf_owner")) as made:
        push = "Chain.from_pretrained(folder).push_to_hub(repo, collection=False)"
        assert made.run(push, folder=tiny, repo="org/tiny").status == 0
        assert made.run(push, folder=large, repo="owner/large").status == 0  # its anchors have the same names
        yield made


@pytest.fixture(autouse=True)
def fresh(hub: HubServer, client: Client) -> None:
    hub.clear()


def load(client: Client, cache: Path, repo: str = "org/tiny", **options: Any) -> Done:
    return client.run(LOAD, repo=repo, cache=cache, options=options or SIZE)


def names(hub: HubServer) -> list[str]:
    """What was asked for: repository and file, of every request about a file."""
    found = (re.search(r"([^/]+)/resolve/[^/]+/(.+)", r.path) for r in hub.requests if r.method == "HEAD")
    return [f"{m[1]}/{m[2]}" for m in found if m]


# -- what is fetched --------------------------------------------------------------------------------------------------


def test_only_the_adjacent_pair_and_only_once(hub: HubServer, client: Client, tiny: Path, tmp_path: Path) -> None:
    manifest = Chain.from_pretrained(tiny).manifest
    small, middle = manifest.anchors[2], manifest.anchors[1]
    size = {"num_parameters": (small.num_parameters + middle.num_parameters) // 2}
    assert load(client, tmp_path / "cache", **size).value == digest(tiny, **size)
    got = names(hub)
    assert not [name for name in got if "a0" in name or "tokenizer" in name or "README" in name]
    assert {"llama-chain-a1/config.json", "llama-chain-a2/config.json", "tiny/chain.json"} <= set(got)
    commit = hub.commits("org/tiny")[0].oid
    hub.clear()
    assert load(client, tmp_path / "cache", **size, revision=commit).value == digest(tiny, **size)
    assert hub.requests == []  # pinned: not one request
    assert load(client, tmp_path / "cache", **size, local_files_only=True).value == digest(tiny, **size)
    assert hub.requests == []
    assert load(client, tmp_path / "cache", **size).value == digest(tiny, **size)
    assert [(r.method, r.path) for r in hub.requests] == [("HEAD", "/org/tiny/resolve/main/chain.json")]


def test_offline(hub: HubServer, client: Client, tiny: Path, tmp_path: Path) -> None:
    """A process that starts with HF_HUB_OFFLINE=1 makes what was made before, and says what is missing."""
    assert load(client, tmp_path / "cache").status == 0
    hub.clear()
    with Client(hub.environment(tmp_path / "home", None) | {"HF_HUB_OFFLINE": "1"}) as offline:
        assert load(offline, tmp_path / "cache").value == digest(tiny)
        done = load(offline, tmp_path / "cache", num_parameters="60k")
        assert done.status == 1
        assert done.out.startswith("ChainNotFoundError ")
        assert "not in the cache" in done.out
        assert done.out.count("\n") == 1
    assert hub.requests == []


def test_force_download(hub: HubServer, client: Client, tiny: Path, tmp_path: Path) -> None:
    load(client, tmp_path / "cache")
    hub.clear()
    assert load(client, tmp_path / "cache", **SIZE, force_download=True).value == digest(tiny)
    assert len([name for name in names(hub) if name.endswith("model.safetensors")]) >= 2


# -- ranges -----------------------------------------------------------------------------------------------------------


def test_half_of_a_model_takes_half_of_the_bytes(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    anchor = Chain.from_pretrained(large).manifest.anchors[0]
    shape = {**anchor.shape, "num_hidden_layers": 4}
    options = {"shape": shape, "method": "prune"}
    plan = Chain.from_pretrained(large).plan(**options)  # type: ignore[arg-type]
    assert plan.num_parameters < 0.52 * anchor.num_parameters
    assert load(client, tmp_path / "cache", "owner/large", **options).value == digest(large, **options)
    whole = anchor.files["model.safetensors"].size
    sent = sum(r.sent for r in hub.requests if r.range)
    assert sent <= 0.65 * whole
    assert plan.bytes_to_fetch <= sent <= plan.bytes_to_fetch + (1 << 17) + 20_000  # the header's part on top
    assert not [r for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors") and not r.range]
    assert len([r for r in hub.requests if r.range]) <= 8  # merged
    assert len([name for name in names(hub) if name.endswith("a0/model.safetensors")]) == 1  # asked about once
    hub.clear()  # the same again is no request; a little more is a little more
    commit = hub.commits("owner/large")[0].oid
    assert load(client, tmp_path / "cache", "owner/large", **options, revision=commit).value == digest(
        large, **options
    )
    assert hub.requests == []
    more = {"shape": {**shape, "num_hidden_layers": 5}, "method": "prune"}
    assert load(client, tmp_path / "cache", "owner/large", **more, revision=commit).value == digest(large, **more)
    assert 0 < sum(r.sent for r in hub.requests) <= 0.15 * whole


def test_a_control_point_comes_in_ranges_too(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    """The layers that a size lacks are not fetched of it, and the model is the one made from whole files."""
    shutil.copytree(large, tmp_path / "bent")
    bent = add_control_points(tmp_path / "bent", rank=32)
    push = "Chain.from_pretrained(folder).push_to_hub(repo, collection=False)"
    assert client.run(push, folder=bent, repo="owner/bent").status == 0
    chain = Chain.from_pretrained(bent)
    shape = {**chain.manifest.anchors[0].shape, "num_hidden_layers": 5}
    plan = chain.plan(shape=shape)
    record = chain.manifest.anchors[1].control_point
    assert plan.method == "bezier" and record is not None and record.file is not None
    hub.clear()
    assert load(client, tmp_path / "cache", "owner/bent", shape=shape).value == digest(bent, shape=shape)
    wanted = sum(map(count_bytes, plan.needed_control.values()))
    assert 0.3 * record.file.size < wanted < 0.8 * record.file.size
    assert [r for r in hub.requests if "control_points/" in r.path]
    assert not [r for r in hub.requests if r.method == "GET" and r.sent == record.file.size]  # never whole
    sent = sum(r.sent for r in hub.requests if r.range)
    assert wanted <= sent <= plan.bytes_to_fetch + 3 * (1 << 17) + 60_000  # first parts of three files on top
    hub.clear()  # at an anchor's own size nothing of it is asked for
    size = {"num_parameters": chain.anchors[1].num_parameters}
    assert load(client, tmp_path / "other", "owner/bent", **size).value == digest(bent, **size)
    assert not [r for r in hub.requests if "control_points/" in r.path]


def test_blocks_that_interpolation_does_not_need(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    chain = Chain.from_pretrained(large)
    shape = {**chain.manifest.anchors[0].shape, "num_hidden_layers": 6}
    plan = chain.plan(shape=shape, method="interpolate")
    options = {"shape": shape, "method": "interpolate"}
    assert load(client, tmp_path / "cache", "owner/large", **options).value == digest(large, **options)
    weights = sum(r.sent for r in hub.requests if r.range) + chain.manifest.anchors[1].files["model.safetensors"].size
    assert plan.bytes_to_fetch <= weights <= plan.bytes_to_fetch + (1 << 17) + 40_000


def test_a_cached_file_is_used_instead(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    anchor = Chain.from_pretrained(large).manifest.anchors[0]
    assert load(client, tmp_path / "cache", "owner/large", shape=anchor.shape).status == 0  # the whole anchor
    hub.clear()
    options = {"shape": {**anchor.shape, "num_hidden_layers": 4}, "method": "prune"}
    assert load(client, tmp_path / "cache", "owner/large", **options).value == digest(large, **options)
    assert not [name for name in names(hub) if name.endswith("model.safetensors")]


def test_a_server_without_ranges(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    """It answers 200 and the whole file; the file is then fetched the ordinary way."""
    anchor = Chain.from_pretrained(large).manifest.anchors[0]
    options = {"shape": {**anchor.shape, "num_hidden_layers": 4}, "method": "prune"}
    hub.ranges = False
    try:
        assert load(client, tmp_path / "cache", "owner/large", **options).value == digest(large, **options)
    finally:
        hub.ranges = True


def test_ranges_of_another_file(hub: HubServer, client: Client, large: Path, tmp_path: Path) -> None:
    """A repository whose file is not the one that the manifest names is found out before weights are fetched."""
    anchor = Chain.from_pretrained(large).manifest.anchors[0]
    options = {"shape": {**anchor.shape, "num_hidden_layers": 4}, "method": "prune"}
    hub.inject(Fault.etag("f" * 64), method="HEAD", path="model.safetensors")
    done = load(client, tmp_path / "cache", "owner/large", **options)
    assert done.status == 1
    assert "IntegrityError" in done.out and "is not the file that the manifest names" in done.out
    assert not [r for r in hub.requests if r.range]


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "drop": Fault.drop(),
    "truncate": Fault.truncate(0.5),
    "corrupt": Fault.corrupt(),
    "etag": Fault.etag("0" * 64),
    "429": Fault.status(429, retry_after=0),
    "500": Fault.status(500),
    "503": Fault.status(503),
    "slow": Fault.slow(0.3),
}
QUICK = ("corrupt",)


@pytest.mark.parametrize(
    ("hub", "kind"),
    [
        pytest.param(storage, kind, marks=() if kind in QUICK and not storage else pytest.mark.slow)
        for storage in (False, True)
        for kind in FAULTS
    ],
    indirect=["hub"],
)
def test_a_fault_at_every_request(hub: HubServer, client: Client, tiny: Path, tmp_path: Path, kind: str) -> None:
    """The right model or a clear error, and never a poisoned cache: the next pull gives the right bytes."""
    right = digest(tiny)
    assert load(client, tmp_path / "probe").value == right
    count = len(hub.requests)
    assert any(r.range for r in hub.requests)  # whole files and ranges are both among them
    outcomes = {"right": 0, "error": 0}
    for n in range(count):
        hub.clear()
        hub.inject(copy.copy(FAULTS[kind]), at=n)
        cache = tmp_path / f"cache-{n}"
        done = load(client, cache)
        assert hub.faults_hit == 1
        if done.status:
            outcomes["error"] += 1
            assert re.match(r"(ChainNotFound|Integrity|Manifest)Error [^\n]+\n$", done.out), (
                f"{n}: {done.out}{done.err}"
            )
        else:
            outcomes["right"] += 1
            assert done.value == right, f"request {n}"
        hub.clear()
        again = load(client, cache)
        assert (again.status, again.out.strip()) == (0, json.dumps(right)), f"request {n}: {done.out} {again.out}"
    if kind in ("429", "slow"):
        assert outcomes["error"] == 0
    if kind == "corrupt":
        assert outcomes["error"] > 0


def test_a_full_disk(hub: HubServer, client: Client, tiny: Path, tmp_path: Path) -> None:
    """A real one of 200 kB: the cache does not fit."""
    code = """
import sys
from cbd_hub import CbdError, from_chain
try:
    from_chain("org/tiny", "100k", cache_dir=sys.argv[1])
except CbdError as error:
    print(type(error).__name__, error)
"""
    place = tmp_path / "disk"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=200k tmpfs '{place}' || exit 77; exec \"$@\""
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", code, str(place)]
    env = hub.environment(tmp_path / "home", "hf_owner")
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("unshare is not there")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.startswith("ChainNotFoundError the disk is full: "), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
