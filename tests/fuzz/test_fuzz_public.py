"""Mutated files of the public systems: their compressed form, the zip inside, and the pickle in a zip that fits it."""

import io
import random
import zipfile
from collections.abc import Callable

import pytest
import torch

from model.errors import ArtifactError
from model.public_artifact import parse_public_artifact, read_torch_file
from tests.fuzz.mutations import in_memory, in_time, mutate
from tests.golden import FOLDER
from tests.test_public_artifact import PACKINGS, saved

FILES = 6000


def with_pickle(raw: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The zip with another data.pkl and checksums that fit."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_mutated_public_artifacts() -> None:
    draw = random.Random(20260402)
    content = {
        "w": {"a.q": torch.ones(4, 3, dtype=torch.int8), "a.scale": torch.ones(4).half(), "b": torch.randn(7)},
        "m": {"a": "gptq (int6)", "b": "passthrough"},
    }
    raw = saved(content)
    packed = [pack(raw) for pack in PACKINGS.values()]
    packed += [path.read_bytes() for path in sorted((FOLDER / "public").iterdir())]
    refused = accepted = 0
    with in_memory():
        for number in range(FILES):
            with in_time():
                try:
                    if number % 4 == 0:
                        parse_public_artifact(mutate(packed[number // 4 % len(packed)], draw))
                    elif number % 4 == 1:
                        read_torch_file(mutate(raw, draw))
                    else:
                        read_torch_file(with_pickle(raw, lambda program: mutate(program, draw)))
                    accepted += 1
                except ArtifactError:
                    refused += 1
    assert refused > FILES // 2 and accepted > 0, (refused, accepted)
