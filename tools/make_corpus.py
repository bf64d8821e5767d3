"""A corpus for trying things out: the command `crnet corpus` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("corpus", __file__)

if __name__ == "__main__":
    main.start()
