"""Prints pip's option for PyTorch's CPU wheels if their index answers within five seconds, else nothing.

pip itself would retry an index that cannot be reached for every package. PGOLF_CPU_INDEX names another index.
"""

import os
import ssl
import urllib.request

from pip._vendor import certifi

URL = os.environ.get("PGOLF_CPU_INDEX") or "https://download.pytorch.org/whl/cpu"

try:
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or certifi.where())
    urllib.request.urlopen(f"{URL}/torch/", timeout=5, context=context).close()
except OSError:
    pass
else:
    print(f"--extra-index-url {URL}")
