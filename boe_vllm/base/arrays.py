"""Host arrays that pass between the rooms, and the package's one legend of shape letters.

A name that ends in capital letters says its shape: `q_THP` is [T, H, P]. A lower-case letter is a
part of what its capital stands for (`r` rows of one tile, `c` candidates of one request, `s` keys
of one sequence), a digit is a size.

    L   positions of a sequence, prompt and canvas
    B   sequences of a pass
    T   packed live rows of a pass
    R   packed logit rows: those whose predictions are wanted
    A   packed saved rows, whose activations are kept for a backward; in `attention`, the rows whose
        attention may pass a gradient
    S   packed rows of keys and values
    Q   packed rows of hypothetical states
    N   any rows
    M   masked positions that may be written now
    W   written positions of the block
    C   candidates
    O   positions whose entropies are summed
    D   width of the residual stream
    F   inner width of the MLP
    H   query heads
    G   key and value heads
    P   size of a head
    V   vocabulary
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
