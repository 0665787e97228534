"""See :mod:`nl_detectron_cli.ab`, or ``--help``."""

from nl_detectron_cli.ab import main

if __name__ == "__main__":
    main()
