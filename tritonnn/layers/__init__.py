"""One file a layer: the torch.nn class with its forward on a Triton kernel."""
