"""The images in TensorBoard: labels, predictions, heat maps, representations (projector)."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from engine.evaluation import predict_probabilities
from inputs.files import IGNORE
from inputs.transforms import shrink_known, to_float

MOST_NAMED = 40  # a heat map of more classes has no names and numbers: they take time and memory


def paint(label: Tensor, palette) -> Tensor:
    """[H, W] class ids -> uint8 [3, H, W] in the data set's colours; 255 is white."""
    colours = torch.full((256, 3), 255, dtype=torch.uint8)
    colours[: len(palette)] = torch.tensor(palette, dtype=torch.uint8)
    return colours[label.long()].permute(2, 0, 1)


def draw_grid(rows: list[list[Tensor]], titles: list[str]) -> Figure:
    """Rows of images under titles: uint8 [3, H, W], or grey maps [H, W] in 0 .. 1."""
    figure = Figure(figsize=(2.4 * len(titles), 2.0 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for i, row in enumerate(rows):
        for axis, image in zip(axes[i], row, strict=True):
            values = image.permute(1, 2, 0) if image.dim() == 3 else image
            axis.imshow(values.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure


def heat_map(matrix: Tensor, names: list[str]) -> Figure:
    """A matrix in 0 .. 1; up to MOST_NAMED classes with names on both sides and values in per
    cent."""
    side = 1.6 + 0.34 * min(len(names), MOST_NAMED)
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(names) > MOST_NAMED:
        return figure
    plain = dict(fontsize=8, parse_math=False)  # a $ in a name does not start a formula
    axis.set_xticks(range(len(names)), names, rotation=90, **plain)
    axis.set_yticks(range(len(names)), names, **plain)
    for i, j in (matrix >= 0.005).nonzero().tolist():
        value = float(matrix[i, j])
        colour = "white" if value > 0.6 else "black"
        axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    return figure


def spread_indices(length: int, number: int) -> list[int]:
    """At most `number` evenly spaced indices from the first to the last."""
    return torch.linspace(0, length - 1, min(number, length)).long().tolist()


@torch.no_grad()
def draw_validation(network: nn.Module, images, palette, device) -> Figure:
    """The same four images each time, with truth, prediction and confidence. `images`: a data set
    of (image uint8 [3, H, W], label uint8 [H, W], size [2])."""
    training = network.training
    network.eval()
    rows = []
    for index in spread_indices(len(images), 4):
        image, label, _ = images[index]
        prob = predict_probabilities(network, to_float(image[None], device))
        confidence, prediction = prob[0].max(dim=0)
        painted = [paint(label, palette), paint(prediction.cpu(), palette)]
        rows.append([image, *painted, confidence.float().cpu()])
    network.train(training)
    return draw_grid(rows, ["image", "truth", "prediction", "confidence"])


def draw_training(to_plot: dict, palette) -> Figure:
    """Images, (pseudo-)labels and confidence of a training step, and the queries that ReCo drew.

    to_plot (see train_step): lists of batches, `images` [B, 3, H, W], `label` [B, H, W] and
    `confidence` [B, H, W] (or bool); `reco`: the statistics of reco_loss with the rep_size (h, w),
    empty without ReCo."""
    images, labels = torch.cat(to_plot["images"]), torch.cat(to_plot["label"])
    confidence = torch.cat([c.float() for c in to_plot["confidence"]])
    last, stats = len(images) - 1, to_plot["reco"]
    rows, titles = [], ["image", "(pseudo-)label", "confidence"]
    if stats:
        titles.append("queries of ReCo")
        # the queries of a class without hard pixels have no weight
        queries = torch.where(stats["query_weight"][:, None] > 0, stats["queries"], -1).cpu()
    # labelled images come first, unlabelled ones last
    for b in sorted({0, min(1, last), max(last - 1, 0), last}):
        image = (images[b].float().cpu().clamp(0, 1) * 255).round().byte()
        label = paint(labels[b].cpu(), palette)
        row = [image, label, confidence[b].cpu()]
        if stats:
            picked = query_mask(queries, stats["rep_size"], b, image.shape[-2:])
            row.append(torch.where(picked, label, image // 3))
        rows.append(row)
    return draw_grid(rows, titles)


def query_mask(queries: Tensor, rep_size, b: int, size) -> Tensor:
    """[1, H, W] bool: the query pixels of image b. `queries`: indices into B*h*w; -1: none."""
    h, w = rep_size
    picked = torch.zeros(h * w)
    mine = queries.flatten() - b * h * w
    picked[mine[(mine >= 0) & (mine < h * w)]] = 1
    return F.interpolate(picked.view(1, 1, h, w), size=tuple(size), mode="nearest")[0] > 0


def draw_confusion(confusion: Tensor, names: list[str]) -> Figure:
    """Heat map of a confusion matrix [truth, prediction], each row divided by its sum."""
    counts = confusion.float()
    return heat_map(counts / counts.sum(1, keepdim=True).clamp_min(1), names)


@torch.no_grad()
def add_embedding(writer: SummaryWriter, network: nn.Module, images, source, device, step: int):
    """Write the representations of a few hundred pixels, coloured by class, for the projector."""
    generator = torch.Generator().manual_seed(0)
    vectors, classes = [], []
    training = network.training
    network.eval()
    for index in spread_indices(len(images), 24):
        image, label, _ = images[index]
        rep = network(to_float(image[None], device))[1][0].float().cpu()  # [D, h, w]
        small = shrink_known(label[None], rep.shape[-2:])[0].flatten()
        for c in small.unique().tolist():
            if c == IGNORE:
                continue
            pixels = (small == c).nonzero()[:, 0]
            pixels = pixels[torch.randperm(len(pixels), generator=generator)[:4]]
            vectors.append(rep.flatten(1)[:, pixels].T)
            classes += [c] * len(pixels)
    network.train(training)
    if not classes:  # none of these images has a labelled pixel
        return
    colours = torch.tensor([source.palette[c] for c in classes]) / 255
    squares = colours[:, :, None, None].expand(-1, -1, 8, 8)
    names = [source.classes[c] for c in classes]
    writer.add_embedding(torch.cat(vectors), names, squares, step, "representation")
