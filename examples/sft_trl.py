"""Chat: a model from a chain, tuned on conversations with TRL's SFTTrainer.

Example: python examples/sft_trl.py my-chain --data my-chats.jsonl --output chat
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from cbd_hub import Chain, from_chain

CHATS = Path(__file__).parent / "data" / "chat" / "union.jsonl"
# For a chain whose tokenizer has no template of its own. It needs no new token: every piece is plain text but the end.
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% if message.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""


def main(options: argparse.Namespace) -> None:
    """Makes the model, tunes it on four fifths of the conversations, and measures it on the rest before and after."""
    chain = Chain.from_pretrained(options.chain)
    size = options.num_parameters or (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    model, tokenizer = from_chain(options.chain, num_parameters=size), chain.tokenizer
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    if options.base_id:
        model.name_or_path = model.config._name_or_path = options.base_id
    rows = load_dataset("json", data_files=str(options.data), split="train").train_test_split(0.2, seed=0)
    arguments = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        max_length=min(1024, model.config.max_position_embeddings),
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.accelerator.is_available(),
        use_cache=True,  # it goes into the config
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss, nats a token: {before:.4f} before, {after:.4f} after {options.steps} steps")
    trainer.save_model(str(options.output))  # weights, config, tokenizer and its chat template
    trainer.create_model_card(model_name=options.output.name, tags=["cbd-hub"])
    prompt = [{"role": "user", "content": "Who reports on the state of the Union?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    print(f"asked: {prompt[0]['content']}\nanswered: {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", nargs="?", default="quickstart-output/chain", help="repo id, or folder of a chain")
    parser.add_argument("--num-parameters", help="such as 600k; by default half-way between the two largest anchors")
    parser.add_argument("--base-id", help="owner/name of the base for the card; else what the chain is called")
    parser.add_argument("--data", type=Path, default=CHATS, help="JSON lines, each with a list `messages`")
    parser.add_argument("--output", type=Path, default=Path("chat"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="1e-3 suits tiny models, 2e-5 larger ones")
    main(parser.parse_args())
