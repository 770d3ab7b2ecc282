"""Widths of the registry's networks that a test can afford; the architectures stay whole."""

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"features": [4, 4, 8, 8, 16, 4]},
    "fcn": {"backbone": "resnet18", "channels": [8, 8, 16, 16]},
    "mask_rcnn": {
        "backbone": "resnet18",
        "channels": [8, 8, 16, 16],
        "pyramid_channels": 16,
        "box_features": 32,
        "mask_channels": 16,
    },
    "h_dense_unet": {
        "stem": 8,
        "growth": 4,
        "blocks": [1, 2, 2, 1],
        "growth_3d": 4,
        "blocks_3d": [1, 1, 2, 1],
        "features": 8,
    },
    "pspnet": {"backbone": "resnet18", "channels": [8, 16, 16, 16], "pyramid_channels": 16},
    "unet3plus": {"base_channels": 4},
    "acm": {"channels": [4, 4, 8, 8], "blocks": [1, 1, 1]},
    "nnunet": {"features": [4, 8, 8, 8, 8, 8, 8]},
}
