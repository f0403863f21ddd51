"""Trained networks on the Hugging Face hub: how one is fetched by its name, and the card of a new
one. A repository there holds what a run's folder does: model.safetensors and config.json."""

from pathlib import Path

from huggingface_hub import (
    ModelCard,
    ModelCardData,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)

from errors import UserError, first_line

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
