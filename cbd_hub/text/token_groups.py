"""Aligning two tokenizations of one text.

Student and teacher read the same bytes, cut differently:

    student   | the | cat | sat on | 1 | 9 | 4 | 5 |
    teacher   | the | cat | sat | on | 194 | 5     |
    groups    | the | cat | sat on | 194   | 5     |

Wherever a token ends at the same byte on both sides, both models have read the same text, so what they expect next
can be compared. The stretch between two such places is a *group*: the fewest tokens of each side that spell the same
bytes.
"""

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError
from cbd_hub.text.vocabulary import Vocabulary

__all__ = ["TokenAligner"]


class TokenAligner:
    """Reads a student's packed blocks with the teacher's tokenizer and finds the groups. Can be pickled.

    Special tokens of the student cut a row into segments. Where one stands the teacher gets its own: the one that
    begins a text for the one that begins a text, and else the one that ends a text (either where the other is
    missing). In front of a row it gets the one that begins a text if its tokenizer adds one itself. A block starts and
    ends anywhere, so the bytes at its ends that are no whole character are trimmed.

    A segment whose text the teacher's tokenizer alters (Unicode normalization, a byte it cannot spell, text that
    spells a special token) or that is no UTF-8 yields no groups, yet is read by the teacher. SentencePiece's space in
    front of a text is understood on both sides; the group that holds it on one side only is left out.

    Args:
        student_tokenizer: a fast tokenizer (:meth:`cbd_hub.text.vocabulary.Vocabulary.of`).
        teacher_tokenizer: another, with a token that ends or begins a text.
        longest: tokens of a group, on either side, at most; longer groups are left out.

    Raises:
        RecipeError: :class:`cbd_hub.text.vocabulary.Vocabulary` refuses a tokenizer, or the teacher's has neither an
            ``eos_token`` nor a ``bos_token``.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        longest: int = 16,
    ) -> None:
        self.student, self.teacher = Vocabulary.of(student_tokenizer), Vocabulary.of(teacher_tokenizer)
        self.tokenizer, self.longest = teacher_tokenizer, longest
        if self.teacher.eos is None and self.teacher.bos is None:
            raise RecipeError("The teacher's tokenizer has no eos_token and no bos_token; set one of them.")
        with_specials: Any = teacher_tokenizer("a")["input_ids"]
        self.front = self.teacher.bos if with_specials[0] == self.teacher.bos else None
        probe: Any = student_tokenizer("a", add_special_tokens=False)["input_ids"]
        self.student_prefix = int((self.student.tokens[probe[0]] or b"").startswith(b" "))
        self.lengths = _lengths(self.student), _lengths(self.teacher)
        self._counts: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the groups and of what was left out so far, in this process (each data loader worker has its own).

        ``tokens``, ``groups``, ``one_to_one`` (groups of one token on both sides), ``long_groups`` (left out),
        ``segments``, ``skipped_segments`` and ``trimmed_bytes``.
        """
        names = "tokens groups one_to_one long_groups segments skipped_segments trimmed_bytes".split()
        return {name: self._counts[name] for name in names}

    def align(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Tokenizes a batch for the teacher and finds its groups. Takes 10 to 17 microseconds a student token on one
        core, most of them in the teacher's tokenizer.

        Only groups are listed whose student tokens are all predicted (labels not -100, not first in the row) and
        before which the teacher has read a token too.

        Args:
            input_ids: (B, S) the student's token ids, packed.
            labels: (B, S), -100 where a token is not predicted; by default all are.

        Returns:
            all int64, on the CPU:

            - ``teacher_input_ids`` (B, T), padded behind to the longest row,
            - ``teacher_attention_mask`` (B, T), 0 on padding,
            - ``groups`` (G, 5), in the student's order: batch row; student position whose logits predict the group's
              first token; number of student tokens; teacher position whose logits predict the group's first token;
              number of teacher tokens.

        B batch, S / T tokens of a row for student / teacher, G groups.
        """
        rows = input_ids.cpu().numpy()
        predicted = np.ones(rows.shape, dtype=bool) if labels is None else (labels != -100).cpu().numpy()
        segments = [self._segments(row) for row in rows]
        texts = [text for row in segments for _, _, text, _ in row if text]
        encoded: Any = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        pending = iter(encoded)
        all_groups, teacher_rows = [np.zeros((0, 5), dtype=np.int64)], []
        for index, row in enumerate(rows):
            ids, groups = self._row(row, segments[index], pending)
            teacher_rows.append(ids)
            all_groups.append(np.insert(self._kept(groups, predicted[index]), 0, index, axis=1))
        self._counts["tokens"] += rows.size
        width = max(map(len, teacher_rows), default=0)
        pad = self.teacher.pad if self.teacher.pad is not None else self.teacher.eos or self.teacher.bos or 0
        padded = [ids + [pad] * (width - len(ids)) for ids in teacher_rows]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in teacher_rows]
        return {
            "teacher_input_ids": torch.tensor(padded, dtype=torch.int64),
            "teacher_attention_mask": torch.tensor(mask, dtype=torch.int64),
            "groups": torch.from_numpy(np.concatenate(all_groups)),
        }

    def _segments(self, row: np.ndarray) -> list[tuple[int, int, str, int]]:
        """The stretches between specials: first token, end, text, bytes before the text; -1 where it is no UTF-8."""
        segments, start = [], 0
        specials = np.flatnonzero(self.lengths[0][row] == 0)
        for end in [*specials.tolist(), len(row)]:
            if end > start:
                data = b"".join([self.student.tokens[i] or b"" for i in row[start:end]])
                skip = self.student_prefix if start and data.startswith(b" ") else 0
                at_front = 0 if start else next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
                at_back = _incomplete(data) if end == len(row) else 0
                body = data[skip + at_front : len(data) - at_back]
                self._counts.update(segments=1, trimmed_bytes=at_front + at_back)
                try:
                    segments.append((start, end, body.decode(), skip + at_front))
                except UnicodeDecodeError:
                    segments.append((start, end, body.decode(errors="replace"), -1))
            start = end + 1
        return segments

    def _row(self, row: np.ndarray, segments: list[tuple[int, int, str, int]], pending: Any) -> tuple[list[int], Any]:
        """The teacher's ids of a row, and its groups (n, 4)."""
        ids = [] if self.front is None else [self.front]
        groups = [np.zeros((0, 4), dtype=np.int64)]
        done = 0
        for start, end, text, skip in [*segments, (len(row), len(row), "", 0)]:
            for position in range(done, start):
                if self._special(int(row[position]), ids) and position:
                    groups.append(np.array([[position - 1, 1, len(ids) - 2, 1]]))
            pieces: list[int] = next(pending) if text else []
            if text:
                aligned = self._aligned(row[start:end], pieces, text.encode(), skip)
                groups.append(aligned + np.array([start, 0, len(ids), 0]))
            ids += pieces
            done = end
        return ids, np.concatenate(groups)

    def _special(self, token: int, ids: list[int]) -> bool:
        """Appends the teacher's token for a special one of the student's; returns whether they mean the same."""
        student, teacher = self.student, self.teacher
        begins = token == student.bos != student.eos
        if token == student.pad != student.eos and not begins:
            return False
        bos, eos = teacher.bos, teacher.eos
        partner = next(i for i in ((bos, eos) if begins else (eos, bos)) if i is not None)
        if begins and ids[-1:] == [partner]:
            return False
        ids.append(partner)
        return len(ids) > 1 and (
            (token == student.eos and partner == eos) or (begins and partner == bos and bos != eos)
        )

    def _aligned(self, student: np.ndarray, teacher: list[int], text: bytes, skip: int) -> np.ndarray:
        """Groups (n, 4) of a segment, positions counted from its start."""
        pieces = b"".join([self.teacher.tokens[i] or b"\xff" for i in teacher])  # \xff: in no text
        if skip < 0 or pieces not in (text, b" " + text):
            self._counts["skipped_segments"] += 1
            return np.zeros((0, 4), dtype=np.int64)
        ours = np.concatenate([[0], np.cumsum(self.lengths[0][student])])
        theirs = np.concatenate([[0], np.cumsum(self.lengths[1][teacher])]) + skip - (len(pieces) - len(text))
        meet = np.intersect1d(ours, theirs, assume_unique=True)
        s, t = np.searchsorted(ours, meet), np.searchsorted(theirs, meet)
        return np.stack([s[:-1] - 1, np.diff(s), t[:-1] - 1, np.diff(t)], axis=1)

    def _kept(self, groups: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """The groups of a row that are predicted, have something before them and are short enough."""
        start, students, before, _ = groups.T
        until = np.concatenate([[0], np.cumsum(predicted)])
        whole = until[start + 1 + students] - until[start + 1] == students
        groups = groups[whole & (start >= 0) & (before >= 0)]
        short = np.all(groups[:, [1, 3]] <= self.longest, axis=1)
        one = np.all(groups[:, [1, 3]] == 1, axis=1)
        self._counts.update(groups=int(short.sum()), one_to_one=int(one.sum()), long_groups=int((~short).sum()))
        return groups[short]


def _lengths(vocabulary: Vocabulary) -> np.ndarray:
    """(V,) bytes of every token, 0 for special ones."""
    return np.array([len(token or b"") for token in vocabulary.tokens], dtype=np.int64)


def _incomplete(data: bytes) -> int:
    """How many bytes at the end begin a UTF-8 character and do not complete it."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if needed > back else 0
    return 0
