"""Count the glue between products: the command `crnet measure-glue` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("measure-glue", __file__)

if __name__ == "__main__":
    main.start()
