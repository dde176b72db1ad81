"""Speculative decoding: the largest anchor writes, and a small model of the same chain drafts for it.

Example: python examples/speculative.py quickstart --draft 300k

A draft proposes a few tokens at a time; one pass of the large model accepts those that it would have written itself
(Leviathan et al. 2023, arXiv 2211.17192), so the text stays the large model's own. Models of one chain share their
tokenizer and were distilled from each other, which is what a draft needs. Both ways decode greedily.
"""

import argparse
import time

import torch
from transformers import PreTrainedModel

from cbd_hub import Chain, from_chain

PROMPTS = ("The Congress of the United States", "I recommend that", "Our relations with foreign", "In the past year")


def write(
    model: PreTrainedModel, prompts: list[torch.Tensor], tokens: int, **draft: object
) -> tuple[list[list[int]], float, int]:
    """Returns the tokens of every text, the seconds, and the passes of the model."""
    passes = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    start, texts = time.perf_counter(), []
    for ids in prompts:
        mask = torch.ones_like(ids)
        texts.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **draft)[0].tolist()
        )
    seconds = time.perf_counter() - start
    handle.remove()
    return texts, seconds, len(passes)


def main(options: argparse.Namespace) -> None:
    """Writes the same texts with and without the draft, and says what it was worth."""
    chain = Chain.from_pretrained(options.chain)
    large, draft = chain.anchors[0].load(), from_chain(options.chain, num_parameters=options.draft)
    draft.generation_config.num_assistant_tokens = options.proposed
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    prompts = [chain.tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    write(large, prompts[:1], 4)  # warm
    alone, without, _ = write(large, prompts, options.tokens)
    texts, with_draft, passes = write(large, prompts, options.tokens, assistant_model=draft)
    written = sum(len(text) - ids.shape[1] for text, ids in zip(texts, prompts, strict=True))
    accepted = (written - passes) / (passes * options.proposed)
    print(chain.tokenizer.decode(texts[0], skip_special_tokens=True))
    print(f"\n{large.num_parameters():,} parameters, draft of {draft.num_parameters():,}, {written} tokens")
    print(f"the same text: {texts == alone}")
    print(f"{accepted:.0%} of {options.proposed} proposed tokens accepted, {written / passes:.2f} tokens a pass")
    print(f"{written / without:.0f} tokens a second alone, {written / with_draft:.0f} with the draft")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", nargs="?", default="quickstart", help="repo id, or folder of a chain")
    parser.add_argument("--draft", default="300k", help="size of the draft, such as 300k")
    parser.add_argument("--proposed", type=int, default=4, help="tokens that the draft proposes at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of every text")
    main(parser.parse_args())
