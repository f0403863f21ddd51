"""DeepLabV3+ on a timm backbone with the representation head of ReCo, and the mean teacher.

model = DeepLabV3Plus(num_classes=19)                 # ResNet-101, ImageNet weights, the network of the paper
logits, rep = model(images)                           # [B, 19, H/4, W/4], [B, 256, H/4, W/4]
"""

import copy
import difflib
import math
import re

import timm
import torch
from torch import Tensor, nn

from errors import UserError
from transforms import upsample


class DeepLabV3Plus(nn.Module):
    """Encoder-decoder with atrous convolution (Chen et al. 2018) and two heads on the decoder: class logits and,
    with `rep_dim`, the dense representation of the regional contrast loss (Liu et al. 2022, section 3).

    num_classes    channels of the logits
    backbone       any timm name that yields a feature pyramid (resnet, regnet, efficientnet, mobilenet, convnext ...)
                   or a ViT of one stride (vit, deit, DINOv2, DINOv3)
    rep_dim        channels of the representation; None builds no representation head
    pretrained     load timm's ImageNet weights (UserError where they cannot be had)
    output_stride  of the deepest feature map (16 in the paper); ViTs keep their patch size
    decoder_stride of the low-level features and so of both outputs (4 in the paper; 2 suits images of 64 pixels)
    channels       width of the ASPP and of both heads
    low_channels   width of the projected low-level features
    aspp_rates     atrous rates of the three 3x3 branches
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        rep_dim: int | None = 256,
        pretrained: bool = True,
        output_stride: int = 16,
        decoder_stride: int = 4,
        channels: int = 256,
        low_channels: int = 48,
        aspp_rates: tuple[int, ...] = (6, 12, 18),
    ):
        super().__init__()
        self.backbone, low_width, high_width, self.patch = build_backbone(
            backbone, pretrained, output_stride, decoder_stride
        )
        self.decoder_stride = decoder_stride
        self.aspp = ASPP(high_width, channels, aspp_rates)
        self.low_level = conv_bn_relu(low_width, low_channels, 1)
        self.classifier = head(channels + low_channels, channels, num_classes)
        self.representation = head(channels + low_channels, channels, rep_dim) if rep_dim else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, 3, H, W] normalised images -> logits [B, C, h, w] and rep [B, D, h, w] (None without the head),
        h = ceil(H / decoder_stride)."""
        size = [math.ceil(n / self.decoder_stride) for n in x.shape[-2:]]
        if self.patch:  # one-stride features: the patches must tile the image, so it is stretched to the next multiple
            x = upsample(x, [math.ceil(n / self.patch) * self.patch for n in x.shape[-2:]])
        features = self.backbone(x)
        low, high = features[0], self.aspp(features[-1])
        same = (
            tuple(low.shape[-2:]) == tuple(size) and not torch.compiler.is_exporting()
        )  # an exported graph is for any size
        low = self.low_level(low if same else upsample(low, size))
        decoded = torch.cat(
            [low, upsample(high, size)], dim=1
        )  # [B, low_channels + channels, h, w]
        return self.classifier(decoded), self.representation(
            decoded
        ) if self.representation is not None else None


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three atrous 3x3 and the image's mean, side by side, then projected."""

    def __init__(self, in_channels: int, channels: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, channels, 1)]
            + [conv_bn_relu(in_channels, channels, 3, dilation=rate) for rate in rates]
        )
        self.pooling = conv_bn_relu(in_channels, channels, 1)
        self.project = conv_bn_relu((len(rates) + 2) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pooling(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([branch(x) for branch in self.branches] + [mean], dim=1))


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, dilation: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=dilation * (kernel // 2),
        dilation=dilation,
        bias=False,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def head(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(in_channels, channels, 3), nn.Conv2d(channels, out_channels, 1)
    )


def build_backbone(
    name: str, pretrained: bool, output_stride: int, decoder_stride: int
) -> tuple[nn.Module, int, int, int]:
    """A timm feature extractor that returns [low-level, deepest] features, their widths, and the patch size
    (0 for a pyramid). Raises UserError for a backbone that cannot work or weights that cannot be had."""
    works = "resnet*, resnext*, regnet*, efficientnet*, mobilenetv3*, convnext*, vit* (DINOv2, DINOv3 too) work"
    try:
        timm.models.get_pretrained_cfg(name)
        known = timm.is_model(name.split(".")[0])
    except RuntimeError:  # a tag that this architecture does not have
        known = False
    if not known:
        near = difflib.get_close_matches(
            name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5
        )
        raise UserError(
            f"--backbone {name}: timm has no such model"
            + (f"; near it: {', '.join(near)}" if near else f"; {works}")
        )
    if pretrained and not timm.models.is_model_pretrained(name):
        raise UserError(
            f"--backbone {name}: timm has no pretrained weights for it; train it from random weights with --no-pretrained"
        )

    refused = f"--backbone {name} at output stride {output_stride} yields no feature pyramid that DeepLabV3+ can use; {works}"
    try:
        probe = timm.create_model(name, features_only=True, output_stride=output_stride)
        options, patch = {"output_stride": output_stride}, 0
    except (
        TypeError,
        AssertionError,
        NotImplementedError,
        ValueError,
        RuntimeError,
        AttributeError,
    ):
        try:  # ViTs know no output stride: their blocks all have the stride of the patch
            probe = timm.create_model(name, features_only=True, dynamic_img_size=True)
        except (
            TypeError,
            AssertionError,
            NotImplementedError,
            ValueError,
            RuntimeError,
            AttributeError,
        ):
            raise UserError(refused) from None
        options, patch = {"dynamic_img_size": True}, probe.feature_info.reduction()[-1]
    strides, widths = probe.feature_info.reduction(), probe.feature_info.channels()
    if patch:
        if set(strides) != {patch}:  # a hierarchical transformer such as Swin
            raise UserError(refused)
        depth = len(probe.model.blocks) if hasattr(probe, "model") else len(probe.blocks)
        options["out_indices"] = indices = (
            depth // 4,
            depth - 1,
        )  # an early block keeps the detail
        low, high = widths[0], widths[-1]
    else:
        if decoder_stride not in strides:
            raise UserError(
                f"--backbone {name} has no features at --decoder-stride {decoder_stride}; it has {sorted(set(strides))}"
            )
        options["out_indices"] = indices = (strides.index(decoder_stride), len(strides) - 1)
        low, high = widths[indices[0]], widths[indices[1]]
    del probe
    try:
        return (
            timm.create_model(name, features_only=True, pretrained=pretrained, **options),
            low,
            high,
            patch,
        )
    except Exception as error:  # the hub's clients raise many kinds; the reason is in the line
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--backbone {name}: the pretrained weights could not be loaded ({type(error).__name__}: {reason[:120]}); connect once "
            "to download them (they stay in the Hugging Face cache), or train from random weights with --no-pretrained"
        ) from error


class MeanTeacher:
    """The exponential moving average of the student's parameters (Tarvainen & Valpola 2017; paper, section 3.3).

    Only parameters are averaged. The batch-norm statistics are the teacher's own: it runs in train mode while it
    labels, in eval mode when it is evaluated. Decay at update t = 0, 1, ... is min(1 - 1/(t + 1), `decay`), so the
    first update copies the student. `label` is `model` as it labels a batch, compiled on request; `model` is what is evaluated and saved.
    """

    def __init__(self, student: nn.Module, decay: float = 0.99, compiled: bool = False):
        self.model = copy.deepcopy(student).requires_grad_(False).train()
        self.label = torch.compile(self.model) if compiled else self.model
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        decay = min(1 - 1 / (self.step + 1), self.decay)
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - decay)
        self.step += 1

    @torch.no_grad()
    def copy_statistics(self, student: nn.Module) -> None:
        """Take the student's batch-norm statistics; for the warm-up, in which the teacher sees no images."""
        for mine, theirs in zip(self.model.buffers(), student.buffers()):
            mine.copy_(theirs)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step = state["step"]


RENAMED = [
    (r"^resnet_", "backbone."),
    (r"^ASPP\.convs\.4\.(\d)", lambda m: f"aspp.pooling.{int(m[1]) - 1}"),
    (r"^ASPP\.convs", "aspp.branches"),
    (r"^ASPP\.", "aspp."),
    (r"^project\.", "low_level."),
]


def convert_reco_checkpoint(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters of a published ReCo checkpoint (DeepLabV3+, ResNet-101) to those of
    DeepLabV3Plus(num_classes, "resnet101", rep_dim=256). The tensors are not copied."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
