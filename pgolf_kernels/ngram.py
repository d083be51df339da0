"""Hints from n-grams: which token tended to follow this context, earlier in the same stream.

A causal expert over a token stream (openai/parameter-golf pull request 1514). For each order k a table maps the context
(the last k tokens) to the number of times it was seen, n, and to its best next token with its number b. At position p
the highest order with b / n >= threshold and n >= least count gives the hint b's token with

    beta = base_beta * b / n,         used as   p'(t) = p(t) e^(beta [t = hint]) / (1 + p(hint) (e^beta - 1))

(threshold, least count) are (.7, 3) up to order 10, (.6, 2) up to 13, (.5, 2) from 14. Only then is the token at p
added: hint and beta at p follow from the tokens before p alone. A best token is replaced once another one's pair count
is larger than its own.

Two voters can take part: within a word, the tokens of the word so far predict the next one; at a word's start, the four
words before do. The flags of the previous token gate them. A hint that two of the three share gains `agree_bonus` (they
vote with beta 0, too); the largest beta wins.

tokens [T], any integers 0 to 65535; hints int32 [T], -1 where there is none; betas float64 [T], 0 there. CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pgolf_kernels import _native
from pgolf_kernels._native_op import num_threads, register_op

_LARGEST_ORDER = 32
_PRIMES = (
    *(36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241, 524309, 655373, 786433, 917521, 1048583, 1179653),
    *(1310729, 1441801, 1572869, 1703941, 1835017, 1966087, 2097169, 2228243, 2359319, 2490389, 2621471, 2752549),
    *(2883617, 3014687, 3145757, 3276833, 3407903, 3538973),
)
_PAIR_MIX, _TABLE_MIX = 1000003, 0x9E3779B97F4A7C15
_PROBES = 16


# --- reference -------------------------------------------------------------------------------------------------------


def ngram_hints_reference(
    tokens: Sequence[int],
    *,
    orders: Sequence[int] = (8, 10, 12, 14, 16),
    table_bits: int = 26,
    threshold_scale: float = 1.0,
    base_beta: float = 2.0,
    hash: str = "compatible",
) -> tuple[list[int], list[float]]:
    """The token expert in plain Python, without the voters.

    "compatible": the published hash (the exclusive or of token * prime), tables of 2^table_bits slots with 16 linear
    probes in which a key that finds no slot is dropped, best counts modulo 2^16. "full": exact contexts in unlimited
    tables.
    """
    hints, betas = [-1] * len(tokens), [0.0] * len(tokens)
    for order in sorted(orders):
        threshold, least = (0.7, 3) if order <= 10 else (0.6, 2) if order <= 13 else (0.5, 2)
        threshold *= threshold_scale
        pairs: dict[Any, list] = {}
        contexts: dict[Any, list] = {}
        for p in range(order, len(tokens)):
            token = tokens[p]
            if hash == "compatible":
                key = 0
                for k in range(order):
                    key ^= tokens[p - 1 - k] * _PRIMES[k]
                pair = _probe(pairs, (key * _PAIR_MIX) ^ (token * _PRIMES[order % 32]), table_bits, [0])
                seen = _probe(contexts, key, table_bits, [0, token, 0])
            else:
                context = tuple(tokens[p - order : p])
                pair = pairs.setdefault((context, token), [0])
                seen = contexts.setdefault(context, [0, token, 0])
            if seen is not None and seen[0] >= least and seen[2] / seen[0] >= threshold:
                hints[p], betas[p] = seen[1], base_beta * (seen[2] / seen[0])
            if pair is not None:
                pair[0] += 1
            if seen is not None:
                seen[0] += 1
                if token == seen[1]:
                    seen[2] = seen[2] + 1 if hash == "full" else (seen[2] + 1) % 65536
                elif pair is not None and pair[0] > seen[2]:
                    seen[1:] = [token, pair[0] if hash == "full" else min(pair[0], 65535)]
    return hints, betas


def _probe(table: dict[int, list], key: int, table_bits: int, fresh: list) -> list | None:
    home = key * _TABLE_MIX % 2**64
    for probe in range(_PROBES):
        known, value = table.setdefault((home + probe) % 2**table_bits, [key, fresh])
        if known == key:
            return value
    return None


# --- op --------------------------------------------------------------------------------------------------------------


def _check(tokens, orders, table_bits, numbers, has_leading_space, is_boundary, full_hash) -> None:
    if tokens.dtype not in (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"tokens: got {tokens.dtype}, wanted an integer type")
    if tokens.ndim != 1 or tokens.numel() >= 2**31:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, wanted [T] with T < 2^31")
    if not orders or len(set(orders)) != len(orders) or not all(1 <= order <= _LARGEST_ORDER for order in orders):
        raise ValueError(f"orders: got {tuple(orders)}, wanted different numbers from 1 to {_LARGEST_ORDER}")
    if not 4 <= table_bits <= 32:
        raise ValueError(f"table_bits: got {table_bits}, wanted 4 to 32")
    names = (
        *("threshold_scale", "base_beta", "agree_bonus", "within_threshold", "within_beta", "word_threshold"),
        "word_beta",
    )
    for name, number in zip(names, numbers, strict=True):
        if not abs(number) < float("inf"):
            raise ValueError(f"{name}: got {number}, wanted a finite number")
    if is_boundary is not None and has_leading_space is None:
        raise ValueError("has_leading_space: got None, wanted flags where is_boundary has some")
    for name, flags in (("has_leading_space", has_leading_space), ("is_boundary", is_boundary)):
        if flags is not None and (flags.dtype != torch.bool or flags.ndim != 1):
            raise TypeError(f"{name}: got {flags.dtype} {tuple(flags.shape)}, wanted torch.bool [vocabulary]")


def _hints_cpu(tokens, orders, table_bits, numbers, has_leading_space, is_boundary, full_hash):
    _check(tokens, orders, table_bits, numbers, has_leading_space, is_boundary, full_hash)
    hints = torch.empty(tokens.shape, dtype=torch.int32)
    betas = torch.empty(tokens.shape, dtype=torch.float64)
    if tokens.numel() == 0:
        return hints, betas
    if tokens.dtype == torch.uint16:
        short = tokens.contiguous()
        largest = int(short.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).max())
    else:
        smallest, largest = (int(bound) for bound in torch.aminmax(tokens))
        if smallest < 0 or largest > 65535:
            raise IndexError(f"tokens: got values from {smallest} to {largest}, wanted 0 to 65535")
        short = tokens.to(torch.uint16).contiguous()
    flags = []
    for name, table in (("has_leading_space", has_leading_space), ("is_boundary", is_boundary)):
        if table is not None and table.numel() <= largest:
            raise IndexError(f"{name}: got {table.numel()} flags, wanted more than the largest token, {largest}")
        flags.append(None if table is None else table.contiguous())
    descending = torch.tensor(sorted(orders, reverse=True), dtype=torch.int64)
    _native.ngram_hints_cpu(
        short.data_ptr(),
        short.numel(),
        descending.data_ptr(),
        len(orders),
        table_bits,
        max(1, largest.bit_length()),
        *numbers,
        *(0 if table is None else table.data_ptr() for table in flags),
        full_hash,
        num_threads(),
        hints.data_ptr(),
        betas.data_ptr(),
    )
    return hints, betas


def _hints_cuda(tokens, *rest):
    raise ValueError(f"tokens: got device {tokens.device}, wanted a CPU tensor")


def _hints_fake(tokens, orders, table_bits, numbers, has_leading_space, is_boundary, full_hash):
    _check(tokens, orders, table_bits, numbers, has_leading_space, is_boundary, full_hash)
    return tokens.new_empty(tokens.shape, dtype=torch.int32), tokens.new_empty(tokens.shape, dtype=torch.float64)


_ngram_hints = register_op(
    "ngram_hints(Tensor tokens, int[] orders, int table_bits, float[] numbers, Tensor? has_leading_space, "
    "Tensor? is_boundary, bool full_hash) -> (Tensor, Tensor)",
    _hints_cpu,
    cuda=_hints_cuda,
    fake=_hints_fake,
    not_differentiable="not differentiable: hints are counts of tokens",
)


# --- public ----------------------------------------------------------------------------------------------------------


def ngram_hints(
    tokens: torch.Tensor,
    *,
    orders: Sequence[int] = (8, 10, 12, 14, 16),
    table_bits: int = 26,
    threshold_scale: float = 1.0,
    base_beta: float = 2.0,
    agree_bonus: float = 0.1,
    within_threshold: float = 0.25,
    within_beta: float = 0.0,
    word_threshold: float = 0.8,
    word_beta: float = 0.0,
    has_leading_space: torch.Tensor | None = None,
    is_boundary: torch.Tensor | None = None,
    hash: str = "compatible",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hints int32 [T] and betas float64 [T] for a whole stream; position p is computed from tokens[:p] alone.

    tokens: integers [T] on CPU (uint16 is taken as it is).
    orders: context lengths, 1 to 32.
    table_bits: "compatible" only: each order's tables have 2^table_bits slots; keys that find none are dropped.
    threshold_scale: factor on the confidence thresholds.
    has_leading_space, is_boundary: bool [vocabulary]; without the first the two voters stay silent, without the
        second no token is a boundary.
    hash: "compatible" gives what pull request 1514 gives, collisions of its hash included. "full" tells contexts apart
        by a 64-bit hash and drops none: other hints (fewer, truer), several times faster, and less memory. The voters
        are the same in both.

    Memory: "compatible" 16 bytes * 2^table_bits for each of two orders at a time (32 where the table is too small for
    packed entries), beside 4 bytes a token for each; "full" 16 bytes a token. The result does not depend on the number
    of threads (torch.get_num_threads()).

    Raises TypeError, ValueError or IndexError naming the argument.
    """
    if hash not in ("compatible", "full"):
        raise ValueError(f"hash: got {hash!r}, wanted 'compatible' or 'full'")
    numbers = [threshold_scale, base_beta, agree_bonus, within_threshold, within_beta, word_threshold, word_beta]
    return _ngram_hints(
        tokens,
        list(orders),
        table_bits,
        [float(number) for number in numbers],
        has_leading_space,
        is_boundary,
        hash == "full",
    )
