"""Screening types: how far a value may be from what was rounded to it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DIGITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of the significand


def half_unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place that float32 `values` had in `dtype`, or more."""
    power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    return (power * 2.0 ** -DIGITS[dtype]).clamp(min=2.0**-25)


def rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of `dtype` that are not above."""
    near = values.to(dtype)
    bits = near.view(torch.int16 if near.element_size() == 2 else torch.int32)
    least = torch.iinfo(bits.dtype).min + 1  # of the numbers below 0 the one next to it
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, least))
    return torch.where(near.float() > values, below.view(dtype), near)


@contextmanager
def plain_gemm() -> Iterator[None]:
    """Lets no gemm use fewer bits than its inputs have, nor add in fewer than float32's."""
    cuda, names = (
        torch.backends.cuda.matmul,
        (
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        ),
    )
    before, precision = (
        [getattr(cuda, name) for name in names],
        torch.get_float32_matmul_precision(),
    )
    try:
        torch.set_float32_matmul_precision("highest")
        for name in names:
            setattr(cuda, name, False)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in zip(names, before, strict=True):
            setattr(cuda, name, value)
