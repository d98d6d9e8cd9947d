"""`tune`: times forms and configurations of convolution on this GPU, and keeps the fastest right ones."""
