"""A state: what state-space, convolution and linear-attention layers keep of a request, whatever its length."""

from dataclasses import dataclass

from vllm_dfloat.errors import UnsupportedError

ITEMSIZE = 2  # of the inputs of a convolution, and of a state unless the model wants float32
STATE_DTYPES = {"auto": 0, "bfloat16": 2, "float16": 2, "float32": 4}  # of --mamba-ssm-cache-dtype


@dataclass(frozen=True)
class State:
    """The state of one layer: the last inputs of a convolution, and the numbers of a recurrence.

    Attributes:
        channels: of the convolution, without those of `groups`; ranks share them.
        length: inputs that are kept per channel.
        groups, group_channels: further channels; where the ranks cannot share the groups, some hold copies.
        numbers: of the recurrence; ranks share them.
        itemsize: bytes of one of these unless --mamba-ssm-cache-dtype says otherwise.
        dtypes: of --mamba-ssm-cache-dtype that vLLM takes for it.
        is_fixed: whether --mamba-ssm-cache-dtype changes nothing.
    """

    channels: int
    length: int
    groups: int = 0
    group_channels: int = 0
    numbers: int = 0
    itemsize: int = ITEMSIZE
    dtypes: tuple[str, ...] = tuple(STATE_DTYPES)
    is_fixed: bool = False

    def num_bytes(self, tp: int, dtype: str) -> int:
        """Return the bytes on each of `tp` ranks; dtype: of STATE_DTYPES.

        Raises:
            UnsupportedError: the ranks cannot share it, or another dtype.
        """
        if dtype not in self.dtypes:
            raise UnsupportedError(
                f"--mamba-ssm-cache-dtype {dtype}: plan knows {', '.join(self.dtypes)}. Give one of them."
            )
        groups = self.groups + (tp - self.groups if self.groups % tp else 0)
        channels = self.channels + groups * self.group_channels
        if channels % tp or self.numbers % tp:
            raise UnsupportedError(
                f"--tp {tp}: a layer's state has {channels} channels and {self.numbers} numbers, which that many "
                "ranks cannot share evenly. Give another --tp, and --pp for the rest of the GPUs."
            )
        given = 0 if self.is_fixed else STATE_DTYPES[dtype]
        numbers = self.numbers // tp * (given or self.itemsize)
        return channels // tp * self.length * ITEMSIZE + numbers
