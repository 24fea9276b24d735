"""Any number of rows through a runtime whose graph takes a fixed number of them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def run(call: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, batch: int) -> Tensor:
    """rows [B, ...] -> [B, E], in calls of `batch`; the last one is filled up with its first row.

    What `call` gives may live in the runtime's own buffer: it is copied before the next call.
    """
    if len(rows) == batch:  # nothing to cut or join: a small tower's query feels either
        return torch.from_numpy(np.array(call(rows), dtype=np.float32))
    outputs = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        missing = batch - len(part)
        if missing:
            part = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
        outputs.append(np.array(call(part)[: batch - missing], dtype=np.float32))
    return torch.from_numpy(np.concatenate(outputs))
