import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet
from deepskip.networks import REGISTRY, brings_loss, build, check_output, installed, outline
from deepskip.networks.h_dense_unet import HDenseUNet
from deepskip.networks.mask_rcnn import instances_of
from deepskip.networks.pooling import CellMeans
from tests.deepskip.networks.small import SMALL

OTHERS = ["smp:Unet:resnet18", "plain_unet"]


def settings_of(name: str) -> dict[str, Any]:
    """Return a config's model section for the network, at a size that a test can afford."""
    if name == "plain_unet":
        return {"network": name, "base_channels": 4, "levels": 3}
    if name.startswith("smp:"):
        return {"network": name, "options": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}}
    return {"network": name, "options": {"size": "paper"} | SMALL[name]}


def small(name: str, in_channels: int, num_classes: int) -> Any:
    torch.manual_seed(0)
    return build(settings_of(name), in_channels, num_classes)


def loss_of(network: Any, image: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the network's own loss if it has one, otherwise ours of its logits."""
    if brings_loss(network):
        return network.training_loss(image, mask, weight)
    return BCEDiceLoss()(network(image), mask, weight)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def batch() -> tuple[Tensor, Tensor]:
    """Return two images (2, 3, 64, 64) with bright squares, and the mask (2, 64, 64) of the squares."""
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, 8:24, 8:24] = mask[0, 40:56, 30:50] = mask[1, 20:44, 20:44] = 1
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return mask[:, None] * 2.0 + 0.3 * noise, mask


@pytest.mark.parametrize("name", [*REGISTRY, *OTHERS])
@pytest.mark.parametrize(("bands", "classes", "height", "width"), [(3, 4, 45, 71), (32, 2, 7, 33), (1, 1, 1, 5)])
def test_logits_of_any_bands_and_size(name: str, bands: int, classes: int, height: int, width: int) -> None:
    network = small(name, bands, classes).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, bands, height, width))
    assert logits.shape == (2, classes, height, width)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", REGISTRY)
def test_every_parameter_learns_and_steps_lower_the_loss(name: str) -> None:
    network = small(name, 3, 1).train()
    image, mask = batch()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for step in range(3):
        # Mask R-CNN samples anchors and proposals, and dropout samples channels.
        torch.manual_seed(1)
        loss = loss_of(network, image, mask)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
            assert not still
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", REGISTRY)
def test_same_seed_same_output(name: str) -> None:
    one, other = small(name, 3, 1).eval(), small(name, 3, 1).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(one(image), other(image))
        torch.manual_seed(1)
        another = build(settings_of(name), 3, 1).eval()
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), another.parameters(), strict=True))


@pytest.mark.parametrize("name", REGISTRY)
def test_parameters_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        assert parameters(build({"network": name, "options": {"size": "paper"}}, 3, 1)) == pytest.approx(
            REGISTRY[name].paper_parameters, rel=0.03
        )


def test_default_widths_have_the_published_parameters() -> None:
    with torch.device("meta"):
        built = {name: parameters(build({"network": name}, 3, 1)) for name in REGISTRY}
        fcn = importlib.import_module("torchvision").models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=1, aux_loss=False
        )
    assert built["fcn"] == parameters(fcn)
    # Huang et al. 2020, table 1, in millions.
    assert round(built["unet3plus"] / 1e6, 2) == 26.97
    # Of one band, as BasicIRSTD counts it, in millions.
    with torch.device("meta"):
        assert round(parameters(build({"network": "acm"}, 1, 1)) / 1e6, 3) == 0.398


def test_plain_unet_is_deepskip_without_deep_skips() -> None:
    """Check that levels 1 to B - 2 have two branches in place of B - u + 1, and that all else is the same."""
    full, plain = DeepSkipUNet(3, 1), build({"network": "plain_unet"}, 3, 1)
    C, B = [8 * 2**u for u in range(5)], 5
    saved = sum(9 * C[u] * sum(C[j] + C[u] for j in range(u + 1, B - 1)) for u in range(B - 1))
    assert parameters(full) - parameters(plain) == saved


def test_instances_are_connected_components() -> None:
    mask = torch.zeros(6, 8, dtype=torch.long)
    mask[0, 0] = mask[1, 1] = 1
    mask[3:5, 2:7] = 1
    mask[3, 7] = 2
    mask[5, 0] = 255
    found = instances_of(mask, 3)
    assert found["boxes"].tolist() == [[0, 0, 2, 2], [2, 3, 7, 5], [7, 3, 8, 4]]
    assert found["labels"].tolist() == [1, 1, 2]
    assert found["masks"].sum((1, 2)).tolist() == [2, 10, 1]
    empty = instances_of(torch.zeros(6, 8), 2)
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 6, 8)


def test_mask_rcnn_without_objects_or_samples() -> None:
    network = small("mask_rcnn", 3, 1)
    image, mask = batch()
    assert torch.isfinite(loss_of(network, image, torch.zeros_like(mask)))
    nothing = loss_of(network, image, mask, torch.zeros(2))
    nothing.backward()
    assert nothing.item() == 0
    torch.manual_seed(1)
    alone = loss_of(network, image[1:], mask[1:])
    torch.manual_seed(1)
    torch.testing.assert_close(loss_of(network, image, mask, torch.tensor([0.0, 1.0])), alone)


def test_mask_rcnn_under_autocast_keeps_boxes_and_numbers_of_objects() -> None:
    network = small("mask_rcnn", 3, 1)
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    # There are 400 objects. bfloat16 cannot represent 257, nor 129.5 as a position.
    target = torch.zeros(1, 160, 160, dtype=torch.long)
    target[0].view(20, 8, 20, 8)[:, 2:5, :, 2:5] = 1
    proposals: list[Tensor] = []
    network.detector.rpn.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(network, image, target).backward()
    assert all(boxes.dtype == torch.float32 for boxes in proposals)
    assert (torch.cat(proposals) != torch.cat(proposals).bfloat16()).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_mask_rcnn_sees_images_in_their_size_when_it_trains_and_when_it_predicts() -> None:
    network = small("mask_rcnn", 3, 1)
    seen = []
    network.detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.randn(2, 3, 64, 96)
    network.training_loss(image, torch.ones(2, 64, 96, dtype=torch.long))
    assert network.eval()(image).shape == (2, 1, 64, 96)
    for batch in seen:
        torch.testing.assert_close(batch, image, rtol=0, atol=0)
    assert len(seen) == 2


def test_mask_rcnn_logits_are_of_scores_times_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small("mask_rcnn", 1, 3)
    masks = torch.zeros(3, 1, 2, 4)
    masks[0, 0, 0, :2], masks[1, 0, 0, 1:3], masks[2, 0, :, 2] = 0.6, 0.9, 0.95
    found = {"labels": torch.tensor([1, 1, 2]), "masks": masks, "scores": torch.tensor([0.9, 0.7, 0.8])}
    monkeypatch.setattr(network.detector, "forward", lambda images: [found])
    logits = network(torch.zeros(1, 1, 2, 4))
    assert logits.argmax(1).tolist() == [[[1, 1, 2, 0], [0, 0, 2, 0]]]
    torch.testing.assert_close(logits[0, 1, 0, :3].sigmoid(), torch.tensor([0.54, 0.63, 0.63]))


def test_h_dense_unets_volume_stays_in_single_precision_on_cpus() -> None:
    network = small("h_dense_unet", 3, 1)
    seen: list[tuple[str, torch.dtype, torch.dtype]] = []
    for module in network.network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append((type(module).__name__, inputs[0].dtype, output.dtype))
            )
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(1, 3, 32, 32)).float().sum().backward()
    assert {kind for kind, *_ in seen} == {"Conv2d", "Conv3d"}
    assert all(dtypes == [torch.float32] * 2 for kind, *dtypes in seen if kind == "Conv3d")
    # The layers around it use bfloat16, as requested.
    assert any(output == torch.bfloat16 for kind, _, output in seen if kind == "Conv2d")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_h_dense_unet_joins_neighbouring_bands() -> None:
    """Check that the order of the bands matters only to the 3-D network."""
    network = small("h_dense_unet", 6, 1).eval().network
    assert isinstance(network, HDenseUNet)
    x = torch.randn(1, 6, 32, 32)
    volume = torch.cat([x[:, None], torch.zeros(1, 1, 6, 32, 32)], 1)
    with torch.inference_mode():
        one, other = (network.volume(v).mean(2) for v in (volume, volume[:, :, [0, 3, 1, 4, 2, 5]]))
    assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("name", ["pspnet", "smp:PSPNet:resnet18"])
def test_pooling_in_an_exportable_form_is_pytorchs(name: str) -> None:
    for cells, height, width in ((2, 7, 10), (3, 4, 4), (6, 13, 6), (6, 2, 3)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(CellMeans(cells)(x), nn.functional.adaptive_avg_pool2d(x, cells))
    network = build({"network": name}, 3, 1)
    pools = [m for m in network.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    assert all(pool.output_size in (1, (1, 1)) for pool in pools)
    assert [m.cells for m in network.modules() if isinstance(m, CellMeans)] == [2, 3, 6]


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", [*(name for name in REGISTRY if name != "mask_rcnn"), "smp:Unet:resnet18"])
def test_heads_start_near_a_rare_foreground(name: str, classes: int) -> None:
    network = small(name, 2, classes)
    heads = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d) and m.out_channels == classes]
    expected = math.log(0.1 / 0.9)
    assert heads[-1].bias is not None
    assert heads[-1].bias.tolist() == pytest.approx([expected] if classes == 1 else [0, *[expected] * (classes - 1)])


@pytest.mark.parametrize("name", ["unet", "fcn"])
def test_enlarged_images(name: str) -> None:
    network = small(name, 3, 2).eval()
    torch.manual_seed(0)
    twice = build(settings_of(name) | {"enlarge": 2}, 3, 2).eval()
    x = torch.randn(1, 3, 24, 40)
    with torch.inference_mode():
        large = network(nn.functional.interpolate(x, scale_factor=2, mode="bilinear"))
        torch.testing.assert_close(twice(x), nn.functional.avg_pool2d(large, 2))
    assert twice.enlarge == 2


def test_a_package_that_is_installed_adds_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package.py").write_text(
        "from torch import nn\n"
        "def build(in_channels, num_classes, *, kernel=1):\n"
        "    return nn.Conv2d(in_channels, num_classes, kernel, padding=kernel // 2)\n"
    )
    info = tmp_path / "some_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_package\nVersion: 1\n")
    # An installed package cannot replace one of our names.
    points = "[deepskip.networks]\nlinear = some_package:build\nunet = some_package:build\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(installed()) == {"linear"}
    network = build({"network": "linear", "options": {"kernel": 3}}, 4, 2)
    assert network(torch.zeros(1, 4, 5, 6)).shape == (1, 2, 5, 6)
    check_output(outline({"network": "linear"}, 4, 2), "", 4, 2)
    # What it returns is checked before a training: here logits of half the size, or of a class too many.
    for argument, wrong in (("stride=2, padding=", "1 x 2 x 64 x 64"), ("padding=", "1 x 3 x 128 x 128")):
        text = (tmp_path / "some_package.py").read_text().replace("padding=", argument)
        text = text.replace("num_classes, kernel", "num_classes + 1, kernel") if argument == "padding=" else text
        (tmp_path / f"other_{len(argument)}.py").write_text(text)
        points += f"other{len(argument)} = other_{len(argument)}:build\n"
        (info / "entry_points.txt").write_text(points)
        with pytest.raises(ValueError, match=rf"must return logits of 1 x 2 x 128 x 128 .*, and returns {wrong}"):
            check_output(outline({"network": f"other{len(argument)}"}, 4, 2), "", 4, 2)
    with pytest.raises(ValueError, match="linear does not take that"):
        build({"network": "linear", "options": {"width": 3}}, 4, 2)


def test_a_checkpoint_from_before_there_were_networks_is_deepskips() -> None:
    old = {"base_channels": 4, "levels": 3, "in_channels": None, "num_classes": None}
    assert isinstance(build(old, 2, 1), DeepSkipUNet)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "unett"}, r"model.network is 'unett' \(did you mean unet"),
        # A name is never an import path.
        ({"network": "os.path:join"}, "model.network is 'os.path:join'; it must be one of deepskip, plain_unet, unet"),
        ({"network": "smp:Unet"}, "must be smp:ARCH:ENCODER"),
        # timm would download these.
        ({"network": "smp:Unet:tu-hf-hub:timm/resnet18"}, "must be smp:ARCH:ENCODER"),
        # The library passes this option to timm. It could name a file with a pickle, or be silently ignored.
        (
            {"network": "smp:Unet:tu-resnet18", "options": {"checkpoint_path": "x.pth"}},
            "model.options has checkpoint_path",
        ),
        (
            {"network": "smp:Unet:resnet18", "options": {"decoder_chanels": [8]}},
            "has decoder_chanels; smp:Unet has .*decoder",
        ),
        ({"network": "smp:Unet:resnet18", "options": {"encoder_depth": 9}}, "cannot be built"),
        ({"network": "smp:DPT:resnet18"}, "cannot be built"),
        *(
            ({"network": name, "options": {"backbone": "hf-hub:somebody/model"}}, "must be a ResNet in timm")
            for name in ("fcn", "pspnet", "mask_rcnn")
        ),
        ({"network": "smp:Unett:resnet18"}, r"no architecture 'unett' \(did you mean unet"),
        ({"network": "smp:Unet:resnet19"}, r"no encoder 'resnet19' \(did you mean resnet18"),
        (
            {"network": "smp:Unet:resnet18", "options": {"depth": 2}},
            "model.options has depth; smp:Unet has decoder_attention",
        ),
        (
            {"network": "smp:Unet:resnet18", "options": {"encoder_weights": "imagenet"}},
            "model.options has encoder_weights",
        ),
        ({"options": {"size": "paper"}}, "deepskip has model.base_channels, model.levels"),
        ({"network": "fcn", "base_channels": 16}, "model.base_channels is for DeepSkip"),
        ({"network": "fcn", "options": {"size": "huge"}}, "model.options.size is 'huge'"),
        ({"network": "unet3plus", "options": {"width": 3}}, "'width'; unet3plus has size, base_channels"),
        ({"network": "unet3plus", "options": {"base_channels": 0}}, "base_channels is 0; it must be a whole number"),
        ({"network": "fcn", "options": {"channels": [8, 8]}}, r"channels is \[8, 8\]; it must be 4 whole numbers"),
        ({"network": "fcn", "options": {"backbone": 18}}, "backbone is 18; it must be a ResNet"),
        ({"network": "mask_rcnn", "enlarge": 2}, "model.enlarge is 2; mask_rcnn computes no logits while it trains"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(settings, 3, 1)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ImportError, match=r"unet needs a package.*pip install '\.\[networks\]'"):
        build({"network": "unet"}, 3, 1)
