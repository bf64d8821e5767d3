#!/usr/bin/env python3
"""Pre-train CR-Net: the command `crnet train` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("train", __file__)

if __name__ == "__main__":
    main.start()
