import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepskip import BCEDiceLoss, DeepSkipUNet
from deepskip.networks import RIVALS, build, training_loss
from deepskip.networks.h_dense_unet import HDenseUNet
from deepskip.networks.mask_rcnn import instances_of
from tests.deepskip.networks.small import SMALL


def small(name: str, in_channels: int, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return build(name, in_channels, num_classes, "paper", **SMALL[name])


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def batch() -> tuple[Tensor, Tensor]:
    """Two images with bright squares, which the mask marks."""
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, 8:24, 8:24] = mask[0, 40:56, 30:50] = mask[1, 20:44, 20:44] = 1
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return mask[:, None] * 2.0 + 0.3 * noise, mask


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(
    ("bands", "classes", "height", "width"), [(1, 1, 64, 64), (3, 4, 45, 71), (32, 2, 7, 33), (2, 1, 1, 5)]
)
def test_logits_of_any_bands_and_size(name: str, bands: int, classes: int, height: int, width: int) -> None:
    network = small(name, bands, classes).eval()
    with torch.inference_mode():
        logits = network(torch.randn(2, bands, height, width))
    assert logits.shape == (2, classes, height, width)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", RIVALS)
def test_every_parameter_learns_and_steps_lower_the_loss(name: str) -> None:
    network = small(name, 3, 1).train()
    image, mask = batch()
    criterion = BCEDiceLoss()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for step in range(3):
        # Mask R-CNN samples anchors and proposals, dropout samples channels
        torch.manual_seed(1)
        loss = training_loss(network, criterion, image, mask)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
            assert not still
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", RIVALS)
def test_same_seed_same_output(name: str) -> None:
    one, other = small(name, 3, 1).eval(), small(name, 3, 1).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(one(image), other(image))
        torch.manual_seed(1)
        another = build(name, 3, 1, "paper", **SMALL[name]).eval()
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), another.parameters(), strict=True))


@pytest.mark.parametrize("name", RIVALS)
def test_parameters_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        assert parameters(build(name, 3, 1, "paper")) == pytest.approx(RIVALS[name].paper_parameters, rel=0.03)


def test_default_widths_have_the_published_parameters() -> None:
    with torch.device("meta"):
        built = {name: parameters(build(name, 3, 1)) for name in RIVALS}
        fcn = importlib.import_module("torchvision").models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=1, aux_loss=False
        )
    assert built["fcn"] == parameters(fcn)
    # Huang et al. 2020, table 1, in millions
    assert round(built["unet3plus"] / 1e6, 2) == 26.97


def test_plain_unet_is_deepskip_without_deep_skips() -> None:
    """At levels 1 to B - 2 there are two branches in place of B - u + 1; nothing else is left out."""
    full, plain = DeepSkipUNet(3, 1), build("plain_unet", 3, 1, "paper")
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
    assert torch.isfinite(training_loss(network, BCEDiceLoss(), image, torch.zeros_like(mask)))
    nothing = training_loss(network, BCEDiceLoss(), image, mask, torch.zeros(2))
    nothing.backward()
    assert nothing.item() == 0
    torch.manual_seed(1)
    alone = training_loss(network, BCEDiceLoss(), image[1:], mask[1:])
    torch.manual_seed(1)
    torch.testing.assert_close(training_loss(network, BCEDiceLoss(), image, mask, torch.tensor([0.0, 1.0])), alone)


def test_mask_rcnn_under_autocast_keeps_boxes_and_numbers_of_objects() -> None:
    network = small("mask_rcnn", 3, 1)
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    # 400 objects: bfloat16 has no 257, and 129.5 is not a place in it
    target = torch.zeros(1, 160, 160, dtype=torch.long)
    target[0].view(20, 8, 20, 8)[:, 2:5, :, 2:5] = 1
    proposals: list[Tensor] = []
    network.detector.rpn.register_forward_hook(lambda module, inputs, output: proposals.extend(output[0]))
    with torch.autocast("cpu", torch.bfloat16):
        training_loss(network, None, image, target).backward()
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
    # what lies around it is in bfloat16 as asked for
    assert any(output == torch.bfloat16 for kind, _, output in seen if kind == "Conv2d")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_h_dense_unet_joins_neighbouring_bands() -> None:
    """The order of the bands matters to the 3-D network alone."""
    network = small("h_dense_unet", 6, 1).eval().network
    assert isinstance(network, HDenseUNet)
    x = torch.randn(1, 6, 32, 32)
    volume = torch.cat([x[:, None], torch.zeros(1, 1, 6, 32, 32)], 1)
    with torch.inference_mode():
        one, other = (network.volume(v).mean(2) for v in (volume, volume[:, :, [0, 3, 1, 4, 2, 5]]))
    assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "segnet"}, "the network is 'segnet'; it must be one of plain_unet, unet, fcn"),
        ({"name": "fcn", "size": "huge"}, "size is 'huge'"),
        ({"name": "fcn", "in_channels": 0}, "in_channels is 0"),
        ({"name": "unet3plus", "width": 3}, "unet3plus has no width 'width'; it has base_channels"),
        ({"name": "unet3plus", "base_channels": 0}, "unet3plus's base_channels is 0; it must be a whole number"),
        ({"name": "fcn", "channels": (8, 8)}, r"fcn's channels is \(8, 8\); it must be 4 whole numbers"),
        ({"name": "fcn", "backbone": 18}, "fcn's backbone is 18; it must be a name"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{"in_channels": 3, "num_classes": 1} | arguments)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ImportError, match=r"unet needs a package.*pip install \.\[baselines\]"):
        build("unet", 3, 1)
