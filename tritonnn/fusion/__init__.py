"""`fuse`: traces a network, makes its graph functional, rewrites it into fused layers, and replays CUDA graphs."""
