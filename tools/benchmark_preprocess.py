"""Measure preprocessing: the command `crnet benchmark-preprocess` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("benchmark-preprocess", __file__)

if __name__ == "__main__":
    main.start()
