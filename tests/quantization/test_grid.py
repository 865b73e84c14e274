import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from epmq.quantization.grid import BITS, GROUP_SIZES, Grid
from epmq.quantization.rtn import round_with, rtn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = st.builds(Grid, st.sampled_from(BITS), st.sampled_from([-1, 32, 64]), st.booleans())


def weight_of(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes and offsets."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 2, rows)[:, None]
    offset = torch.randn(rows, 1, generator=generator)
    return (size * (torch.randn(rows, columns, generator=generator) + offset)).to(dtype)


def arguments(grid: Grid, dtype: torch.dtype | None = None) -> QuantizationArgs:
    """What compressed-tensors calls the grid."""
    return QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy="channel" if grid.group_size == -1 else "group",
        group_size=None if grid.group_size == -1 else grid.group_size,
        scale_dtype=dtype,
    )


def reference_scales(weight: torch.Tensor, grid: Grid, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point as compressed-tensors makes them of float32 weights."""
    groups = weight.float().reshape(len(weight), -1, grid.width(weight.shape[1]))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), arguments(grid, dtype))


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, rows=st.integers(1, 12), columns=st.sampled_from([64, 128, 192]), seed=st.integers(0, 10_000))
def test_scales_and_zero_points_are_compressed_tensors(grid, rows, columns, seed):
    weight = weight_of(rows, columns, seed)
    scale, zero = grid.scales(weight)
    expected_scale, expected_zero = reference_scales(weight, grid, torch.float32)
    assert torch.equal(scale, expected_scale) and scale.dtype == torch.float32
    assert torch.equal(zero, expected_zero) and zero.dtype == torch.int8


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, dtype=st.sampled_from(DTYPES[1:]), rows=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_scales_are_rounded_to_the_dtype_they_are_stored_in(grid, dtype, rows, seed):
    weight = weight_of(rows, 128, seed, dtype)
    scale, zero = grid.scales(weight, dtype)
    expected_scale, expected_zero = reference_scales(weight, grid, dtype)
    assert scale.dtype == dtype and torch.equal(scale.float(), expected_scale)
    # compressed-tensors takes the zero point from the scale before it is rounded; here it fits the stored scale.
    assert (zero.int() - expected_zero.int()).abs().max() <= 1
    groups = weight.float().reshape(rows, -1, grid.width(128))
    exact = grid.lowest - groups.amin(-1).clamp(max=0) / scale.float()
    if not grid.symmetric:
        assert torch.equal(zero.float(), exact.round().clamp(grid.lowest, grid.highest))


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, dtype=st.sampled_from(DTYPES), rows=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_codes_and_values_are_compressed_tensors(grid, dtype, rows, seed):
    weight = weight_of(rows, 128, seed, dtype)
    quantized = rtn(weight, grid, scale_dtype=dtype)
    zero = None if grid.symmetric else quantized.zero_point
    # Codes are computed in float32 whatever the weight's dtype.
    codes = quantize(weight.float(), quantized.scale.float(), zero, arguments(grid), dtype=torch.int8)
    steps = weight.float() / quantized.scale.float().repeat_interleave(grid.width(128), dim=1)
    # compressed-tensors adds the zero point before it rounds, so exact halves may fall to the other side.
    halves = (steps - steps.floor() - 0.5).abs() < 1e-4 * (not grid.symmetric)
    assert quantized.codes.dtype == torch.int8 and torch.equal(quantized.codes[~halves], codes[~halves])
    assert (quantized.codes[halves].int() - codes[halves].int()).abs().sum() <= halves.sum()
    values = dequantize(quantized.codes, quantized.scale, zero, arguments(grid))
    assert quantized.dequantize().dtype == dtype and torch.equal(quantized.dequantize(), values)


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, rows=st.integers(1, 12), seed=st.integers(0, 10_000))
def test_rounding_is_off_by_half_a_step_at_most(grid, rows, seed):
    weight = weight_of(rows, 128, seed)
    quantized = rtn(weight, grid)

    def per_weight(value: torch.Tensor) -> torch.Tensor:
        return value.float().repeat_interleave(grid.width(128), dim=1)

    scale, zero = per_weight(quantized.scale), per_weight(quantized.zero_point)
    error = (quantized.dequantize() - weight).abs()
    in_range = (weight / scale + zero >= grid.lowest) & (weight / scale + zero <= grid.highest)
    assert in_range.float().mean() > 0.3
    assert (error[in_range] <= 0.5 * scale[in_range] * (1 + 1e-4)).all()
    # Min–max: what lies outside is off by one step at most, and it lies at the ends of the grid.
    assert (error <= scale * (1 + 1e-4)).all()
    ends = quantized.codes[~in_range]
    assert ((ends == grid.lowest) | (ends == grid.highest)).all()


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, seed=st.integers(0, 10_000))
def test_values_on_the_grid_come_back(grid, seed):
    weight = weight_of(6, 128, seed)
    quantized = rtn(weight, grid)
    again = round_with(quantized.dequantize(), grid, quantized.scale, quantized.zero_point)
    assert torch.equal(again.codes, quantized.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zero(symmetric, dtype):
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[1] = torch.randn(64)
    for grid in (Grid(4, -1, symmetric), Grid(2, 32, symmetric)):
        quantized = rtn(weight, grid, scale_dtype=dtype)
        values = quantized.dequantize()
        assert (quantized.scale > 0).all() and torch.isfinite(values).all()
        assert not values[0].any() and not values[2].any() and values[1].any()
        assert torch.equal(quantized.scale[0].float(), reference_scales(weight, grid, dtype)[0][0])


def test_zero_is_on_the_grid_even_for_rows_of_one_sign():
    weight = torch.rand(4, 64) + 5
    weight[:, 0] = 0
    weight[2:] *= -1
    for bits in BITS:
        assert not rtn(weight, Grid(bits, -1, False)).dequantize()[:, 0].any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_small_weights_keep_all_their_bits_in_16_bit_scales(dtype):
    """A scale below the smallest normal float16 is stored as a subnormal one, not raised."""
    weight = (1e-3 * torch.randn(8, 128)).to(dtype)
    grid = Grid(8)
    scale, _ = grid.scales(weight, dtype)
    assert torch.equal(scale.float(), reference_scales(weight, grid, dtype)[0])
    assert (rtn(weight, grid, scale_dtype=dtype).codes.float().abs().amax(1) >= 127).all()


@pytest.mark.parametrize("group_size", [size for size in GROUP_SIZES if size > 0])
@pytest.mark.parametrize("columns", [31, 33, 65, 129, 200])
def test_a_group_size_that_does_not_divide_is_refused(group_size, columns):
    message = f"group size {group_size} does not divide {columns} input columns"
    with pytest.raises(ValueError, match=message):
        Grid(4, group_size).width(columns)
    with pytest.raises(ValueError, match=message):
        rtn(torch.randn(2, columns), Grid(4, group_size))
    assert Grid(4).width(columns) == columns


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_twos_complement(bits):
    grid = Grid(bits)
    assert (grid.lowest, grid.highest) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = rtn(weight_of(10, 128, 0), Grid(bits, 32, False)).codes
    assert (int(codes.min()), int(codes.max())) == (grid.lowest, grid.highest)


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 32, False)])
def test_split_cuts_stacked_layers_apart(grid):
    parts = [weight_of(rows, 64, rows) for rows in (3, 1, 5)]
    for found, part in zip(rtn(torch.cat(parts), grid).split([3, 1, 5]), parts, strict=True):
        alone = rtn(part, grid)
        assert torch.equal(found.codes, alone.codes) and torch.equal(found.dequantize(), alone.dequantize())
        assert torch.equal(found.scale, alone.scale) and torch.equal(found.zero_point, alone.zero_point)
