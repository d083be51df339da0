"""The golden vectors in tests/golden: numbers that the public reference systems give on CPU in float32."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def load_safetensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / name)


def load_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def metadata(name: str) -> dict[str, Any]:
    """The JSON configuration stored in a .safetensors file's metadata."""
    with open(FOLDER / name, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return json.loads(header["__metadata__"]["config"])
