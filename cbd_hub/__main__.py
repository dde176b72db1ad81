"""``python -m cbd_hub``: the command line, for launchers that start a module (``accelerate launch -m cbd_hub``)."""

from cbd_hub.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
