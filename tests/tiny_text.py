"""Small made-up documents that tests of text share."""

from pathlib import Path

from datasets import Dataset, IterableDataset

__all__ = ["make_documents", "make_files", "make_text", "texts"]

PARAGRAPH = "The {0} sat on the mat, and the {0} saw {1} birds over the river.\n\n"


def make_text(number: int, paragraphs: int = 6) -> str:
    return "".join(PARAGRAPH.format(f"cat{number}", index) for index in range(paragraphs))


def make_documents(count: int = 40, paragraphs: int = 6) -> Dataset:
    return Dataset.from_dict({"text": [make_text(number, paragraphs) for number in range(count)]})


def texts(documents: Dataset | IterableDataset) -> list[str]:
    return [row["text"] for row in documents]


def make_files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder
