import numpy as np
import pytest
import torch
from skimage.exposure import adjust_gamma, rescale_intensity

from deepskip.augment import augment, draw, loader_entries, pack, unpack
from deepskip.config import AugmentConfig

STILL = {"flip": False, "rotate90": False}
N, H = 64, 9


def batch(bands: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(N, bands, H, H, generator=generator)
    return image, torch.randint(0, 3, (N, H, H), generator=generator)


def test_flips_and_quarter_turns_are_the_eight_symmetries_exactly() -> None:
    image, mask = batch(5)
    config = AugmentConfig()
    changed, changed_mask = augment(config, draw(config, 0, [0] * N, list(range(N)), 5), image, mask, 255)
    seen = set()
    for i in range(N):
        for k in range(8):
            flipped = image[i].flip(2) if k >= 4 else image[i]
            flipped_mask = mask[i].flip(1) if k >= 4 else mask[i]
            if torch.equal(changed[i], torch.rot90(flipped, k % 4, (1, 2))):
                # The mask was changed in the same way.
                assert torch.equal(changed_mask[i], torch.rot90(flipped_mask, k % 4, (0, 1)))
                seen.add(k)
                break
        else:
            raise AssertionError(f"sample {i} was changed by something else")
    assert seen == set(range(8))


def test_a_function_of_seed_epoch_and_sample_alone() -> None:
    image, mask = batch(3)
    config = AugmentConfig(rotate=20, scale=0.2, brightness=0.2, contrast=0.2, band_shift=0.1, noise=0.1)
    whole = augment(config, draw(config, 7, [2] * N, list(range(N)), 3), image, mask, 255)
    part = augment(config, draw(config, 7, [2] * 3, [5, 9, 60], 3), image[[5, 9, 60]], mask[[5, 9, 60]], 255)
    torch.testing.assert_close(part[0], whole[0][[5, 9, 60]])
    assert torch.equal(part[1], whole[1][[5, 9, 60]])
    other = augment(config, draw(config, 7, [3] * N, list(range(N)), 3), image, mask, 255)
    assert not torch.allclose(other[0], whole[0])


def test_what_turns_in_from_outside_is_ignored() -> None:
    config = AugmentConfig(**STILL, rotate=45)
    ones = torch.ones(N, 1, 31, 31)
    image, mask = augment(config, draw(config, 0, [0] * N, list(range(N)), 1), ones, torch.ones(N, 31, 31).long(), 255)
    assert set(mask.unique().tolist()) == {1, 255}
    # The middle never leaves the frame.
    assert (mask[:, 10:21, 10:21] == 1).all()
    torch.testing.assert_close(image, ones)


def test_intensity_changes_by_hand() -> None:
    image, mask = batch(4)
    config = AugmentConfig(**STILL, brightness=0.3, contrast=0.4, band_shift=0.2)
    changed, changed_mask = augment(config, draw(config, 0, [0] * N, list(range(N)), 4), image, mask, 255)
    assert torch.equal(changed_mask, mask)
    for i in range(N):
        for c in range(4):
            gain, shift = np.polyfit(image[i, c].flatten().numpy(), changed[i, c].flatten().numpy(), 1)
            assert 0.6 - 1e-4 <= gain <= 1.4 + 1e-4
            assert abs(shift) <= 0.5 + 1e-4


def test_gamma_against_scikit_image() -> None:
    image, mask = batch(2)
    # A band without contrast has no range to scale to.
    image[3, 1] = 0.25
    config = AugmentConfig(**STILL, gamma=0.5)
    draws = draw(config, 0, [0] * N, list(range(N)), 2)
    changed, _ = augment(config, draws, image, mask, 255)
    assert draws.power.min() >= 1 / 1.5
    assert draws.power.max() <= 1.5
    assert draws.power.std() > 0.1
    for i in range(N):
        for c in range(2):
            band = image[i, c].double().numpy()
            scaled = rescale_intensity(band, out_range=(0.0, 1.0)) if band.std() else np.zeros_like(band)
            expected = adjust_gamma(scaled, draws.power[i, 0].item()) * np.ptp(band) + band.min()
            np.testing.assert_allclose(changed[i, c], expected, atol=1e-5)
    # Without gamma, all other numbers are the same.
    still = draw(AugmentConfig(**STILL), 0, [0] * N, list(range(N)), 2)
    assert torch.equal(still.shift, draws.shift)
    assert still.noise_seed == draws.noise_seed


@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (6, 11)])
@pytest.mark.parametrize("last", [True, False])
def test_flips_and_quarter_turns_are_numpys_bit_for_bit(labels: torch.dtype, size: tuple[int, int], last: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(N, 3, *size, generator=generator)
    image = image.contiguous(memory_format=torch.channels_last) if last else image
    mask = torch.randint(0, 256, (N, *size), generator=generator).to(labels)
    config = AugmentConfig(rotate90=size[0] == size[1])
    draws = draw(config, 3, [1] * N, list(range(N)), 3)
    changed, changed_mask = augment(config, draws, image, mask, 255)
    assert (changed.dtype, changed_mask.dtype) == (torch.float32, labels)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    maps = draws.matrix.round().int().numpy()
    for i in range(N):
        # The expected image follows from what the map does to the axes (x, y), with y down.
        for before, after in ((image[i].numpy(), changed[i].numpy()), (mask[i].numpy(), changed_mask[i].numpy())):
            expected = before
            if abs(maps[i, 0, 0]):
                expected = np.flip(expected, -1) if maps[i, 0, 0] < 0 else expected
                expected = np.flip(expected, -2) if maps[i, 1, 1] < 0 else expected
            else:
                # If x becomes y and y becomes x, it is a quarter turn and then a mirror of either axis.
                expected = np.flip(np.rot90(expected, 1, (-2, -1)), -2)
                expected = np.flip(expected, -1) if maps[i, 0, 1] < 0 else expected
                expected = np.flip(expected, -2) if maps[i, 1, 0] < 0 else expected
            assert after.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_a_symmetry_is_what_the_warp_makes_of_its_map() -> None:
    # An angle too small to move a nearest neighbour keeps the same draws, but resamples.
    image, mask = batch(2)
    still, turned = AugmentConfig(), AugmentConfig(rotate=1e-6)
    ids = list(range(N))
    exact, exact_mask = augment(still, draw(still, 0, [0] * N, ids, 2), image, mask, 255)
    warped, warped_mask = augment(turned, draw(turned, 0, [0] * N, ids, 2), image, mask, 255)
    torch.testing.assert_close(exact, warped, rtol=0, atol=1e-4)
    assert torch.equal(exact_mask, warped_mask)


def test_draws_travel_in_a_batch_bit_for_bit() -> None:
    config = AugmentConfig(rotate=20, scale=0.2, brightness=0.2, contrast=0.2, band_shift=0.1, noise=0.1)
    epochs, ids = [3] * N, list(range(N))
    drawn = draw(config, 7, epochs, ids, 5)
    entries = loader_entries(config, 7, 5, epochs, ids)
    assert entries["draws"].shape == (N, 7 + 5)
    assert torch.equal(entries["draws"], pack(drawn))
    come = unpack(entries["draws"], entries["noise_seed"])
    for name in ("matrix", "gain", "power", "shift", "symmetry"):
        one, other = getattr(come, name), getattr(drawn, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert come.noise_seed == drawn.noise_seed
