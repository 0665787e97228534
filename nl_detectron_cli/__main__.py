"""``python -m nl_detectron_cli`` is ``nl-detectron``."""

from nl_detectron_cli import main

if __name__ == "__main__":
    main()
