"""The Triton kernels: results in interpreter mode, machine code for every supported GPU, both in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from cluscomp_kernels.clus_linear import reference, triton_kernel

real = torch.empty
torch.empty = lambda *a, **k: real(*a, **k).fill_(float("nan"))
# the interpreter truncates to bfloat16, so its error is a whole unit in the last place
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
cases = [
    (1, 1, 1, 1, 1, torch.float16, torch.float32),
    (5, 70, 50, 8, 40, torch.float16, torch.float16),
    (1, 33, 131, 6, 300, torch.bfloat16, torch.bfloat16),
    # the interpreter multiplies the bits of bfloat16 in tl.dot, so with several tokens one of the two types is another
    (2, 33, 131, 6, 300, torch.bfloat16, torch.float32),
    (3, 47, 31, 2, 30, torch.float16, torch.bfloat16),
    (1, 100, 37, 3, 9, torch.float16, torch.bfloat16),
    (1, 65, 64, 4, 65536, torch.float32, torch.float32),
    (16, 40, 90, 16, 100, torch.float32, torch.float32),
    (17, 40, 90, 9, 100, torch.float16, torch.float32),
    (0, 40, 90, 9, 100, torch.float16, torch.float32),
]
for seed, (tokens, in_features, out_features, dim, clusters, stored, dtype) in enumerate(cases):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(clusters, dim, generator=generator).to(stored)
    codes = torch.randint(0, clusters, (in_features, -(-out_features // dim)), generator=generator).to(torch.uint16)
    codes.view(torch.int16)[0, 0] = clusters - 1 if clusters < 32768 else -1  # 65535: the sign bit of 16-bit codes
    scale = torch.rand(out_features, generator=generator) + 0.5
    bias = torch.randn(out_features, generator=generator)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    padded = torch.nn.functional.pad(codebook, (0, (1 << (dim - 1).bit_length()) - dim))
    weight = reference.decode(codebook.double(), codes, out_features)
    assert torch.equal(triton_kernel.decode_dense(codes, padded, out_features, dim, torch.float32).double(), weight), seed
    for s, b in ((scale, bias), (None, None)):
        y = triton_kernel.linear_triton(x, codes, padded, s, b, out_features, dim)
        factor = torch.ones(out_features) if s is None else s
        expected = x.double() @ weight * factor.double() + (0 if b is None else b.double())
        # float32 sums in any order; beyond the fused tokens weights, product, scale and bias are rounded to the dtype of x
        roundings = 1 if tokens <= triton_kernel.FUSED_TOKENS else 4
        magnitude = (x.double().abs() @ weight.abs()) * factor.double() + (0 if b is None else b.double().abs())
        bound = magnitude * ((in_features + 3) * EPS[torch.float32] + roundings * EPS[dtype]) + 1e-7
        assert y.shape == (tokens, out_features) and y.dtype == dtype
        assert ((y - expected).abs() <= bound).all(), (seed, (y - expected).abs().max())
        assert torch.equal(y, triton_kernel.linear_triton(x, codes, padded, s, b, out_features, dim)), seed
print("agreed", len(cases))
"""

COMPILED = """
import sys
from triton_aot import compile_kernel
from cluscomp_kernels.clus_linear import triton_kernel as tk

capability = int(sys.argv[1])
for row, dim in ((8, 6), (4, 4), (16, 16)):
    tile = {"ROW": row, "GROUPS": tk._groups_per_program(row), "CHANNELS": tk.CHANNELS}
    operands = {"x": "*bf16", "codes": "*u16", "codebook": "*bf16", "partial": "*fp32", "in_features": "i32", "groups": "i32"}
    sizes = {**operands, "channels_per_split": "i32", "tokens": "i32"}
    one = compile_kernel(tk.one_token_kernel, sizes, tile, capability)
    few = compile_kernel(tk.few_tokens_kernel, sizes, {**tile, "TOKENS": tk.FUSED_TOKENS}, capability)
    dense = {**operands, "dense": "*bf16", "out_features": "i32"}
    decode = compile_kernel(tk.decode_kernel, dense, {**tile, "DIM": dim}, capability)
    last = {"partial": "*fp32", "row_scale": "*fp32", "bias": "*fp32", "y": "*bf16"}
    last |= dict.fromkeys(("splits", "tokens", "values", "out_features"), "i32")
    flags = {"DIM": dim, "ROW": row, "HAS_SCALE": True, "HAS_BIAS": True, "BLOCK": 256}
    finish = compile_kernel(tk.finish_kernel, last, flags, capability)
    for name, usage in (("one_token", one), ("few_tokens", few), ("decode", decode), ("finish", finish)):
        print(capability, dim, name, usage)
        assert usage.stack == 0 and usage.local == 0 and usage.registers <= 255 and usage.shared <= 48 << 10, (name, usage)
"""


def run(script: str, *arguments: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_agree_with_the_reference(tmp_path: object) -> None:
    assert run(INTERPRETED, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path)).strip() == "agreed 10"


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90])
def test_compiled_kernels_spill_nothing(capability: int, tmp_path: object) -> None:
    printed = run(COMPILED, str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("Usage") == 12
