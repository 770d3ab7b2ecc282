"""One line for a whole prediction: over itself on a terminal, now and then a new one elsewhere."""

import sys
import time

# between lines where they cannot overwrite each other, and on a terminal
QUIET_SECONDS, LIVE_SECONDS = 10.0, 0.2


class Progress:
    """Counts images, and shares of large ones, and says how many there are in a second and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.pixels = total, 0, 0
        # of the large image at hand
        self.share, self.share_pixels = 0.0, 0
        self.started = time.monotonic()
        self.live = sys.stdout.isatty()
        self.last = self.started if not self.live else 0.0

    def count(self, pixels: int) -> None:
        """Takes note of a finished image."""
        self.done += 1
        self.pixels += pixels
        self.share, self.share_pixels = 0.0, 0
        self._show()

    def part(self, share: float, pixels: int) -> None:
        """Takes note of how much of the image at hand is done, 0 to 1, and in pixels."""
        self.share, self.share_pixels = share, pixels
        self._show()

    def line(self) -> str:
        """Puts it into words."""
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
        """Ends the line."""
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
