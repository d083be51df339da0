"""The public layout of a data set: names of its folders and files, and which of several variants is meant.

DATA_DIR/datasets/fineweb10B_sp8192/fineweb_{train,val}_*.bin      `sp8192` is the variant
DATA_DIR/tokenizers/fineweb_8192_bpe.model
"""

from __future__ import annotations

import re
from pathlib import Path

from model.errors import DataError

DEFAULT_VARIANT = "sp8192"
PUBLIC_PREFIX = "fineweb10B_"
_VARIANT = re.compile(r"sp(\d+)")


def public_tokenizer_name(variant: str) -> str:
    """The tokenizer's file name for a variant: sp8192 -> fineweb_8192_bpe.model (DataError for another form)."""
    match = _VARIANT.fullmatch(variant)
    if not match:
        raise DataError(f"variant: got {variant!r}, wanted the form sp8192")
    return f"fineweb_{match[1]}_bpe.model"


def choose_variant(folder: Path, variant: str, vocab_size: int) -> str:
    """`variant`, or with "" the one in `folder` that `vocab_size` names, or the only one there.

    Raises DataError where that is not there, and naming those that are where none is meant.
    """
    found = sorted(path.name.removeprefix(PUBLIC_PREFIX) for path in folder.glob(f"datasets/{PUBLIC_PREFIX}*"))
    named = f"sp{vocab_size}"
    chosen = variant or (named if named in found else found[0] if len(found) == 1 else "")
    if not found:
        wanted = f"datasets/{PUBLIC_PREFIX}{variant or 'spN'}"
        raise DataError(f"{folder}: wanted {wanted}, there is neither that nor a manifest.json")
    if not chosen:
        of = f", and vocab_size={vocab_size} names none of them" if vocab_size else ""
        raise DataError(f"{folder}: holds {' and '.join(found)}{of}; wanted --variant with one of them")
    if chosen not in found:
        raise DataError(f"{folder}: wanted datasets/{PUBLIC_PREFIX}{chosen}, there are {', '.join(found)}")
    return chosen
