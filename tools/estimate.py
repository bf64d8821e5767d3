"""Memory and time before a run: the command `crnet estimate` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("estimate", __file__)

if __name__ == "__main__":
    main.start()
