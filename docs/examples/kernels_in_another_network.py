"""Train somebody else's network in a plain PyTorch loop with DeepSkip's fused BCE + Dice loss."""

import torch
from torch import nn

from deepskip.kernels import bce_dice_sums, loss_of_sums


def main(steps: int = 20) -> float:
    """Train a small network on noise with bright squares; return the last loss."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for step in range(steps):
        target = torch.zeros(4, 64, 64, dtype=torch.uint8, device=device)
        target[:, 8 + step : 14 + step, 20:26] = 1
        image = torch.randn(4, 3, 64, 64, device=device) + 2 * target[:, None]
        # one pass over the logits for the sums, in which several GPUs could be added up here
        sums = bce_dice_sums(network(image), target, alpha=0.8)
        loss, bce, dice = loss_of_sums(sums)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f} = BCE {bce.item():.3f} + Dice {dice.item():.3f}")
    return loss.item()


if __name__ == "__main__":
    main()
