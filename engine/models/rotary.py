"""Rotary tables: a decoder's every supported rope scaling as one pair of fixed cos and sin tables, and plain ones.

The order of operations is that of transformers 5.23 (`modeling_rope_utils.py`, the tests' oracle): float32 agrees.
"""

import math

import torch

from engine.checkpoints.config import DecoderConfig, RopeScaling
from engine.errors import InvalidInput


def rotary_tables(config: DecoderConfig, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [length, head_dim / 2]: row p is position p, column i turns the pair (i, i + head_dim / 2).

    The attention factor of yarn and longrope is folded in. `length` defaults to the config's max_length.
    """
    if config.positions != "rotary":
        raise InvalidInput("positions", f"{config.architecture} has learned positions, no rotary tables")
    angles = _angles(_frequencies(config), config.max_length if length is None else length)
    factor = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return angles.cos() * factor, angles.sin() * factor


def plain_tables(theta: float, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin without any scaling, float32 [length, head_dim / 2]."""
    angles = _angles(1.0 / _powers(theta, head_dim), length)
    return angles.cos(), angles.sin()


def _angles(frequencies: torch.Tensor, length: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]


def _powers(theta: float, head_dim: int) -> torch.Tensor:
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _frequencies(config: DecoderConfig) -> torch.Tensor:
    """Radians per position, [head_dim / 2]."""
    scaling = config.rope_scaling
    powers = _powers(config.rope_theta, config.head_dim)
    if scaling is None:
        return 1.0 / powers
    if scaling.kind == "linear":
        return 1.0 / powers / scaling.factor
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.short_factors) * powers)
    if scaling.kind == "llama3":
        return _llama3_frequencies(1.0 / powers, scaling)
    return _yarn_frequencies(powers, config.rope_theta, scaling)


def _llama3_frequencies(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Short wavelengths stay, long ones are divided by the factor, those between are blended."""
    low_wavelength = scaling.original_length / scaling.low_freq_factor
    high_wavelength = scaling.original_length / scaling.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    ends = torch.where(wavelength > low_wavelength, plain / scaling.factor, plain)
    return torch.where(between, (1 - smooth) * ends / scaling.factor + smooth * ends, ends)


def _yarn_frequencies(powers: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Interpolated frequencies blended into extrapolated ones along a ramp over the dimensions (arXiv 2309.00071)."""
    dim = 2 * powers.shape[0]

    def dimension(rotations: float) -> float:
        return dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp's slope stays finite
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated
