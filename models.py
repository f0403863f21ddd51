"""DeepLabV3+ with the representation head of ReCo, the mean teacher, and a trained network to use.

model = DeepLabV3Plus(19, "resnet101.tv_in1k")   # ImageNet weights: the paper's network
logits, rep = model(images)                      # [B, 19, H/4, W/4], [B, 256, H/4, W/4]

model = load("runs/NAME")                        # a trained run
mask = model.predict("photo.jpg")                # uint8 [H, W]
"""

import argparse
import copy
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from backbones import build_backbone
from data import DATASETS
from engine.checkpoint import load_weights, read_config, read_torch, read_weights
from engine.evaluation import predict_images, predict_strips
from inputs.errors import UserError, first_line, need, note
from inputs.files import read_image, to_rgb, write_json
from inputs.source import Source
from inputs.transforms import memory_format, upsample


class DeepLabV3Plus(nn.Module):
    """Encoder-decoder with atrous convolution (Chen et al. 2018) and two heads on the decoder:
    class logits and, with `rep_dim`, the dense representation of the regional contrast loss (Liu
    et al. 2022, section 3). Takes images in 0 .. 1 and normalises them.

    num_classes      channels of the logits
    backbone         a timm name: a network with a feature pyramid (resnet, regnet, efficientnet,
                     mobilenet, convnext ...) or a ViT of one stride (vit, deit, DINOv2, DINOv3);
                     not HRNet, MaxViT or Swin, which take only some image sizes
    rep_dim          channels of the representation; None builds no representation head
    pretrained       load timm's weights (UserError where that fails)
    mean, std        per channel, of images in 0 .. 1; None: those of the backbone's training
    output_stride    of the deepest features; a backbone that cannot be dilated (densenet, vgg ...)
                     has 32, a ViT its patch size
    decoder_stride   of the low-level features and so of both outputs (4 in the paper; 2 suits
                     images of 64 pixels)
    channels         width of the ASPP and of both heads
    low_channels     width of the projected low-level features
    aspp_rates       atrous rates of the three 3x3 branches
    backbone_weights a file to load the pretrained weights from
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101",
        rep_dim: int | None = 256,
        pretrained: bool = True,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        output_stride: int = 16,
        decoder_stride: int = 4,
        channels: int = 256,
        low_channels: int = 48,
        aspp_rates: tuple[int, ...] = (6, 12, 18),
        backbone_weights: str | None = None,
    ):
        super().__init__()
        self.backbone, low_width, high_width, self.patch = build_backbone(
            backbone, pretrained, output_stride, decoder_stride, backbone_weights
        )
        self.decoder_stride, self.frozen = decoder_stride, False
        self.aspp = ASPP(high_width, channels, aspp_rates)
        self.low_level = conv_bn_relu(low_width, low_channels, 1)
        self.classifier = head(channels + low_channels, channels, num_classes)
        self.representation = head(channels + low_channels, channels, rep_dim) if rep_dim else None
        for name, values in (("mean", mean), ("std", std)):
            values = self.backbone.pretrained_cfg[name] if values is None else values
            constant = torch.as_tensor(values, dtype=torch.float32)
            self.register_buffer(name, constant.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, 3, H, W] images in 0 .. 1 -> logits [B, C, h, w] and rep [B, D, h, w] (None
        without the head), h = ceil(H / decoder_stride)."""
        size = [math.ceil(n / self.decoder_stride) for n in x.shape[-2:]]
        x = (x - self.mean) / self.std
        if self.patch:  # the patches of a ViT must tile the image, so it is stretched
            x = upsample(x, [math.ceil(n / self.patch) * self.patch for n in x.shape[-2:]])
        features = self.backbone(x)
        low, high = features[0], self.aspp(features[-1])
        # an exported graph must fit any size
        if list(low.shape[-2:]) != size or torch.compiler.is_exporting():
            low = upsample(low, size)
        # [B, low_channels + channels, h, w]
        decoded = torch.cat([self.low_level(low), upsample(high, size)], dim=1)
        rep = None if self.representation is None else self.representation(decoded)
        return self.classifier(decoded), rep

    def freeze_backbone(self) -> None:
        """Train only the heads: the backbone has no gradient, and its batch norm stays in eval
        mode."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three atrous 3x3 and the mean over the image, in
    parallel, then a projection."""

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


class MeanTeacher:
    """The exponential moving average of the student's parameters (Tarvainen & Valpola 2017; paper,
    section 3.3).

    The decay at update t = 0, 1, ... is min(1 - 1/(t + 1), `decay`), so the first update copies the
    student. In the paper only parameters are averaged, and the teacher is in train mode when it
    labels, so its batch-norm statistics are its own. average_statistics: they are averaged too, and
    the teacher is always in eval mode.

    model  what is evaluated and saved
    label  the same network for labelling a batch, compiled on request"""

    def __init__(
        self,
        student: nn.Module,
        decay: float = 0.99,
        compiled: bool = False,
        average_statistics: bool = False,
    ):
        self.model = copy.deepcopy(student).requires_grad_(False).train(not average_statistics)
        self.label = torch.compile(self.model) if compiled else self.model
        self.decay, self.step, self.average_statistics = decay, 0, average_statistics

    @torch.no_grad()
    def update(self, student: nn.Module, statistics: bool = False) -> None:
        """Move towards the student. statistics: copy its batch-norm statistics as well (during
        warm-up the teacher sees no images)."""
        decay = min(1 - 1 / (self.step + 1), self.decay)
        mine, theirs = list(self.model.parameters()), list(student.parameters())
        if self.average_statistics:
            average_over_processes(running_statistics(student))  # one teacher on all processes
            mine += running_statistics(self.model)
            theirs += running_statistics(student)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        self.step += 1
        if statistics:
            for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step = state["step"]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The means and variances of its batch-norm layers."""
    return [buffer for name, buffer in network.named_buffers() if ".running_" in f".{name}"]


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, parts, strict=True):
        tensor.copy_(mean.view_as(tensor))


# ----------------------------------------------------------------------------- the start of a run
def new_model(
    args: argparse.Namespace, source: Source, accelerator: Accelerator, fresh: bool = True
) -> tuple[DeepLabV3Plus, dict]:
    """Build the network on the device, and its config entry. fresh: with initial weights; False
    if a checkpoint will replace them."""
    torch.manual_seed(args.seed)
    shape = dict(
        num_classes=len(source.classes),
        backbone=args.backbone,
        rep_dim=args.rep_dim if args.model == "reconet" else None,
        output_stride=args.output_stride,
        decoder_stride=args.decoder_stride,
        channels=args.channels,
        low_channels=args.low_channels,
        aspp_rates=args.aspp_rates,
    )
    pretrained = args.pretrained and fresh and not args.init_from
    weights = args.backbone_weights if pretrained else None
    model = DeepLabV3Plus(**shape, pretrained=pretrained, backbone_weights=weights)
    stride = model.backbone.feature_info.reduction()[-1]
    if stride > args.output_stride:
        note(f"--backbone {args.backbone} cannot be dilated: its output stride is {stride}")
    if args.init_from and fresh:
        init_from(model, Path(args.init_from), source.classes)
    config = {
        "model": {
            **shape,
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": source.classes,
        "palette": source.palette,
        "crop_size": args.crop_size,
        "size": source.size,
        "max_size": source.max_size,
        "arguments": vars(args),
    }
    return prepare_training(model, args, accelerator), config


def prepare_training(
    model: DeepLabV3Plus, args: argparse.Namespace, accelerator: Accelerator
) -> DeepLabV3Plus:
    """Move the network to the device, with gradients only for what the run trains."""
    device = accelerator.device
    if accelerator.num_processes > 1 and device.type == "cuda":
        # a process has few images, so compute batch statistics over all processes. timm's
        # conversion keeps the activations in its own norm layers
        model = convert_sync_batchnorm(model)
    else:
        for module in model.modules():  # unused counts, which cost an operation per layer
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked = None
    if model.representation is not None and not args.reco:
        model.representation.requires_grad_(False)  # distributed training waits for every gradient
    if args.backbone_lr_scale == 0:
        model.freeze_backbone()
    return model.to(device, memory_format=memory_format(device))


def init_from(model: DeepLabV3Plus, folder: Path, classes: list[str]) -> None:
    """Load the weights of a finished run of the same classes (--init-from). The representation
    head stays random if the run has none."""
    need(
        read_config(folder)["classes"] == classes,
        f"--init-from {folder}: was trained on classes that differ from this data set's",
    )
    weights = read_weights(folder / "model.safetensors")

    def head_of(state: dict) -> dict:
        return {key: value for key, value in state.items() if key.startswith("representation.")}

    head, theirs = head_of(model.state_dict()), head_of(weights)
    if head and theirs:
        head = theirs
    body = {key: value for key, value in weights.items() if key not in theirs}
    load_weights(model, body | head, f"--init-from {folder}")


# ------------------------------------------------------------------------------ a trained network
CARD = """---
{{ card_data }}
---
Semantic segmentation by DeepLabV3+, trained with {{ repo_url }} (paper: {{ paper_url }}). Classes,
palette and training options are in config.json. In that repository:

```python
import models

model = models.load("user/name")  # of this page
mask = model.predict("photo.jpg")  # uint8 [H, W]: indices into model.classes
```
"""
LOCAL = {"data_path", "out_dir", "cache_dir", "init_from", "backbone_weights", "labeled_list"}


class Segmenter(
    DeepLabV3Plus,
    PyTorchModelHubMixin,
    repo_url="the ReCo repository",
    paper_url="https://arxiv.org/abs/2104.04465",
    pipeline_tag="image-segmentation",
    tags=["semantic-segmentation", "semi-supervised-learning"],
    model_card_template=CARD,
):
    """A trained network to use, built from a run's config: `classes`, `palette`, `predict`.

    `save_pretrained(folder)` and `push_to_hub("user/name")` are huggingface_hub's own; both write
    the weights, config.json without local paths, and a short model card."""

    def __init__(self, config: dict):
        super().__init__(**{**config["model"], "pretrained": False})
        self.config, self.classes = config, config["classes"]
        self.palette = [tuple(colour) for colour in config["palette"]]

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        arguments = {k: v for k, v in self.config["arguments"].items() if k not in LOCAL}
        write_json(save_directory / "config.json", self.config | {"arguments": arguments})

    def predict(
        self,
        image: Image.Image | np.ndarray | Tensor | str | Path | list,
        probabilities: bool = False,
        confidence: bool = False,
        tile: int = 1024,
        **options,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | list:
        """The mask uint8 [H, W] of an image of any size: a path, a PIL image, a uint8 array
        [H, W, 3] or [H, W], or a uint8 tensor [3, H, W]; a list gives a list of masks. The EXIF
        orientation of a file is applied, that of a PIL image is not.

        probabilities  return [C, H, W] float32 instead
        confidence     return (mask, probability of the predicted class float32 [H, W])
        tile           larger images are predicted in tiles of this side
        options        scales, flip, window: see evaluation.predict_probabilities
        Raises UserError for a file that is not an image."""
        if isinstance(image, (list, tuple)):
            return [self.predict(one, probabilities, confidence, tile, **options) for one in image]
        image = as_tensor(image)
        height, width = image.shape[-2:]
        common = self, image[None], self.network_size(height, width), tile, self.mean.device
        training = self.training
        self.eval()
        try:
            if probabilities:
                prob = np.empty((len(self.classes), height, width), np.float32)
                for rows, columns, part in predict_strips(*common, **options):
                    prob[:, rows, columns] = part[0].cpu().numpy()
                return prob
            (mask,), (sure,) = predict_images(*common, **options)
        finally:
            self.train(training)
        return (mask, sure) if confidence else mask

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the network sees an image: the training resolution, with the aspect
        ratio of the image. If all training images had the same size, the longer side is scaled to
        theirs; otherwise only larger images are scaled down. At least 32 pixels, so that any
        backbone can halve it five times."""
        longer = max(height, width)
        limit = self.config.get("max_size") or longer
        target = max(self.config["size"]) if self.config.get("size") else min(limit, longer)
        return max(32, round(height * target / longer)), max(32, round(width * target / longer))


def load(name: str | Path) -> Segmenter:
    """The trained network of a run folder, or of user/name on the Hugging Face Hub, in eval mode.
    Raises UserError if it is missing or damaged."""
    path = Path(name)
    # a name on the Hub has two parts, the first of which is not a folder here
    if len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
        path = fetch(str(name))
    config, file = read_config(path), path / "model.safetensors"
    weights = read_weights(file)
    try:
        model = Segmenter(config)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    except Exception as error:  # whatever timm and torch raise for the entries of a foreign file
        raise UserError(
            f"{path / 'config.json'}: describes a network that cannot be built "
            f"({type(error).__name__})"
        ) from None
    load_weights(model, weights, file)
    return model.eval()


def fetch(name: str) -> Path:
    """The folder of user/name in the Hub's cache, updated if there is a connection. UserError if it
    is not in the cache and cannot be downloaded."""
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the Hub's client raises many kinds
        raise UserError(
            f"{name}: no such folder, and downloading it from the Hub failed "
            f"({type(error).__name__}: {first_line(error)[:120]})"
        ) from None


def as_tensor(image: Image.Image | np.ndarray | Tensor | str | Path) -> Tensor:
    """One image of any type that `predict` takes -> uint8 RGB [3, H, W]."""
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3:
            raise ValueError(
                f"an image tensor must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}"
            )
        return image
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an image array must be uint8, got {image.dtype}")
        image = Image.fromarray(image)
    return to_rgb(image)


# --------------------------------------------------------------------------- published checkpoints
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


# the data sets of the authors' code (they published checkpoints of the first two)
PUBLISHED = ("cityscapes", "pascal", "sun")


def load_published(file: str, dataset: str | None) -> Segmenter:
    """The network of a published checkpoint, in eval mode. The file does not name the data set it
    was trained on; `dataset` does. Raises UserError for a file that does not fit."""
    need(
        dataset in PUBLISHED,
        f"--checkpoint requires --dataset {', '.join(PUBLISHED)}: the file does not name the data "
        "set it was trained on",
    )
    state = read_torch(Path(file))
    need(
        isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
        f"{file}: is not a dictionary of tensors, as the published checkpoints are",
    )
    source = DATASETS[dataset].source
    config = {
        "model": {"num_classes": len(source.classes), "backbone": "resnet101"},
        "classes": source.classes,
        "palette": source.palette,
        "crop_size": DATASETS[dataset].recipe["crop_size"] * 2,
        "size": source.size,
        "max_size": source.max_size,
        "arguments": {"dataset": dataset, "script": "the authors' code"},
    }
    model = Segmenter(config)
    load_weights(model, convert_reco_checkpoint(state), file)
    return model.eval()
