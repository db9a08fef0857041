"""Taking a byte string apart from its front."""

from __future__ import annotations

from icmlora.errors import CodeError


class Reader:
    """Bytes that are taken in order; what is missing or left over is an error."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            CodeError: There are fewer.
        """
        end = self._at + size
        if end > len(self._data):
            raise CodeError(f"the code ends after {len(self._data)} bytes; {end} were expected")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self, size: int) -> int:
        """Return the next `size` bytes as one integer, lowest byte first."""
        return int.from_bytes(self.take(size), "little")

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            CodeError: Something is.
        """
        if self._at != len(self._data):
            raise CodeError(f"the code has {len(self._data) - self._at} bytes too many")
