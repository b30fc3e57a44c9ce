"""What layers of attention cache per token: keys and values, a latent vector for both, or keys of an indexer."""

from dataclasses import dataclass

from vllm_dfloat.plan.kv_cache import EVERYTHING, Reach, latent_page_bytes, page_bytes

SCALED = 128  # numbers of an indexer's key that share a float32 scale
SPARSE_FP8_BYTES = 656  # per token of a latent vector of sparse attention in FP8: vLLM's fp8_ds_mla


@dataclass(frozen=True)
class Keys:
    """Keys and values of each token, or in place of both a latent vector (multi-head latent attention).

    Attributes:
        kv_heads, head_dim: of keys, and of values.
        latent: numbers of the vector, which every rank holds whole; 0 for keys and values.
        reach: how far back attention looks.
        value_dim: width of a value; 0 if it is that of a key.
        is_sparse: whether attention reads only the tokens that an indexer chooses.
    """

    kv_heads: int
    head_dim: int
    latent: int = 0
    reach: Reach = EVERYTHING
    value_dim: int = 0
    is_sparse: bool = False

    def page_bytes(self, tp: int, block_size: int, dtype: str) -> int:
        """Return the bytes of a block on each rank."""
        if self.latent and self.is_sparse and dtype.startswith("fp8"):
            return block_size * SPARSE_FP8_BYTES
        if self.latent:
            return latent_page_bytes(self.latent, block_size, dtype)
        width = self.head_dim + (self.value_dim or self.head_dim)
        return page_bytes(self.kv_heads, width, tp, block_size, dtype)


@dataclass(frozen=True)
class IndexerKeys:
    """Keys by which an indexer chooses the tokens that a layer reads: in FP8, one per token, whole on every rank.

    Attributes:
        head_dim: numbers of a key.
        reach: everything.
    """

    head_dim: int
    reach: Reach = EVERYTHING

    def page_bytes(self, tp: int, block_size: int, dtype: str) -> int:
        """Return the bytes of a block on each rank, whatever --kv-cache-dtype is."""
        return block_size * (self.head_dim + 4 * (self.head_dim // SCALED))
