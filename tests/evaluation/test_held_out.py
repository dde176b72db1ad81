"""Held-out loss against transformers' own, and bits a byte."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_models import FAMILIES, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import HeldOutLoss, bits_per_byte, evaluate_loss, losses_by_beginning
from cbd_hub.text.packing import train_tokenizer


def make_blocks(rows: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def make_dataset(blocks: Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": blocks.tolist()})


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loss_of_transformers(family: str) -> None:
    model, blocks = tiny_model(tiny_config(family)), make_blocks()
    with torch.no_grad():
        expected = model(blocks, labels=blocks).loss.item()
    got = evaluate_loss(model, blocks, batch_size=2)
    assert got.loss == pytest.approx(expected, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert got.num_tokens == 5 * 11


def test_losses_with_and_without_a_beginning_are_of_the_same_tokens() -> None:
    model, text = tiny_model(tiny_config("llama")), make_blocks()
    began, bare = losses_by_beginning(model, text, token=1)
    with torch.no_grad():
        without = model(text).logits[:, :-1]
        with_it = model(F.pad(text, (1, 0), value=1)).logits[:, 1:-1]
    for got, logits in ((began, with_it), (bare, without)):
        assert got == pytest.approx(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item(), rel=1e-5)
    assert began != pytest.approx(bare, rel=1e-3)


def test_soft_capped_logits_are_capped() -> None:
    model, blocks = tiny_model(tiny_config("gemma3_text", final_logit_softcapping=0.5)), make_blocks()
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    assert logits.abs().max() <= 0.5
    expected = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert evaluate_loss(model, blocks).loss == pytest.approx(expected, rel=1e-5)


def test_datasets_streams_and_tensors_give_one_result() -> None:
    model, blocks = tiny_model(tiny_config("llama")), make_blocks()
    expected = evaluate_loss(model, blocks)
    assert evaluate_loss(model, make_dataset(blocks)) == expected
    assert evaluate_loss(model, make_dataset(blocks).to_iterable_dataset()) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    model, blocks = tiny_model(tiny_config("llama"), torch.float64), make_blocks()
    assert evaluate_loss(model, blocks, batch_size).loss == pytest.approx(evaluate_loss(model, blocks).loss, rel=1e-12)


@pytest.mark.parametrize("max_tokens, rows", [(1, 1), (11, 1), (32, 2), (33, 3), (10_000, 5)])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_max_tokens_takes_the_first_blocks(max_tokens: int, rows: int, batch_size: int) -> None:
    model, blocks = tiny_model(tiny_config("llama"), torch.float64), make_blocks()
    got = evaluate_loss(model, make_dataset(blocks), batch_size, max_tokens=max_tokens)
    assert got.num_tokens == 11 * rows
    assert got.loss == pytest.approx(evaluate_loss(model, blocks[:rows]).loss, rel=1e-12)


def make_apart(rows: int = 5) -> tuple[Dataset, list[Tensor]]:
    """Blocks of 12 tokens that hold documents of 5, 1, 4 and 2, and the documents one by one."""
    blocks, lengths = make_blocks(rows), [5, 1, 4, 2]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    columns = {"input_ids": blocks, "position_ids": positions, "labels": blocks.where(positions > 0, -100)}
    documents = [document for block in blocks for document in block.split(lengths)]
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()}), documents


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_documents_kept_apart_are_measured_as_if_alone(family: str, attention: str) -> None:
    model = tiny_model(tiny_config(family, final_logit_softcapping=2.0 if "gemma" in family else None))
    model.set_attn_implementation(attention)
    blocks, documents = make_apart()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()
            for ids in documents
            if len(ids) > 1
        ]
    got = evaluate_loss(model, blocks, batch_size=2)
    assert got.num_tokens == 5 * (4 + 3 + 1)
    assert got.loss == pytest.approx(sum(losses) / got.num_tokens, rel=1e-5)
    assert evaluate_loss(model, blocks.to_iterable_dataset(), batch_size=3).loss == pytest.approx(got.loss, rel=1e-5)
    assert evaluate_loss(model, make_blocks()).loss != pytest.approx(got.loss, rel=1e-3)
    with torch.no_grad():  # and the model is left as it was
        assert torch.equal(model(make_blocks()).logits, model(make_blocks()).logits)
        assert not model.base_model._forward_pre_hooks


@pytest.mark.parametrize("max_tokens, rows", [(1, 1), (15, 1), (16, 2), (39, 4), (40, 5)])
def test_max_tokens_counts_what_is_predicted(max_tokens: int, rows: int) -> None:
    blocks, _ = make_apart()
    assert evaluate_loss(tiny_model(tiny_config("llama")), blocks, 3, max_tokens=max_tokens).num_tokens == 8 * rows


@pytest.mark.parametrize("initial", [True, False])
def test_a_model_that_mixes_documents_up_is_refused(initial: bool) -> None:
    model = tiny_model(tiny_config("opt"))
    if initial:  # small weights hide the mistake best
        model.apply(model._init_weights)
    blocks, _ = make_apart()
    with pytest.raises(RecipeError, match="OPTForCausalLM does not keep the documents of a block apart"):
        evaluate_loss(model, blocks)
    assert evaluate_loss(model, blocks.select_columns("input_ids")).num_tokens == 55


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_untrained_and_half_precision_models_pass_the_check(family: str, dtype: torch.dtype) -> None:
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert evaluate_loss(model, make_apart()[0]).num_tokens == 40


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_restored(training: bool) -> None:
    model = tiny_model(tiny_config("gpt2", resid_pdrop=0.5, embd_pdrop=0.5))
    expected = evaluate_loss(model, make_blocks()).loss
    model.train(training)
    assert evaluate_loss(model, make_blocks()).loss == expected
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(IndexError):
        evaluate_loss(model, torch.full((1, 4), 10_000))  # no such token
    assert model.training is training


def test_a_model_can_be_trained_after_it_was_evaluated() -> None:
    model, blocks = tiny_model(tiny_config("llama")), make_blocks()
    evaluate_loss(model, blocks)
    model(blocks, labels=blocks).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("blocks", [torch.empty(0, 8, dtype=torch.long), torch.ones(3, 1, dtype=torch.long)])
def test_nothing_to_evaluate_on_is_refused(blocks: Tensor) -> None:
    with pytest.raises(RecipeError, match="one block of two tokens"):
        evaluate_loss(tiny_model(tiny_config("llama")), blocks, max_tokens=4)


def test_evaluation_as_dict_is_json() -> None:
    result = HeldOutLoss(loss=1.5, perplexity=math.exp(1.5), num_tokens=7)
    assert HeldOutLoss(**json.loads(json.dumps(result.as_dict()))) == result


def test_bits_per_byte_by_hand() -> None:
    tokenizer = train_tokenizer([{"text": "one two three, one two three. "}] * 20, 280)
    text = "one two three. one three two, "
    ids = tokenizer(text)["input_ids"]
    blocks = torch.tensor([ids, ids])
    result = HeldOutLoss(loss=0.5, perplexity=math.exp(0.5), num_tokens=len(ids) - 1)  # the first block alone
    size = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert bits_per_byte(result, blocks, tokenizer) == pytest.approx(0.5 * (len(ids) - 1) / math.log(2) / size)
    with pytest.raises(RecipeError, match="no text"):
        bits_per_byte(result, torch.tensor([[0, 0, 0]]), tokenizer)
