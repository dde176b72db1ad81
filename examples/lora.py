"""LoRA: a model from a chain is written as a folder, and a PEFT adapter is trained on top of it.

An adapter is of use only with the very weights that it was trained on, so its config and card have to name a place
from which they load. A model in memory has none; a written one has its folder, and a published one its repository.

Example: python examples/lora.py my-chain --base-id my-name/my-model --output lora
"""

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from cbd_hub import Chain
from cbd_hub.chain.export import write_model
from cbd_hub.text.packing import pack
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import load_splits

SPEECHES = sorted((Path(__file__).parent / "data" / "sotu").glob("20*.txt"))


def main(options: argparse.Namespace) -> None:
    """Writes the base model, trains an adapter on it, and writes that beside it."""
    chain = Chain.from_pretrained(options.chain)
    size = options.num_parameters or (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    base = (options.output / "base").resolve()
    write_model(chain, chain.plan(size), base, repo_id=options.base_id)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), chain.tokenizer
    if options.base_id:  # PEFT reads the first for the adapter's config and the second for its card
        model.name_or_path = model.config._name_or_path = options.base_id
    targets = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    model = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets))
    model.print_trainable_parameters()

    length = min(512, model.config.max_position_embeddings)
    data = DataConfig(text_files=[str(path.resolve()) for path in options.text], held_out_fraction=0.2)
    splits = load_splits(data)[0]
    train, held_out = (
        pack(documents, tokenizer, length).map(lambda block: {"labels": block["input_ids"]})
        for documents in (splits.train, splits.test)
    )
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cache=True,  # it goes into the config
    )
    trainer = Trainer(model, arguments, default_data_collator, train, held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss, nats a token: {before:.4f} before, {after:.4f} after {options.steps} steps")
    model.save_pretrained(options.output / "adapter")
    print(f"base: {base}   adapter: {options.output / 'adapter'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", nargs="?", default="quickstart-output/chain", help="repo id, or folder of a chain")
    parser.add_argument("--num-parameters", help="such as 600k; by default half-way between the two largest anchors")
    parser.add_argument(
        "--base-id", help="owner/name under which the base is to be published; else its folder is named"
    )
    parser.add_argument("--text", type=Path, nargs="+", default=SPEECHES, help="UTF-8 text files")
    parser.add_argument("--output", type=Path, default=Path("lora"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="5e-3 suits tiny models, 2e-4 larger ones")
    main(parser.parse_args())
