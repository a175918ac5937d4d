"""Lets torchvision be imported beside a torch that it was not built for; see `make test-vllm`.

From the package index there is only a torchvision for CUDA. Beside a CPU build of torch its
compiled part does not load, and importing it ends at two operators that vLLM has no use for.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

if (spec := find_spec("torchvision")) and spec.origin:
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        for name in ("nms", "qnms"):
            signature = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
