"""`python -m bln_train`, also under torchrun."""

from bln_train.cli.app import main

if __name__ == "__main__":
    main()
