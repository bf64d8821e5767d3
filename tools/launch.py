#!/usr/bin/env python3
"""Start ranks: the command `crnet launch` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("launch", __file__)

if __name__ == "__main__":
    main.start()
