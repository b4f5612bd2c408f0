"""What one step computes: chosen by the scheduler, run by the runner."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Plan:
    """S rows, decodes first. Sequence i computes positions starts[i] .. starts[i] + lens[i] (half-open).

    rows:        [S] int32, indices into Rows
    starts:      [S] int32, num_computed when the step begins
    lens:        [S] int32, tokens to compute, ≥ 1
    samples:     [S] bool, this chunk reaches the last known token, so the next one is sampled
    num_decodes: the first that many sequences have one token to compute, which was sampled by an earlier step
    """

    rows: NDArray[np.int32]
    starts: NDArray[np.int32]
    lens: NDArray[np.int32]
    samples: NDArray[np.bool_]
    num_decodes: int

    @property
    def num_tokens(self) -> int:
        return int(self.lens.sum())
