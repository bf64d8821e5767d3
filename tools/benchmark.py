"""Measure training steps: the command `crnet benchmark` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("benchmark", __file__)

if __name__ == "__main__":
    main.start()
