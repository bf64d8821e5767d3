"""Import what a run needs: the command `crnet check-imports` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("check-imports", __file__)

if __name__ == "__main__":
    main.start()
