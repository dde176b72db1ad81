"""Small made-up documents that tests of text share."""

from pathlib import Path

from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from cbd_hub.text.generators import Generator
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.settings import Sampling

__all__ = [
    "GREEDY",
    "PROMPTS",
    "SAMPLED",
    "make_documents",
    "make_files",
    "make_text",
    "texts",
    "tokenizer_with_beginning",
    "written",
]

PARAGRAPH = "The {0} sat on the mat, and the {0} saw {1} birds over the river.\n\n"
PROMPTS = ["The cat", "", "over the river and", "birds", "mat, and the cat5 saw", "é", "sat"]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
SAMPLED = Sampling(max_new_tokens=12)


def make_text(number: int, paragraphs: int = 6) -> str:
    return "".join(PARAGRAPH.format(f"cat{number}", index) for index in range(paragraphs))


def make_documents(count: int = 40, paragraphs: int = 6) -> Dataset:
    return Dataset.from_dict({"text": [make_text(number, paragraphs) for number in range(count)]})


def texts(documents: Dataset | IterableDataset) -> list[str]:
    return [row["text"] for row in documents]


def written(generator: Generator, sampling: Sampling, prompts: list[str] = PROMPTS, first: int = 0) -> list[str]:
    return [text.text for text in generator.generate(prompts, sampling, first)]


def make_files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder


def tokenizer_with_beginning(
    documents: Dataset, vocab_size: int = 320, more: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer that puts ``<s>`` before a text, as those of Llama, Mistral and Gemma do; ``</s>`` ends one."""
    rules = train_tokenizer(documents, vocab_size).backend_tokenizer
    rules.add_special_tokens(["<s>", "</s>", *more])
    rules.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", rules.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>", pad_token="</s>")
