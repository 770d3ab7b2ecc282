import numpy as np
import torch

from deepskip.augment import augment, draw
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
            if torch.allclose(changed[i], torch.rot90(flipped, k % 4, (1, 2)), atol=1e-4):
                # the mask went the same way
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
    # the middle never leaves the frame
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
