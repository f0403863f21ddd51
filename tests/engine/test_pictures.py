"""The images in TensorBoard: what they show, and that many classes take neither time nor memory."""

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from engine import pictures


def drawn(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_heat_map_has_names_and_numbers_of_few_classes():
    matrix = torch.tensor([[0.9, 0.1], [0.004, 0.996]])
    figure = pictures.heat_map(matrix, ["$road", "car"])
    assert drawn(figure) == ["90", "10", "100"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["$road", "car"]
    figure.canvas.draw()


def test_a_heat_map_of_many_classes_is_a_plain_image(tmp_path):
    figure = pictures.heat_map(torch.rand(253, 253), [f"class {i}" for i in range(253)])
    assert not drawn(figure) and max(figure.get_size_inches()) < 16
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_figure("confusion", figure, 0)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**23


def test_a_training_figure_shows_labels_and_queries():
    images, labels = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = 1
    palette = [(255, 0, 0), (0, 0, 255)]
    stats = dict(
        queries=torch.tensor([[0, 5], [31, 31]]),  # of 2 x 4 x 4 pixels
        query_weight=torch.tensor([1.0, 0.0]),
        rep_size=(4, 4),
    )
    halves = {name: [x[:1], x[1:]] for name, x in (("images", images), ("label", labels))}
    to_plot = dict(halves, confidence=[labels[:1] != 255, torch.rand(1, 8, 8)], reco=stats)
    figure = pictures.draw_training(to_plot, palette)
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "image",
        "(pseudo-)label",
        "confidence",
        "queries of ReCo",
    ]
    first, second = (np.asarray(figure.axes[i].images[0].get_array()) for i in (3, 7))
    dark = (images * 255).round().byte().permute(0, 2, 3, 1).numpy() // 3
    assert (first[:2, :2] == palette[0]).all() and (first[2:4, 2:4] == palette[0]).all()
    assert (second == dark[1]).all()  # a class without weight draws nothing
    assert len(pictures.draw_training({**to_plot, "reco": {}}, palette).axes) == 6
