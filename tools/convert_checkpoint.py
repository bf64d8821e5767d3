"""Checkpoints to Hugging Face and back: the command `crnet convert` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("convert", __file__)

if __name__ == "__main__":
    main.start()
