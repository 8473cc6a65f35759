"""The trainable operator `cluscomp::linear`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluscomp_kernels.clus_linear import linear, reference, trainable

OUT = 11


def operands(dtype: torch.dtype, dim: int = 4, clusters: int = 9, in_features: int = 7) -> tuple[Tensor, ...]:
    """Return x, codebook, codes, row scale and bias."""
    generator = torch.Generator().manual_seed(dim)
    return (
        torch.randn(2, 3, in_features, generator=generator).to(dtype),
        torch.randn(clusters, dim, generator=generator).to(dtype),
        torch.randint(0, clusters, (in_features, -(-OUT // dim)), generator=generator).to(torch.uint16),
        torch.rand(OUT, generator=generator).to(dtype) + 0.5,
        torch.randn(OUT, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("dim", [1, 3, 4, 11, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_agrees_with_the_reference(dim: int, dtype: torch.dtype) -> None:
    x, codebook, codes, scale, bias = operands(dtype, dim)
    expected = reference.linear(x.double(), codebook.double(), codes, OUT, scale.double(), bias.double())
    y = linear(x, codebook, codes, OUT, scale, bias)
    assert y.dtype == dtype
    # At most 7 products and sums and four more roundings, relative to the sum of magnitudes.
    weight = reference.decode(codebook.double(), codes, OUT).abs()
    magnitude = (x.double().abs() @ weight) * scale.double() + bias.double().abs()
    assert ((y - expected).abs() <= 11 * torch.finfo(dtype).eps / 2 * magnitude).all()


def test_codebooks_of_int8_are_constants() -> None:
    x, codebook, codes, scale, _ = operands(torch.float32)
    whole = (codebook * 40).to(torch.int8)
    scale.requires_grad_()
    y, expected = linear(x, whole, codes, OUT, scale), linear(x, whole.float(), codes, OUT, scale)
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), scale)[0], torch.autograd.grad(expected.sum(), scale)[0])


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_gradients_against_finite_differences(dim: int) -> None:
    x, codebook, codes, scale, bias = operands(torch.float64, dim)
    wanted = tuple(tensor.requires_grad_() for tensor in (x, codebook, scale, bias))
    assert torch.autograd.gradcheck(lambda x, c, s, b: linear(x, c, codes, OUT, s, b), wanted)
    assert torch.autograd.gradcheck(lambda x, c: linear(x, c, codes, OUT), wanted[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_agree_with_torch_through_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable, "BLOCK_BYTES", OUT * 4 * 3)  # three channels per block; the last block is shorter
    x, codebook, codes, scale, bias = operands(dtype)
    wide = [tensor.double().requires_grad_() for tensor in (x, codebook, scale, bias)]
    reference.linear(wide[0], wide[1], codes, OUT, wide[2], wide[3]).square().sum().backward()
    narrow = [tensor.requires_grad_() for tensor in (x, codebook, scale, bias)]
    linear(narrow[0], narrow[1], codes, OUT, narrow[2], narrow[3]).square().sum().backward()
    for exact, found in zip(wide, narrow, strict=True):
        assert exact.grad is not None
        assert found.grad is not None
        assert found.grad.dtype == found.dtype
        # Fewer than 20 consecutive roundings, each relative to magnitudes like that of the largest gradient.
        assert (exact.grad - found.grad).abs().max() <= 20 * torch.finfo(dtype).eps * exact.grad.abs().max()


def test_a_master_codebook_of_another_dtype_gets_gradients_of_its_own() -> None:
    x, codebook, codes, scale, _ = operands(torch.bfloat16)
    master = codebook.float().requires_grad_()
    y = linear(x, master, codes, OUT, scale)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert scale.grad is None


def test_opcheck() -> None:
    x, codebook, codes, scale, bias = operands(torch.float32)
    operator = torch.ops.cluscomp.linear.default
    torch.library.opcheck(operator, (x, codebook, codes, OUT, None, None))
    wanted = [tensor.requires_grad_() for tensor in (x, codebook, scale, bias)]
    torch.library.opcheck(operator, (wanted[0], wanted[1], codes, OUT, wanted[2], wanted[3]))


def test_torch_compile_trains_a_module() -> None:
    x, codebook, codes, scale, _ = operands(torch.float32)

    class Compressed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codebook = torch.nn.Parameter(codebook.clone())
            self.scale = torch.nn.Parameter(scale.clone())

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(linear(x, self.codebook, codes, OUT, self.scale))

    eager, compiled = Compressed(), Compressed()
    eager(x).sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(compiled.codebook.grad, eager.codebook.grad)
    torch.testing.assert_close(compiled.scale.grad, eager.scale.grad)


def test_wrong_operands_are_refused() -> None:
    x, codebook, codes, scale, _ = operands(torch.float32)
    with pytest.raises(IndexError):
        linear(x, codebook[:1], codes, OUT)
    with pytest.raises(ValueError, match=r"expected \[in_features, 4\]"):
        linear(x, codebook, codes, 13)
    with pytest.raises(TypeError, match=r"expected torch.uint16"):
        linear(x, codebook, codes.to(torch.int32), OUT)
    with pytest.raises(ValueError, match="row_scale has shape"):
        linear(x, codebook, codes, OUT, scale[:1])
