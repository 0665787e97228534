"""Run ``nl-detectron`` as ``python -m nl_detectron_cli``."""

from nl_detectron_cli import main

if __name__ == "__main__":
    main()
