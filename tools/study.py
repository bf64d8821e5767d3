"""Train a grid of configurations: the command `crnet study` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("study", __file__)

if __name__ == "__main__":
    main.start()
