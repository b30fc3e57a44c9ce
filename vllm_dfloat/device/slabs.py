"""What a device says about slabs (kernels/configs.py); how a matrix is cut into them is in codec/slabs.py."""

import torch


def default_bytes(device: torch.device) -> int:
    """Return the bytes of a slab on a device, where the option `slab` says nothing (kernels/configs.py)."""
    from vllm_dfloat.kernels.configs import config_of

    return config_of(device).slab_bytes


def proof_work(device: torch.device) -> int:
    """Return the floating-point operations that a proof of slabs may take on a device (kernels/configs.py)."""
    from vllm_dfloat.kernels.configs import config_of

    return config_of(device).slab_proof_work
