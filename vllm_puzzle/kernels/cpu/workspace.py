"""The memory for what a call computes on the way to its output."""

import ctypes
import threading

import torch

from .library import CALL_LAYOUT, CODES_LAYOUT

_CACHE_LINE = 64


class Workspace:
    """The one buffer that all layers of the process share, since they run one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.address = 0
        self.num_bytes = 0
        self.call = ctypes.create_string_buffer(CALL_LAYOUT.size + CODES_LAYOUT.size)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def release(self) -> None:
        """Gives the memory back; the next call takes what it needs."""
        self.address = self.num_bytes = 0
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def grow(self, num_bytes: int) -> None:
        """Makes room for `num_bytes`, where there is less; the lock is the caller's to hold."""
        if num_bytes > self.num_bytes:
            # The old one goes first: both at once would be a peak that nobody asked for. Its size goes with it, since
            # there may be no memory for the new one.
            self.release()
            self._buffer = torch.empty(num_bytes + _CACHE_LINE, dtype=torch.uint8)
            self.address = -(-self._buffer.data_ptr() // _CACHE_LINE) * _CACHE_LINE
            self.num_bytes = num_bytes


WORKSPACE = Workspace()
