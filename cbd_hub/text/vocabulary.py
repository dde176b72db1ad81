"""The bytes that tokens stand for, and how two vocabularies compare.

A tokenizer cuts text into pieces and gives each a number. Two tokenizers number the same piece differently, yet a
piece is a string of bytes either way, so two vocabularies are compared, and their tokens matched, by bytes. There are
two common ways to write bytes into a vocabulary:

- *byte-level BPE* (GPT-2, Llama 3, Qwen, SmolLM) writes each byte as one printable character: a space is ``Ġ``;
- *SentencePiece with byte fallback* (Llama 2, Mistral, Gemma) writes text as it is, a space as ``▁``, and spells what
  has no token of its own with the 256 tokens ``<0x00>`` to ``<0xFF>``.

Both can spell any ordinary text. A vocabulary that cannot (WordPiece, or BPE with an unknown-token) is refused: what
it reads is not what was written, so bytes say nothing about it.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError

__all__ = ["Pairs", "Vocabulary", "VocabularyReport", "compare_vocabularies"]


def _characters_of_bytes() -> dict[str, int]:
    """GPT-2's writing of bytes: printable ones as themselves, the other 68 as the characters from 256 on."""
    visible = {byte for byte in range(256) if chr(byte) in pre_tokenizers.ByteLevel.alphabet()}
    hidden = sorted(set(range(256)) - visible)
    return {**{chr(byte): byte for byte in visible}, **{chr(256 + n): byte for n, byte in enumerate(hidden)}}


_BYTES = _characters_of_bytes()
_FALLBACK = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
# Bytes that text consists of. Some byte-level vocabularies (SmolLM2's) lack others: control characters, bytes that
# never occur in UTF-8 and those that begin a character of an unassigned plane.
_ORDINARY = {bytes([b]) for b in (9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))}
_SPACE = "\u2581"  # SentencePiece's ▁


@dataclass(frozen=True)
class Vocabulary:
    """What each token id stands for."""

    tokens: tuple[bytes | None, ...]
    """The bytes of every id; None for special and unused ones."""
    fallback: frozenset[int] = frozenset()
    """Ids of ``<0xNN>`` tokens, used for a byte only where no other token fits."""
    bos: int | None = None
    """Id of the token that begins a text, if there is one."""
    eos: int | None = None
    """Id of the token that ends a text, if there is one."""
    pad: int | None = None
    """Id of the token that fills up a batch, if there is one."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Reads the vocabulary of a fast tokenizer. Takes about half a second per 50,000 entries.

        An added token that is not special (Pythia's runs of spaces, say) stands for its text. The tokens that begin
        and end a text stand for no bytes, whether or not they are marked as special.

        Raises:
            RecipeError: the tokenizer is a slow one, or it lacks a token for a byte of ordinary text.
                Bytes that text hardly ever holds (control characters, say) may lack one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RecipeError(
                f"{type(tokenizer).__name__} has no tokenizers backend to read bytes from; load a fast tokenizer "
                "(AutoTokenizer with a tokenizer.json)."
            )
        state = json.loads(backend.to_str())
        kinds = {part["type"] for name in ("pre_tokenizer", "decoder", "normalizer") for part in _parts(state[name])}
        model = state["model"]
        byte_level = "ByteLevel" in kinds and model["type"] == "BPE"
        if not byte_level and not ("ByteFallback" in kinds and model.get("byte_fallback")):
            raise RecipeError(
                f"{type(tokenizer).__name__} is a {model['type']} tokenizer that cannot spell every text in bytes; "
                "use byte-level BPE (GPT-2's kind) or BPE with byte fallback (Llama 2's kind)."
            )
        entries: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        spell = _byte_level if byte_level else _sentence_piece
        tokens: dict[int, bytes | None] = {index: spell(text) for text, index in entries.items()}
        if model.get("unk_token") in entries:
            tokens[entries[model["unk_token"]]] = None
        for added in state["added_tokens"]:
            tokens[added["id"]] = None if added["special"] else added["content"].encode()
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        tokens.update({index: None for index in (bos, eos) if index is not None})
        lacking = _ORDINARY - set(tokens.values())
        if lacking:
            raise RecipeError(
                f"{type(tokenizer).__name__} has no token for {len(lacking)} of the bytes that make up text (first: "
                f"0x{min(lacking).hex()}), so it cannot spell every text; use a tokenizer with all of them."
            )
        return cls(
            tokens=tuple(tokens.get(index) for index in range(max(tokens) + 1)),
            fallback=frozenset() if byte_level else frozenset(entries[t] for t in _FALLBACK if t in entries),
            bos=bos,
            eos=eos,
            pad=tokenizer.pad_token_id,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id that spells a string: of several the lowest, and a ``<0xNN>`` only where there is no other."""
        ids: dict[bytes, int] = {}
        for index in sorted(range(len(self)), key=lambda index: (index in self.fallback, index)):
            if token := self.tokens[index]:
                ids.setdefault(token, index)
        return ids


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tokens of two vocabularies that mean the same. Each id occurs at most once."""

    student_ids: Tensor
    """(M,) int64."""
    teacher_ids: Tensor
    """(M,) int64, in the order of `student_ids`."""
    identical: bool
    """Whether the vocabularies are one: the same ids with the same bytes and the same roles. Then all are paired."""

    @classmethod
    def between(cls, student: Vocabulary, teacher: Vocabulary) -> "Pairs":
        """Pairs the tokens with the same bytes, and those that end (and those that begin) a text.

        Where a vocabulary begins texts with the token that ends them, that token is paired as the ending one.

        M pairs.
        """
        if student == teacher:
            every = torch.arange(len(student))
            return cls(every, every.clone(), True)
        pairs = [(student.ids[token], teacher.ids[token]) for token in student.ids.keys() & teacher.ids.keys()]
        if student.eos is not None and teacher.eos is not None:
            pairs.append((student.eos, teacher.eos))
        if student.bos not in (None, student.eos) and teacher.bos not in (None, teacher.eos):
            pairs.append((student.bos, teacher.bos))
        ids = torch.tensor(sorted(pairs), dtype=torch.int64).reshape(-1, 2)
        return cls(ids[:, 0].contiguous(), ids[:, 1].contiguous(), False)


@dataclass(frozen=True)
class VocabularyReport:
    """How two vocabularies compare, by their entries and on some texts. All shares are from 0 to 1."""

    student_size: int
    """Entries of the student's vocabulary."""
    teacher_size: int
    """Entries of the teacher's."""
    matched: int
    """Pairs of tokens (:class:`Pairs`)."""
    student_share: float
    """Share of the student's entries that have a partner."""
    teacher_share: float
    """Share of the teacher's."""
    student_frequency: float
    """Share of the student's tokens of the texts that have a partner."""
    teacher_frequency: float
    """Share of the teacher's."""
    student_digits: int
    """The student's tokens of nothing but digits (a leading space aside) that have no partner."""
    teacher_digits: int
    """The teacher's: hundreds, where the student splits numbers into digits and the teacher does not."""
    student_digits_frequency: float
    """Share of the student's tokens of the texts that are such."""
    teacher_digits_frequency: float
    """Share of the teacher's."""
    student_specials: tuple[str, ...]
    """The student's special tokens that have no partner."""
    teacher_specials: tuple[str, ...]
    """The teacher's."""
    token_ratio: float
    """The student's tokens of the texts per token of the teacher's."""
    student_bytes_per_token: float
    """Bytes of the texts per token of the student's."""
    teacher_bytes_per_token: float
    """Bytes of the texts per token of the teacher's."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("", "student", "teacher"),
            ("entries", f"{self.student_size:,}", f"{self.teacher_size:,}"),
            ("with a partner", f"{self.student_share:.1%}", f"{self.teacher_share:.1%}"),
            ("... by frequency", f"{self.student_frequency:.1%}", f"{self.teacher_frequency:.1%}"),
            ("digits without", f"{self.student_digits:,}", f"{self.teacher_digits:,}"),
            ("... by frequency", f"{self.student_digits_frequency:.1%}", f"{self.teacher_digits_frequency:.1%}"),
            ("specials without", str(len(self.student_specials)), str(len(self.teacher_specials))),
            ("bytes per token", f"{self.student_bytes_per_token:.2f}", f"{self.teacher_bytes_per_token:.2f}"),
            ("tokens, relative", f"{self.token_ratio:.2f}", "1.00"),
        ]
        return "\n".join(f"{name:<16} {student:>9} {teacher:>9}" for name, student, teacher in rows)


@dataclass(frozen=True)
class _Side:
    """One vocabulary's half of a report."""

    share: float
    frequency: float
    digits: int
    digits_frequency: float
    specials: tuple[str, ...]
    tokens: int

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, paired: Tensor, texts: list[str]
    ) -> "_Side":
        encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts = torch.zeros(len(vocabulary), dtype=torch.int64)
        for ids in encoded["input_ids"]:
            counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=len(vocabulary))
        alone = torch.ones(len(vocabulary), dtype=torch.bool)
        alone[paired] = False
        digits = alone & torch.tensor([(token or b"").removeprefix(b" ").isdigit() for token in vocabulary.tokens])
        total = max(int(counts.sum()), 1)
        return cls(
            share=len(paired) / len(vocabulary),
            frequency=1 - int(counts[alone].sum()) / total,
            digits=int(digits.sum()),
            digits_frequency=int(counts[digits].sum()) / total,
            specials=tuple(
                token.content
                for index, token in sorted(tokenizer.added_tokens_decoder.items())
                if vocabulary.tokens[index] is None and alone[index]
            ),
            tokens=int(counts.sum()),
        )


def compare_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
) -> VocabularyReport:
    """Compares two tokenizers by their entries and by how they cut some texts.

    Args:
        student_tokenizer: a fast tokenizer.
        teacher_tokenizer: another.
        texts: a few hundred documents of the kind to train on are plenty; they are held in memory.

    Raises:
        RecipeError: there is no text, or :meth:`Vocabulary.of` refuses a tokenizer.
    """
    texts = list(texts)
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise RecipeError("compare_vocabularies got no text to count tokens of; pass some documents.")
    ours, theirs = Vocabulary.of(student_tokenizer), Vocabulary.of(teacher_tokenizer)
    pairs = Pairs.between(ours, theirs)
    student = _Side.of(student_tokenizer, ours, pairs.student_ids, texts)
    teacher = _Side.of(teacher_tokenizer, theirs, pairs.teacher_ids, texts)
    return VocabularyReport(
        student_size=len(ours),
        teacher_size=len(theirs),
        matched=len(pairs.student_ids),
        student_share=student.share,
        teacher_share=teacher.share,
        student_frequency=student.frequency,
        teacher_frequency=teacher.frequency,
        student_digits=student.digits,
        teacher_digits=teacher.digits,
        student_digits_frequency=student.digits_frequency,
        teacher_digits_frequency=teacher.digits_frequency,
        student_specials=student.specials,
        teacher_specials=teacher.specials,
        token_ratio=student.tokens / teacher.tokens,
        student_bytes_per_token=size / student.tokens,
        teacher_bytes_per_token=size / teacher.tokens,
    )


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer's JSON; of a sequence each of its steps."""
    if part is None:
        return
    yield part
    for name in ("pretokenizers", "decoders", "normalizers"):
        for inner in part.get(name, ()):
            yield from _parts(inner)


def _byte_level(text: str) -> bytes | None:
    """The bytes of a token of GPT-2's writing, or None where it holds a character that stands for no byte."""
    return bytes(_BYTES[c] for c in text) if all(c in _BYTES for c in text) else None


def _sentence_piece(text: str) -> bytes:
    """The bytes of a token of SentencePiece's writing."""
    return _FALLBACK.get(text) or text.replace(_SPACE, " ").encode()
