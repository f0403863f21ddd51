"""What Apple's GPUs ("mps") are spared, since PyTorch gets it wrong there in some of the versions
that this repository runs on. None of this was run on one."""

import torch
from torch import Tensor
from torch.nn import functional as F


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. The host does not wait for the copy, except with mps: a
    copy that is not waited for may read memory that is free again (pytorch/pytorch 189690)."""
    return x.to(device, non_blocking=torch.device(device).type != "mps")


def memory_format(device: torch.device) -> torch.memory_format:
    """How a network's tensors lie in memory: channels last, which is faster, but not with mps,
    where batch norm then has a wrong gradient, or none (pytorch/pytorch 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def counting_device(device: torch.device) -> torch.device:
    """Where pixels are counted: with mps on the CPU, since bincount takes seconds there, or fails
    (ultralytics/ultralytics 26239)."""
    return torch.device("cpu") if device.type == "mps" else device


def largest_of_cell(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C, h, w], the largest value of each cell of a grid; with mps on the CPU,
    since the cells are wrong there where h does not divide H (pytorch/pytorch 190064)."""
    return F.adaptive_max_pool2d(x.to(counting_device(x.device)), tuple(size)).to(x.device)
