"""Where the elements of a matrix lie, as the PTX ISA writes it down, in plain numpy loops."""

from __future__ import annotations

import numpy as np

__all__ = ["a_matrix", "b_matrix", "c_matrix", "square"]


def _positions(lane: int) -> tuple[int, int]:
    """(groupID, threadID_in_group)."""
    return lane >> 2, lane % 4


def a_matrix(elements: np.ndarray) -> np.ndarray:
    """A of m16n8k8 from 4 elements a lane, of m16n8k16 from 8, or of m16n8k32 from 16."""
    count = elements.shape[1]
    matrix = np.zeros((16, 2 * count), elements.dtype)
    for lane in range(32):
        group, thread = _positions(lane)
        for i in range(count):
            if count == 4:
                row = group if i < 2 else group + 8
                column = thread * 2 + (i & 1)
            elif count == 8:
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            else:
                row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
                column = thread * 4 + (i & 3) + (16 if i >= 8 else 0)
            matrix[row, column] = elements[lane, i]
    return matrix


def b_matrix(elements: np.ndarray) -> np.ndarray:
    """B of m16n8k8 from 2 elements a lane, of m16n8k16 from 4, or of m16n8k32 from 8."""
    count = elements.shape[1]
    matrix = np.zeros((4 * count, 8), elements.dtype)
    for lane in range(32):
        group, thread = _positions(lane)
        for i in range(count):
            if count == 2:
                row = thread * 2 + i
            elif count == 4:
                row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            else:
                row = thread * 4 + (i & 3) + (16 if i >= 4 else 0)
            matrix[row, group] = elements[lane, i]
    return matrix


def c_matrix(elements: np.ndarray) -> np.ndarray:
    """C or D, [16, 8], from 4 elements a lane."""
    matrix = np.zeros((16, 8), elements.dtype)
    for lane in range(32):
        group, thread = _positions(lane)
        for i in range(4):
            matrix[group if i < 2 else group + 8, thread * 2 + (i & 1)] = elements[lane, i]
    return matrix


def square(words: np.ndarray) -> np.ndarray:
    """An 8 by 8 matrix of 16-bit elements from a word of each lane."""
    matrix = np.zeros((8, 8), np.uint16)
    for lane in range(32):
        group, thread = _positions(lane)
        matrix[group, 2 * thread] = words[lane] & 0xFFFF
        matrix[group, 2 * thread + 1] = words[lane] >> 16
    return matrix
