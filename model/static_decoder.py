"""Decodes `encode_codes(..., mode="static")` with NumPy alone, so that it can travel with a size-limited submission.

The same bits as pgolf_kernels.packing.decode_codes, and the same refusals; docs/packing.md has the format. Lanes are
advanced together, so that a step costs a few array operations for up to 1024 codes.
"""

import itertools
import zlib

import numpy as np


def decode_static(data):
    """The matrices, int8 [R, C]. Raises ValueError for damaged data."""
    body = bytes(data[9:])
    if bytes(data[:5]) != b"PGC1S" or zlib.crc32(body) != int.from_bytes(data[5:9], "little"):
        raise ValueError("coded matrices: damaged, or not in the static format")
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while place < len(body) and shift < 42:
            value |= (body[place] & 127) << shift
            shift += 7
            place += 1
            if body[place - 1] < 128:
                return value
        raise ValueError("coded matrices: a shape is damaged")

    shapes: list[tuple[int, int]] = []
    for _ in range(varint()):
        shape = varint(), varint()
        shapes += [shape] * min(varint(), 4097 - len(shapes))
        if len(shapes) > 4096:
            break
    if len(shapes) > 4096 or sum(max(r, 1) * max(c, 1) for r, c in shapes) > (1 << 22) + 1024 * len(body):
        raise ValueError("coded matrices: more than the data can hold")
    return decode_matrices(body[place:], shapes)


def decode_matrices(body, shapes):
    """`decode_static` of what follows the shapes."""
    try:
        return _decode(body, shapes)
    except (IndexError, OverflowError) as error:
        raise ValueError("coded matrices: it ends early") from error


def _decode(body, shapes):
    place = 1

    def check(good):
        if not good:
            raise ValueError("coded matrices: damaged")

    def frequencies(symbols):
        """Frequencies of so many symbols, from their weights of eight bits."""
        nonlocal place
        code = np.frombuffer(body, np.uint8, symbols, place).astype(np.int64)
        place += symbols
        check(code.any())
        weight = np.where(code > 0, (16 + (code & 15)) << (code >> 4), 0)
        frequency = np.where(code > 0, np.maximum(1, (weight << 14) // weight.sum()), 0)
        frequency[weight.argmax()] += (1 << 14) - frequency.sum()
        check(frequency[weight.argmax()] > 0)
        return frequency

    def tables(symbols, count):
        """(frequencies, their running sums, the symbol of each of the 2^14 slots) of each table."""
        f = np.stack([frequencies(symbols) for _ in range(count)])
        slots = np.stack([np.repeat(np.arange(symbols, dtype=np.uint8), row) for row in f])
        return f.astype(np.uint32), (np.cumsum(f, axis=1) - f).astype(np.uint32), slots

    groups = [(shape, len(list(same))) for shape, same in itertools.groupby(shapes)]
    headers = []
    for _ in groups:
        headers.append(place)
        symbols, count = body[place + 1] + 1, body[place + 2] + 1
        place += 3 + symbols * count + count * (count > 1)
    lanes = min(1 << 10, max(1, sum(r * c for r, c in shapes) >> 15))
    check(body[0] == lanes.bit_length() - 1)
    lanes = 1 << body[0]
    state = np.frombuffer(body, "<u4", lanes, place).copy()
    check((state >= 65536).all())
    words = np.frombuffer(body, "<u2", -1, place + 4 * lanes)
    used = 0

    def run(model, table):
        """Symbols of a run whose entry i is coded with table[i]."""
        nonlocal used
        frequency, start, slots = model
        out = np.empty(len(table), np.uint8)
        for i in range(0, len(table), lanes):
            t = table[i : i + lanes]
            x = state[: len(t)]
            slot = x & 16383
            symbol = out[i : i + lanes] = slots[t, slot]
            x = frequency[t, symbol] * (x >> 14) + slot - start[t, symbol]
            short = np.flatnonzero(x < 65536)
            check(used + len(short) <= len(words))
            x[short] = x[short] << 16 | words[used : used + len(short)]
            used += len(short)
            state[: len(t)] = x
        return out

    result = []
    for ((rows, cols), repeats), place in zip(groups, headers, strict=True):
        low, symbols, count = body[place], body[place + 1] + 1, body[place + 2] + 1
        check((low ^ 128) + symbols <= 256)
        place += 3
        codes = tables(symbols, count)
        columns = np.zeros(cols * repeats, np.uint8)
        if count > 1:
            columns = run(tables(count, 1), columns)
        for index in range(repeats):
            cluster = columns[index * cols : (index + 1) * cols]
            result.append((run(codes, np.tile(cluster, rows)) + np.uint8(low)).view(np.int8).reshape(rows, cols))
    check(used == len(words) and (state == 65536).all())
    return result
