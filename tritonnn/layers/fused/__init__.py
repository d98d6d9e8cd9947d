"""The layers that `fuse` puts in."""
