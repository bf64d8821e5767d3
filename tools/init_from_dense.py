"""Turn a dense model into low_rank or crnet: the command `crnet init` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("init", __file__)

if __name__ == "__main__":
    main.start()
