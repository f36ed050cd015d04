"""Barriers in shared memory, ``mbarrier``: what threads of two CTAs wait for, phase by phase.

A barrier's phase ends after as many arrivals as it was made for, and after the bytes that were
announced have been stored. Whoever waits names the phase by its parity, 0 at first; waiting for
parity 1 at first passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import tirx as I

from tq_tvm.kernels.device import i32, local, pointer, ptx, remote_address, store, u32

__all__ = [
    "BARRIER_BYTES",
    "Barriers",
    "Turn",
    "arrive_at_peer",
    "publish_barriers",
    "store_to_peer",
]

BARRIER_BYTES = 8
_WORDS = BARRIER_BYTES // 4


class Barriers:
    """``count`` barriers in a buffer of words, from word ``begin`` on, an even one."""

    def __init__(self, words, begin: int, count: int) -> None:
        self._words, self._begin, self.count = words, begin, count

    @property
    def end(self) -> int:
        """The word behind them."""
        return self._begin + _WORDS * self.count

    def _at(self, index):
        return pointer(self._words, self._begin + _WORDS * index)

    def make(self, arrivals: int | Callable[[int], Any]) -> None:
        """One thread makes them, each of so many arrivals."""
        for i in range(self.count):
            count = u32(arrivals) if isinstance(arrivals, int) else arrivals(i)
            ptx("mbarrier.init.shared::cta.b64", self._at(i), T.cast(count, "uint32"))

    def arrive(self, index) -> None:
        """Arrive; what the thread wrote before is seen by whoever waits."""
        state = local(1, "uint64")
        ptx("mbarrier.arrive.release.cta.shared::cta.b64", state[0], self._at(index))

    def expect(self, index, count) -> None:
        """Arrive, and announce bytes."""
        state = local(1, "uint64")
        name = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64"
        ptx(name, state[0], self._at(index), T.cast(count, "uint32"))

    def remote(self, index, rank):
        """The address of the same barrier in another CTA of the cluster."""
        return remote_address(self._at(index), rank)

    def wait(self, index, parity) -> None:
        """Wait for a phase to end."""
        I.evaluate(T.cuda.mbarrier_wait(self._at(index), parity))


def arrive_at_peer(address) -> None:
    """Arrive at a barrier of another CTA, see `Barriers.remote`, behind the thread's reads.

    Not a release to the cluster, for which a thread waits until its writes are seen everywhere:
    1400 of 7000 cycles a tile of ``mla``'s first form, on an H100, and 2400 more for whoever
    acquires them, who empties L1.
    """
    ptx("mbarrier.arrive.shared::cluster.b64", address)


def store_to_peer(address, values: list, barrier) -> None:
    """Store four floats in another CTA; their bytes count towards a barrier there."""
    name = "st_async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
    ptx(name, address, *values, barrier)


def publish_barriers() -> None:
    """The thread that made barriers lets other CTAs see them; a barrier of the cluster follows."""
    ptx("fence.mbarrier_init.release.cluster")


class Turn:
    """Which of ``count`` places is next, and the parity of its barrier: a ring's registers."""

    def __init__(self, count: int, parity: int) -> None:
        self._count = count
        self._index, self._parity = local(1, "int32"), local(1, "int32")
        store(self._index, i32(0))
        store(self._parity, i32(parity))

    @property
    def index(self) -> Any:
        """The place."""
        return self._index[0]

    @property
    def parity(self) -> Any:
        """What to wait for."""
        return self._parity[0]

    def advance(self) -> None:
        """The next place."""
        if self._count > 1:
            store(self._index, self._index[0] + 1)
            wrapped = self._index[0] == self._count
            store(self._parity, T.Select(wrapped, 1 - self._parity[0], self._parity[0]))
            store(self._index, T.Select(wrapped, i32(0), self._index[0]))
        else:
            store(self._parity, 1 - self._parity[0])
