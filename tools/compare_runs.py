"""Final losses side by side: the command `crnet compare` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("compare", __file__)

if __name__ == "__main__":
    main.start()
