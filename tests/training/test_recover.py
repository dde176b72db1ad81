"""Recovery pre-training of a model from a real chain: losses, curve, teacher, folder, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_recipe import TEXT, built_chain, digests
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cbd_hub.chain.chain import Chain
from cbd_hub.chain.export import write_model
from cbd_hub.errors import ChainNotFoundError, OutputExistsError, RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.settings import DataConfig
from cbd_hub.training.recover import RecoverConfig, _blocks, recover, recover_folder, recover_on_text
from cbd_hub.training.settings import DistillationConfig

LENGTH, BATCH = 32, 4
STEP = LENGTH * BATCH
DATA = DataConfig(text_files=str(TEXT / "179*.txt"), sequence_length=LENGTH, held_out_fraction=0.2)
TRAINING = DistillationConfig(tokens=10 * STEP, batch_size=BATCH, learning_rate=3e-3)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain.from_pretrained(built_chain())


@pytest.fixture(scope="module")
def folder(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model between the two largest anchors, as `cbd-hub from-chain` writes it; read only."""
    path = tmp_path_factory.mktemp("made") / "model"
    write_model(chain, chain.plan(chain.manifest.curve[0].num_parameters), path, progress=False)
    return path


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def log(work_dir: Path) -> list[dict[str, Any]]:
    return list(json.loads((work_dir / "trainer_state.json").read_text())["log_history"])


def test_the_loss_falls_and_the_curve_counts_tokens(chain: Chain, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    found = recover(model, chain.tokenizer, DATA, TRAINING, work_dir=tmp_path, progress=False)
    assert found.final_loss < found.start_loss - 0.05
    assert [tokens for tokens, _ in found.curve] == [step * STEP for step in range(11)]
    assert found.training.tokens == TRAINING.tokens
    losses = [loss for _, loss in found.curve]
    assert losses[0] == found.training.start_loss and min(losses) == found.training.best_loss
    assert found.training.best_step is not None and losses[found.training.best_step] == min(losses)
    test = evaluate_loss(model, _blocks(DATA, chain.tokenizer)["test"])
    assert (test.loss, test.num_tokens) == (pytest.approx(found.final_loss, abs=1e-6), found.test_tokens)
    assert found.start_loss != found.training.start_loss  # another part of the text
    assert json.loads(json.dumps(found.as_dict()))["curve"][1][0] == STEP


def test_a_teacher_joins_the_loss_exactly(chain: Chain, folder: Path, tmp_path: Path) -> None:
    model, teacher = load(folder), chain.anchors[0].load()
    blocks, first = _blocks(DATA, chain.tokenizer), np.random.default_rng(0).permutation
    config = TRAINING.model_copy(update={"tokens": 2 * STEP, "ce": 0.7, "kl": 1.5, "temperature": 2.0})
    rows = blocks["train"].select(first(len(blocks["train"]))[:BATCH])["input_ids"]
    ids = torch.tensor(list(rows))
    with torch.no_grad():
        student_logits, teacher_logits = (m(input_ids=ids).logits[:, :-1].flatten(0, 1) for m in (model, teacher))
    ce = cross_entropy(student_logits, ids[:, 1:].flatten())
    soft = [log_softmax(logits / 2.0, -1) for logits in (student_logits, teacher_logits)]
    kl = 4.0 * kl_div(soft[0], soft[1], log_target=True, reduction="batchmean")
    before = state(teacher)
    recover(model, chain.tokenizer, DATA, config, teacher, work_dir=tmp_path, progress=False)
    step = next(entry for entry in log(tmp_path) if "kl" in entry)
    assert step["step"] == 1
    assert step["ce"] == pytest.approx(ce.item(), rel=1e-4) and step["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert step["loss"] == pytest.approx(0.7 * ce.item() + 1.5 * kl.item(), rel=1e-4)
    assert "hidden" not in step
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    recover(load(folder), chain.tokenizer, DATA, config, work_dir=tmp_path, progress=False)
    assert not any("kl" in entry for entry in log(tmp_path))


def test_scratch_is_the_same_shape_on_the_same_text(chain: Chain, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = state(model)
    scratch = recover(model, chain.tokenizer, DATA, TRAINING, scratch=True, work_dir=tmp_path, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    made = recover(model, chain.tokenizer, DATA, TRAINING, work_dir=tmp_path, progress=False)
    assert [tokens for tokens, _ in scratch.curve] == [tokens for tokens, _ in made.curve]
    assert scratch.curve[0][1] == pytest.approx(math.log(len(chain.tokenizer)), abs=0.2)  # nothing is known yet
    assert scratch.curve[0][1] > made.curve[0][1] + 0.5
    assert all(one > other for (_, one), (_, other) in zip(scratch.curve, made.curve, strict=True))
    again = recover(model, chain.tokenizer, DATA, TRAINING, scratch=True, work_dir=tmp_path, progress=False)
    assert again == scratch


def test_a_ready_folder_is_written(chain: Chain, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "recovered"
    made = digests(folder)
    text = sorted(TEXT.glob("179*.txt"))
    told = recover_on_text(
        folder,
        text,
        output,
        tokens=f"{10 * STEP}",
        learning_rate=3e-3,
        teacher=str(built_chain()),
        against_scratch=True,
        sequence_length=LENGTH,
        batch_size=BATCH,
        progress=False,
    )
    assert told.keys() == {"recovered", "from scratch"} and digests(folder) == made
    found = told["recovered"]
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    data = DATA.model_copy(update={"held_out_fraction": 0.1})  # the default
    test = _blocks(data, AutoTokenizer.from_pretrained(output))["test"]
    assert evaluate_loss(loaded, test).loss == pytest.approx(found.final_loss, abs=1e-6)
    assert loaded.config.use_cache

    start = load(folder).config.cbd_hub
    origin = loaded.config.cbd_hub
    assert {name: value for name, value in origin.items() if name != "recovered"} == start
    assert origin["recovered"]["tokens"] == 10 * STEP and origin["recovered"]["teacher"] == "chain"
    assert origin["recovered"]["final_loss"] == found.final_loss < found.start_loss
    report = json.loads((output / "recovery.json").read_text())
    assert report["recovered"] == json.loads(json.dumps(found.as_dict()))
    assert report["config"]["training"]["tokens"] == 10 * STEP and "from scratch" in report
    assert (output / "recovery.png").read_bytes().startswith(b"\x89PNG")
    _, head, body = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0" and "model-index" not in head
    assert "made from the chain tiny and trained on for 1,280 tokens with chain as its teacher" in body
    assert f"{found.start_loss:.4f} | {found.final_loss:.4f}" in body
    assert sorted(path.name for path in output.parent.iterdir()) == ["recovered"]


def test_the_dtype_stays_and_a_plain_model_has_no_chain(chain: Chain, tmp_path: Path) -> None:
    plain = chain.anchors[-1].load(torch.bfloat16)
    del plain.config.cbd_hub
    plain.save_pretrained(tmp_path / "plain")
    chain.tokenizer.save_pretrained(tmp_path / "plain")
    config = RecoverConfig(data=DATA.model_dump(exclude={"sequence_length"}), training=TRAINING)
    found = recover_folder(tmp_path / "plain", config, tmp_path / "out", progress=False)
    assert found.keys() == {"recovered"}
    assert (
        found["recovered"].training.tokens == math.ceil(10 * STEP / (64 * BATCH)) * 64 * BATCH
    )  # the model's context
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.cbd_hub.keys() == {"recovered"}
    assert "begun as plain and trained on" in (tmp_path / "out" / "README.md").read_text()


def test_bad_input_is_refused_before_anything_is_trained(chain: Chain, folder: Path, tmp_path: Path) -> None:
    text = [TEXT / "1790_george_washington_n.txt"]
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    new = tmp_path / "new"

    def refused(error: type[Exception], words: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=words):
            recover_on_text(*arguments, progress=False, **options)
        assert not new.exists()

    refused(RecipeError, "give text to train on", folder, [], new)
    refused(RecipeError, "No text file matches", folder, [tmp_path / "none.txt"], new)
    refused(OutputExistsError, "is not empty", folder, text, taken)
    refused(RecipeError, "is a chain; make a model from it first", built_chain(), text, new)
    refused(ChainNotFoundError, "no model that can be loaded", taken, text, new)
    refused(RecipeError, "tokens is 0", folder, text, new, tokens=0)
    refused(RecipeError, "training.tokens is 'many'", folder, text, new, tokens="many")
    refused(RecipeError, "learning_rate is -1", folder, text, new, learning_rate=-1.0)
    refused(RecipeError, "sequence_length is 128 and the model's context 64", folder, text, new, sequence_length=128)
    refused(ChainNotFoundError, "taken", folder, text, new, teacher=str(taken))
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_a_teacher_of_another_vocabulary_is_refused(chain: Chain, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(chain, chain.plan(chain.anchors[-1].num_parameters), other, progress=False)
    small = train_tokenizer(
        [{"text": TEXT.joinpath("1793_george_washington_n.txt").read_text()}], len(chain.tokenizer)
    )
    assert len(small) == len(chain.tokenizer)  # sizes alone do not tell them apart
    small.save_pretrained(other)
    config = RecoverConfig(data=DATA, training=TRAINING, teacher=str(other))
    with pytest.raises(RecipeError, match="another vocabulary than the model"):
        recover_folder(folder, config, tmp_path / "out", progress=False)
    wide = chain.anchors[0].load()
    wide.resize_token_embeddings(len(chain.tokenizer) + 5)
    with pytest.raises(RecipeError, match="teacher's vocabulary has 305 entries and the model's 300"):
        recover(load(folder), chain.tokenizer, DATA, TRAINING, wide, work_dir=tmp_path / "work", progress=False)
    with pytest.raises(RecipeError, match="use the model's own tokenizer"):
        large = train_tokenizer([{"text": text.read_text()} for text in TEXT.glob("18*.txt")], 400)
        recover(load(folder), large, DATA, TRAINING, work_dir=tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    config = RecoverConfig(data=DATA, training=TRAINING.model_copy(update={"report_to": "wanbd"}))
    with pytest.raises(RecipeError, match=r"training.report_to names 'wanbd'; allowed: .*wandb"):
        recover_folder(tmp_path / "no model", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
