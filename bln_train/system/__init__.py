"""What the operating system gives: files, locks, signals, devices, random numbers. Knows nothing of training."""
