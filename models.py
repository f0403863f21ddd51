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
from accelerate import Accelerator
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    PyTorchModelHubMixin,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from PIL import Image
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from backbones import build_backbone, input_statistics, split_dilation
from data import DATASETS
from engine.checkpoint import best_miou, load_weights, read_config, read_torch, read_weights
from engine.evaluation import predict_picture, predict_strips
from inputs.errors import UserError, first_line, need
from inputs.files import read_image, to_rgb, write_json
from inputs.source import Source
from inputs.transforms import memory_format, upsample


class DeepLabV3Plus(nn.Module):
    """Encoder-decoder with atrous convolution (Chen et al. 2018) and two heads on the decoder:
    class logits and, with `rep_dim`, the dense representation of the regional contrast loss (Liu
    et al. 2022, section 3). It takes images in 0 .. 1 and normalises them itself.

    num_classes      channels of the logits
    backbone         any timm name that yields a feature pyramid (resnet, regnet, efficientnet,
                     mobilenet, convnext ...) or a ViT of one stride (vit, deit, DINOv2, DINOv3);
                     not Swin and its like, whose features have their channels last
    rep_dim          channels of the representation; None builds no representation head
    pretrained       load timm's weights (UserError where they cannot be had)
    mean, std        per channel, of the images in 0 .. 1; None: those the backbone was trained with
    output_stride    of the deepest feature map; None: 16, as in the paper, or 32 for a backbone
                     that cannot be dilated, such as densenet. ViTs keep their patch size
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
        output_stride: int | None = None,
        decoder_stride: int = 4,
        channels: int = 256,
        low_channels: int = 48,
        aspp_rates: tuple[int, ...] = (6, 12, 18),
        backbone_weights: str | None = None,
    ):
        super().__init__()
        self.backbone, low_width, high_width, self.multiple = build_backbone(
            backbone, pretrained, output_stride, decoder_stride, backbone_weights
        )
        split_dilation(self.backbone)
        self.decoder_stride, self.frozen = decoder_stride, False
        self.aspp = ASPP(high_width, channels, aspp_rates)
        self.low_level = conv_bn_relu(low_width, low_channels, 1)
        self.classifier = head(channels + low_channels, channels, num_classes)
        self.representation = head(channels + low_channels, channels, rep_dim) if rep_dim else None
        for name, values, own in zip(
            ("mean", "std"), (mean, std), input_statistics(backbone), strict=True
        ):
            constant = torch.as_tensor(own if values is None else values, dtype=torch.float32)
            self.register_buffer(name, constant.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, 3, H, W] images in 0 .. 1 -> logits [B, C, h, w] and rep [B, D, h, w] (None
        without the head), h = ceil(H / decoder_stride)."""
        size = [math.ceil(n / self.decoder_stride) for n in x.shape[-2:]]
        x = (x - self.mean) / self.std
        if self.multiple:
            # the patches of a ViT must tile the image, or the stages of a pyramid meet: stretched
            x = upsample(x, [math.ceil(n / self.multiple) * self.multiple for n in x.shape[-2:]])
        features = self.backbone(x)
        low, high = features[0], self.aspp(features[-1])
        if list(low.shape[-2:]) != size or torch.compiler.is_exporting():  # a graph for any size
            low = upsample(low, size)
        # [B, low_channels + channels, h, w]
        decoded = torch.cat([self.low_level(low), upsample(high, size)], dim=1)
        rep = None if self.representation is None else self.representation(decoded)
        return self.classifier(decoded), rep

    def freeze_backbone(self) -> None:
        """Train the heads alone: the backbone has no gradient, no graph is kept of it, and its
        batch norm stays in eval mode."""
        self.frozen = True
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three atrous 3x3 and the image's mean, side by side,
    then projected."""

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

    Only parameters are averaged. The batch-norm statistics are the teacher's own: it runs in train
    mode while it labels, in eval mode when it is evaluated. Decay at update t = 0, 1, ... is
    min(1 - 1/(t + 1), `decay`), so the first update copies the student. `label` is `model` as it
    labels a batch, compiled on request; `model` is what is evaluated and saved."""

    def __init__(self, student: nn.Module, decay: float = 0.99, compiled: bool = False):
        self.model = copy.deepcopy(student).requires_grad_(False).train()
        self.label = torch.compile(self.model) if compiled else self.model
        self.decay, self.step = decay, 0

    @torch.no_grad()
    def update(self, student: nn.Module, statistics: bool = False) -> None:
        """Move towards the student. statistics: copy its batch-norm statistics as well (in a
        warm-up the teacher sees no images)."""
        decay = min(1 - 1 / (self.step + 1), self.decay)
        torch._foreach_lerp_(list(self.model.parameters()), list(student.parameters()), 1 - decay)
        self.step += 1
        if statistics:
            for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step = state["step"]


# ----------------------------------------------------------------------------- the start of a run
def new_model(
    args: argparse.Namespace, source: Source, accelerator: Accelerator, fresh: bool = True
) -> tuple[DeepLabV3Plus, dict]:
    """The network on the device, and its entry in config.json. fresh: with its initial weights;
    False if a checkpoint will replace them."""
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
    check_crop(model, args)
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
        "arguments": vars(args),
    }
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # a process holds few images: batch norm takes its statistics from those of all.
        # timm's conversion keeps the activations of its own norm layers
        model = convert_sync_batchnorm(model)
    if model.representation is not None and not args.reco:
        model.representation.requires_grad_(False)  # distributed training waits for every gradient
    if args.backbone_lr_scale == 0:
        model.freeze_backbone()
    device = accelerator.device
    return model.to(device, memory_format=memory_format(device)), config


def check_crop(model: DeepLabV3Plus, args: argparse.Namespace) -> None:
    """UserError where nothing is left of the training crop in the depth of the backbone."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, *args.crop_size))
    except Exception as error:  # whatever the backbone's code raises
        sides = " ".join(map(str, args.crop_size))
        reason = first_line(error)
        raise UserError(
            f"--crop-size {sides} does not suit --backbone {args.backbone} ({reason}); take a "
            "larger crop, or another backbone"
        ) from error
    model.train()


def init_from(model: DeepLabV3Plus, folder: Path, classes: list[str]) -> None:
    """The weights of a finished run of the same classes (--init-from). The head of the
    representation begins at random where the run has none."""
    need(
        read_config(folder)["classes"] == classes,
        f"--init-from {folder}: was trained on other classes than those of this data set",
    )
    weights = read_weights(folder / "model.safetensors")
    ours, theirs = (
        {key for key in state if key.startswith("representation.")}
        for state in (model.state_dict(), weights)
    )
    if not ours:
        weights = {key: value for key, value in weights.items() if key not in theirs}
    elif not theirs:
        weights |= {key: value for key, value in model.state_dict().items() if key in ours}
    load_weights(model, weights, f"--init-from {folder}")


# ------------------------------------------------------------------------------ a trained network
class Segmenter(DeepLabV3Plus, PyTorchModelHubMixin):
    """A trained network to use: `classes`, `palette` and `predict`; built from a run's config.

    `save_pretrained(folder)` and `push_to_hub("user/name", model_card_kwargs={"license": ...})`
    are huggingface_hub's own; both write weights, config.json and a model card."""

    def __init__(self, config: dict):
        # before the network normalised its images itself, all were by ImageNet's constants
        constants = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        super().__init__(**{**constants, **config["model"], "pretrained": False})
        self.config, self.classes = config, config["classes"]
        self.palette = [tuple(colour) for colour in config["palette"]]
        self.folder: Path | None = None  # of the run

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        write_json(save_directory / "config.json", public_config(self.config))

    def generate_model_card(self, license: str | None = None) -> ModelCard:
        return model_card(self.config, self.folder and best_miou(self.folder), license)

    def predict(
        self,
        image,
        probabilities: bool = False,
        confidence: bool = False,
        tile: int = 1024,
        **options,
    ):
        """The mask uint8 [H, W] of an image of any size: a path, a PIL image, a uint8 array
        [H, W, 3] or [H, W], or a uint8 tensor [3, H, W]; of a list the list of masks. A file is
        turned as its EXIF data say, as everywhere here; a PIL image is taken as it is.

        probabilities  [C, H, W] float32 in place of the mask
        confidence     (mask, probability of the predicted class float32 [H, W])
        tile           larger images are predicted in tiles of this side
        options        scales, flip, window: see prediction.predict_probabilities
        Raises UserError for a file that is no image."""
        if isinstance(image, (list, tuple)):
            return [self.predict(one, probabilities, confidence, tile, **options) for one in image]
        picture = as_picture(image)
        size = self.network_size(*picture.shape[-2:])
        training, device = self.training, self.mean.device
        self.eval()
        try:
            if probabilities:
                prob = np.empty((len(self.classes), *picture.shape[-2:]), np.float32)
                strips = predict_strips(self, picture, size, tile, device, **options)
                for rows, columns, part in strips:
                    prob[:, rows, columns] = part.cpu().numpy()
                return prob
            mask, sure = predict_picture(self, picture, size, tile, device, **options)
        finally:
            self.train(training)
        return (mask, sure) if confidence else mask

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the network sees a picture: the resolution it was trained at, aspect
        kept. Where all training images had one size the longer side is brought to theirs, up or
        down; else a larger picture is brought down. A side has 32 pixels or more, so that any
        backbone can halve it five times."""
        arguments = self.config["arguments"]
        # older configs do not say it: Cityscapes and SUN RGB-D are trained at one size
        known = {"cityscapes": (512, 1024), "sun": (384, 512)}
        size = self.config.get("size") or known.get(arguments["dataset"])
        limit = {"pascal": 500, "folder": arguments.get("max_size")}.get(arguments["dataset"])
        factor, longer = 1.0, max(height, width)
        if size:
            factor = max(size) / longer
        elif limit:
            factor = min(1.0, limit / longer)
        return max(32, round(height * factor)), max(32, round(width * factor))


def load(name: str | Path) -> Segmenter:
    """The trained network of a run's folder, or of user/name on the Hugging Face hub, in eval mode.
    Raises UserError for a folder that holds none, or a damaged one."""
    folder = fetch(str(name)) if is_hub_name(str(name)) else Path(name)
    config = read_config(folder)
    weights = read_weights(folder / "model.safetensors")
    try:
        model = Segmenter(config)
    except UserError:
        raise
    except Exception as error:  # whatever timm and torch make of entries that are not theirs
        raise UserError(
            f"{folder / 'config.json'}: describes a network that cannot be built "
            f"({type(error).__name__})"
        ) from None
    load_weights(model, weights, folder / "model.safetensors")
    model.folder = folder
    return model.eval()


def as_picture(image) -> Tensor:
    """Whatever `predict` takes as one image -> uint8 RGB [3, H, W]."""
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


# that the authors' code trains on (they offer files of the first two)
PUBLISHED = ("cityscapes", "pascal", "sun")


def load_published(file: str, dataset: str | None) -> Segmenter:
    """The network of a published checkpoint in eval mode. The file does not say what it was
    trained on: `dataset` does. Raises UserError for a file that does not fit."""
    need(
        dataset in PUBLISHED,
        f"--checkpoint needs --dataset {', '.join(PUBLISHED)}: the file does not say what it was "
        "trained on",
    )
    state = read_torch(Path(file))
    need(
        isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
        f"{file}: is no dictionary of tensors, as the published checkpoints are",
    )
    source = DATASETS[dataset].source
    config = {
        "model": {"num_classes": len(source.classes), "backbone": "resnet101", "rep_dim": 256},
        "classes": source.classes,
        "palette": source.palette,
        "crop_size": DATASETS[dataset].recipe["crop_size"] * 2,
        "arguments": {"dataset": dataset, "script": "the authors' code", "max_size": None},
    }
    model = Segmenter(config)
    load_weights(model, convert_reco_checkpoint(state), file)
    return model.eval()


# ------------------------------------------------------------------------ the Hugging Face hub
FILES = ["config.json", "model.safetensors"]
LOCAL = {"data_path", "out_dir", "cache_dir", "init_from", "backbone_weights"}


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be user/name on the hub: its first part is no folder here."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()


def fetch(name: str) -> Path:
    """The folder with the newest config.json and weights of user/name, downloaded into the hub's
    cache; without a connection, those that are there. Raises UserError where there are none."""
    try:
        cached = all(isinstance(try_to_load_from_cache(name, file), str) for file in FILES)
        try:  # one request decides: the download itself would try for a minute
            get_hf_file_metadata(hf_hub_url(name, FILES[0]), timeout=5)
            connected = True
        except Exception:  # of the client's many kinds: no connection, or no such name
            if not cached:
                raise
            connected = False
        path = snapshot_download(name, allow_patterns=FILES, local_files_only=not connected)
    except Exception as error:  # the hub's clients raise many kinds; the reason is in the line
        raise UserError(
            f"{name}: no such folder, and not to be had from the hub either "
            f"({type(error).__name__}: {first_line(error)[:120]})"
        ) from None
    return Path(path)


def public_config(config: dict) -> dict:
    """config.json without the paths of the machine that trained."""
    arguments = {k: v for k, v in config["arguments"].items() if k not in LOCAL}
    if arguments.get("labeled_list"):
        arguments["labeled_list"] = Path(arguments["labeled_list"]).name
    return {**config, "arguments": arguments}


def describe_labels(arguments: dict) -> str:
    if arguments.get("label_ratio"):
        return f"partial labels ({arguments['label_ratio']}) on every image"
    if arguments.get("labeled_list"):
        return f"the images of {Path(arguments['labeled_list']).name}"
    number = arguments.get("num_labeled")
    return f"{number} labelled images" if number else "every label of the data set"


def model_card(config: dict, miou: float | None, license: str | None) -> ModelCard:
    """README.md of a trained network: how it was trained, how it is used, its classes."""
    arguments = config["arguments"]
    data = ModelCardData(
        license=license,
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", "semi-supervised-learning", "model_hub_mixin"],
    )
    score = "not recorded" if miou is None else f"{100 * miou:.2f} %"
    classes = "\n".join(
        f"| {i} | {name} | {' '.join(map(str, colour))} |"
        for i, (name, colour) in enumerate(zip(config["classes"], config["palette"], strict=True))
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# Semantic segmentation: {len(config["classes"])} classes of {arguments["dataset"]}

DeepLabV3+ on {config["model"]["backbone"]}, for the ReCo repository (regional contrast, Liu et al.,
ICLR 2022, arXiv 2104.04465).

- trained by: {arguments["script"]}, method {arguments.get("method", "not recorded")}
- data: {arguments["dataset"]}
- labels: {describe_labels(arguments)}
- validation mIoU: {score}

With the ReCo repository:

```python
import models

model = models.load("user/name")  # of this page
mask = model.predict("photo.jpg")  # uint8 [H, W]: indices into model.classes
```

| value | class | colour |
|---|---|---|
{classes}
""")
