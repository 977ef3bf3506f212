"""BatchNorm to batchless norms and back; norms folded into convolutions for inference."""
