"""One rank of a world, counted: the command `crnet simulate` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("simulate", __file__)

if __name__ == "__main__":
    main.start()
