"""The Triton kernels of the compressed linear operator: results in interpreter mode, machine code for every supported GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_aot import Usage, compile_kernel

pytest.importorskip("triton")

from cluscomp_kernels.clus_linear import triton_kernel as kernel

INTERPRETED = """
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float
from cluscomp_kernels.clus_linear import reference, triton_kernel
import triton.language as tl

# the interpreter holds bfloat16 as its bits, and its tl.dot would multiply those
dot = InterpreterBuilder.create_dot
def wide(operand):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle(_convert_float(operand.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)
InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)

real = torch.empty
torch.empty = lambda *a, **k: real(*a, **k).fill_(float("nan"))
# the interpreter truncates to bfloat16, so its error is a whole unit in the last place
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
cases = [
    (1, 1, 1, 1, 1, torch.float16, torch.float32),
    (5, 70, 50, 8, 40, torch.float16, torch.float16),
    (1, 33, 131, 6, 300, torch.bfloat16, torch.bfloat16),
    (2, 33, 131, 6, 300, torch.bfloat16, torch.bfloat16),
    (5, 64, 131, 6, 300, torch.bfloat16, torch.float16),
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

# Products with 1 are the other operand, to the last bit: each finite float16 value as an entry of a codebook, some as inputs.
def products(x, codes, codebook):
    (tokens, channels), groups, (_, row) = x.shape, codes.shape[1], codebook.shape
    partial, per_program = torch.empty(1, tokens, groups * row), triton_kernel._groups_per_program(row)
    sizes = dict(ROW=row, GROUPS=per_program, CHANNELS=triton_kernel.CHANNELS, TOKENS=triton_kernel.FUSED_TOKENS)
    grid = (-(-groups // per_program), 1)
    triton_kernel.few_tokens_kernel[grid](x, codes, codebook, partial, tokens, channels, groups, channels, **sizes)
    return partial[0]
patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
finite = patterns[patterns.isfinite()]
codes = torch.arange(len(finite) // 4, dtype=torch.int32).to(torch.uint16).reshape(16, -1)
assert torch.equal(products(torch.eye(16).bfloat16(), codes, finite.reshape(-1, 4)), finite.reshape(16, -1).float())
x = finite[torch.randperm(len(finite), generator=generator)[:512]].reshape(16, 32)
assert torch.equal(products(x, torch.eye(32).to(torch.uint16), torch.tensor([[0.0], [1.0]]).bfloat16()), x.float())
print("agreed", len(cases))
"""


def test_interpreted_kernels_agree_with_the_reference(tmp_path: Path) -> None:
    """Runs in a separate process, because `@triton.jit` fixes the mode at import."""
    variables = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "agreed 11"


CAPABILITIES = pytest.mark.parametrize("capability", [80, 86, 87, 89, 90])
OPERANDS = {"x": "*bf16", "codes": "*u16", "codebook": "*bf16", "partial": "*fp32", "in_features": "i32", "groups": "i32"}
SIZES = {**OPERANDS, "channels_per_split": "i32", "tokens": "i32"}


def tile(row: int) -> dict[str, int]:
    return {"ROW": row, "GROUPS": kernel._groups_per_program(row), "CHANNELS": kernel.CHANNELS}


def assert_fits(usage: Usage) -> None:
    assert usage.stack == usage.local == 0
    assert usage.registers <= 255
    assert usage.shared <= 48 << 10


@CAPABILITIES
@pytest.mark.usefixtures("triton_cache")
def test_compiled_kernels_spill_nothing(capability: int) -> None:
    for row, dim in ((8, 6), (4, 4), (16, 16)):
        few = {**tile(row), "TOKENS": kernel.FUSED_TOKENS}
        dense = {**OPERANDS, "dense": "*bf16", "out_features": "i32"}
        last = {"partial": "*fp32", "row_scale": "*fp32", "bias": "*fp32", "y": "*bf16"}
        last |= dict.fromkeys(("splits", "tokens", "values", "out_features"), "i32")
        flags = {"DIM": dim, "ROW": row, "HAS_SCALE": True, "HAS_BIAS": True, "BLOCK": 256}
        assert_fits(compile_kernel(kernel.one_token_kernel, SIZES, tile(row), capability).usage)
        assert_fits(compile_kernel(kernel.few_tokens_kernel, SIZES, few, capability).usage)
        assert_fits(compile_kernel(kernel.decode_kernel, dense, {**tile(row), "DIM": dim}, capability).usage)
        assert_fits(compile_kernel(kernel.finish_kernel, last, flags, capability).usage)


@CAPABILITIES
@pytest.mark.usefixtures("triton_cache")
@pytest.mark.parametrize(
    ("x", "codebook", "multiplied"),
    [("bf16", "bf16", "bf16"), ("fp16", "fp16", "f16"), ("bf16", "fp16", "bf16"), ("fp16", "bf16", "bf16")],
)
def test_tensor_cores_multiply_every_pair_of_16_bit_types(capability: int, x: str, codebook: str, multiplied: str) -> None:
    types = {**SIZES, "x": f"*{x}", "codebook": f"*{codebook}"}
    constants = {**tile(8), "TOKENS": kernel.FUSED_TOKENS}
    usage, ptx = compile_kernel(kernel.few_tokens_kernel, types, constants, capability)
    assert_fits(usage)
    assert f".f32.{multiplied}.{multiplied}.f32" in ptx
    # The result if the types are not those of an instruction.
    assert "fma.rn.f32" not in ptx
