"""How much memory each way of computing attention needs: see ``contract.Workspace``. Numbers alone, without torch."""

from __future__ import annotations

SAMPLER_ROWS = 16  # rows whose logits plain torch sorts together
TILE = 192  # queries of a CPU tile, at most
UNSPLIT = 2048  # rows of a slot that a GPU's decoding reads in one piece
SPLIT = 512  # rows of a piece of a larger slot
FLOAT32 = 4  # bytes
WINDOW_DIMS = 2  # of the state of a convolution
MIXER_CHUNK = 64  # tokens of a sequence that a mixer computes together


def whole_matrices(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Plain torch: a chunk's whole score matrices in the model's type and float32, and copies of keys and values."""
    prefill = heads * chunk * rows * (itemsize + 3 * 4) + 2 * heads * rows * head_dim * itemsize
    return max(prefill, _plain_decode(heads, rows, slots, head_dim, itemsize))


def tiles(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Tiled for a CPU: scores and weights of one tile of queries, and copies of keys and values."""
    tile = 4 * heads * min(chunk, TILE) * rows * itemsize
    prefill = tile + (2 * heads * rows + 2 * heads * chunk) * head_dim * itemsize
    return max(prefill, _plain_decode(heads, rows, slots, head_dim, itemsize))


def fused_steps(*, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Fused on a GPU: scores of decoding tokens and results of splits; of a chunk, sums and the survivors' lists."""
    splits = 2 + rows // SPLIT if rows > UNSPLIT else 0
    return max(4 * slots * heads * (rows + splits * (head_dim + 2)), heads * chunk * (3 * 4 + head_dim * itemsize))


def _plain_decode(heads: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Scores and their ranks, and a copy of the keys and values of half the slots."""
    return slots * heads * rows * (itemsize + 5 * 4) + slots // 2 * 2 * heads * rows * head_dim * itemsize


def mixing(shape: tuple[int, ...], *, tokens: int, slots: int, in_place: bool) -> int:
    """About what one function of a mixer holds beside its inputs and states, in float32.

    Args:
        shape: of one sequence's state: [W - 1, C] of a convolution, else [H, A, B].
        tokens: of the step, each in a short segment at worst.
        slots: sequences that decode together.
        in_place: whether states are read and written where they are, token by token. Plain torch gathers the states of
            many sequences, and computes a chunk of each at once.
    """
    if len(shape) == WINDOW_DIMS:
        return 0 if in_place else FLOAT32 * 4 * tokens * shape[1]
    heads, rows, columns = shape
    outputs = 3 * tokens * heads * min(rows, columns)
    if in_place:
        return FLOAT32 * outputs
    chunk = MIXER_CHUNK if rows > 1 else 1  # the state spaces of Mamba-1 are computed token by token
    of_token = heads * (4 * (rows + columns) + 4 * chunk)
    return FLOAT32 * (outputs + 5 * slots * heads * rows * columns + min(tokens, slots * chunk) * of_token)
