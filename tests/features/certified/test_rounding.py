import numpy as np
import pytest
import torch

from kit.features.certified.rounding import DIGITS, half_unit, plain_gemm, rounded_down

SIZES = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def values() -> torch.Tensor:
    """float32 of every size that scores have, bounds of the types' steps among them."""
    random = np.random.default_rng(0)
    found = random.standard_normal(20_000) * 2.0 ** random.integers(-30, 5, 20_000)
    steps = 1 + np.arange(-40, 41) / 2.0**12  # ties and powers of 2
    edges = np.concatenate([steps * 2.0**power for power in range(-14, 4)])
    found = np.concatenate([found, edges, -edges, [0.0, -0.0]])
    return torch.from_numpy(found.astype(np.float32))


def spacing(rounded: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Between a value and the next larger one of its type, by their definition."""
    size = np.abs(rounded.double().numpy())
    with np.errstate(divide="ignore"):
        power = np.where(size > 0, np.floor(np.log2(size)), -np.inf)
    return np.maximum(2.0 ** (power - DIGITS[dtype] + 1), SIZES[dtype])


@pytest.mark.parametrize("dtype", DIGITS)
def test_half_a_unit_covers_what_rounding_moves_and_no_more(dtype):
    rounded = values().to(dtype)
    half = half_unit(rounded.float(), dtype).double().numpy()
    moved = (rounded.double() - values().double()).abs().numpy()
    assert (moved <= half).all()
    expected = np.maximum(spacing(rounded, dtype) / 2, 2.0**-25)
    np.testing.assert_array_equal(half, expected)
    if dtype != torch.float32:
        assert (moved == half).sum() > 100


@pytest.mark.parametrize("dtype", DIGITS)
def test_rounded_down_is_the_largest_value_that_is_not_above(dtype):
    given = values()
    down = rounded_down(given, dtype)
    assert down.dtype == dtype
    assert (down.double() <= given.double()).all()
    least = torch.full_like(down, -torch.inf)
    gap = torch.nextafter(down, -least).double() - given.double()
    assert (gap > 0).all()
    exact = given == given.to(dtype).float()
    assert torch.equal(down[exact].float(), given[exact])
    assert dtype == torch.float32 or 1000 < (~exact).sum()


def test_nothing_is_above_minus_infinity_and_all_is_below_infinity():
    ends = torch.tensor([-torch.inf, torch.inf])
    for dtype in DIGITS:
        assert rounded_down(ends, dtype).float().tolist() == ends.tolist()


def test_gemms_are_plain_inside_and_as_before_after_it():
    cuda, names = torch.backends.cuda.matmul, ["allow_fp16_accumulation"]
    names += [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]

    def settings():
        return torch.get_float32_matmul_precision(), *(getattr(cuda, n) for n in names)

    before = settings()
    try:
        torch.set_float32_matmul_precision("medium")
        for name in names:
            setattr(cuda, name, True)
        loose = settings()
        with pytest.raises(KeyError), plain_gemm():
            assert settings() == ("highest", False, False, False)
            raise KeyError
        assert settings() == loose
    finally:
        torch.set_float32_matmul_precision(before[0])
        for name, value in zip(names, before[1:], strict=True):
            setattr(cuda, name, value)
