"""bln-train: train convolutional networks one image at a time, with the result of the whole batch."""

__version__ = "0.1.0"
