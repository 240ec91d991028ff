"""Import it before torch: Triton's kernels are interpreted on a machine without an NVIDIA GPU."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
