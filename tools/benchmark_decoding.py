"""Measure decoding: the command `crnet benchmark-decoding` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("benchmark-decoding", __file__)

if __name__ == "__main__":
    main.start()
