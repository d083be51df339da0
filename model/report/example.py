"""A piece of validation text in which every token has the colour of its loss."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np

from model.data.tokenizer import SPACE, Tokenizer
from model.report.html import Markup, details, join, tag
from model.report.load import Run

_TOKENS = 360
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Upper ends of the classes in bits a token, with the colour of each.
_SCALE = (
    (0.5, "#ffffff"),
    (1.5, "#fef4e2"),
    (3.0, "#fde3ba"),
    (5.0, "#fbc98e"),
    (8.0, "#f5a26a"),
    (math.inf, "#e8744f"),
)


def example_text(run: Run) -> Iterator[Markup]:
    """The start of a typical document under the run's final mode; other modes stand in each token's tooltip."""
    mode, source = run.final_mode, run.by_token
    if mode is None or source is None or mode not in source.nll:
        return
    documents = source.per_document(mode)
    chosen = _choose(documents)
    if chosen is None:
        return
    start, length = (int(value) for value in source.documents[chosen])
    end = start + min(length, _TOKENS)
    tokens = source.tokens[start + 1 : end]
    bits = {name: nll[start + 1 : end] / math.log(2) for name, nll in source.nll.items()}
    loss, size, count = documents[chosen]
    shown = f", of which the first {len(tokens):,} are shown" if len(tokens) < count else ""
    yield tag(
        "p",
        f"Document {chosen + 1} of {len(documents):,}, of typical difficulty: {loss / math.log(2) / size:.3f} bits per "
        f"byte over {int(count):,} tokens{shown}. Colours are bits for a token under {mode}; its tooltip has every "
        "mode.",
    )
    yield _key()
    yield tag("div", join(_spans(tokens, bits, mode, source.tokenizer)), class_="text")
    if len(bits) > 1:
        yield details("The same text, better and worse", join(_compare(tokens, bits, mode, source.tokenizer)))


def _choose(documents: np.ndarray) -> int | None:
    """The document nearest to the middle, among those long enough to fill the picture if there are any."""
    usable = np.flatnonzero(documents[:, 1] > 0)
    if not usable.size:
        return None
    long = usable[documents[usable, 2] >= _TOKENS]
    usable = long if long.size else usable
    bpb = documents[usable, 0] / documents[usable, 1]
    return int(usable[np.argmin(np.abs(bpb - np.median(bpb)))])


def _spans(tokens: np.ndarray, bits: dict[str, np.ndarray], mode: str, tokenizer: Tokenizer) -> Iterator[Markup]:
    for text, first, last in _pieces(tokens, tokenizer):
        loss = {name: float(values[first:last].sum()) for name, values in bits.items()}
        colour = next(colour for top, colour in _SCALE if not loss[mode] > top)
        title = f"{text!r}\n" + "\n".join(f"{name}: {value:.2f} bits" for name, value in loss.items())
        yield tag("span", text, style=f"background:{colour}", title=title)


def _compare(tokens: np.ndarray, bits: dict[str, np.ndarray], mode: str, tokenizer: Tokenizer) -> Iterator[Markup]:
    """Where the final mode gains on another one (blue) or loses (red)."""
    other = "plain" if mode != "plain" and "plain" in bits else next(name for name in bits if name != mode)
    yield tag("p", f"Blue where {mode} needs fewer bits than {other}, red where it needs more; full colour at 1 bit.")
    spans = []
    for text, first, last in _pieces(tokens, tokenizer):
        gain = float((bits[other][first:last] - bits[mode][first:last]).sum())
        strength = min(1.0, abs(gain)) if math.isfinite(gain) else 0.0
        rgb = "43,108,176" if gain > 0 else "200,60,50"
        style = f"background:rgba({rgb},{0.75 * strength:.2f})"
        spans.append(tag("span", text, style=style, title=f"{text!r}\n{gain:+.2f} bits"))
    yield tag("div", join(spans), class_="text")


def _pieces(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, int, int]]:
    """(text, first, last) of each token; the byte tokens of one character are put together."""
    position = 0
    while position < len(tokens):
        first = position
        data = bytearray()
        while position < len(tokens) and (match := _BYTE_PIECE.fullmatch(tokenizer.piece(tokens[position]))):
            data.append(int(match[1], 16))
            position += 1
            if data.decode("utf-8", errors="replace")[-1] != "\ufffd":
                break
        if data:
            yield data.decode("utf-8", errors="replace"), first, position
            continue
        piece = tokenizer.piece(tokens[position])
        position += 1
        yield piece.replace(SPACE, " "), first, position


def _key() -> Markup:
    keys = []
    below = 0.0
    for top, colour in _SCALE:
        label = f"{below:g} to {top:g} bits" if math.isfinite(top) else f"over {below:g} bits"
        keys.append(tag("span", join([tag("i", "", style=f"background:{colour}"), label]), class_="key"))
        below = top
    return tag("p", join(keys))
