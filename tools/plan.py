"""The fastest layout that fits: the command `crnet plan` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("plan", __file__)

if __name__ == "__main__":
    main.start()
