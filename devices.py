"""What Apple's GPUs ("mps") are spared, since PyTorch gets it wrong there in some of the versions
that this repository runs on. None of this was run on one."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. The host does not wait for the copy, except with mps: a
    copy that is not waited for may read memory that is free again (pytorch/pytorch 189690)."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def memory_format(device: torch.device) -> torch.memory_format:
    """How a network's tensors lie in memory: channels last, which is faster, but not with mps,
    where the gradient of batch norm then is wrong or fails (pytorch/pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def cpu_for_mps(device: torch.device) -> torch.device:
    """The device, or the CPU in place of mps: for operations that are wrong there, or fail."""
    return torch.device("cpu") if device.type == "mps" else device
