#!/usr/bin/env python3
"""Writes goldens/quants.json: random blocks of every weight type and the fp32 values that the
`gguf` package (GGUF's reference implementation in Python) makes of them.

    python tests/kernels/make_quant_goldens.py
"""

import json
import pathlib

import gguf
import numpy as np
from gguf.quants import dequantize

ROWS, COLS = 2, 256
TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K".split()
NUMPY_TYPES = {"F32": np.float32, "F16": np.float16}


def golden(name: str, rng: np.random.Generator) -> dict:
    kind = gguf.GGMLQuantizationType[name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = COLS // block_elements * block_bytes
    while True:  # random bytes make infinite scales now and then: not what a file holds
        data = rng.integers(0, 256, (ROWS, row_bytes), dtype=np.uint8)
        values = dequantize(data.view(NUMPY_TYPES.get(name, np.uint8)), kind).astype(np.float32)
        if np.isfinite(values).all():
            break
        if block_bytes <= 4 or name == "BF16":  # plain floats: clear the top exponent bit
            size = block_bytes
            data[:, size - 1 :: size] &= 0xBF
            values = dequantize(data.view(NUMPY_TYPES.get(name, np.uint8)), kind)
            values = values.astype(np.float32)
            break
    return {
        "rows": ROWS,
        "cols": COLS,
        "data": data.tobytes().hex(),
        "values": values.astype("<f4").tobytes().hex(),
    }


def main() -> None:
    rng = np.random.default_rng(20240607)
    with np.errstate(all="ignore"):
        goldens = {name: golden(name, rng) for name in TYPES}
    path = pathlib.Path(__file__).parent / "goldens" / "quants.json"
    path.write_text(json.dumps(goldens, indent=0) + "\n")


if __name__ == "__main__":
    main()
