"""The defaults of the training options for each data set."""

# Defaults by data set. lr is for `batch_size` images per step (the labelled ones; train_semi.py
# adds as many unlabelled, train_supervised.py doubles them at the same rate, as in the paper).
PAPER = dict(
    backbone="resnet101.tv_in1k",
    pretrained=True,
    output_stride=16,
    decoder_stride=4,
    channels=256,
    low_channels=48,
    rep_dim=256,
    aspp_rates=[6, 12, 18],
    crop_size=[321],
    scale=[0.5, 1.5],
    max_size=1024,
    batch_size=10,
    lr=2.5e-3,
    optimizer="sgd",
    weight_decay=5e-4,
    backbone_lr_scale=1.0,
    iterations=40_000,
    val_interval=500,
    warmup_iterations=0,
    num_labeled=0,
    num_workers=None,  # the cores there are
)
# AdamW needs other rates than SGD, and a pretrained ViT a fortieth of the heads'. Published for
# DINOv2 backbones (UniMatch V2, Yang et al. 2024), not measured here.
ADAMW = dict(optimizer="adamw", lr=2e-4, weight_decay=0.01)
VIT_LR_SCALE = 1 / 40
RECIPES = {
    "cityscapes": PAPER | dict(crop_size=[512], scale=[1.0, 1.0], batch_size=2),
    "pascal": PAPER,
    "sun": PAPER | dict(batch_size=5),
    "folder": PAPER | dict(batch_size=8),
    # photographs of 480x360 on a laptop: a small pretrained network
    "camvid": PAPER
    | dict(
        backbone="tf_efficientnet_lite0.in1k",
        channels=64,
        low_channels=24,
        rep_dim=64,
        crop_size=[224],
        batch_size=4,
        lr=0.04,
        iterations=2000,
    ),
    # no pretrained weights, 64x64 images: a small network of output stride 8 with a decoder at
    # stride 2, a higher rate, small crops (a step takes three quarters of the time of whole
    # scenes), and a length of five minutes on two cores
    "street": PAPER
    | dict(
        backbone="test_resnet",
        pretrained=False,
        output_stride=8,
        decoder_stride=2,
        channels=32,
        low_channels=24,
        rep_dim=32,
        aspp_rates=[1, 2, 3],
        crop_size=[48],
        batch_size=4,
        lr=0.2,
        iterations=4400,
        val_interval=880,
        num_labeled=20,
        num_workers=0,
    ),
}
