"""Backbones: timm's feature extractors, with pretrained weights from the Hub or a file."""

import difflib
import logging
from pathlib import Path

import timm
import torch
from huggingface_hub import snapshot_download
from torch import nn

from inputs.errors import UserError, first_line, need

WORKING = (
    "resnet*, resnext*, regnet*, efficientnet*, mobilenetv3*, convnext*, vit* (DINOv2, DINOv3 too) "
    "work"
)
# no warnings about the weights of the classifier, which is not used
logging.getLogger("timm").setLevel(logging.ERROR)


def build_backbone(
    name: str, pretrained: bool, output_stride: int, decoder_stride: int, weights: str | None = None
) -> tuple[nn.Module, int, int, int]:
    """A timm feature extractor: images [B, 3, H, W] -> [low-level, deepest] features.

    pretrained      load timm's weights from the Hub, or those of the file `weights`
    output_stride   of the deepest features; a backbone that cannot be dilated has 32, a ViT its
                    patch size
    decoder_stride  of the low-level features; without effect on a ViT
    Returns it, the two widths, and the patch size of a ViT (else 0), which must tile the image.
    Raises UserError for a backbone that does not work or weights that cannot be loaded."""
    options, low_width, high_width, patch = choose_features(name, output_stride, decoder_stride)
    if not pretrained:
        backbone = timm.create_model(name, features_only=True, **options)
        return backbone, low_width, high_width, patch
    if weights:
        check_weights(weights, name)
    file = weights or download(name)
    options |= {"pretrained": True, "pretrained_cfg_overlay": dict(file=file, custom_load=False)}
    try:
        backbone = timm.create_model(name, features_only=True, **options)
    except Exception as error:  # the loader raises many kinds
        raise UserError(f"--backbone {name}: cannot load {file} ({first_line(error)})") from None
    return backbone, low_width, high_width, patch


def choose_features(
    name: str, output_stride: int, decoder_stride: int
) -> tuple[dict, int, int, int]:
    """Options of timm.create_model that give [low-level, deepest] features, their widths, and the
    patch size of a ViT, 0 for other networks."""
    network, options = probe(name, output_stride)
    strides, widths = network.feature_info.reduction(), network.feature_info.channels()
    if len(set(strides)) == 1:  # a ViT: an early block keeps the detail
        depth = len(network.model.blocks)
        options["out_indices"] = (depth // 4, depth - 1)
        return options, widths[0], widths[-1], strides[-1]
    need(
        decoder_stride in strides,
        f"--backbone {name} has no features at --decoder-stride {decoder_stride}; it has "
        f"{sorted(set(strides))}",
    )
    low, indices = strides.index(decoder_stride), network.feature_info.out_indices
    options["out_indices"] = (indices[low], indices[-1])
    return options, widths[low], widths[-1], 0


def probe(name: str, output_stride: int) -> tuple[nn.Module, dict]:
    """The feature extractor on the meta device (shapes without values), and the options that it
    accepts. UserError unless it maps images of any size to features [B, C, h, w]."""
    names = timm.list_models() + timm.list_pretrained()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"similar names: {', '.join(near)}" if near else WORKING
        raise UserError(f"--backbone {name}: timm has no such model; {hint}")
    # a ViT refuses an output stride; other networks that refuse it have one of 32
    for options in ({"output_stride": output_stride}, {"dynamic_img_size": True}, {}):
        try:
            with torch.device("meta"), torch.no_grad():
                network = timm.create_model(name, features_only=True, **options).eval()
                strides = network.feature_info.reduction()
                patch = strides[-1] if len(set(strides)) == 1 else 0
                size = (2 * patch, 3 * patch) if patch else (33, 47)
                features = network(torch.empty(1, 3, *size))
        except Exception:  # the networks raise many kinds for an option or size they do not take
            continue
        if [x.shape[1] for x in features] == network.feature_info.channels():
            return network, options
    raise UserError(
        f"--backbone {name}: does not map images of any size to the features that DeepLabV3+ "
        f"requires; {WORKING}"
    )


# ------------------------------------------------------------------------------------- weights
def download(name: str) -> str:
    """The file of timm's weights in the Hub's cache, downloaded if necessary. UserError if it is
    not in the cache and cannot be downloaded."""
    try:
        # fails at once without a connection, where timm's own download retries for a minute
        repository = timm.models.get_pretrained_cfg(name).hf_hub_id
        folder = snapshot_download(repository, allow_patterns="model.safetensors")
        (file,) = Path(folder).glob("model.safetensors")
        return str(file)
    except Exception as error:  # the Hub's client raises many kinds
        raise UserError(
            f"--backbone {name}: cannot download the pretrained weights ({type(error).__name__}: "
            f"{first_line(error)[:120]}); connect once (they stay in the Hugging Face cache), give "
            "a file with --backbone-weights, or start from random weights with --no-pretrained"
        ) from None


def check_weights(file: str, name: str) -> None:
    """UserError unless the file (safetensors, or written by torch.save) has every weight of timm's
    classifier `name` and no others; its last layer may differ or be missing.

    timm's own loader ignores what is missing or unknown. Nothing is unpickled."""
    origin = f"--backbone-weights {file}"
    try:
        state = timm.models.load_state_dict(file, weights_only=True)
        found = {key: tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # the unpickler and the readers raise many kinds
        raise UserError(
            f"{origin}: is damaged or not a dictionary of tensors ({type(error).__name__})"
        ) from None
    with torch.device("meta"):
        network = timm.create_model(name)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    head = network.pretrained_cfg["classifier"] or ()
    odd = [
        f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'no such entry')}"
        for key in {**expected, **found}
        if found.get(key) != expected.get(key)
        # old files do not have the counts of batch norm
        and not (key.startswith(head) or key.endswith("num_batches_tracked"))
    ]
    need(
        not odd,
        f"{origin}: does not fit --backbone {name} ({odd[0] if odd else ''}; {len(odd)} entries "
        "differ)",
    )
