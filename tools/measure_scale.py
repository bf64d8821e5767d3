#!/usr/bin/env python3
"""Count what grows with the number of ranks: the command `crnet measure-scale` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("measure-scale", __file__)

if __name__ == "__main__":
    main.start()
