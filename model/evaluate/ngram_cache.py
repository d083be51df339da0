"""Counts of an n-gram cache as if it had been filled token by token, by sorting instead of by dictionaries.

The cache remembers, for contexts of 1 to `order` - 1 tokens, which tokens came next and how often (pull request 1499).
It is asked for the relative frequency of a token behind the longest context that it has seen. Contexts are compared
exactly: the number of a context of n tokens comes from the number of its last n - 1 and the token in front.
"""

from __future__ import annotations

import numpy as np

_VOCABULARY = 1 << 16


class CacheCounts:
    """The cache over a stream in which position i was learnt by event `events[j] = i`, j = 0, 1, ...

    streams: the token streams one behind the other; contexts do not reach across. `events` int64: positions of the
    joined streams in the order of learning; a position may be learnt more than once.
    """

    def __init__(self, streams: list[np.ndarray], order: int, events: np.ndarray) -> None:
        self.tokens = np.concatenate(streams).astype(np.int64)
        behind = np.concatenate([np.arange(len(stream)) for stream in streams])  # tokens in front of each position
        self._events = len(events)
        self._levels = []
        context = np.zeros(len(self.tokens), dtype=np.int64)
        for length in range(1, order):
            reach = np.flatnonzero(behind >= length)
            number = np.full(len(self.tokens), -1, dtype=np.int64)
            pairs = context[reach] * _VOCABULARY + self.tokens[reach - length]
            number[reach] = np.unique(pairs, return_inverse=True)[1]
            self._levels.append((number, *self._sorted(number, events)))
            context = number

    def frequency(self, positions: np.ndarray, tokens: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Relative frequency of `tokens` behind the longest context of each position seen in the first `known` events.

        float64 [n]; nan where no context, of whatever length, was seen.
        """
        result = np.full(len(positions), np.nan)
        for number, contexts, pairs, pair_of in reversed(self._levels):
            open_ = np.flatnonzero(np.isnan(result) & (number[positions] >= 0))
            context, limit = number[positions[open_]], known[open_]
            seen = self._count(contexts, context, limit)
            hits = np.zeros(len(open_), dtype=np.int64)
            wanted = context * _VOCABULARY + tokens[open_]
            pair = np.minimum(np.searchsorted(pair_of, wanted), len(pair_of) - 1) if len(pair_of) else None
            if pair is not None:
                exists = pair_of[pair] == wanted
                hits[exists] = self._count(pairs, pair[exists], limit[exists])
            some = seen > 0
            result[open_[some]] = hits[some] / seen[some]
        return result

    def _sorted(self, number: np.ndarray, events: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Events by (context, time) and by (context and token, time), and the sorted pairs that the latter number."""
        learnt = np.flatnonzero(number[events] >= 0)
        context = number[events[learnt]]
        pair_of, pair = np.unique(context * _VOCABULARY + self.tokens[events[learnt]], return_inverse=True)
        return np.sort(context * self._events + learnt), np.sort(pair * self._events + learnt), pair_of

    def _count(self, table: np.ndarray, key: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """Events of each key among the first `limit`."""
        first = np.searchsorted(table, key * self._events)
        return np.searchsorted(table, key * self._events + limit) - first
