"""Full fine-tuning: a model from a chain, trained on text files with transformers' Trainer.

Example: python examples/finetune.py my-chain --text speeches/*.txt --output finetuned
"""

import argparse
from pathlib import Path

from transformers import Trainer, TrainingArguments, default_data_collator

from cbd_hub import Chain, from_chain
from cbd_hub.text.packing import pack
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import load_splits

SPEECHES = sorted((Path(__file__).parent / "data" / "sotu").glob("20*.txt"))


def main(options: argparse.Namespace) -> None:
    """Makes the model, measures it, trains it, measures it again, and writes it with its tokenizer."""
    chain = Chain.from_pretrained(options.chain)
    size = options.num_parameters or (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    model, tokenizer = from_chain(options.chain, num_parameters=size), chain.tokenizer
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
        per_device_eval_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
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
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{model.num_parameters():,} parameters, written to {options.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", nargs="?", default="quickstart-output/chain", help="repo id, or folder of a chain")
    parser.add_argument("--num-parameters", help="such as 600k; by default half-way between the two largest anchors")
    parser.add_argument("--text", type=Path, nargs="+", default=SPEECHES, help="UTF-8 text files")
    parser.add_argument("--output", type=Path, default=Path("finetuned"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="1e-3 suits tiny models, 5e-5 larger ones")
    main(parser.parse_args())
