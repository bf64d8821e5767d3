"""Continue prompts: the command `crnet generate` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("generate", __file__)

if __name__ == "__main__":
    main.start()
