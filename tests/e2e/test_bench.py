"""`gloam bench` on random weights: no model file, no server."""

import json
import subprocess

from gloam_process import binary

SHAPE = ("--random-weights", "smollm2-135m", "--device", "cpu", "--threads", "2")


def bench(*arguments):
    return subprocess.run(
        [binary(), "bench", *arguments], capture_output=True, text=True, timeout=120
    )


def test_gemm_has_a_row_per_product():
    done = bench("gemm", *SHAPE, "--batch", "1,3", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    products = ["qkv", "attention_out", "gate_up", "down", "lm_head", "layer"]
    assert [(row["rows"], row["product"]) for row in report["rows"]] == [
        (rows, product) for rows in (1, 3) for product in products
    ]
    layer = dict(zip(products, report["rows"]))
    assert all(row["us"] > 0 for row in report["rows"])
    # Two bytes per weight of 9 + 2 * 3 heads of 64 channels, from 576.
    assert layer["qkv"]["megabytes"] * 1e6 == 2 * (9 + 2 * 3) * 64 * 576
    parts = sum(layer[name]["megabytes"] for name in ("qkv", "attention_out", "gate_up", "down"))
    assert abs(layer["layer"]["megabytes"] - parts) < 1e-6


def test_dense_attention_has_a_row_per_batch_and_context():
    done = bench(
        "attention", *SHAPE, "--batch", "1,2", "--context", "33,64", "--repeats", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = report["rows"]
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 33), (1, 64), (2, 33), (2, 64)]
    # Keys and values of 3 heads of 64 channels in two bytes each.
    assert all(
        abs(row["megabytes"] * 1e6 - row["batch"] * row["context"] * 2 * 3 * 64 * 2) < 1
        for row in rows
    )
    assert all(row["us"] > 0 and row["gigabytes_per_second"] > 0 for row in rows)
    assert report["facts"]["kv_cache_dtype"] == "bf16"


def test_wrong_use_names_the_setting():
    done = bench("gemm", "--random-weights", "nope")
    assert done.returncode == 1 and "'nope' is not a known shape" in done.stderr
    done = bench("gemm", *SHAPE, "--batch", "0")
    assert done.returncode == 2 and "--batch: Value 0 not in range 1 to" in done.stderr
    done = bench("step", *SHAPE, "--kv-cache-dtype", "fp8")
    assert done.returncode == 1 and "fp8 needs a GPU" in done.stderr
    done = bench("attention", *SHAPE, "--replay", __file__)
    assert done.returncode == 2 and "--random-weights excludes --replay" in done.stderr
