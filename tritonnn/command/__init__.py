"""What `python -m tritonnn NETWORK` is made of."""
