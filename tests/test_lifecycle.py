"""A chain's whole life at the command line, every step in a process of its own, against the loopback Hub."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from hub_server import HubServer
from tiny_recipe import built_chain, tiny_recipe
from transformers import AutoModelForCausalLM

PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The state of the union", return_tensors="pt")
out = model.generate(**ids, max_new_tokens=5, do_sample=False)[0].tolist()
assert "cbd_hub" not in sys.modules
print(json.dumps([model.num_parameters(), out, model.config.cbd_hub]))
if len(sys.argv) > 2:
    model.push_to_hub(sys.argv[2])
    tokenizer.push_to_hub(sys.argv[2])
"""


def test_from_a_recipe_to_a_model_that_a_third_party_uses(tmp_path: Path) -> None:
    with HubServer(redirect=True) as hub:
        hub.add_user("maker", "hf_maker")
        hub.add_user("user", "hf_user")
        hub.add_user("third", "hf_third")

        def run(who: str, *arguments: str) -> str:
            """One process, with a Hub cache of its own for everybody."""
            env = hub.environment(tmp_path / f"home-{who}", f"hf_{who}") | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        def cbd(who: str, *arguments: str) -> str:
            return run(who, "-m", "cbd_hub", *arguments)

        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe()))
        cbd("maker", "build", "recipe.yaml", "--output", "chain")
        dry = json.loads(cbd("maker", "push", "chain", "maker/chain", "--dry-run", "--json"))
        assert dry["dry_run"] and not hub.repos
        told = json.loads(cbd("maker", "push", "chain", "maker/chain", "--json"))
        assert told["chain"]["sha"] == hub.commits("maker/chain")[0].oid

        inspected = json.loads(cbd("user", "inspect", "maker/chain", "--json"))
        anchors = inspected["anchors"]
        assert [a["revision"] for a in anchors] == [a["sha"] for a in told["anchors"]]
        size = (anchors[0]["num_parameters"] + anchors[1]["num_parameters"]) // 2
        asked = ("maker/chain", "--num-parameters", str(size), "--tolerance", "0.1")
        hub.clear()
        plan = json.loads(cbd("user", "plan", *asked, "--json"))
        assert not [r for r in hub.requests if r.path.endswith("model.safetensors")]  # a dry run reads no weights
        made = json.loads(
            cbd("user", "from-chain", *asked, "--output", "model", "--push-to-hub", "user/middle", "--json")
        )
        assert made["num_parameters"] == plan["num_parameters"]
        assert made["published"] == {"repo_id": "user/middle", "commit": hub.commits("user/middle")[0].oid}

        # Another process without cbd_hub loads the folder, and pushes the model under a name of its own.
        count, out, origin = json.loads(run("user", "-c", PLAIN, "model", "user/again").splitlines()[-1])
        assert count == plan["num_parameters"]
        assert origin["chain"] == "maker/chain"
        assert origin["revision"] == told["chain"]["sha"]
        # And a third party loads what either published.
        for repo in ("user/middle", "user/again"):
            assert json.loads(run("third", "-c", PLAIN, repo).splitlines()[-1])[:2] == [count, out]

        assert set(hub.repos) == {
            "maker/chain",
            *(a["repo_id"] for a in anchors),
            "user/middle",
            "user/again",
        }
        (collection,) = hub.collections.values()
        assert {item["id"] for item in collection.items} == {"maker/chain", *(a["repo_id"] for a in anchors)}
        for repo in ("maker/chain", *(a["repo_id"] for a in anchors), "user/middle"):
            card = hub.files(repo)["README.md"].decode()
            library = "cbd-hub" if repo == "maker/chain" else "transformers"
            assert f"library_name: {library}" in card and "## Quick start" in card
        card = hub.files("user/middle")["README.md"].decode()
        assert "base_model_relation: merge" in card
        assert all(f"- {a['repo_id']}" in card for a in anchors[:2])
        assert 'from_pretrained("user/middle")' in card
        assert "size_loss.png" in hub.files("maker/chain")


def test_a_recipe_may_publish_what_it_builds(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_user("maker", "hf_maker")
        AutoModelForCausalLM.from_config(_config()).save_pretrained(tmp_path / "source")
        recipe = {
            "name": "cut",
            "source": {"model": str(tmp_path / "source")},
            "anchors": [0.7],
            "tokenizer": str(built_chain()),
            "data": tiny_recipe()["data"],
            "calibration_tokens": 512,
            "evaluation": {"tokens": 200, "curve_points": 0},
            "distillation": {"tokens": 0},
            "hub": {"repo_id": "maker/cut", "private": True, "license": "mit"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "cbd_hub", "build", str(tmp_path / "recipe.yaml"), "--output"]
        env = hub.environment(tmp_path / "home", "hf_maker")
        subprocess.run([*command, str(tmp_path / "chain")], env=env, check=True, capture_output=True)
        assert len(hub.repos) == 3
        assert "maker/cut" not in (tmp_path / "chain" / "chain.json").read_text()  # where it went is no part of it
        assert all(repository.private for repository in hub.repos.values())
        assert "license: mit" in hub.files("maker/cut")["README.md"].decode()
        # Without permission the chain is there all the same, and the error says so in one line.
        env = hub.environment(tmp_path / "home-2", "hf_nobody")
        done = subprocess.run([*command, str(tmp_path / "again")], env=env, capture_output=True, text=True)
        assert done.returncode == 1
        assert "does not accept the token" in done.stderr.splitlines()[-1]
        assert (tmp_path / "again" / "chain.json").is_file()


def _config():  # type: ignore[no-untyped-def]
    from tiny_models import tiny_config

    return tiny_config("llama", vocab_size=300, intermediate_size=300)
