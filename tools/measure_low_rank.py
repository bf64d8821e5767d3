"""What the previous layer's outputs say of a layer's: the command `crnet observe` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("observe", __file__)

if __name__ == "__main__":
    main.start()
