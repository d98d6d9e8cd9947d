"""Side-by-side measurements against PyTorch and peers: `python benchmarks/compare.py`."""
