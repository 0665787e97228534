"""See :mod:`nl_detectron_cli.overfit`, or ``--help``."""

from nl_detectron_cli.overfit import main

if __name__ == "__main__":
    main()
