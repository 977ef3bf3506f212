"""Convolution, batchless norm, residual sum and activation as one layer, found in a network by torch.fx."""
