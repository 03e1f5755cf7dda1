"""Randomness is an address, not a history: every draw is a function of (seed, place), never of what was drawn before.

A key is a 64-bit integer. `fold_in(seed, "crops", epoch, index)` names one place, `uniform(key, n)` are the numbers
that lie there. Nothing has a state, so nothing has to be saved, and neither the number of workers, processes or
micro-batches nor a restart changes any draw. The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), in wrapping int64 arithmetic that is the same on every device.
"""

import hashlib

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio; as a signed integer, because torch has no uint64 product
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> repeats the sign bit, the mask takes it away


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64, a bijection whose output bits all depend on all input bits."""
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """`_mix` of one number, signed as an int64."""
    x %= 1 << 64
    x = (x ^ (x >> 30)) * MIX_1 % (1 << 64)
    x = (x ^ (x >> 27)) * MIX_2 % (1 << 64)
    return _signed(x ^ (x >> 31))


def _signed(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def number(name: str) -> int:
    """What a name is as a place: 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def fold_in(key: int | Tensor, *places: int | str | Tensor) -> Tensor:
    """The key of a place inside a place: integers, names, or int64 tensors of places (then a tensor of keys).

    Integers and names stay numbers, so nothing is copied to the device of a key: that would wait for it.
    """
    if not isinstance(key, Tensor):
        key = torch.tensor(_signed(key), dtype=torch.int64)
    for place in places:
        if isinstance(place, Tensor):
            place = _mix(place.to(key.device, torch.int64) + GAMMA)
        else:
            place = _mix_int((number(place) if isinstance(place, str) else place) + GAMMA)
        key = _mix(key ^ place)
    return key


def bits(key: Tensor, n: int) -> Tensor:
    """[...] int64 keys -> [..., n] int64, 64 random bits each."""
    counter = torch.arange(1, n + 1, device=key.device, dtype=torch.int64)
    return _mix(key.unsqueeze(-1) + counter * GAMMA)


def uniform(key: Tensor, n: int) -> Tensor:
    """[...] int64 keys -> [..., n] float32 in [0, 1), multiples of 2^-24."""
    return _shift_right(bits(key, n), 40).to(torch.float32) * 2.0**-24


def permutation(key: Tensor, n: int) -> Tensor:
    """[...] int64 keys -> [..., n] int64, for each a random order of 0 .. n-1: that of n different 64-bit draws."""
    return bits(key, n).argsort()


def shuffled(key: Tensor, n: int, positions: Tensor) -> Tensor:
    """[...] int64 positions in 0 .. n-1 -> what stands there in a random order of 0 .. n-1 that is never written down.

    For sets so large that `permutation` would take minutes and 40 bytes an image. A Feistel network with four rounds
    (Luby and Rackoff, 1988) is a bijection of the next power of four, walked until it is back inside n (Black and
    Rogaway, CT-RSA 2002).
    """
    half = ((n - 1).bit_length() + 1) // 2
    mask, rounds = (1 << half) - 1, bits(key, 4)

    def permute(x: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for k in rounds:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        return left << half | right

    x = permute(positions)
    while (outside := x >= n).any():
        x = torch.where(outside, permute(x), x)
    return x
