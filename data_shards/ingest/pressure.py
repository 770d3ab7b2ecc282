"""Wait for a training that is slower than the source: how many samples of the chain its admission log has not reached."""

from pathlib import Path

from deepskip.data_shards.manifest import Generation
from deepskip.data_shards.sources.split import PackError

ADMISSIONS = "admissions.jsonl"


class Pressure:
    """The distance of a training that follows the chain.

    Args:
        run: Folder of its run, with the admission log: a line for each generation, in their order.
        most: Number of samples that the training may be behind.

    Raises:
        PackError: If there is no such folder.
    """

    def __init__(self, run: Path, most: int) -> None:
        if not run.is_dir():
            raise PackError(f"{run} is not the folder of a run; it is made when a training with data.follow begins")
        self.path, self.most = run / ADMISSIONS, most
        self._read, self._admitted = 0, 0

    def behind(self, chain: list[Generation]) -> int:
        """Return the number of samples in generations that the training has not admitted.

        Args:
            chain: The generations.

        Raises:
            OSError: If the log cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                # The log only grows, except for a last line that a crash left incomplete.
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            text = b""
        whole = text.rfind(b"\n") + 1
        self._read += whole
        self._admitted += text[:whole].count(b"\n")
        return sum(each.samples for each in chain[self._admitted :])

    def is_high(self, chain: list[Generation]) -> bool:
        """Return whether the training is too far behind."""
        return self.behind(chain) > self.most
