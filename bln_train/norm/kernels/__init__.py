"""What surrounds a convolution in one pass over its output: in PyTorch, in C and in Triton."""
