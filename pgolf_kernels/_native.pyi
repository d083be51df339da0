# The native module's functions are called by the kernels' Python faces alone, which check everything first.
from typing import Any

def __getattr__(name: str) -> Any: ...
