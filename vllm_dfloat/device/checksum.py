"""The checksum of a payload; `PackedWeight.check_payload` and the live check compare it."""

import torch

CHUNK_WORDS = 1 << 15  # fits a CPU's cache as int64: larger chunks took ten times as long
GPU_CHUNKS = 32  # chunks that a GPU sums at once: 8 MiB of temporary memory, whatever the size


def checksum(payload: torch.Tensor) -> int:
    """Return the sum of a payload's 32-bit words, each times odd factors of its position, modulo 2**64.

    Any change within one word changes the sum: a difference below 2**32 times an odd number is no multiple of 2**64.
    Two words that swap places change it too, since their factors differ. The result is the same on every device.

    Args:
        payload: uint8 [n], contiguous, aligned to 4 bytes; zeros complete the last word.
    """
    if not payload.numel():
        return 0
    device, whole = payload.device, payload.numel() // 4 * 4
    words = payload[:whole].view(torch.int32)
    if whole < payload.numel():
        last = torch.nn.functional.pad(payload[whole:], (0, 3))[:4].view(torch.int32)
    else:
        last = words[:0]
    chunked = words.numel() // CHUNK_WORDS * CHUNK_WORDS
    chunks, rest = words[:chunked].view(-1, CHUNK_WORDS), torch.cat([words[chunked:], last])
    factors = _factors(0, max(CHUNK_WORDS if chunked else 0, rest.numel()), device)
    step = GPU_CHUNKS if device.type == "cuda" else 1
    sums = [_dot(chunks[at : at + step], factors) for at in range(0, len(chunks), step)]
    sums.append(_dot(rest[None], factors))
    all_sums = torch.cat(sums)
    # With the factors used within a chunk, word i of chunk j and word j of chunk i could swap unnoticed.
    return int((all_sums * _factors(1 << 20, all_sums.numel(), device)).sum())


def _dot(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return int64 [n], the sums of words int32 [n, count] times the first `count` factors."""
    return words.to(torch.int64).mul_(factors[: words.shape[1]]).sum(1)


def _factors(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return `count` odd pseudo-random numbers, int64: a multiplicative hash, mixed twice, of first + 1 and on."""
    x = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    for multiplier in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
        x.mul_(multiplier).bitwise_xor_(x >> 29)
    return x.bitwise_or_(1)
