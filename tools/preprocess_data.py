"""Text to .bin/.idx: the command `crnet preprocess` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("preprocess", __file__)

if __name__ == "__main__":
    main.start()
