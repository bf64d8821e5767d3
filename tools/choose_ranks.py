"""Choose ranks by spectra, under a budget: the command `crnet ranks` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("ranks", __file__)

if __name__ == "__main__":
    main.start()
