"""Loss and perplexity: the command `crnet evaluate` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("evaluate", __file__)

if __name__ == "__main__":
    main.start()
