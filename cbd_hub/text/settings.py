"""What a user sets about text: where it comes from, and what a source model writes.

Settings stand apart from the code that reads text, so that a recipe is read without loading it.
"""

import hashlib
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cbd_hub.settings import Settings

__all__ = ["DataConfig", "DatasetSource", "GenerationConfig", "Sampling", "ServerConfig", "SourceConfig"]


class DatasetSource(Settings):
    """A text column of a dataset on the Hub, or of a local dataset folder."""

    name: str
    """Repo id on the Hub, or a folder of data files relative to the recipe."""
    config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""
    split: str = "train"
    """Split to read; slices such as "train[:1%]" work too, except when streaming."""
    column: str = "text"
    """The column that holds one document a row: text, or a conversation, a list of {role, content} that the
    tokenizer's chat template turns into text."""
    revision: str | None = None
    """Branch, tag or commit of the dataset repository; a commit makes the build repeatable."""


class SourceConfig(Settings):
    """One of several sources of text: exactly one of `text_files` and `dataset`."""

    text_files: str | list[str] | None = None
    """Paths or glob patterns of UTF-8 text files, relative to the recipe's folder. Each file is one document; a
    ``.jsonl`` file holds one a line, under the key ``text``. Either may be packed (``.gz``)."""
    dataset: DatasetSource | None = None
    """A dataset to read the text from."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of the training tokens that this source makes up, relative to the other weights."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "SourceConfig":
        if bool(self.text_files) == (self.dataset is not None):
            got = "both" if self.dataset else "neither"
            raise ValueError(f"give exactly one of text_files and dataset, got {got}")
        return self


class DataConfig(Settings):
    """Which text a chain is distilled on: exactly one of `text_files` and `dataset`, or a list of `sources`."""

    text_files: str | list[str] | None = None
    """Paths or glob patterns of UTF-8 text files, relative to the recipe's folder. Each file is one document; a
    ``.jsonl`` file holds one a line, under the key ``text``. Either may be packed (``.gz``)."""
    dataset: DatasetSource | None = None
    """A dataset to read the text from."""
    sources: list[SourceConfig] | None = Field(default=None, min_length=1)
    """Several sources, mixed by weight. Where one runs out before the others, it starts again."""
    sequence_length: int = Field(default=512, ge=2)
    """Length of a block, in tokens."""
    document_boundaries: bool = False
    """Keep the documents in a block apart: none attends to another, positions start again with each, and the first
    token of each is not predicted. Otherwise a block is read as one text."""
    begin_of_text: str = "auto"
    """The token that begins every block, and with ``document_boundaries`` every document: ``auto`` is what the
    tokenizer puts before a text, as a rule what the model was trained with; ``none``; or a token such as "<s>"."""
    end_of_text: str = "auto"
    """The token that ends every document: ``auto`` is the end of text that the model was pretrained with; ``eos`` the
    tokenizer's ``eos_token``, which of a chat model ends a turn; or a token."""
    held_out_fraction: float = Field(default=0.1, gt=0, le=0.5)
    """Share of the text that is never trained on, 0 to 0.5: half validates, half tests. Of several sources, the share
    of each."""
    streaming: bool = False
    """Read the documents as they are needed instead of loading them first, for text larger than memory or
    disk."""
    seed: int = 0
    """Decides which documents are held out, and the order in which sources are mixed."""

    @property
    def shares(self) -> list[float]:
        """The share of tokens that each source makes up; their sum is 1."""
        weights = [source.weight for source in self.each_source()]
        return [weight / sum(weights) for weight in weights]

    def each_source(self) -> list[SourceConfig]:
        """The sources, in order; one that stands alone has weight 1."""
        return self.sources or [SourceConfig(text_files=self.text_files, dataset=self.dataset)]

    @model_validator(mode="after")
    def _one_way(self) -> "DataConfig":
        ways = {"text_files": self.text_files, "dataset": self.dataset, "sources": self.sources}
        named = [name for name, value in ways.items() if value]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise ValueError(f"give exactly one of text_files and dataset, or a list of sources, got {got}")
        return self

    @model_serializer(mode="wrap")
    def _without_newer_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves unset what older recipes do not have, so that a build of one goes on where it stopped."""
        before = {"sources": None, "document_boundaries": False, "begin_of_text": "none", "end_of_text": "eos"}
        return {name: value for name, value in handler(self).items() if name not in before or value != before[name]}


class Sampling(Settings):
    """How the next token is chosen."""

    max_new_tokens: int = Field(default=200, ge=1)
    """Most tokens written after a prompt; fewer where the model ends its text."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Logits are divided by it; 1 samples from the model's own distribution, 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability; 1 is all."""
    top_k: int = Field(default=0, ge=0)
    """Sample among this many of the likeliest tokens; 0 is all. Not every server knows it."""
    seed: int = 0
    """Another seed samples other text."""

    def row_seed(self, number: int) -> int:
        """The seed of the prompt with a number, 0 to 2^31 - 1."""
        return int(hashlib.sha256(f"{self.seed}:{number}".encode()).hexdigest(), 16) % 2**31


class ServerConfig(Settings):
    """A server that speaks the OpenAI protocol, such as vLLM's."""

    base_url: str = Field(pattern="^https?://")
    """Where its paths begin, as a rule "http://host:port/v1"."""
    model: str
    """The model's name on the server. The text is kept under this name, whatever the address."""
    api_key_env: str | None = None
    """The environment variable that holds the key; the key itself never stands in a recipe."""
    parallel: int = Field(default=4, ge=1)
    """Requests at a time."""
    retries: int = Field(default=5, ge=0)
    """Further tries of a request that failed for a passing reason."""
    timeout: float = Field(default=120, gt=0, allow_inf_nan=False)
    """Seconds that one try may take."""
    start: str | None = None
    """Sent for an empty prompt: the begin-of-text token as text, such as "<s>"."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, for this server alone."""


class GenerationConfig(Settings):
    """What a source model writes, and which of it is kept."""

    prompts: str | DatasetSource | None = None
    """A UTF-8 text file with one prompt a line, or a dataset of prompts; None takes the first tokens of each document
    of the corpus."""
    prompt_tokens: int = Field(default=16, ge=0)
    """Tokens of a corpus document that make a prompt; 0 is an empty prompt, so that the model begins by itself."""
    documents: int = Field(default=1000, ge=1)
    """Texts to write. Where there are fewer prompts they are used again, each time with another seed; greedy
    decoding, which would write the same again, uses each once."""
    sampling: Sampling = Sampling()
    """How the next token is chosen."""
    chat: bool = False
    """A prompt is a user's message and the text the answer to it. Otherwise the text goes on from the prompt."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts continued together by a model in this process."""
    server: ServerConfig | None = None
    """Have a server write; None is the source model in this process."""
    min_tokens: int = Field(default=0, ge=0)
    """Drop what has fewer new tokens."""
    max_repetition: float = Field(default=0.5, ge=0, le=1)
    """Drop what repeats itself: the share of its runs of four words that came before in it. 1 keeps everything."""
    deduplicate: bool = True
    """Drop what an earlier text says word for word, white space aside."""
