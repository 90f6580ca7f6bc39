"""Strings that end a completion, found while it is being sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BYTES = 4  # of a character in UTF-8 at most: as many tokens may share one character
_CONTEXT = 4  # tokens more, since a decoder may trim or garble the start of what it is given


class StopStrings:
    """Says for each token whether with it the completion's decoded text first contains one of some strings.

    Only each completion's last tokens are kept and decoded, enough to hold the longest string in whatever pieces it
    comes. Special tokens are not text and do not count.

    Args:
        strings: none of them empty.
        rows: completions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], rows: int) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self._special = frozenset(tokenizer.all_special_ids)
        reach = _BYTES * max(map(len, strings)) + _CONTEXT
        self._tails: list[deque[int]] = [deque(maxlen=reach) for _ in range(rows)]

    def ended(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Append a token to each of these rows; does it complete a string?"""
        spoken = [token not in self._special for token in tokens]
        for row, token, counts in zip(rows, tokens, spoken, strict=True):
            if counts:
                self._tails[row].append(token)
        return [counts and self._contains(row) for row, counts in zip(rows, spoken, strict=True)]

    def _contains(self, row: int) -> bool:
        text = self.tokenizer.decode(list(self._tails[row]))
        return any(string in text for string in self.strings)
