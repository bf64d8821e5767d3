"""Count what recomputation keeps: the command `crnet measure-recompute` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("measure-recompute", __file__)

if __name__ == "__main__":
    main.start()
