"""A TCP proxy that can be cut and held, in front of a server whose data must survive."""

import asyncio
import threading
from contextlib import suppress


class Proxy:
    """Forward connections on a port of this machine to another port, from a thread of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.loop = asyncio.new_event_loop()
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()
        # Bytes pass while it is set.
        self.open = asyncio.Event()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._call(self._listen())

    def _call(self, action: object) -> None:
        asyncio.run_coroutine_threadsafe(action, self.loop).result(timeout=60)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self.open.set()
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(OSError):
            while data := await reader.read(2**16):
                await self.open.wait()
                writer.write(data)
                await writer.drain()
        self.writers.discard(writer)
        writer.close()

    async def _close(self) -> None:
        if self.server is not None:
            self.server.close()
        for writer in list(self.writers):
            # Without a last word, as when a machine dies.
            writer.transport.abort()

    async def _set(self, passing: bool) -> None:
        (self.open.set if passing else self.open.clear)()

    def cut(self) -> None:
        """Refuse connections, and reset those that exist."""
        self._call(self._close())

    def mend(self) -> None:
        """Accept connections again."""
        self._call(self._listen())

    def hold(self, held: bool) -> None:
        """Stop passing bytes on, or resume."""
        self._call(self._set(not held))
