"""The feature extractor of the network: any timm backbone that has what DeepLabV3+ needs, and its
pretrained weights, from the hub or from a file."""

import contextlib
import difflib
import functools
import logging
from pathlib import Path

import timm
import torch
from einops import rearrange
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from engine.checkpoint import read_torch, read_weights
from inputs.errors import UserError, first_line, need

WORKING = (
    "resnet*, resnext*, regnet*, efficientnet*, mobilenetv3*, convnext*, vit* (DINOv2, DINOv3 too) "
    "work"
)
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # where training scripts put the weights
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm looks for on the hub
# What timm's architectures raise for options that are not theirs.
REFUSALS = (
    TypeError,
    AssertionError,
    NotImplementedError,
    ValueError,
    RuntimeError,
    AttributeError,
)


def build_backbone(
    name: str,
    pretrained: bool,
    output_stride: int | None,
    decoder_stride: int,
    weights: str | None = None,
) -> tuple[nn.Module, int, int, int]:
    """A timm feature extractor that returns [low-level, deepest] features, their widths, and what
    the sides of its input must be multiples of (0: any size will do; a ViT's patch).

    pretrained     load timm's weights from the hub, or those of the file `weights`
    output_stride  None: 16, or 32 for a backbone that cannot be dilated
    Raises UserError for a backbone that cannot work or weights that cannot be had."""
    check_name(name)
    try:
        found = probe_features(name, output_stride or 16, decoder_stride)
    except UserError:
        if output_stride:
            raise
        found = probe_features(name, 32, decoder_stride)
    options, low, high, patch = found
    multiple = patch or needed_multiple(name, options.get("output_stride"))
    if weights and pretrained:
        state, origin = read_weight_file(Path(weights)), f"--backbone-weights {weights}"
        backbone = timm.create_model(name, features_only=True, **options)
        load_features(backbone, name, state, origin)
    elif pretrained:
        backbone = from_hub(name, options)
    else:
        backbone = timm.create_model(name, features_only=True, **options)
    for parameter in unused_parameters(name, 16 * patch or 256, **options):
        backbone.get_parameter(parameter).requires_grad_(False)
    return backbone, low, high, multiple


def from_hub(name: str, options: dict) -> nn.Module:
    """The feature extractor with timm's weights; UserError where they cannot be had."""
    need(
        timm.models.is_model_pretrained(name),
        f"--backbone {name}: timm has no pretrained weights for it; train it from random weights "
        "with --no-pretrained",
    )
    try:
        check_hub(name)
        with quiet(logging.getLogger("timm")):
            return timm.create_model(name, features_only=True, pretrained=True, **options)
    except Exception as error:  # the hub's clients raise many kinds; the reason is in the line
        reason = first_line(error)[:120]
        raise UserError(
            f"--backbone {name}: the pretrained weights could not be loaded "
            f"({type(error).__name__}: {reason}); connect once to download them (they stay in the "
            "Hugging Face cache), give a file with --backbone-weights, or train from random "
            "weights with --no-pretrained"
        ) from error


def check_name(name: str) -> None:
    """UserError where timm does not know the model."""
    try:
        timm.models.get_pretrained_cfg(name)
        known = timm.is_model(name.split(".")[0])
    except RuntimeError:  # a tag that this architecture does not have
        known = False
    if not known:
        names = timm.list_models() + timm.list_pretrained()
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"near it: {', '.join(near)}" if near else WORKING
        raise UserError(f"--backbone {name}: timm has no such model; {hint}")


def probe_features(
    name: str, output_stride: int, decoder_stride: int
) -> tuple[dict, int, int, int]:
    """Options of timm.create_model that give [low-level, deepest] features, their widths, and the
    patch size (0 for a pyramid)."""
    refused = (
        f"--backbone {name} at output stride {output_stride} yields no feature pyramid that "
        f"DeepLabV3+ can use; {WORKING}"
    )
    if output_stride != 32:
        refused += "; or try --output-stride 32"
    # ViTs know no output stride: their blocks have the stride of the patch. Other networks that do
    # not know it have one of 32
    choices = [{"output_stride": output_stride}, {"dynamic_img_size": True}]
    choices += [{}] if output_stride == 32 else []
    options, probe = first_that_builds(name, choices)
    need(probe is not None, refused)
    strides, widths = probe.feature_info.reduction(), probe.feature_info.channels()
    patch = strides[-1] if "dynamic_img_size" in options else 0
    if patch:
        need(set(strides) == {patch}, refused)  # else a hierarchical transformer such as Swin
        depth = len(getattr(probe, "model", probe).blocks)
        options["out_indices"] = (depth // 4, depth - 1)  # an early block keeps the detail
        return options, widths[0], widths[-1], patch
    found = feature_widths(name, options.get("output_stride"), 256)
    need(found == widths and strides[-1] <= output_stride, refused)
    need(
        decoder_stride in strides,
        f"--backbone {name} has no features at --decoder-stride {decoder_stride}; it has "
        f"{sorted(set(strides))}",
    )
    low = strides.index(decoder_stride)
    indices = probe.feature_info.out_indices
    options["out_indices"] = (indices[low], indices[-1])
    return options, widths[low], widths[-1], 0


def first_that_builds(name: str, choices: list[dict]) -> tuple[dict, nn.Module | None]:
    """The first options with which timm builds the feature extractor, and it; None if none will."""
    for options in choices:
        try:
            return options, timm.create_model(name, features_only=True, **options)
        except REFUSALS:
            continue
    return {}, None


def needed_multiple(name: str, output_stride: int | None) -> int:
    """32 for a network whose stages only fit together on such sides, as HRNet; else 0. UserError
    for one that those do not suit either (MaxViT)."""
    if feature_widths(name, output_stride, 264):
        return 0
    fits = feature_widths(name, output_stride, 288)
    need(fits, f"--backbone {name}: takes pictures of a few sizes alone; {WORKING}")
    return 32


@functools.cache
def feature_widths(name: str, output_stride: int | None, side: int) -> list[int] | None:
    """Channels of its features of a square image, without computing them; None where it cannot take
    the image."""
    options = {"output_stride": output_stride} if output_stride else {}
    network = without_storage(name, features_only=True, **options).eval()
    with torch.device("meta"):
        try:
            return [x.shape[1] for x in network(torch.empty(1, 3, side, side))]
        except Exception:  # whatever its code raises
            return None


@functools.cache
def unused_parameters(name: str, side: int, **options) -> list[str]:
    """Parameters that lead to none of its features, as the last exchange of HRNet: distributed
    training would wait for their gradient."""
    network = without_storage(name, features_only=True, **options).eval()
    with torch.device("meta"), torch.inference_mode(False), torch.enable_grad():
        total = sum(x.sum() for x in network(torch.empty(1, 3, side, side)))
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [n for n, gradient in zip(names, gradients, strict=True) if gradient is None]


def without_storage(name: str, **options) -> nn.Module:
    """timm's network on the meta device: shapes alone. Some cannot be built there, because their
    code looks at values (before timm 1.0.30 that of RegNet, before 1.0.21 more)."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):  # what is built next begins as without this
            return timm.create_model(name, **options).to("meta")


def vit_patch(name: str, output_stride: int, decoder_stride: int) -> int:
    """Patch size of a ViT of one stride, 0 for a pyramid; UserError as `build_backbone`."""
    check_name(name)
    return probe_features(name, output_stride, decoder_stride)[-1]


def input_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of the images, in 0 .. 1, that the backbone was trained on."""
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(config.mean), tuple(config.std)


# --------------------------------------------------------------------- dilated depthwise, on a CPU
class DilatedDepthwise(nn.Conv2d):
    """A depthwise convolution of dilation d, which trains on a CPU as one without: on the d x d
    images of every d-th row and column. The result is the same, and the gradient takes half the
    time: oneDNN is slow at that of a dilated depthwise convolution (docs/speed.md)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> the same shape."""
        if x.device.type != "cpu" or not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        (height, width), (d, e) = x.shape[-2:], self.dilation
        x = F.pad(x, (0, -width % e, 0, -height % d))
        parts = rearrange(x, "b c (h d) (w e) -> (b d e) h w c", d=d, e=e)
        padding = [side // 2 for side in self.kernel_size]
        parts = F.conv2d(  # channels last, as the network is
            rearrange(parts, "n h w c -> n c h w"),
            self.weight,
            self.bias,
            padding=padding,
            groups=self.groups,
        )
        x = rearrange(parts, "(b d e) c h w -> b (h d) (w e) c", d=d, e=e)
        return rearrange(x, "b h w c -> b c h w")[..., :height, :width]


def split_dilation(backbone: nn.Module) -> None:
    """Make every dilated depthwise convolution of the backbone a DilatedDepthwise, in place."""
    for conv in backbone.modules():
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            continue
        depthwise = conv.groups == conv.in_channels == conv.out_channels
        same = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        odd = all(k % 2 for k in conv.kernel_size)
        dilated = max(conv.dilation) > 1 and conv.stride == (1, 1)
        if depthwise and dilated and odd and conv.padding == same:
            conv.__class__ = DilatedDepthwise


# ------------------------------------------------------------------------------------- weights
def check_hub(name: str) -> None:
    """Raise the hub client's error at once where weights are neither in its cache nor within
    reach: its download would try again and again for a minute."""
    repository = timm.models.get_pretrained_cfg(name).hf_hub_id
    if not repository:
        return
    repository = repository if "/" in repository else f"timm/{repository}"
    cached = (try_to_load_from_cache(repository, file) for file in WEIGHT_FILES)
    if not any(isinstance(path, str) for path in cached):
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=5)


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file or in one that torch.save wrote, by itself or as part
    of a checkpoint; nothing is unpickled."""
    need(path.is_file(), f"--backbone-weights {path}: no such file")
    try:
        state = read_weights(path) if path.suffix == ".safetensors" else read_torch(path)
    except UserError as error:
        raise UserError(f"--backbone-weights {error}") from None
    if isinstance(state, dict):
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]
        state = inner[0] if inner else state
    need(
        isinstance(state, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()),
        f"--backbone-weights {path}: is no dictionary of tensors",
    )
    return clean_state_dict(state)


def load_features(backbone: nn.Module, name: str, state: dict[str, Tensor], origin: str) -> None:
    """Into the feature extractor the weights of the whole classifier `name`, whose head and last
    blocks it may lack. UserError where something is missing, unknown or of another shape."""
    whole = without_storage(name).state_dict()
    # a feature extractor may flatten its stages ("layers.0" becomes "layers_0") or wrap the model
    renamed = {key.replace(".", "_"): value for key, value in state.items()}
    own = backbone.state_dict()
    keys = {key: key.removeprefix("model.").replace(".", "_") for key in own}
    for key, short in keys.items():
        if key.endswith("num_batches_tracked"):  # older files do not have these counts
            renamed.setdefault(short, own[key])
    odd = [f"it lacks {key}" for key, short in keys.items() if short not in renamed]
    odd += [f"{key} is unknown to the network" for key in state if key not in whole]
    odd += [
        f"{key} is {tuple(renamed[short].shape)}, expected {tuple(own[key].shape)}"
        for key, short in keys.items()
        if short in renamed and renamed[short].shape != own[key].shape
    ]
    need(
        not odd,
        f"{origin}: does not fit --backbone {name} ({odd[0] if odd else ''}; {len(odd)} entries "
        "differ)",
    )
    backbone.load_state_dict({key: renamed[short] for key, short in keys.items()})


@contextlib.contextmanager
def quiet(logger: logging.Logger):
    """Without the library's notes, for instance on the classifier's keys, which nobody needs."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
