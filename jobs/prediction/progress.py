"""Print the progress of a prediction: one line that is updated on a terminal, a new line every 10 seconds elsewhere."""

import sys
import time

# The seconds between updates: in a file, where each is a new line, and on a terminal.
QUIET_SECONDS, LIVE_SECONDS = 10.0, 0.2


class Progress:
    """Count finished images and parts of large ones, and print the throughput and the remaining time.

    Args:
        total: Number of images.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.pixels = total, 0, 0
        # The finished part of the current large image.
        self.share, self.share_pixels = 0.0, 0
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()
        self.last = self.started if not self.live else 0.0

    def count(self, pixels: int) -> None:
        """Record a finished image and its number of pixels."""
        self.done += 1
        self.pixels += pixels
        self.share, self.share_pixels = 0.0, 0
        self._show()

    def part(self, share: float, pixels: int) -> None:
        """Record how much of the current image is done.

        Args:
            share: Finished share of the image, 0 to 1.
            pixels: Finished pixels.
        """
        self.share, self.share_pixels = share, pixels
        self._show()

    def line(self) -> str:
        """Return the text of the progress line."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        done = self.done + self.share
        text = f"images {done:.2f}" if self.share else f"images {self.done}"
        pixels = self.pixels + self.share_pixels
        text += f"/{self.total}  {self.done / seconds:.1f} images/s  {pixels / seconds / 1e6:.2f} MPixel/s"
        if done:
            left = round(seconds / done * (self.total - done))
            text += f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return text

    def end(self) -> None:
        """Clear the progress line on a terminal."""
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self.last < (LIVE_SECONDS if self.live else QUIET_SECONDS):
            return
        self.last = now
        if self.live:
            print(f"\r{self.line()}\x1b[K", end="", flush=True)
        else:
            print(self.line(), flush=True)
