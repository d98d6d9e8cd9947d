"""Where the rows of x lie in a box of shared memory: for 3x3 filters of stride 1 or 2."""

from triton.experimental import gluon


@gluon.constexpr_function
def box_rows(tile_p: int, stride: int) -> int:
    """The rows of x in a box for tile_p rows of y."""
    return stride * tile_p + edge_rows(stride)


@gluon.constexpr_function
def edge_rows(stride: int) -> int:
    """Those of them that are loaded apart, as the sides of what TMA loads are powers of 2."""
    return 3 - stride


@gluon.constexpr_function
def first_row(r: int, tile_p: int, stride: int) -> int:
    """Where in a box the tile_p rows under the filter's row r begin."""
    return r if stride == 1 else (0, tile_p + 1, 1)[r]


@gluon.constexpr_function
def part(i: int, tile_p: int, stride: int) -> tuple[int, int]:
    """The first and the number of the rows that are a box's part i of three: two alike, powers of 2, and the edge."""
    if i == 2:
        return tile_p, edge_rows(stride)
    rows = stride * tile_p // 2
    return (i * rows if stride == 1 else i * (tile_p + 1)), rows
