"""How many positions a filter or pooling window has along an image."""


def output_size(
    size: int, kernel_size: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Rows (or columns) of output; less than 1 where the window does not fit into the padded image.

    With `ceil_mode` a last window counts that starts inside the image or its left padding and ends beyond the right.
    """
    rest = size + 2 * padding - dilation * (kernel_size - 1) - 1 + (stride - 1 if ceil_mode else 0)
    count = rest // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count
